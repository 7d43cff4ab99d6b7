"""Kinds of kernels that are built around one op, the anchor: which ops, and what writes them.

A kind may offer tiles to time on a device (`candidates`). A tile is a frozen dataclass of numbers:
equal tiles print alike, which is how a record of an earlier choice names one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accel.backends.triton import (
    attention,
    attention_training,
    batched,
    cached,
    depthwise,
    embedding_gradient,
    experts,
    gemv,
    matmul,
    pooling,
    scan,
    skinny,
    summed,
    topk,
    updates,
)
from accel.backends.triton.kernel import KernelCode, generate
from accel.backends.triton.tiles import KERNEL_TILES
from accel.ir.module import Op, Region
from accel.ir.types import product

Generate = Callable[[str, Region, str, int, Any], KernelCode]
Candidates = Callable[[Op, int], Sequence[Any]]


@dataclass(frozen=True)
class Anchor:
    """One kind of kernel.

    Attributes:
        ops: the names of the ops it may be built around.
        reason: why an op of this name has no such kernel; None if it has.
        generate: (name, region, comment, multiprocessors, tile or None) -> code; it may change the
            region. None leaves the tile to the kind's model of costs.
        candidates: (the `accel.kernel` op, multiprocessors) -> tiles worth timing, the likeliest
            to pay first; what does not compile or does not fit the device is left out when it is
            tried. None: nothing to choose.
        choose: (the `accel.kernel` op, multiprocessors, capability) -> the tile where none was
            measured, for kinds whose choice depends on the architecture.
        library_reason: (op, capability) -> why a library is faster; None if it is not.
        tf32_reason: as `reason`, where float32 operands may be rounded to tf32.
    """

    ops: tuple[str, ...]
    reason: Callable[[Op], str | None]
    generate: Generate
    candidates: Candidates | None = None
    choose: Callable[[Op, int, int], Any] | None = None
    library_reason: Callable[[Op, int], str | None] | None = None
    tf32_reason: Callable[[Op], str | None] | None = None


ANCHORS: dict[str, Anchor] = {
    "gemv": Anchor(("linear",), gemv.reason, gemv.generate, gemv.candidates, gemv.choose_for),
    "matmul": Anchor(
        ("linear",),
        matmul.reason,
        matmul.generate,
        matmul.candidates,
        matmul.choose_tile,
        tf32_reason=partial(matmul.reason, tf32=True),
    ),
    "skinny": Anchor(
        ("linear",), skinny.reason, skinny.generate, skinny.candidates, skinny.choose_for
    ),
    "batched": Anchor(("matmul",), batched.reason, batched.generate, batched.candidates),
    "experts": Anchor(
        ("expert_linear",),
        experts.reason,
        experts.generate,
        experts.candidates,
        experts.choose_for,
    ),
    "cached_attention": Anchor(
        ("cached_attention",),
        cached.reason,
        cached.generate,
        cached.candidates,
        cached.choose_tile,
    ),
    "update": Anchor(("dynamic_update",), updates.reason, updates.generate),
    "attention": Anchor(
        ("attention",),
        attention.reason,
        attention.generate,
        attention.candidates,
        attention.choose,
        attention.library_reason,
    ),
    **dict.fromkeys(
        attention_training.OPS,
        Anchor(
            attention_training.OPS,
            attention_training.reason,
            attention_training.generate,
            attention_training.candidates,
            library_reason=attention_training.library_reason,
        ),
    ),
    "scan": Anchor(scan.OPS, scan.reason, scan.generate),
    "topk": Anchor(("topk",), topk.reason, topk.generate),
    "embedding_gradient": Anchor(
        embedding_gradient.OPS, embedding_gradient.reason, embedding_gradient.generate
    ),
    "summed": Anchor(("kernel",), summed.reason, summed.generate, summed.candidates),
    "depthwise": Anchor(
        ("conv",),
        depthwise.reason,
        depthwise.generate,
        depthwise.candidates,
    ),
    "pool": Anchor(("max_pool",), pooling.reason, pooling.generate, depthwise.candidates),
}

# Kinds whose launches read arguments of the function before they wait (`LaunchCode.early`).
EARLY = frozenset(("cached_attention",))


def reason(op: Op, kind: str, tf32: bool = False) -> str | None:
    """None if a kernel of this kind may be built around the op, else the reason why not."""
    anchor = ANCHORS.get(kind)
    if anchor is None:
        return f"no kernel of kind '{kind}' is generated for GPUs"
    if op.name not in anchor.ops:
        return f"accel.{op.name} is not accel.{' or accel.'.join(anchor.ops)}"
    ask = anchor.tf32_reason if tf32 else None
    return anchor.reason(op) if ask is None else ask(op)


def library_reason(op: Op, kind: str, capability: int) -> str | None:
    """Why a library does better than a kernel of this kind; None if it does not, or the kind asks
    elsewhere."""
    ask = ANCHORS[kind].library_reason
    return None if ask is None else ask(op, capability)


def choose(kernel: Op, sms: int, capability: int) -> Any:
    """The tile of an `accel.kernel` op by the model of its kind; None where `generate` chooses."""
    anchor = ANCHORS.get(str(kernel.attribute("kind")))
    if anchor is None or anchor.choose is None:
        return None
    return anchor.choose(kernel, sms, capability)


def neighbour_reason(op: Op, neighbour: Op) -> str | None:
    """None if the kernel of a linear, attention or an update may hold this op too, else why not."""
    if op.name == "cached_attention":
        return cached.neighbour_reason(op, neighbour)
    if op.name == "attention":
        return attention.neighbour_reason(op, neighbour)
    if op.name == "dynamic_update" and neighbour.name == "rope":
        return None  # decomposed inside of the kernel
    if neighbour.name == "slice":
        axis = int(neighbour.attribute("axis")) % op.result.type.rank
        halves = neighbour.result.shape[axis] * 2 == op.result.shape[axis]
        plain = axis == op.result.type.rank - 1 and neighbour.attribute("step") == 1
        return None if plain and halves else "a slice that is no half of the columns"
    if neighbour.name == "rms_norm" and product_kind(op) == "gemv":
        return None
    return f"accel.{neighbour.name} does not ride along with a linear"


def product_kind(op: Op) -> str:
    """The kind of kernel that multiplies a linear's rows fastest, whatever is around it.

    Each row of a gemv's x costs multiplications on slow units; tensor cores take 16 rows at once.
    But a gemv decodes a weight at far less cost.
    """
    on_tensor_cores = skinny.reason(op) is None
    weight = op.operands[1].op
    plain = weight is None or weight.name == "constant"
    most = 2 if on_tensor_cores and plain else gemv.MOST_ROWS
    if gemv.reason(op) is None and int(product(op.result.shape[:-1])) <= most:
        return "gemv"
    return "skinny" if on_tensor_cores else "matmul"


def is_whole(op: Op, kind: str) -> bool:
    """Whether the kernel's own generator takes this op, which so stays whole."""
    if (kind, op.name) in (
        ("gemv", "dequantize"),
        ("topk", "softmax"),
        ("attention", "rope"),
        ("cached_attention", "update_pages"),
    ):
        return True
    return kind in ANCHORS and op.name in ANCHORS[kind].ops


def generator(kind: str) -> Generate:
    """What writes kernels of this kind."""
    anchor = ANCHORS.get(kind)
    return generate if anchor is None else anchor.generate


def candidates(kernel: Op, sms: int) -> Sequence[Any]:
    """Tiles worth timing for an `accel.kernel` op, besides the model's own choice."""
    anchor = ANCHORS.get(str(kernel.attribute("kind")))
    if anchor is None:
        return KERNEL_TILES
    return () if anchor.candidates is None else anchor.candidates(kernel, sms)
