"""`torch.compile(model, backend="accel", options={...})`: the entry point that torch finds.

Options: those of `accel.Options`, `target`, and the frontend's own (`accel.frontends.dynamo`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from accel.compiler.api import compile_function
from accel.frontends.dynamo import make_backend
from accel.ir.module import Module


def _compile(
    module: Module, options: Mapping[str, Any]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    rest = dict(options)
    return compile_function(module, target=str(rest.pop("target", "cpu")), options=rest)


accel_backend = make_backend(_compile)
