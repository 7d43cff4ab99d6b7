"""Products whose weight is chosen for each row: the experts of a mixture (Shazeer et al., 2017).

How rows are brought together by expert (sorted, padded, in groups) is a backend's business: the op
says which expert multiplies which row, and nothing about an order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import ExecutionError, TypeInferenceError
from accel.ir.op import define
from accel.ir.ops.contract import CONTRACTION
from accel.ir.ops.elementwise import check_dtype
from accel.ir.types import TensorType, format_shape, is_integer, same_dim, same_shape

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


@define("expert_linear", CONTRACTION)
class ExpertLinear:
    """x [..., K] times weight [E, N, K] of the row's expert transposed, plus its bias [E, N].

    `experts` [...] holds an integer in [0, E) for each row of x. Only the weights of experts that
    some row asks for are read.
    """

    @staticmethod
    def infer(
        x: TensorType, weight: TensorType, experts: TensorType, bias: TensorType | None = None
    ) -> TensorType:
        check_dtype("expert_linear", "f", x, weight, bias)
        if not is_integer(experts.dtype):
            raise TypeInferenceError(f"accel.expert_linear: experts have dtype {experts.dtype}")
        fits = x.rank > 0 and weight.rank == 3 and same_dim(x.shape[-1], weight.shape[2])
        if not fits or not same_shape(x.shape[:-1], experts.shape):
            raise TypeInferenceError(
                f"accel.expert_linear: {format_shape(x.shape)} with weight "
                f"{format_shape(weight.shape)} and experts {format_shape(experts.shape)}"
            )
        if bias is not None and not same_shape(bias.shape, weight.shape[:2]):
            raise TypeInferenceError(f"accel.expert_linear: bias {bias} with weight {weight}")
        return x.with_shape((*x.shape[:-1], weight.shape[1]))

    @staticmethod
    def evaluate(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
        chosen = experts.reshape(-1)
        rows = x.reshape(chosen.shape[0], x.shape[-1])
        y = x.new_empty((rows.shape[0], weight.shape[1]))
        for expert in chosen.unique().tolist():
            if not 0 <= expert < weight.shape[0]:
                raise ExecutionError(f"expert {expert} of {weight.shape[0]}")
            mine = (chosen == expert).nonzero().squeeze(1)
            own = None if bias is None else bias[expert]
            y[mine] = torch.nn.functional.linear(rows[mine], weight[expert], own)
        return y.reshape(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def decompose(
        b: Builder, x: Value, weight: Value, experts: Value, bias: Value | None = None
    ) -> Value:
        """A product of one row and a copy of its expert's weight."""
        own = b.gather(weight, experts, axis=0)
        column = b.reshape(x, shape=(*x.shape, 1))
        y = b.reshape(b.matmul(own, column), shape=(*x.shape[:-1], weight.shape[1]))
        return y if bias is None else b.add(y, b.gather(bias, experts, axis=0))
