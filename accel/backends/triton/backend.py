"""`TritonBackend`: what generated GPU kernels can take, and their code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.backends.cubin.compile import Binary, Unit, capability
from accel.backends.cubin.pool import Pool
from accel.backends.loops import trace
from accel.backends.loops.phases import REDUCTIONS
from accel.backends.loops.reasons import type_reason
from accel.backends.triton import anchors, batched, dependent, float8, matmul, scalar
from accel.backends.triton.addresses import size_name
from accel.backends.triton.kernel import KernelCode, LaunchCode, Slot, size_limits
from accel.backends.triton.product_loop import FULL_PRECISION, TF32_PRECISION
from accel.backends.triton.toolchain import version
from accel.backends.vendor import scaled
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.fingerprint import region_fingerprint
from accel.ir.module import Op, Region, clone_region_into
from accel.ir.op import Trait
from accel.ir.printer import print_op
from accel.ir.types import Dim, symbol


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch of a kernel: its code, and what it is given."""

    code: LaunchCode
    binary: Binary

    @property
    def name(self) -> str:
        return self.code.name

    @property
    def reads(self) -> list[Slot]:
        return self.code.reads

    @property
    def writes(self) -> list[Slot]:
        return self.code.writes

    @property
    def dims(self) -> tuple[Dim, ...]:
        return tuple(symbol(name) for name in self.code.sizes)


@dataclass
class CompiledLaunches:
    """Kernels, compiled.

    Attributes:
        names: the kernel of each op that was asked for, in order; equal ones share one.
        launches: by kernel name, what to launch, in order.
        scratch: by kernel name, the bytes of each scratch buffer.
        zeroed: by kernel name, the scratch buffers that start as zeros.
    """

    names: list[str]
    launches: dict[str, list[CompiledLaunch]] = field(default_factory=dict)
    scratch: dict[str, list[Dim]] = field(default_factory=dict)
    zeroed: dict[str, list[int]] = field(default_factory=dict)

    @property
    def sources(self) -> dict[str, str]:
        """Readable source by launch name."""
        return {one.name: one.code.source for made in self.launches.values() for one in made}


@dataclass(frozen=True)
class Compiling:
    """Kernels whose machine code is being made: by name their code, and a binary a launch."""

    names: list[str]
    code: Mapping[str, KernelCode]
    binaries: Mapping[str, Sequence[Future[Binary]]]

    def result(self) -> CompiledLaunches:
        """Waits for it. Raises BackendError where Triton fails."""
        made = CompiledLaunches(self.names)
        for name, code in self.code.items():
            made.launches[name] = [
                CompiledLaunch(launch, binary.result())
                for launch, binary in zip(code.launches, self.binaries[name], strict=True)
            ]
            made.scratch[name], made.zeroed[name] = code.scratch, code.zeroed
        return made


class TritonBackend:
    """Generated kernels for NVIDIA GPUs. Stateless; one may serve many compiles.

    Args:
        arch: "sm_80", "sm_90", "sm_100"...
        sms: multiprocessors, for the cost model.
        tile: the tile of kernels around an anchor, in place of the cost model's choice.
        tiles: tiles of single kernels, by `kernel_fingerprint`: what tuning has chosen.
        tf32: float32 operands of products may be rounded to tf32, as
            `torch.set_float32_matmul_precision("high")` allows.
        measures: products become kernels even where the cost model prefers a library, since
            tuning compares the two (`accel.compiler.tune`).
    """

    name = "triton"

    def __init__(
        self,
        arch: str = "sm_90",
        sms: int = 132,
        tile: Any = None,
        *,
        tiles: Mapping[str, Any] | None = None,
        measures: bool = False,
        tf32: bool = False,
    ) -> None:
        self.arch, self.sms, self.tile = arch, sms, tile
        self.tiles, self.measures, self.tf32 = dict(tiles or {}), measures, tf32

    def version(self) -> str:
        """A cache key for machine code, together with a kernel's fingerprint and tile."""
        return f"{version()}-{self.arch}-{self.sms}{'-tf32' if self.tf32 else ''}"

    def tile_of(self, kernel: Op) -> Any:
        """The tile that was chosen for an `accel.kernel` op; None leaves it to the cost model."""
        chosen = self.tiles.get(kernel_fingerprint(kernel))
        if chosen is None and str(kernel.attribute("kind")) in anchors.ANCHORS:
            return self.tile
        return chosen

    def candidates(self, kernel: Op) -> Sequence[Any]:
        """Tiles worth timing for an `accel.kernel` op, besides the cost model's own choice."""
        own = capability(self.arch)
        made = anchors.candidates(kernel, self.sms)
        return [tile for tile in made if getattr(tile, "capability", own) == own]

    def supports(self, op: Op) -> str | None:
        """None if a kernel region may hold this op, else the reason why not."""
        reason = type_reason(op)
        if reason is not None:
            return reason
        if op.name in trace.INDEX_OPS:
            return _index_reason(op)
        if op.name in REDUCTIONS:
            return _reduction_reason(op)
        if op.has(Trait.ELEMENTWISE) or op.name == "rope":
            return self._composite_reason(op)
        return f"accel.{op.name} has no generated code"

    def supports_product(self, op: Op) -> str | None:
        return self.supports_anchor(op, "gemv") and self.supports_anchor(op, "matmul")

    def supports_neighbour(self, op: Op, neighbour: Op) -> str | None:
        return type_reason(neighbour) or anchors.neighbour_reason(op, neighbour)

    def product_kind(self, op: Op, members: Sequence[Op]) -> tuple[str, str | None]:
        if op.name == "matmul":
            return "batched", batched.saves(op, members, self.sms, self.tf32)
        kind = anchors.product_kind(op)
        faster = None if self.measures else scaled.is_faster(op, capability(self.arch))
        if faster is not None:
            return kind, faster
        if kind == "matmul" and not self.measures:
            return kind, matmul.saves(op, members, self.sms, capability(self.arch))
        return kind, None

    def supports_anchor(self, op: Op, kind: str) -> str | None:
        reason = type_reason(op) or anchors.reason(op, kind, self.tf32)
        if reason is None and not self.measures:
            return anchors.library_reason(op, kind, capability(self.arch))
        return reason

    def supports_decoding(self, op: Op) -> str | None:
        if op.definition.decompose is None:
            return self.supports(op)
        return type_reason(op)  # composites are decomposed inside the kernel

    def matmul_columns(self, op: Op) -> int:
        raise BackendError(f"accel.{op.name} has no generated code on GPUs")

    def _composite_reason(self, op: Op) -> str | None:
        reason = scalar.supports(op)
        if reason is None or op.definition.decompose is None:
            return reason
        region = Region([v.type for v in op.operands])
        copy = Op(op.definition, region.args, op.attributes, [r.type for r in op.results],
                  segments=op.segments)  # fmt: skip
        Builder(region).decompose(copy)
        inner = (self.supports(made) for made in region.ops)
        return next((r for r in inner if r is not None), None)

    def generate(self, kernels: Sequence[Op]) -> tuple[list[str], dict[str, KernelCode]]:
        """Sources only: the kernel name of each op, and the code by name."""
        made: dict[str, KernelCode] = {}
        names: list[str] = []
        for kernel in kernels:
            name = f"accel_{kernel_fingerprint(kernel)[:16]}"
            if name not in made:
                made[name] = self._generate(name, kernel)
            names.append(name)
        return names, made

    def compile(self, kernels: Sequence[Op]) -> CompiledLaunches:
        """Compiles `accel.kernel` ops for `arch`, in this process. No GPU is needed.

        Raises BackendError with the reason if an op has no code, or Triton fails.
        """
        return self.start(kernels, Pool(0)).result()

    def start(self, kernels: Sequence[Op], pool: Pool) -> Compiling:
        """Writes the sources, and has the pool compile them. Raises BackendError without code."""
        names, made = self.generate(kernels)
        binaries = {
            name: [pool.submit(unit_of(launch, self.arch)) for launch in code.launches]
            for name, code in made.items()
        }
        return Compiling(names, made, binaries)

    def _generate(self, name: str, kernel: Op) -> KernelCode:
        kind = str(kernel.attribute("kind"))
        region = self.primitive_region(kernel.regions[0], kind)
        for op in region.ops:
            if op.has(Trait.TERMINATOR):
                continue
            reason = None if anchors.is_whole(op, kind) else self.supports(op)
            if reason is not None:
                raise BackendError(
                    f"no generated kernel: {reason}", where=str(op.location or kernel.location)
                )
        make, tile = anchors.generator(kind), self.tile_of(kernel)
        if tile is None:
            tile = anchors.choose(kernel, self.sms, capability(self.arch))
        code = make(name, region, print_op(kernel), self.sms, tile)
        for launch in code.launches:
            if self.tf32:
                launch.source = launch.source.replace(FULL_PRECISION, TF32_PRECISION)
            launch.source = float8.resolved(
                launch.source, capability(self.arch), gluon=launch.gluon
            )
        if capability(self.arch) >= dependent.FIRST_CAPABILITY:
            constants = {Slot("input", i).name for i in constant_operands(kernel)}
            arguments = {Slot("input", i) for i, v in enumerate(kernel.operands) if v.op is None}
            for launch in code.launches:
                if not arguments.issuperset(launch.early):
                    _wait_first(launch)
                if launch.gluon and f"{dependent.WAIT}()" not in launch.source:
                    continue  # starts when its predecessor has ended
                known = constants | {size_name(s) for s in launch.sizes}
                launch.source = dependent.overlapped(launch.source, launch.name, known)
                launch.dependent = True
        else:
            for launch in code.launches:
                _wait_first(launch)
        return code

    def primitive_region(self, region: Region, kind: str = "") -> Region:
        """A copy in which every op has code of its own; composites without are decomposed."""
        copy = Region([a.type for a in region.args])
        copy.parent = region.parent  # whose function knows how large sizes get
        clone_region_into(region, copy, {})
        pending = list(copy.ops)
        while pending:
            op = pending.pop()
            if op.definition.decompose is None or _has_own_code(op):
                continue
            if anchors.is_whole(op, kind):
                continue
            before = op.prev
            op.replace_with(Builder(before=op).decompose(op))
            current = copy.first if before is None else before.next
            while current is not None and current is not op.next:
                pending.append(current)
                current = current.next
        return copy


def _wait_first(launch: LaunchCode) -> None:
    """Takes back that a launch reads something before it waits."""
    if launch.early:
        launch.source = launch.source.replace(f"    {dependent.WAIT}()\n", "")
        launch.early = []


def constant_operands(kernel: Op) -> tuple[int, ...]:
    """Which operands are weights of the program: memory that nothing writes while it runs."""
    made = [(i, value.op) for i, value in enumerate(kernel.operands)]
    return tuple(i for i, op in made if op is not None and op.name == "constant")


def kernel_fingerprint(kernel: Op) -> str:
    """What an `accel.kernel` op computes, its kind, and which operands are constants, or arguments
    of the function that it may read early, and the largest sizes: equal ones share one kernel."""
    region, kind = region_fingerprint(kernel.regions[0]), kernel.attribute("kind")
    arguments = [i for i, v in enumerate(kernel.operands) if v.op is None]
    early = arguments if kind in anchors.EARLY else []
    limits = sorted(size_limits(kernel.regions[0]).items())
    text = f"{kind} {constant_operands(kernel)} {early} {limits} {region}"
    return hashlib.sha256(text.encode()).hexdigest()


def unit_of(launch: LaunchCode, arch: str) -> Unit:
    """What Triton compiles for a launch."""
    return Unit(
        launch.source, launch.name, launch.signature, launch.constants, launch.warps, arch,
        launch.gluon,
    )  # fmt: skip


def _has_own_code(op: Op) -> bool:
    if op.name in trace.INDEX_OPS or op.name in REDUCTIONS:
        return True
    return op.has(Trait.ELEMENTWISE) and scalar.supports(op) is None


def _index_reason(op: Op) -> str | None:
    reason = trace.lookup_reason(op)
    if reason is not None:
        return reason
    if op.name == "arange" and any(isinstance(op.attribute(a), float) for a in ("start", "step")):
        return "a floating arange"
    if op.name == "dynamic_update" and op.attribute("ring"):
        return "an update of a ring, among other ops"
    if op.name in ("full", "pad") and isinstance(op.attribute("value"), complex):
        return "complex numbers"
    if op.name in ("arange", "iota") and scalar.is_storage_only(op.result.dtype):
        return f"dtype {op.result.dtype}"
    return None


def _reduction_reason(op: Op) -> str | None:
    dtype: torch.dtype = op.operands[0].dtype
    if scalar.is_storage_only(dtype):
        return f"a reduction of {dtype}"
    attributes = {a.name for a in op.definition.attributes}
    if "axes" not in attributes and op.attribute("axis") is None:
        return f"accel.{op.name} over all axes at once"
    return None
