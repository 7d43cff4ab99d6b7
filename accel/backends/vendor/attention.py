"""Attention by torch's fused kernels, with the head merge that usually follows; cache updates."""

from __future__ import annotations

import torch

from accel.ir.capability import LibraryMatch
from accel.ir.module import Op
from accel.ir.types import same_shape


class ScaledDotProduct:
    """attention without softcap and sinks; then permute(0, 2, 1, 3) and reshape to [B, S, H * E],
    if there.

    The kernel's output is laid out [B, S, H, E] in memory, so taking the head merge into the call
    turns two copies into none.
    """

    name = "sdpa"
    dtypes: frozenset[torch.dtype] = frozenset((torch.float32, torch.float64, torch.bfloat16))

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "attention" or op.attribute("softcap") is not None:
            return None
        if op.arguments()[4] is not None:
            return None
        if op.result.dtype not in self.dtypes:
            return None
        ops = with_head_merge(op)
        options = tuple(
            (name, op.attribute(name)) for name in ("scale", "causal", "offset", "window")
        )
        merge = ("none", "permute", "merge")[len(ops) - 1]
        return LibraryMatch(self.name, ops, (*options, ("heads", merge)))


class CachedAttention:
    """cached_attention without sinks, with the head merge, over a view of what the cache holds."""

    name = "cached_attention"
    dtypes = ScaledDotProduct.dtypes | {torch.float16}

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "cached_attention" or op.result.dtype not in self.dtypes:
            return None
        if op.arguments()[5] is not None:
            return None
        ops = with_head_merge(op)
        names = ("scale", "window", "softcap", "ring")
        options = tuple((name, op.attribute(name)) for name in names)
        merge = ("none", "permute", "merge")[len(ops) - 1]
        return LibraryMatch(self.name, ops, (*options, ("heads", merge)))


class Update:
    """dynamic_update, in the memory of its operand where the plan donates that."""

    name = "update"

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "dynamic_update":
            return None
        axis = op.attribute("axis") % op.result.type.rank
        return LibraryMatch(self.name, [op], (("axis", axis), ("ring", op.attribute("ring"))))


def with_head_merge(op: Op) -> list[Op]:
    """An attention op; then permute(0, 2, 1, 3) and reshape to [B, S, H * E], if there."""
    ops = [op]
    user = op.result.single_user
    if user is None or user.name != "permute" or user.attributes["axes"] != (0, 2, 1, 3):
        return ops
    ops.append(user)
    reshape = user.result.single_user
    if reshape is not None and reshape.name == "reshape":
        batch, heads, queries, size = op.result.shape
        if same_shape(reshape.result.shape, (batch, queries, heads * size)):
            ops.append(reshape)
    return ops


class CudaAttention(ScaledDotProduct):
    """The same on GPUs: FlashAttention, cuDNN's or memory-efficient attention, torch chooses."""

    dtypes = ScaledDotProduct.dtypes | {torch.float16}
