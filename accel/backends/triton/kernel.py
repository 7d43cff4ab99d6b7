"""One kernel: a region becomes Triton sources, one a phase, each launched once.

Every source is a module with one `@triton.jit` function,

    accel_..._0(x0, x1, t0, y0, s0, status, BLOCK: tl.constexpr)

whose parameters are what it reads (arguments x, scratch t), what it writes (results y, scratch t),
the symbolic sizes, a word that is set if an index is out of range, and block sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sympy

from accel.backends.loops.phases import Phase, Planner, Store, region_symbols
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import size_name
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.maps import MapCode
from accel.backends.triton.program import Program, ProgramWriter
from accel.backends.triton.split import (
    PartialWriter,
    TotalWriter,
    partial_kinds,
    plan_split,
    scratch_bytes,
)
from accel.backends.triton.tiles import MODEL_TILE, KernelTile
from accel.ir.module import Function, Region, Value
from accel.ir.types import SUB_BYTE_BITS, Dim, product

_LARGEST_INT32 = (1 << 31) - (1 << 20)  # tiles may overrun a tensor by their size


@dataclass(frozen=True)
class Slot:
    """A tensor that a launch gets: ("input" | "result" | "scratch", number)."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        """The parameter's name in the source."""
        return {"input": "x", "result": "y", "scratch": "t"}[self.kind] + str(self.number)


@dataclass
class LaunchCode:
    """One Triton function and how to launch it.

    Attributes:
        reads, writes: the tensors whose addresses are its first arguments.
        sizes: symbols passed after them, as int64.
        checks: a status word follows.
        signature: Triton's types of all its parameters, block sizes ("constexpr") included.
        programs: how many programs the grid has.
        inplace: pairs (position in writes, position in reads) that may be the same memory.
        maps: matrices it copies a tile at a time; parameters of their own, before block sizes.
        gluon: its language is Gluon, not Triton.
        dependent: it may start before earlier kernels have ended, and waits for them itself
            (`accel.backends.triton.dependent`).
        early: what the source reads before it waits. It may do so if these are arguments of the
            function: nothing that runs at the same time writes them.
        updates: pairs like these whose result starts as a copy of what is read, or is that very
            memory: the launch writes a part of it and reads it as the result.
    """

    name: str
    source: str
    reads: list[Slot]
    writes: list[Slot]
    sizes: tuple[str, ...]
    checks: bool
    signature: dict[str, str]
    constants: dict[str, int]
    programs: Dim
    warps: int
    inplace: list[tuple[int, int]] = field(default_factory=list)
    dependent: bool = False
    maps: tuple[MapCode, ...] = ()
    gluon: bool = False
    updates: list[tuple[int, int]] = field(default_factory=list)
    early: list[Slot] = field(default_factory=list)


@dataclass
class KernelCode:
    """All launches of one kernel, in order, and the bytes of its scratch buffers.

    The scratch buffers of `zeroed` are zeros before the first launch and after the last one.
    """

    name: str
    launches: list[LaunchCode]
    scratch: list[Dim]
    zeroed: list[int] = field(default_factory=list)


def generate(
    name: str, region: Region, comment: str, sms: int, tile: KernelTile | None = None
) -> KernelCode:
    """Sources of a region of primitive ops. Raises BackendError for what has none."""
    generator = Generator(name, region, comment, sms)
    generator.kernel_tile = tile or MODEL_TILE
    return generator.run()


class Generator:
    """Plans a region and writes its launches. `scratch` holds the type and bytes of each buffer:
    values that the plan materializes, then partial results of split reductions."""

    def __init__(self, name: str, region: Region, comment: str, sms: int) -> None:
        self.name, self.region, self.comment, self.sms = name, region, comment, sms
        self.planner = Planner(region)
        self.kernel_tile = MODEL_TILE
        self.scratch: list[tuple[str, Dim]] = []
        self.launches: list[LaunchCode] = []

    def run(self) -> KernelCode:
        self.planner.run()
        join_stores(self.planner.phases)
        for value in self.planner.scratch_values:
            kind = dtypes.scratch(dtypes.compute(value.dtype))
            self.scratch.append((kind, product((dtypes.width(kind), *value.shape))))
        self.kind = index_kind(self.region, self.planner.scratch_values)
        for phase in self.planner.phases:
            self._phase(phase)
        return KernelCode(self.name, self.launches, [size for _, size in self.scratch])

    def _phase(self, phase: Phase) -> None:
        writes = [Slot(s.place.kind, s.place.number) for s in phase.stores]
        targets = [slot.name for slot in writes]
        writer = ProgramWriter(phase, self._emitter(phase), targets, self.sms)
        writer.kernel_tile = self.kernel_tile
        split = plan_split(phase, writer, self.sms)
        if split is None:
            reads, program = self._finish(phase, writer.write())
            pairs = _inplace(writer, phase, self.region, reads)
            self._launch(program, reads, writes, pairs)
            return
        first = len(self.scratch)
        for kind in partial_kinds(phase):
            self.scratch.append((dtypes.scratch(kind), scratch_bytes(kind, split)))
        between = [Slot("scratch", n) for n in range(first, len(self.scratch))]
        names = [s.name for s in between]
        partial = PartialWriter(phase, self._emitter(phase), names, self.sms, split)
        partial.kernel_tile = self.kernel_tile
        reads, program = self._finish(phase, partial.write())
        self._launch(program, reads, between, [])
        total = TotalWriter(phase, self._emitter(phase), targets, self.sms, split, names)
        reads, program = self._finish(phase, total.write())
        self._launch(program, [*reads, *between], writes, [])

    def _emitter(self, phase: Phase) -> Emitter:
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        numbers = {v: i for i, v in enumerate(self.planner.scratch_values)}
        pointers |= {v: f"t{numbers[v]}" for v in phase.needs}
        return Emitter(self.planner.indexer, pointers, set(phase.needs), self.kind)

    def _finish(self, phase: Phase, program: Program) -> tuple[list[Slot], Program]:
        """What the program reads, arguments first."""
        numbers = {v: i for i, v in enumerate(self.planner.scratch_values)}
        reads = [
            Slot("scratch", numbers[v])
            if v in phase.needs
            else Slot("input", self.region.args.index(v))
            for v in program.reads
        ]
        return sorted(reads, key=lambda s: (s.kind, s.number)), program

    def _launch(
        self,
        program: Program,
        reads: list[Slot],
        writes: list[Slot],
        inplace: list[tuple[int, int]],
    ) -> None:
        name = f"{self.name}_{len(self.launches)}"
        signature = {slot.name: dtypes.pointer(self._stored(slot)) for slot in (*reads, *writes)}
        symbols = region_symbols(self.region)
        kind = "i32" if self.kind == "int32" else "i64"
        signature.update({size_name(s): kind for s in symbols})
        if program.checks:
            signature["status"] = "*i32"
        signature.update({one.name: one.type for one in program.maps})
        signature.update(dict.fromkeys(program.constants, "constexpr"))
        source = _source(name, program, signature, self.comment)
        self.launches.append(
            LaunchCode(
                name,
                source,
                reads,
                writes,
                symbols,
                program.checks,
                signature,
                program.constants,
                program.programs,
                program.warps,
                inplace,
                maps=program.maps,
                gluon=program.gluon,
            )
        )

    def _stored(self, slot: Slot) -> str:
        if slot.kind == "scratch":
            return self.scratch[slot.number][0]
        values = self.region.args if slot.kind == "input" else self.region.results
        return dtypes.storage(values[slot.number].dtype)


def index_kind(region: Region, scratch: list[Value]) -> str:
    """int32 if every position in every tensor fits, whatever the symbolic sizes are."""
    inner = [r for op in region.ops for r in op.results]
    return kind_of(region, (*region.args, *region.results, *scratch, *inner))


def kind_of(region: Region, values: Iterable[Value]) -> str:
    """int32 if every position in these values of a region fits."""
    limits = size_limits(region)
    counts = (_largest(value.type.numel(), limits) for value in values)
    fits = all(count is not None and count < _LARGEST_INT32 for count in counts)
    return "int32" if fits else "int64"


def size_limits(region: Region) -> dict[str, int]:
    """The largest values of the symbolic sizes that a region mentions, where there are any: the
    runtime refuses larger ones."""
    around: object = region.parent
    while around is not None and not isinstance(around, Function):
        around = around.parent  # type: ignore[attr-defined]
    if around is None:
        return {}
    known = ((name, around.symbols.get(name)) for name in region_symbols(region))
    return {name: info.max for name, info in known if info is not None and info.max is not None}


def _largest(count: Dim, limits: Mapping[str, int]) -> int | None:
    """The largest value of a size; None if it has none, or is no sum of products of symbols."""
    if isinstance(count, int):
        return count
    if not all(s.name in limits for s in count.free_symbols) or not count.is_polynomial():
        return None
    if any(c.is_negative is not False for c in sympy.Poly(count).coeffs()):
        return None
    return int(count.subs({s: limits[s.name] for s in count.free_symbols}))


def join_stores(phases: list[Phase]) -> None:
    """Moves results without reductions into the phase that reads the same rows: a norm's input,
    say, which is the sum of two tensors that is stored as well."""
    for phase in [p for p in phases if not p.reduces and not p.makes]:
        for store in list(phase.stores):
            for row in phases:
                if _may_join(store, phase, row, phases):
                    inner = tuple(a for a in phase.outer if a not in row.outer)
                    row.stores.append(Store(store.value, store.place, store.index, inner))
                    row.needs |= phase.needs
                    phase.stores.remove(store)
                    break
        if not phase.stores:
            phases.remove(phase)


def _may_join(store: Store, phase: Phase, row: Phase, phases: list[Phase]) -> bool:
    """Whether a store of `phase` can be one more store of `row`: over its rows, and over columns
    that it has anyway."""
    if not row.reduces or not set(row.outer) <= set(phase.outer):
        return False
    inner = set(phase.outer) - set(row.outer)
    columns = [set(r.axes) for r in row.reduces] + [set(s.inner) for s in row.stores]
    if inner not in columns:
        return False
    later = phases[phases.index(row) :]
    return not any(phase.needs & p.makes for p in later)


def _inplace(
    writer: ProgramWriter, phase: Phase, region: Region, reads: list[Slot]
) -> list[tuple[int, int]]:
    """Reads that the launch's only result may overwrite: at the very place of the write."""
    if len(phase.stores) != 1 or phase.stores[0].place.kind != "result":
        return []
    (store,) = phase.stores
    written = writer.indexer.flatten(store.index, store.value.shape)
    found = []
    for position, slot in enumerate(reads):
        if slot.kind != "input":
            continue
        arg = region.args[slot.number]
        places = {
            writer.indexer.flatten(index, arg.shape)
            for value, index in writer.survey.costly
            if value is arg
        }
        fits = arg.type.numel() == store.value.type.numel() and arg.dtype not in SUB_BYTE_BITS
        width = arg.dtype.itemsize == store.value.dtype.itemsize
        if fits and width and places == {written}:
            found.append((0, position))
    return found


_TRITON = """\
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
"""
# Triton 3.9 has other names for the two copies than 3.6.
_GLUON = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait)
from triton.language.extra.cuda import libdevice

bring_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
meet = getattr(tl, "thread_barrier", None) or tl.barrier
"""


def _source(name: str, program: Program, signature: dict[str, str], comment: str) -> str:
    parameters = ", ".join(
        f"{p}: tl.constexpr" if t == "constexpr" else p for p, t in signature.items()
    )
    blocks = ", ".join(f"{k} = {v}" for k, v in program.constants.items())
    text = "\n".join(f"# {line}".rstrip() for line in comment.splitlines())
    head, jit = (_GLUON, "gluon") if program.gluon else (_TRITON, "triton")
    parts = [
        f"{text}\n#\n# {blocks or 'no blocks'}; {program.warps} warps\n\n{head}",
        *program.helpers,
        f"@{jit}.jit\ndef {name}({parameters}):\n{program.lines}\n",
    ]
    source = "\n\n".join(parts)
    if program.gluon and "tl.PropagateNan" in source:  # which Gluon does not name
        source = source.replace("tl.PropagateNan", "triton_language.PropagateNan")
        source = source.replace(head, f"import triton.language as triton_language\n{head}", 1)
    return source
