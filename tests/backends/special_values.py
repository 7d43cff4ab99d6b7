"""Kernels of every template on inputs with NaN and infinities: what is hit, and nothing else.

Used through Triton's interpreter (`test_triton_special_values`) and on a device (`tests/gpu`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.backends.triton.attention_tiles import OverlappedTile as OverlappedAttentionTile
from accel.backends.triton.product_plan import MatmulTile
from accel.backends.triton.skinny_loop import SkinnyTile
from accel.backends.triton.streamed import StreamedTile
from accel.ir import Function, TensorType, WeightStore, interpret
from accel.ir.storage import pack_sub_byte
from accel.ir.types import SUB_BYTE_BITS
from tests.backends import (
    test_triton_attention_overlapped,
    test_triton_batched,
    test_triton_depthwise,
    test_triton_experts,
    test_triton_gemv,
    test_triton_gemv_streamed,
    test_triton_matmul,
    test_triton_overlapped,
    test_triton_scan,
    test_triton_skinny,
)
from tests.backends.kernels import f32, function_of
from tests.backends.test_tvm_kernels import typed

FP16, BF16 = torch.float16, torch.bfloat16
_FLOATS = (torch.float32, FP16, BF16)
BAD = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Special:
    """A kernel: its types and body, and what writes it."""

    types: Sequence[TensorType]
    build: Callable[..., Any]
    kind: str = "pointwise"
    tile: Any = None
    sms: int = 132

    def function(self) -> Function:
        return function_of(self.types, self.build)


def _named(
    template: str,
    cases: dict[str, Any],
    names: Sequence[str],
    kind: str,
    *tiles: Any,
    sms: int = 132,
) -> dict[str, Special]:
    return {
        f"{template}, {name}, {type(tile).__name__}": Special(*cases[name][:2], kind, tile, sms)
        for name in names
        for tile in tiles
    }


_PLAIN = {
    "softmax": ([f32(6, 70)], lambda b, x: b.softmax(x, axis=1)),
    "softmax of long rows": ([f32(3, 20000)], lambda b, x: b.softmax(x, axis=1)),
    "layer norm": (
        [f32(6, 70), f32(70), f32(70)],
        lambda b, x, w, c: b.layer_norm(x, w, c, rank=1, eps=1e-5),
    ),
    "rms norm": ([typed(BF16, 5, 64), typed(BF16, 64)], lambda b, x, w: b.rms_norm(x, w, eps=1e-6)),
    "reductions": (
        [f32(6, 70)],
        lambda b, x: [b.sum(x, axes=(1,)), b.amax(x, axes=(1,)), b.amin(x, axes=(1,)),
                      b.argmax(x, axis=1), b.argmin(x, axis=1)],
    ),
    "all of long rows": (
        [f32(2, 40000)],  # parts, of which some are behind the end
        lambda b, x: [b.sum(x, axes=(1,)), b.amax(x, axes=(1,)), b.argmax(x, axis=1)],
    ),
    "columns": ([f32(70, 6)], lambda b, x: [b.mean(x, axes=(0,)), b.amax(x, axes=(0,))]),
    "pointwise": (
        [f32(6, 70), f32(70)],
        lambda b, x, y: [b.relu(b.add(x, y)), b.maximum(x, y), b.clamp(x, min=-1.0, max=1.0),
                         b.sigmoid(x), b.tanh(x), b.silu(x), b.gelu(x)],
    ),
    "turned": ([typed(FP16, 70, 66)], lambda b, x: b.relu(b.permute(x, axes=(1, 0)))),
}  # fmt: skip


def cases() -> dict[str, Special]:
    """By name; each kernel is small."""
    overlapped = test_triton_overlapped
    made = {name: Special(*case) for name, case in _PLAIN.items()}
    made |= _named("gemv", test_triton_gemv.CASES, list(test_triton_gemv.CASES)[:6], "gemv", None)
    for name, (tile, case) in test_triton_gemv_streamed.CASES.items():
        made[f"gemv that stays, {name}"] = Special(*case, "gemv", tile, 3)
    skinny = ("plain", "gelu, residual", "gate times up", "int8 a channel")
    made |= _named("skinny", test_triton_skinny.CASES, skinny, "skinny",
                   SkinnyTile(16, 32, 4, 3, 1), SkinnyTile(16, 32, 4, 3, 2))  # fmt: skip
    made |= _named("skinny", test_triton_skinny.STREAMED, list(test_triton_skinny.STREAMED),
                   "skinny", StreamedTile(64, 128, 3, 2))  # fmt: skip
    loops = ("odd sizes", "bias, gelu, residual", "gate times up", "activation before",
             "int8 a channel")  # fmt: skip
    made |= _named("matmul", test_triton_matmul.CASES, loops, "matmul", None)
    ours = ("tails", "odd columns", "bias, gelu", "bias, residual", "gate times up")
    for tile_name, tile in overlapped.TILES.items():
        named = _named("matmul", overlapped.CASES, ours, "matmul", tile, sms=2)
        made |= {f"{name}, {tile_name}": special for name, special in named.items()}
    pairs = ("broadcast batch", "scores of heads", "heads merged", "residual")
    made |= _named(
        "batched", test_triton_batched.CASES, pairs, "batched", MatmulTile(16, 32, 16, 4, 2, 2)
    )
    for rows, tile in ((12, test_triton_experts.FEW), (70, test_triton_experts.MANY)):
        some = test_triton_experts.cases(rows)
        made |= _named(f"experts, {rows} rows", some, list(some)[:3], "experts", tile)
    sums = ("sum", "product", "long rows", "middle axis")
    made |= _named("scan", test_triton_scan.CASES, sums, "scan", None)
    images = ("plain", "padded", "stride")
    made |= _named("depthwise", test_triton_depthwise.CASES, images, "depthwise", None)
    made |= _attention()
    return made


def _attention() -> dict[str, Special]:
    heads = [typed(FP16, 1, 2, 70, 64)] * 3
    plain = lambda b, q, k, v, **how: b.attention(q, k, v, scale=0.125, **how)  # noqa: E731
    made = {
        "attention": Special(heads, plain, "attention"),
        "attention, causal": Special(heads, lambda b, *x: plain(b, *x, causal=True), "attention"),
    }
    tile = OverlappedAttentionTile
    for name in ("one part", "tails of queries"):
        types, build, _ = test_triton_attention_overlapped.CASES[name]
        own = test_triton_attention_overlapped.TILE
        assert isinstance(own, tile)
        made[f"attention in Gluon, {name}"] = Special(types, build, "attention", own, 3)
    return made


def poisoned_inputs(special: Special, seed: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
    """(operand, inputs): one operand at a time holds a NaN and both infinities."""
    generator = torch.Generator().manual_seed(seed)
    experts = next((int(t.shape[0]) for t in special.types if len(t.shape) == 3), 8)

    def value(t: TensorType) -> Tensor:
        shape = [int(d) for d in t.shape]
        if t.dtype in _FLOATS:
            return torch.randn(shape, generator=generator).to(t.dtype)
        made = torch.randint(0, experts, shape, generator=generator)
        return made.to(torch.uint8 if t.dtype in SUB_BYTE_BITS else t.dtype)

    for operand, type_ in enumerate(special.types):
        if type_.dtype not in _FLOATS or (special.kind == "depthwise" and operand == 1):
            continue  # whether a weight is multiplied with padding is up to each library
        inputs = [value(t) for t in special.types]
        flat = inputs[operand].reshape(-1)
        for bad in BAD:
            flat[int(torch.randint(0, len(flat), (), generator=generator))] = bad
        inputs[operand] = flat.reshape(inputs[operand].shape)
        yield operand, inputs


def stored(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs as kernels take them: elements of less than a byte are packed."""
    return [
        pack_sub_byte(x, a.dtype) if a.dtype in SUB_BYTE_BITS else x
        for x, a in zip(inputs, function.args, strict=True)
    ]


def agrees(special: Special, inputs: Sequence[Tensor], got: Sequence[Tensor]) -> str:
    """How results differ from the function in float64: where they are no number or infinite, and
    otherwise by more than rounding. "" if they do not.

    (In float32 on a CPU, torch's GELU of infinity is no number; on a GPU it is infinity.)
    """
    function = special.function()
    same = interpret(function, inputs, WeightStore())
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for number, (g, s, e) in enumerate(zip(got, same, exact, strict=True)):
        if not g.dtype.is_floating_point:
            if not torch.equal(g, s):
                return f"result {number}: {g} is not {s}"
            continue
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            if not torch.equal(what(g), what(e)):
                wrong = (what(g) != what(e)).nonzero()
                return (
                    f"result {number}: {what.__name__} differs at {wrong[:4].tolist()} of "
                    f"{len(wrong)}: {g[tuple(wrong[0])]} for {e[tuple(wrong[0])]}"
                )
        finite = e.isfinite()
        if not bool(finite.any()):
            continue
        largest = max(float(e[finite].abs().max()), 1e-3)
        bound = max(8 * torch.finfo(g.dtype).eps, 2e-5) * largest
        off = float((g[finite].double() - e[finite]).abs().max())
        if not off <= bound:
            return f"result {number}: off by {off}, {bound} is allowed"
    return ""
