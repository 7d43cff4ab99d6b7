"""The ways in which one `accel.kernel` can be computed, each as a program of its own.

The cost model's kernel comes first; for kernels that a select pass made, what libraries and kernels
for the rest would do, and other kinds of kernels around the same op (a product of few rows may be
"gemv", "skinny" or "matmul"); then the same kernel with other tiles. Tiles whose source is one that
is tried already are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel.backends.triton import TritonBackend
from accel.backends.triton.anchors import ANCHORS
from accel.compiler import gpu
from accel.compiler.kernel_jobs import Job, module_of, with_tile
from accel.compiler.lower import lower_function
from accel.compiler.options import Options
from accel.errors import BackendError
from accel.ir.capability import Library
from accel.ir.module import Function, Module, Op, Value, clone_op
from accel.ir.op import Trait
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.runtime.plan import FunctionPlan

KERNEL, LIBRARY = "kernel", "library"  # labels; other variants are called as their tile prints


def place_in(pipeline: Sequence[object]) -> int:
    """Where tuning belongs among the passes: after those that make kernels around an op."""
    names = [str(each).partition("{")[0] for each in pipeline]
    names = names[: names.index("select_libraries")] if "select_libraries" in names else names
    made = [i for i, n in enumerate(names) if n.startswith("select_")]
    return max(made, default=-1) + 1


@dataclass(frozen=True)
class Variant:
    """One way: the cost model's kernel, a tile, another kind of kernel, or libraries."""

    label: str
    tile: Any = None
    kind: str = ""

    @property
    def is_tile(self) -> bool:
        """Whether the kernel stays what it is."""
        return self.label != LIBRARY and not self.kind


@dataclass(frozen=True)
class Trial:
    """A variant, compiled: a function whose arguments are the kernel's operands."""

    label: str
    function: Function
    plan: FunctionPlan
    module: Module
    code: bytes | None
    sources: Mapping[str, str]


def has_library_variant(kernel: Op) -> bool:
    """Whether ops of the kernel might as well be given to a library."""
    kind = str(kernel.attribute("kind"))
    return kind in ANCHORS and kind != "experts"  # whose decomposition copies weights


def model_choice(kernel: Op, backend: TritonBackend) -> str:
    """What the cost model takes: its kernel, or a library."""
    region, kind = kernel.regions[0], str(kernel.attribute("kind"))
    plain = TritonBackend(backend.arch, backend.sms, tf32=backend.tf32)
    names = ANCHORS[kind].ops if kind in ANCHORS else ()
    op = next((o for o in region.ops if o.name in names), None)
    if op is None:
        return KERNEL
    if op.name != "linear":
        return KERNEL if plain.supports_anchor(op, kind) is None else LIBRARY
    decoding = _behind(op.operands[1])
    members = [
        o
        for o in region.ops
        if o not in decoding and not o.has(Trait.TERMINATOR) and o.name != "full"
    ]
    return KERNEL if plain.product_kind(op, members)[1] is None else LIBRARY


def _behind(value: Value) -> set[Op]:
    """The ops that a value is made of."""
    found: set[Op] = set()
    pending = [value]
    while pending:
        op = pending.pop().op
        if op is not None and op not in found:
            found.add(op)
            pending += op.operands
    return found


def variants_of(kernel: Op, backend: TritonBackend, most: int) -> list[Variant]:
    """At most `most` variants, the cost model's kernel and the library's among them."""
    seen: set[str] = set()
    made: list[Variant] = []
    for tile in (None, *backend.candidates(kernel)):
        try:
            source = _source(kernel, with_tile(backend, kernel, tile))
        except BackendError:
            continue  # the tile does not fit the kernel
        if source in seen:
            continue
        seen.add(source)
        made.append(Variant(KERNEL if tile is None else str(tile), tile))
        if len(made) == most:
            break
    if has_library_variant(kernel):
        made[1:1] = [Variant(LIBRARY), *_other_kinds(kernel, backend)]
    return made


def _other_kinds(kernel: Op, backend: TritonBackend) -> list[Variant]:
    """Kinds of kernels that may be built around the same op, and that take the whole region."""
    own = str(kernel.attribute("kind"))
    found = []
    for kind, anchor in ANCHORS.items():
        op = next((o for o in kernel.regions[0].ops if o.name in anchor.ops), None)
        if kind == own or op is None or backend.supports_anchor(op, kind) is not None:
            continue
        variant = Variant(f"as {kind}", kind=kind)
        try:
            backend.generate([as_kind(kernel, kind)])
        except BackendError:
            continue
        found.append(variant)
    return found


def as_kind(kernel: Op, kind: str) -> Op:
    """A copy of the kernel, of another kind; its operands are arguments of a module of its own."""
    (copy,) = (op for op in module_of(kernel).main.ops if op.name == "kernel")
    if kind:
        copy.attributes["kind"] = kind
    return copy


def job_of(kernel: Op, variant: Variant, backend: TritonBackend) -> Job:
    """The compilation that a variant of the kernel needs."""
    return Job.of(as_kind(kernel, variant.kind), backend, variant.tile)


def _source(kernel: Op, backend: TritonBackend) -> str:
    _, code = backend.generate([kernel])
    return "".join(f"{one.source}{one.warps}" for made in code.values() for one in made.launches)


def build(
    kernel: Op, variant: Variant, backend: TritonBackend, libraries: Sequence[Library]
) -> Trial:
    """Compiles a variant, mostly from the cache. Raises BackendError where it has no code."""
    module = module_of(kernel)
    (copy,) = (op for op in module.main.ops if op.name == "kernel")
    if variant.kind:
        copy.attributes["kind"] = variant.kind
    chosen = with_tile(backend, copy, variant.tile)
    if variant.label == LIBRARY:
        dissolve(copy)
        context = Context(generator=chosen, libraries=libraries)
        rest = gpu.KERNEL_PIPELINE[place_in(gpu.KERNEL_PIPELINE) :]
        PassManager(list(rest), context).run(module)
    module.main.donates = _updates(module.main)
    symbols, code, sources = gpu.compile_launches(module, chosen, Options())
    plan = lower_function(module.main, module, symbols)
    return Trial(variant.label, module.main, plan, module, code, sources)


def dissolve(kernel: Op) -> None:
    """Puts the ops of a kernel's region in its place."""
    region = kernel.regions[0]
    mapping = dict(zip(region.args, kernel.operands))
    assert kernel.parent is not None
    for op in region.ops:
        if not op.has(Trait.TERMINATOR):
            kernel.parent.insert_before(clone_op(op, mapping), kernel)
    kernel.replace_with([mapping[v] for v in region.results])


def _updates(function: Function) -> dict[int, int]:
    """Results that are an argument with a part replaced: they may take over its memory."""
    donates: dict[int, int] = {}
    for number, result in enumerate(function.results):
        value = _updated(result)
        if value in function.args and value.type == result.type:
            donates[number] = function.args.index(value)
    return donates


def _updated(value: Value) -> Value | None:
    """The value outside of regions that this one is an update of."""
    op = value.op
    if op is None:
        return None
    if op.regions:
        inner = _updated(op.regions[0].results[op.results.index(value)])
        args = op.regions[0].args
        return op.operands[args.index(inner)] if inner in args else None
    if not op.has(Trait.UPDATE):
        return None
    return op.operands[0]
