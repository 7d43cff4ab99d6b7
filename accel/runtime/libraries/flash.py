"""torch's attention kernels for training on a GPU: forward with logsumexp, and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.torch_native import spliced

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_LARGEST_CUDNN, _LARGEST_FLASH = 128, 256  # head sizes
_ROWS = 32  # the memory-efficient kernel pads its logsumexp to this


class FlashAttention:
    """q [B, H, S, D], k and v [B, H, T, D], mask or none -> y, logsumexp [B, H, S]; with
    `backward`: gradient, q, k, v, y, logsumexp, mask or none -> gradients of q, k, v.

    `turned` says which results are [B, S, H, D], `wanted` which there are. cuDNN's kernel, or
    FlashAttention, takes 16-bit heads without a mask, the memory-efficient one all others.
    """

    name = "flash_attention"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        scale, causal = options.get("scale"), options.get("causal") is True
        backward = options.get("backward") is True
        count = 7 if backward else 4
        if type(scale) is not float or len(operands) != count or None in operands[: count - 1]:
            raise ArtifactError(f"{self.name} takes {count} operands and a scale")
        results = 3 if backward else 2
        turned, wanted = _flags(options, "turned", results), _flags(options, "wanted", results)
        run: Callable[..., list[Tensor]] = _gradients if backward else _attention

        def call(*tensors: Tensor | None) -> list[Tensor]:
            made = run(*tensors, scale=scale, causal=causal)
            chosen = [m.transpose(1, 2) if t else m for m, t in zip(made, turned)]
            # In the order of the call's results: those of the op itself come first.
            order = sorted(range(results), key=lambda i: turned[i])
            return [chosen[i] for i in order if wanted[i]]

        return spliced(call, operands)


def _flags(options: Mapping[str, Any], name: str, count: int) -> list[bool]:
    value = options.get(name)
    values = value.get("list") if isinstance(value, Mapping) else None
    if not isinstance(values, list) or len(values) != count:
        raise ArtifactError(f"flash_attention: {name} is {value!r}")
    return [v is True for v in values]


def _kernel(q: Tensor, mask: Tensor | None) -> str:
    """Which kernel computes this; forward and backward must agree."""
    size = q.shape[-1]
    if q.dtype not in _HALF or mask is not None or size % 8 or size > _LARGEST_FLASH:
        return "efficient"
    major, _ = torch.cuda.get_device_capability(q.device)
    fits = major in (9, 10) and size <= _LARGEST_CUDNN and torch.backends.cuda.cudnn_sdp_enabled()
    return "cudnn" if fits else "flash"


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, causal: bool
) -> list[Tensor]:
    kernel = _kernel(q, mask)
    if kernel == "cudnn":
        made = _aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return [made[0], made[1].reshape(q.shape[:3])]
    if kernel == "flash":
        made = _aten._scaled_dot_product_flash_attention.default(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return [made[0], made[1]]
    made = _aten._scaled_dot_product_efficient_attention.default(
        q, k, v, _full_mask(q, k, mask), True, 0.0, causal, scale=scale
    )
    return [made[0], made[1][..., : q.shape[2]]]


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, mask: Tensor | None, *,
    scale: float, causal: bool,
) -> list[Tensor]:  # fmt: skip
    kernel = _kernel(q, mask)
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of no dropout
    lengths = (q.shape[2], k.shape[2])
    if kernel == "cudnn":
        made = _aten._scaled_dot_product_cudnn_attention_backward.default(
            grad, q, k, v, _laid_out_as(q, y), lse.unsqueeze(-1), seed, seed, None, None, None,
            *lengths, 0.0, causal, scale=scale,
        )  # fmt: skip
    elif kernel == "flash":
        made = _aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, y, lse, None, None, *lengths, 0.0, causal, seed, seed, scale=scale
        )
    else:
        rows = -lse.shape[-1] % _ROWS
        padded = torch.nn.functional.pad(lse, (0, rows), value=float("inf"))
        made = _aten._scaled_dot_product_efficient_attention_backward.default(
            grad, q, k, v, _full_mask(q, k, mask), y, padded, seed, seed, 0.0,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
    return list(made[:3])


def _laid_out_as(q: Tensor, y: Tensor) -> Tensor:
    """y with its axes in q's order in memory, as the forward made it: torch keeps cuDNN's plans by
    the strides of q, k and v alone, and reads y with those of the first call."""
    strides = q.stride()
    order = sorted(range(y.dim()), key=lambda axis: -strides[axis])
    ordered = y.permute(order)
    if ordered.is_contiguous():
        return y
    return ordered.contiguous().permute([order.index(axis) for axis in range(y.dim())])


def _full_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask in the kernel's shape, dtype and alignment."""
    if mask is None:
        return None
    shape = (*q.shape[:3], k.shape[2])
    wide = torch.zeros((*shape[:3], shape[3] + -shape[3] % 8), dtype=q.dtype, device=q.device)
    made = wide[..., : shape[3]]
    return made.copy_(mask.to(q.dtype).expand(shape))
