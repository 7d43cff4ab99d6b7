"""`torch.compile(model, backend="accel", options={...})`: the entry point that torch finds.

Options: those of `accel.Options`, `target`, and the frontend's own (`accel.frontends.dynamo`).
Without `target`, code is made for the device that the tensors lie on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.compiler.api import compile_function
from accel.compiler.targets import get_target, target_of
from accel.frontends.dynamo import make_backend
from accel.ir.module import Module


def compile_graph(
    module: Module, options: Mapping[str, Any], device: torch.device
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What `make_backend` asks for: a graph of torch.compile, for the device of its tensors."""
    rest = dict(options)
    target = rest.pop("target", None)
    chosen = target_of(device) if target is None else get_target(str(target))
    place = device if chosen.kind == "cuda" and device.type == "cuda" else None
    keep = module.main.metadata.get("kept")
    return compile_function(module, rest, chosen, device=place, keep=keep)


accel_backend = make_backend(compile_graph)
