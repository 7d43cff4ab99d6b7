"""`TvmBackend`: what generated CPU kernels can take, and their code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from accel.backends.loops import trace
from accel.backends.loops.phases import REDUCTIONS, region_symbols
from accel.backends.loops.reasons import is_stored, type_reason
from accel.backends.tvm import anchors, blocked, contract, dtypes, scalar
from accel.backends.tvm.kernel import KernelCode, generate
from accel.backends.tvm.shim import c_source
from accel.backends.tvm.toolchain import build, version
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.fingerprint import region_fingerprint
from accel.ir.module import Op, Region, clone_region_into
from accel.ir.op import Trait
from accel.ir.types import SUB_BYTE_BITS, Dim, product, symbol


@dataclass
class CompiledKernels:
    """A library of kernels.

    Attributes:
        symbols: the C function of each kernel that was asked for, in order; equal ones share one.
        sources: readable source by symbol (TVMScript), and the C shim as "shim.c".
        library: the shared object.
        inplace: by symbol, pairs (result, input) where the result may overwrite the input.
        updates: by symbol, pairs where the result starts as a copy of the input, or is its memory.
    """

    symbols: list[str]
    sources: dict[str, str]
    library: bytes
    inplace: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    updates: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


class TvmBackend:
    """Generated kernels for CPUs. Stateless; one may serve many compiles."""

    name = "tvm"

    def version(self) -> str:
        """A cache key for machine code."""
        return version()

    def supports(self, op: Op) -> str | None:
        """None if a kernel region may hold this op, else the reason why not."""
        reason = type_reason(op)
        if reason is not None:
            return reason
        if op.name in trace.INDEX_OPS:
            return _index_reason(op)
        if op.name in REDUCTIONS:
            return _reduction_reason(op)
        if op.has(Trait.ELEMENTWISE):
            return self._elementwise_reason(op)
        return f"accel.{op.name} has no generated code"

    def supports_product(self, op: Op) -> str | None:
        """None if a kernel of kind "gemv" may hold this contraction, else the reason why not."""
        reason = type_reason(op) or contract.reason(op)
        if reason is None and product(op.operands[0].shape[:-1]) != 1:
            source = op.operands[1].op
            if source is not None and source.name == "constant":
                return "several rows of an uncompressed weight"
        return reason

    def supports_neighbour(self, op: Op, neighbour: Op) -> str | None:
        for anchor in anchors.ANCHORS.values():
            rules = {**anchor.sources, **anchor.neighbours}
            if op.name in anchor.ops and neighbour.name in rules:
                return type_reason(neighbour) or rules[neighbour.name](neighbour)
        return "a product's kernel takes elementwise ops after it only"

    def product_kind(self, op: Op, members: Sequence[Op]) -> tuple[str, str | None]:
        return "gemv", None

    def supports_decoding(self, op: Op) -> str | None:
        """None if a kernel of kind "gemv" may decode its weight with this op."""
        if op.definition.decompose is None:
            return self.supports(op)
        return type_reason(op)  # composites are decomposed inside the kernel

    def supports_anchor(self, op: Op, kind: str) -> str | None:
        """None if a kernel of this kind may be built around the op, else the reason why not."""
        return type_reason(op) or anchors.reason(op, kind)

    def matmul_columns(self, op: Op) -> int:
        """Columns of one block of such a linear's weight [blocks, K, columns]."""
        return blocked.block_columns(op)

    def _elementwise_reason(self, op: Op) -> str | None:
        reason = scalar.supports(op)
        if reason is None or op.definition.decompose is None:
            return reason
        region = Region([v.type for v in op.operands])
        copy = Op(op.definition, region.args, op.attributes, [r.type for r in op.results],
                  segments=op.segments)  # fmt: skip
        Builder(region).decompose(copy)
        inner = (self.supports(made) for made in region.ops)
        return next((r for r in inner if r is not None), None)

    def dims(self, kernel: Op) -> tuple[Dim, ...]:
        """The sizes to pass after a kernel's buffers."""
        return tuple(symbol(name) for name in region_symbols(kernel.regions[0]))

    def compile(self, kernels: Sequence[Op], cpu: str = "") -> CompiledKernels:
        """Compiles `accel.kernel` ops into one library.

        Args:
            cpu: LLVM's name of the CPU; "" is this machine's.

        Raises BackendError with the reason if an op has no code, or a tool fails.
        """
        made: dict[str, KernelCode] = {}
        symbols: list[str] = []
        for kernel in kernels:
            _check_packed(kernel)
            kind = str(kernel.attribute("kind"))
            print_ = f"{kind}_{region_fingerprint(kernel.regions[0])}"
            if print_ not in made:
                made[print_] = self._generate(f"accel_{print_[: len(kind) + 17]}", kernel)
            symbols.append(made[print_].name)
        unique = list(made.values())
        library = build(unique, cpu) if unique else b""
        sources = {k.name: k.source for k in unique}
        if unique:
            sources["shim.c"] = c_source(unique)
        return CompiledKernels(
            symbols,
            sources,
            library,
            {k.name: k.inplace for k in unique},
            {k.name: k.updates for k in unique if k.updates},
        )

    def _generate(self, name: str, kernel: Op) -> KernelCode:
        kind = str(kernel.attribute("kind"))
        region = self.primitive_region(kernel.regions[0], kind)
        for op in region.ops:
            if op.has(Trait.TERMINATOR):
                continue
            reason = None if _is_whole(op, kind) else self.supports(op)
            if reason is not None:
                raise BackendError(
                    f"no generated kernel: {reason}", where=str(op.location or kernel.location)
                )
        return generate(name, region, kind)

    def primitive_region(self, region: Region, kind: str = "") -> Region:
        """A copy in which every op has code of its own; composites without are decomposed."""
        copy = Region([a.type for a in region.args])
        clone_region_into(region, copy, {})
        pending = list(copy.ops)
        while pending:
            op = pending.pop()
            if op.definition.decompose is None or _has_own_code(op):
                continue
            if _is_whole(op, kind):
                continue
            before = op.prev
            if kind == "gemv" and contract.reason(op) is None:
                op.replace_with([contract.expand_linear(op)])
            else:
                op.replace_with(Builder(before=op).decompose(op))
            current = copy.first if before is None else before.next
            while current is not None and current is not op.next:
                pending.append(current)
                current = current.next
        return copy


def _is_whole(op: Op, kind: str) -> bool:
    """Whether the kernel is built around this op, which so stays whole."""
    return kind in anchors.ANCHORS and type_reason(op) is None and anchors.reason(op, kind) is None


def _has_own_code(op: Op) -> bool:
    if op.name in trace.INDEX_OPS or op.name in REDUCTIONS:
        return True
    return op.has(Trait.ELEMENTWISE) and scalar.supports(op) is None


def _index_reason(op: Op) -> str | None:
    reason = trace.lookup_reason(op)
    if reason is not None:
        return reason
    if op.name == "arange" and not all(
        not isinstance(op.attribute(a), float) for a in ("start", "step")
    ):
        return "a floating arange"
    if op.name in ("full", "pad") and isinstance(op.attribute("value"), complex):
        return "complex numbers"
    if op.name in ("arange", "iota") and op.result.dtype in dtypes.ONLY_CAST:
        return f"dtype {op.result.dtype}"
    return None


def _reduction_reason(op: Op) -> str | None:
    if op.operands[0].dtype in dtypes.ONLY_CAST:
        return f"a reduction of {op.operands[0].dtype}"
    attributes = {a.name for a in op.definition.attributes}
    if "axes" not in attributes and op.attribute("axis") is None:
        return f"accel.{op.name} over all axes at once"
    return None


def _check_packed(kernel: Op) -> None:
    for value in kernel.operands:
        if value.dtype in SUB_BYTE_BITS and not is_stored(value):
            raise BackendError(
                f"a kernel reads a computed {value.dtype} tensor", where=str(kernel.location or "")
            )
