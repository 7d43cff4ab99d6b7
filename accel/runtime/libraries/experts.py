"""Products of a mixture's experts on the host: one linear for each expert that has rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.errors import ArtifactError, ExecutionError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.torch_native import spliced


class ExpertLinear:
    """x [..., K], weight [E, N, K], experts [...], bias [E, N] or none (`accel.expert_linear`)."""

    name = "experts.linear"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        if len(operands) != 4 or any(o is None for o in operands[:3]):
            raise ArtifactError("experts.linear takes x, weight, experts and an optional bias")
        return spliced(_multiply, operands)


def _multiply(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
    chosen, order = experts.reshape(-1).sort(stable=True)
    rows = x.reshape(chosen.shape[0], x.shape[-1])[order]
    names, counts = torch.unique_consecutive(chosen, return_counts=True)
    made = x.new_empty((chosen.shape[0], weight.shape[1]))
    start = 0
    for expert, count in zip(names.tolist(), counts.tolist()):
        if not 0 <= expert < weight.shape[0]:
            raise ExecutionError(f"expert {expert} of {weight.shape[0]}")
        own = None if bias is None else bias[expert]
        made[start : start + count] = F.linear(rows[start : start + count], weight[expert], own)
        start += count
    y = torch.empty_like(made)
    y[order] = made
    return y.reshape(*x.shape[:-1], weight.shape[1])
