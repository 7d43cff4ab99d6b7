"""Attention over the first tokens of a text and the last ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import define
from accel.ir.ops.attention import Attention, Rope
from accel.ir.ops.contract import CONTRACTION
from accel.ir.types import TensorType, same_dim, simplify_dim

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


@define("streaming_attention", CONTRACTION)
class StreamingAttention:
    """Attention to the first `sinks` tokens and the last `window` ones (Xiao et al., 2024).

    q [B, H, S, D] and k [B, G, T, D] come without their rotary embedding, v is [B, G, T, E]; the
    queries are the last S of T tokens. cos and sin [..., T, D] hold the angles of positions 0 to
    T - 1, as for `rope`. Query i sees keys j <= i with j < `sinks` or j > i - `window`, and keys
    are turned by their place among those that are seen: after `sinks` + `window` tokens the window
    follows the sinks directly, however long the text is. `scale` and `softcap` as in `attention`.
    """

    @staticmethod
    def infer(
        q: TensorType,
        k: TensorType,
        v: TensorType,
        cos: TensorType,
        sin: TensorType,
        *,
        scale: float,
        sinks: int,
        window: int,
        style: str = "half",
        softcap: float | None = None,
    ) -> TensorType:
        if sinks < 0 or window < 1:
            raise TypeInferenceError(
                f"accel.streaming_attention: sinks = {sinks}, window = {window}"
            )
        Rope.infer(k, cos, sin, style=style)
        for table in (cos, sin):
            if table.rank < 2 or not same_dim(table.shape[-2], k.shape[2]):
                raise TypeInferenceError(f"accel.streaming_attention: {table} for keys {k}")
        return Attention.infer(q, k, v, scale=scale)

    @staticmethod
    def evaluate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        scale: float,
        sinks: int,
        window: int,
        style: str = "half",
        softcap: float | None = None,
    ) -> Tensor:
        """As in the paper: each query has its cache of keys in order, turned by their place."""
        made, total = [], k.shape[2]
        for i in range(total - q.shape[2], total):
            first = max(i - window + 1, sinks)
            seen = torch.tensor([*range(min(sinks, i + 1)), *range(first, i + 1)])
            angles = [table[..., : len(seen), :] for table in (cos, sin)]
            last = [table[..., -1:, :] for table in angles]
            row = q[:, :, i - total + q.shape[2]].unsqueeze(2)
            query = Rope.evaluate(row, *last, style=style)
            keys = Rope.evaluate(k[:, :, seen], *angles, style=style)
            values = v[:, :, seen]
            made.append(Attention.evaluate(query, keys, values, scale=scale, softcap=softcap))
        return torch.cat(made, 2) if made else q.new_empty(*q.shape[:3], v.shape[3])

    @staticmethod
    def decompose(
        b: Builder,
        q: Value,
        k: Value,
        v: Value,
        cos: Value,
        sin: Value,
        *,
        scale: float,
        sinks: int,
        window: int,
        style: str = "half",
        softcap: float | None = None,
    ) -> Value:
        """Scores depend on distances alone. Keys in the window have their own distance; for sinks
        there is a second query, which stands no further from them than `sinks` + `window`. Both
        queries side by side meet keys of which one half is zero."""
        rows, total, size = q.shape[2], k.shape[2], q.shape[3]
        start, long = simplify_dim(total - rows), torch.int64
        row = b.iota(shape=(rows,), axis=0, dtype=long)
        row = b.add(row, b.size_like(start, long))
        near = b.minimum(row, b.scalar(sinks + window - 1, long))
        own, held = [], []
        for table in (cos, sin):
            axis = table.type.rank - 2
            own.append(b.slice(table, axis=axis, start=start, stop=total))
            held.append(b.gather(table, near, axis=axis))
        queries = b.cat(b.rope(q, *own, style=style), b.rope(q, *held, style=style), axis=3)
        turned = b.rope(k, cos, sin, style=style)
        place = b.iota(shape=(total, 1), axis=0, dtype=long)
        sink = b.lt(place, b.scalar(sinks, long))
        none = b.scalar(0.0, k.dtype)
        keys = b.cat(b.where(sink, none, turned), b.where(sink, turned, none), axis=3)
        column = b.reshape(place, shape=(1, total))
        at = b.reshape(row, shape=(rows, 1))
        recent = b.gt(column, b.sub(at, b.scalar(window, long)))
        seen = b.logical_or(b.lt(column, b.scalar(sinks, long)), recent)
        keep = b.logical_and(seen, b.le(column, at))
        assert not isinstance(size, int) or queries.shape[3] == 2 * size
        made: Value = b.attention(queries, keys, v, keep, scale=scale, softcap=softcap)
        return made
