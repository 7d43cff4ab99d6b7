"""Runs a callable on fake tensors and records the ATen calls it makes.

The recorder sits where PyTorch's own pre-dispatch tracing does, above autograd and above the
decompositions of composite ops, so `linear`, `layer_norm`, `scaled_dot_product_attention`... are
seen whole. It keeps the calls with their fake arguments and results and makes no graph: that is
about six times faster than `torch.export` (SmolLM2-135M: 0.4 s, not 2.5 s). In-place calls and
views are recorded as they are; `accel.frontends.aliases` makes them functional.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules import module as nn_module

from accel.errors import CaptureError
from accel.ir.module import Location

_HIDDEN = tuple(
    os.path.dirname(os.path.abspath(p)) + os.sep for p in (torch.__file__, __file__, contextlib.__file__)
)


@dataclass(slots=True)
class Call:
    """One ATen call: arguments and result are fake tensors, SymInts and Python values."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    location: Location | None


class Recorder(ProxyTorchDispatchMode):
    """The dispatch mode that records. It derives from the tracing mode of `make_fx` because only
    that mode may sit at the pre-dispatch key; nothing of its tracing is used."""

    def __init__(self, where: Callable[[], Location | None]) -> None:
        super().__init__(None, "fake", True)  # type: ignore[arg-type]
        self.calls: list[Call] = []
        self.where = where

    def __torch_dispatch__(  # type: ignore[override]
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            raise CaptureError(
                f"the higher-order op '{func}' is not supported", where=str(self.where() or "")
            )
        try:
            result = func(*args, **kwargs)
        except _REFUSALS as error:
            raise refusal(error, func, self.where()) from error
        self.calls.append(Call(func, args, kwargs, result, self.where()))
        return result

    def __sym_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return func(*args, **kwargs)


_REFUSALS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)


def refusal(error: BaseException, func: Any, where: Location | None) -> CaptureError:
    """The typed error for what fake tensors cannot do: values or sizes that depend on data."""
    place = str(where or "")
    if isinstance(error, DynamicOutputShapeException):
        return CaptureError(
            f"the size of the result of {func} depends on the values of a tensor",
            where=place,
            advice="use a fixed size with a mask, e.g. torch.where in place of boolean indexing",
        )
    if isinstance(error, UnsupportedOperatorException):
        return CaptureError(f"{func} has no shape rule", where=place)
    return CaptureError(
        "Python needs the value of a tensor here (an if, a loop bound, int(), item() or tolist())",
        where=place,
        advice="compute the choice with torch.where, or pass the value in as a Python number",
    )


class FrameLocator:
    """Finds the innermost frame of the user's model: outside of torch and of this package."""

    def __init__(self) -> None:
        self.scopes: list[str] = [""]
        self._hidden: dict[CodeType, bool] = {}

    def __call__(self) -> Location | None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            hidden = self._hidden.get(code)
            if hidden is None:
                name = code.co_filename
                hidden = name.startswith(_HIDDEN) or name.startswith("<")
                self._hidden[code] = hidden
            if not hidden:
                return Location(code.co_filename, frame.f_lineno, self.scopes[-1])
            frame = frame.f_back
        return None

    def place_of(self, error: BaseException) -> Location | None:
        """The innermost line of the user's model on an error's traceback."""
        found: Location | None = None
        step = error.__traceback__
        while step is not None:
            name = step.tb_frame.f_code.co_filename
            if not (name.startswith(_HIDDEN) or name.startswith("<")):
                found = Location(name, step.tb_lineno, self.scopes[-1])
            step = step.tb_next
        return found

    @contextlib.contextmanager
    def follow(self, root: torch.nn.Module) -> Iterator[None]:
        """Keeps `scopes` at the path of the submodule that runs."""
        names = {id(m): name for name, m in root.named_modules()}

        def enter(module: torch.nn.Module, args: Any) -> None:
            self.scopes.append(names.get(id(module), self.scopes[-1]))

        def leave(module: torch.nn.Module, args: Any, result: Any) -> None:
            self.scopes.pop()

        hooks = (
            nn_module.register_module_forward_pre_hook(enter),
            nn_module.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def record(
    function: Callable[[], Any],
    fake_mode: FakeTensorMode,
    where: Callable[[], Location | None],
) -> tuple[list[Call], Any]:
    """Runs `function` (which closes over fake tensors) and returns its calls and its result.

    Raises CaptureError with the user's file and line where tracing cannot go on.
    """
    recorder = Recorder(where)
    with (
        torch.no_grad(),
        fake_mode,
        torch._dispatch.python.enable_python_dispatcher(),
        recorder,
    ):
        result = function()
    return recorder.calls, result
