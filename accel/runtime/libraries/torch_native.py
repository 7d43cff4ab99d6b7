"""Calls that torch itself does best: linears with weights given at run time, attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.options import choice, without_sinks

_LARGEST_CUDNN_HEAD = 128
_CUDNN_MAJORS = (9, 10)  # Hopper, Blackwell


def spliced(run: Callable[..., Any], operands: Sequence[Operand | None]) -> LibraryCall:
    """Calls `run` with one argument per operand: weights and None in their places."""
    fixed = [None if o is None else o.weight for o in operands]
    holes = [i for i, o in enumerate(operands) if o is not None and o.weight is None]
    if holes == list(range(len(fixed))):
        return run

    def call(*given: Tensor) -> Any:
        arguments = list(fixed)
        for hole, value in zip(holes, given):
            arguments[hole] = value
        return run(*arguments)

    return call


class TorchLinear:
    """x [..., K], weight [N, K], bias [N] or none, as `torch.nn.functional.linear`."""

    name = "torch.linear"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        return spliced(F.linear, operands)


class ScaledDotProduct:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, E], mask or none (see `accel.attention`)."""

    name = "sdpa"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        operands = without_sinks(operands, 4)
        if len(operands) != 4 or any(o is None for o in operands[:3]):
            raise ArtifactError("sdpa takes q, k, v and an optional mask")
        scale = options.get("scale")
        if not isinstance(scale, float):
            raise ArtifactError(f"sdpa: scale is {scale!r}")
        causal, window = options.get("causal") is True, options.get("window")
        offset = options.get("offset", 0)
        heads = choice(options, "heads", ("none", "permute", "merge"))
        if not (window is None or type(window) is int) or type(offset) is not int:
            raise ArtifactError("sdpa: window and offset must be static integers")
        banded = window is not None or (causal and offset != 0)
        bands: dict[tuple[int, int], Tensor] = {}

        def band(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
            sizes = (q.shape[2], k.shape[2])
            keep = bands.get(sizes)
            if keep is None:
                keep = _band(*sizes, causal, offset, window, q.device)
                bands.clear()
                bands[sizes] = keep
            if mask is None:
                return keep
            if mask.dtype == torch.bool:
                return mask & keep
            return mask.masked_fill(~keep, float("-inf"))

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            native = causal and not banded and mask is None
            if not native and (banded or causal):
                mask = band(q, k, mask)
            grouped = q.shape[1] != k.shape[1]
            if mask is None and not grouped and cudnn_is_faster(q, k, v, native):
                out = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
                    q, k, v, None, False, 0.0, native, False, scale=scale
                )[0]
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=native, scale=scale, enable_gqa=grouped
                )
            if heads == "none":
                return out
            out = out.transpose(1, 2)
            return out if heads == "permute" else out.reshape(out.shape[0], out.shape[1], -1)

        return spliced(run, operands)


def cudnn_is_faster(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether cuDNN's kernel takes this attention without a mask, on a GPU where it is the fastest
    of torch's: 600 TFLOP/s and more on an H200, where FlashAttention-2 has 320. torch prefers the
    latter."""
    size = q.shape[-1]
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.numel() > 0
    fits = fits and size == v.shape[-1] and size % 8 == 0 and size <= _LARGEST_CUDNN_HEAD
    fits = fits and not (causal and q.shape[2] != k.shape[2])
    if not fits or any(t.stride(-1) != 1 for t in (q, k, v)):
        return False
    major, _ = torch.cuda.get_device_capability(q.device)
    return major in _CUDNN_MAJORS and torch.backends.cuda.cudnn_sdp_enabled()


def _band(
    rows: int, columns: int, causal: bool, offset: int, window: int | None, device: torch.device
) -> Tensor:
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    distance = column[None, :] - row[:, None] - offset
    keep = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if causal:
        keep &= distance <= 0
    if window is not None:
        keep &= distance > -window
    return keep
