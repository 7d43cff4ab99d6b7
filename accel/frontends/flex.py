"""`torch.nn.attention.flex_attention` (Dong et al., 2024) as the operators that it means.

Its graphs hold one higher-order op with two functions of a score, a batch, a head and two
positions. They are elementwise, so they are called once, on positions that broadcast to all pairs.
Without a change of scores that is attention with a boolean mask, whose bands (causal, windows)
passes read; with one it is products and a softmax, in which passes find attention again. As in
torch's own reference the mask is the block mask's function; a row that sees nothing is 0.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.flex_attention import flex_attention as HIGHER_ORDER
from torch.nn import functional as F

_LN2 = math.log(2)


def expand(graph: fx.GraphModule) -> None:
    """Replaces the higher-order op in a graph of Dynamo's by calls of `attend`."""
    found = [n for n in graph.graph.nodes if n.target is HIGHER_ORDER]
    for node in found:
        node.target = attend
    if found:
        graph.recompile()


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """While a model is recorded, flex_attention reaches the recorder.

    Outside of `torch.compile`, torch compiles the op by itself, and block masks read captured
    tensors through an autograd function that only `torch.export` can trace.
    """
    with contextlib.ExitStack() as stack:
        for name, attribute, value in _PATCHES:
            module = sys.modules.get(name)
            if module is not None and hasattr(module, attribute):
                stack.callback(setattr, module, attribute, getattr(module, attribute))
                setattr(module, attribute, value)
        yield


def _index(x: Tensor, indices: list[Tensor]) -> Tensor:
    return torch.ops.aten.index.Tensor(x, indices)


_PATCHES: tuple[tuple[str, str, Any], ...] = (
    ("torch.nn.attention.flex_attention", "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
    ("torch._dynamo._trace_wrapped_higher_order_op", "mod_index", _index),
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: Mapping[str, Any],
    score_buffers: tuple[Any, ...] = (),
    mask_buffers: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, H, S, D], key and value [B, G, T, .]: the output, and for each query the logsumexp
    and the largest of its scores, in units of log 2 (as torch's op has them)."""
    batch, heads, rows = query.shape[:3]
    columns = key.shape[2]
    places = []
    for axis, count in enumerate((batch, heads, rows, columns)):
        shape = [1] * 4
        shape[axis] = count
        places.append(torch.arange(count, device=query.device).view(shape))
    keep = block_mask[-1](*places, *mask_buffers)
    if keep.dim() == 0:
        keep = keep.expand(1, 1, rows, columns)
    grouped = key.shape[1] != heads
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = (_spread(x, heads) if grouped else x for x in (key, value))
    scores = query.to(wide) @ keys.to(wide).transpose(-2, -1) * scale
    changed = score_mod(scores, *places, *score_buffers)
    statistics = any(kernel_options.get(n) for n in ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX"))
    seen = torch.where(keep, changed, float("-inf"))
    if changed is scores:
        made = F.scaled_dot_product_attention(
            query, key, value, keep, scale=scale, enable_gqa=grouped
        )
    else:
        weights = torch.softmax(seen, -1)
        weights = torch.where(keep.any(-1, keepdim=True), weights, 0.0)
        made = weights.to(query.dtype) @ values
    if not statistics:
        empty = query.new_empty(query.shape[:3], dtype=wide)
        return made, empty, empty
    return made, torch.logsumexp(seen, -1) / _LN2, seen.amax(-1) / _LN2


def _spread(x: Tensor, heads: int) -> Tensor:
    """[B, G, T, D] with each head for all queries that share it."""
    batch, groups, count, size = x.shape
    wide = x[:, :, None].expand(batch, groups, heads // groups, count, size)
    return wide.reshape(batch, heads, count, size)
