"""One kernel: a region becomes TIR functions, one a phase, and a C function that runs them.

The TIR functions have plain C signatures,

    k_p0(inputs..., results..., scratch..., int *status, sizes..., zero, begin, end)

and compute rows begin <= row < end of their phase, so any thread pool can share them out. The C
function `k(words, threads)` (see `shim`) takes the addresses and sizes in one array, allocates
scratch memory, and shares the rows of each phase among the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from accel.backends.loops.index import Affine
from accel.backends.loops.phases import Phase, Planner, Reduce, Store, region_symbols
from accel.backends.loops.survey import Survey
from accel.backends.tvm import anchors, dtypes, tir
from accel.backends.tvm.addresses import Sizes
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.flat import FlatNest
from accel.backends.tvm.rows import RowNest
from accel.backends.tvm.updates import UpdatePhase
from accel.ir.module import Region, Value
from accel.ir.types import SUB_BYTE_BITS, Dim, product


@dataclass
class PhaseCode:
    """One TIR function, the number of its rows, and the work in one row.

    `can_fail`: an index is checked at run time.
    """

    name: str
    function: object
    rows: Dim
    cost: Dim
    can_fail: bool = False


@dataclass
class KernelCode:
    """Everything about one kernel but its machine code.

    Attributes:
        scratch: bytes of each scratch buffer.
        inplace: pairs (result, input) where the result may overwrite the input.
        updates: those of them where the result starts as a copy of the input, or is its memory.
    """

    name: str
    inputs: int
    results: int
    symbols: tuple[str, ...]
    phases: list[PhaseCode]
    scratch: list[Dim]
    inplace: list[tuple[int, int]]
    updates: list[tuple[int, int]] = field(default_factory=list)

    @property
    def can_fail(self) -> bool:
        """Whether an index is checked at run time."""
        return any(p.can_fail for p in self.phases)

    @property
    def source(self) -> str:
        """The TIR as TVMScript."""
        return "\n\n".join(_script(p.function) for p in self.phases)


def _script(function: object) -> str:
    lines = str(function.script()).splitlines()  # type: ignore[attr-defined]
    return "\n".join(line for line in lines if not line.startswith("# from tvm")).strip() + "\n"


def generate(name: str, region: Region, kind: str = "") -> KernelCode:
    """Code of a region of primitive ops. Raises BackendError for what has none."""
    planner = Planner(region)
    anchored = anchors.find(region, kind)
    if anchored is not None:
        anchor, op = anchored
        anchor.plan(planner, op)
    else:
        planner.run()
    symbols = region_symbols(region)
    scratch = planner.scratch_values
    phases = [
        _phase(f"{name}_p{number}", phase, planner, region, symbols)
        for number, phase in enumerate(planner.phases)
    ]
    sizes = [_scratch_bytes(v) for v in scratch]
    updates = [
        (phase.result, region.args.index(phase.op.operands[0]))
        for phase in planner.phases
        if isinstance(phase, UpdatePhase) and phase.op is not None
    ]
    pairs = updates or _inplace(planner, region)
    return KernelCode(
        name, len(region.args), len(region.results), symbols, phases, sizes, pairs, updates
    )  # fmt: skip


def _scratch_dtype(value: Value) -> str:
    kind = dtypes.compute(value.dtype)
    return "uint8" if kind == "bool" else kind


def _scratch_bytes(value: Value) -> Dim:
    width = torch.empty(0, dtype=getattr(torch, _scratch_dtype(value))).element_size()
    return product((width, *value.shape))


class _Parameters:
    """Parameters of one function: typed pointers with a flat buffer over each."""

    def __init__(self) -> None:
        self.variables: list[tir.Var] = []
        self.block = tir.Block()

    def pointer(self, name: str, dtype: str, count: tir.Expr) -> tir.Buffer:
        variable = tir.tirx.Var(name, tir.types.PointerType(tir.types.PrimType(dtype)))
        self.variables.append(variable)
        buffer = tir.tirx.decl_buffer((count,), dtype, name.upper(), data=variable)
        self.block.statements.append(tir.tirx.DeclBuffer(buffer, data=variable))
        return buffer


def _phase(
    name: str, phase: Phase, planner: Planner, region: Region, symbols: tuple[str, ...]
) -> PhaseCode:
    sizes = Sizes({s: tir.var(s) for s in symbols})
    parameters = _Parameters()

    def count(value: Value) -> tir.Expr:
        if dtypes.storage(value.dtype) == "uint8":
            return sizes.code(value.type.nbytes())
        return sizes.code(value.type.numel())

    buffers = {
        value: parameters.pointer(f"x{i}", dtypes.storage(value.dtype), count(value))
        for i, value in enumerate(region.args)
    }
    results = [
        parameters.pointer(f"y{i}", dtypes.storage(value.dtype), count(value))
        for i, value in enumerate(region.results)
    ]
    scratch = [
        parameters.pointer(f"t{i}", _scratch_dtype(value), sizes.code(value.type.numel()))
        for i, value in enumerate(planner.scratch_values)
    ]
    status = parameters.pointer("status", "int32", tir.i64(1))
    places = dict(zip(planner.scratch_values, scratch))
    state = {
        region.results[made.result]: results[made.result]
        for made in planner.phases
        if isinstance(made, UpdatePhase)
    }
    reads = buffers | state | {v: places[v] for v in phase.needs}
    emitter = Emitter(planner.indexer, reads, sizes)
    targets = {
        position: (results if store.place.kind == "result" else scratch)[store.place.number]
        for position, store in enumerate(phase.stores)
    }
    begin, end = tir.var("begin"), tir.var("end")
    anchored = anchors.nest_of(phase)
    if anchored is not None:
        nest = anchored(phase, emitter, results[phase.result])
    elif phase.reduces:
        nest = RowNest(phase, emitter, targets)
    else:
        nest = FlatNest(phase, emitter, targets)
    body = nest.emit(begin, end)
    block = parameters.block
    if emitter.failed is not None:
        zero = tir.i64(0)
        block.allocate(emitter.failed)
        block.store(emitter.failed, tir.const(0, "int32"), zero)
        report = tir.Block()
        report.store(status, tir.const(1, "int32"), zero)
        body.branch(tir.ne(tir.load(emitter.failed, zero), tir.const(0, "int32")), report)
    block.statements.extend(body.statements)
    variables = [*parameters.variables, *sizes.symbols.values(), sizes.zero, begin, end]
    function = tir.tirx.PrimFunc(variables, block.statement())
    function = function.with_attr({"global_symbol": name, "tirx.noalias": True})
    return PhaseCode(name, function, nest.rows, nest.cost, emitter.failed is not None)


def _inplace(planner: Planner, region: Region) -> list[tuple[int, int]]:
    """Results that may overwrite an input: every read of it is at the very place of the write.

    Only in kernels of one phase with one loop of stores, so that nothing reads the input later. The
    stores of an element follow one another, each after what it computes, and the code says that no
    pointers alias: so the result must depend on the input, and later stores must not.
    """
    if len(planner.phases) != 1:
        return []
    (phase,) = planner.phases
    if len({store.inner for store in phase.stores}) != 1:
        return []
    by_store = [_argument_reads(planner, [store], ()) for store in phase.stores]
    reads = _argument_reads(planner, phase.stores, phase.reduces)
    pairs: list[tuple[int, int]] = []
    for i, store in enumerate(phase.stores):
        written = planner.indexer.flatten(store.index, store.value.shape)
        for number, arg in enumerate(region.args):
            fits = arg.type.numel() == store.value.type.numel()
            width = dtypes.storage(arg.dtype) == dtypes.storage(store.value.dtype)
            fits = fits and arg.dtype not in SUB_BYTE_BITS
            last = bool(by_store[i][arg]) and not any(later[arg] for later in by_store[i + 1 :])
            last = last and store.place.kind == "result"
            if fits and width and last and reads[arg] == {written}:
                pairs.append((store.place.number, number))
    return pairs


def _argument_reads(
    planner: Planner, stores: Sequence[Store], reduces: Sequence[Reduce]
) -> dict[Value, set[Affine]]:
    """Flat positions at which each argument is read."""
    reads: dict[Value, set[Affine]] = {arg: set() for arg in planner.region.args}
    survey = Survey(planner.indexer, {})
    for store in stores:
        survey.element(store.value, store.index)
    for reduce in reduces:
        survey.element(reduce.op.operands[0], reduce.source)
    for value, index in survey.costly:
        if value in reads:
            reads[value].add(planner.indexer.flatten(index, value.shape))
    return reads
