"""Training attention: logsumexp kept, and gradients, by the kernels that torch has."""

from __future__ import annotations

import torch

from accel.ir.capability import LibraryMatch
from accel.ir.module import Op
from accel.ir.types import same_dim

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SWAP = (0, 2, 1, 3)


class FlashAttention:
    """flash_attention and flash_attention_backward without window and cap, each result
    [B, H, S, D] with its permute to [B, S, H, D], which is how the kernels lay it out, if that is
    all that reads it."""

    name = "flash_attention"

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name not in ("flash_attention", "flash_attention_backward"):
            return None
        if op.operands[0].dtype not in _DTYPES:
            return None
        q, k = op.operands[:2] if op.name == "flash_attention" else op.operands[1:3]
        special = op.attribute("window") is not None or op.attribute("softcap") is not None
        if special or not same_dim(q.shape[1], k.shape[1]):
            return None
        turned = [_turned(op, i) for i in range(len(op.results))]
        ops = [op, *(t for t in turned if t is not None)]
        options = (
            ("scale", op.attribute("scale")),
            ("causal", op.attribute("causal")),
            ("backward", op.name == "flash_attention_backward"),
            ("turned", tuple(t is not None for t in turned)),
            ("wanted", tuple(bool(r.uses) for r in op.results)),
        )
        return LibraryMatch(self.name, ops, options)


def _turned(op: Op, index: int) -> Op | None:
    user = op.results[index].single_user
    if user is None or user.name != "permute" or user.attributes["axes"] != SWAP:
        return None
    return user
