"""Products of float8 codes on tensor cores, by cuBLAS (`torch._scaled_mm`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.options import choice
from accel.runtime.libraries.torch_native import spliced

_CODES = torch.float8_e4m3fn


class ScaledLinear:
    """x [..., K] and weight [N, K] of float8_e4m3fn, no bias, two scales, [bias [N]].

    `first` says whose scale is the first one: "row" ([..., 1], the other one for columns),
    "column", or "one" (both are numbers). Sums are added up in float32. The result has the dtype
    of `dtype`.
    """

    name = "torch.scaled_mm"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        if len(operands) not in (5, 6) or operands[0] is None or operands[1] is None:
            raise ArtifactError(f"{self.name} takes x, weight, two scales, and an optional bias")
        x, weight = operands[0], operands[1]
        if x.dtype != _CODES or weight.dtype != _CODES or len(weight.shape) != 2:
            raise ArtifactError(f"{self.name} takes codes of float8_e4m3fn, and a matrix")
        first = choice(options, "first", ("row", "column", "one"))
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[
            choice(options, "dtype", ("bfloat16", "float16"))
        ]

        def run(x: Tensor, w: Tensor, _: None, s: Tensor, t: Tensor, bias: Any = None) -> Tensor:
            row, column = (t, s) if first == "column" else (s, t)
            shape = () if first == "one" else (-1, 1), () if first == "one" else (1, -1)
            made: Tensor = torch._scaled_mm(
                x.reshape(-1, x.shape[-1]),
                w.t(),
                scale_a=row.reshape(shape[0]).contiguous(),
                scale_b=column.reshape(shape[1]).contiguous(),
                bias=None if bias is None else bias.reshape(-1),
                out_dtype=dtype,
            )
            return made.reshape(*x.shape[:-1], w.shape[0])

        return spliced(run, operands)
