"""A recorded ATen call, and questions about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from accel.errors import CaptureError
from accel.ir.module import Location


@dataclass(slots=True)
class Call:
    """One ATen call: arguments and result are fake tensors, SymInts and Python values."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    location: Location | None


_UNUSUAL_TWINS = {"normal_": "normal_functional"}


def functional_twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten::add.Tensor` for `aten::add_.Tensor`; None if there is none."""
    namespace, _, base = target._schema.name.partition("::")
    if base.startswith("__i") and base.endswith("__"):
        pure = f"__{base[3:]}"  # `x &= y`
    elif base.endswith("_") and not base.endswith("__"):
        pure = _UNUSUAL_TWINS.get(base, base[:-1])
    else:
        return None
    packet = getattr(getattr(torch.ops, namespace), pure, None)
    if packet is None:
        return None
    overload = target._schema.overload_name or "default"
    found = getattr(packet, overload, None)
    return found if found is not None else getattr(packet, "default", None)


def normalize(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with those that the schema takes by position put there."""
    if not call.kwargs:
        return call.args, call.kwargs
    arguments = call.target._schema.arguments
    args, kwargs = list(call.args), dict(call.kwargs)
    for argument in arguments[len(args) :]:
        if argument.kwarg_only or argument.name not in kwargs:
            break
        args.append(kwargs.pop(argument.name))
    return tuple(args), kwargs


def results_of(call: Call) -> list[Any]:
    """The call's results as a flat list."""
    if isinstance(call.result, (list, tuple)):
        flat: list[Any] = []
        for r in call.result:
            flat.extend(r if isinstance(r, (list, tuple)) else (r,))
        return flat
    return [] if call.result is None else [call.result]


def flat_tensors(call: Call) -> Iterable[Tensor]:
    """The tensors among a call's arguments, in order."""
    found: list[Tensor] = []
    _add_tensors(call.args, found)
    if call.kwargs:
        _add_tensors(call.kwargs.values(), found)
    return found


def _add_tensors(args: Iterable[Any], found: list[Tensor]) -> None:
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            _add_tensors(arg, found)


def fake_mode_of(call: Call) -> FakeTensorMode | None:
    """The mode of the call's fake tensors."""
    for t in (*flat_tensors(call), *results_of(call)):
        if isinstance(t, FakeTensor):
            return t.fake_mode
    return None


def written_storages(calls: Sequence[Call]) -> set[int]:
    """Storages that some call writes to."""
    found: set[int] = set()
    for call in calls:
        schema = call.target._schema
        if schema.is_mutable and call.args and isinstance(call.args[0], Tensor):
            found.add(storage_key(call.args[0]))
        elif schema.name == "aten::batch_norm" and call.args[5]:
            found.update(storage_key(t) for t in call.args[3:5] if t is not None)
    found.discard(0)
    return found


def has_complex(call: Call) -> bool:
    return any(t.dtype.is_complex for t in flat_tensors(call)) or any(
        isinstance(t, Tensor) and t.dtype.is_complex for t in results_of(call)
    )


def is_plain(dtype: torch.dtype) -> bool:
    """Whether a Python number holds a value of this dtype exactly."""
    return dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    )  # fmt: skip


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory; 0 for those without a storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0  # sparse and opaque tensors alias nothing


def check_plain(tensor: Tensor) -> None:
    """Raises CaptureError for a tensor that is made of others, such as a nested tensor."""
    if is_traceable_wrapper_subclass(tensor):
        raise CaptureError(
            f"an input of class {type(tensor).__name__}",
            advice="pass the plain tensors that it is made of",
        )
