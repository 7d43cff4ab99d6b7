"""Autocast around a compile: it decides what the model computes, and nothing else.

Eager PyTorch casts the operands of some operators where `torch.autocast` is on. The captured
program holds those casts, so passes, kernels and later calls run without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

Settings: TypeAlias = tuple[tuple[str, torch.dtype], ...]

_DEVICES = ("cpu", "cuda")


def current() -> Settings:
    """Device types for which autocast is on, and to which dtypes it casts."""
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in _DEVICES
        if torch.is_autocast_enabled(device)
    )


@contextlib.contextmanager
def suspended(settings: Settings) -> Iterator[None]:
    """Without autocast inside."""
    with contextlib.ExitStack() as stack:
        for device, dtype in settings:
            stack.enter_context(torch.autocast(device, dtype, enabled=False))
        yield


@contextlib.contextmanager
def resumed(settings: Settings) -> Iterator[None]:
    """With these settings inside."""
    with contextlib.ExitStack() as stack:
        for device, dtype in settings:
            stack.enter_context(torch.autocast(device, dtype))
        yield


def key_of(func: torch._ops.OpOverload, arguments: Any) -> torch._C.DispatchKey | None:
    """Where the dispatcher has a kernel that casts the operands of this call; None if nowhere.

    A recorder of calls sits above autocast. It has to call that kernel, which calls the operator
    again, on what it has cast and with its own key excluded.
    """
    for device, _ in current():
        name = f"Autocast{device.upper()}"
        key = getattr(torch._C.DispatchKey, name)
        if (
            not torch._C._dispatch_tls_is_dispatch_key_excluded(key)
            and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), name)
            and _on_device(arguments, device)
        ):
            return key
    return None


def _on_device(value: Any, device: str) -> bool:
    """Whether a call has a tensor there."""
    if isinstance(value, (list, tuple)):
        return any(_on_device(v, device) for v in value)
    if isinstance(value, dict):
        return any(_on_device(v, device) for v in value.values())
    return isinstance(value, torch.Tensor) and value.device.type == device
