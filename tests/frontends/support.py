"""Captures models and runs the captured programs in the reference interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accel import tree
from accel.frontends.export import capture
from accel.ir import Module, interpret, verify


class Captured:
    """A captured model, called like the model; keeps its state between calls."""

    def __init__(self, module: Module) -> None:
        verify(module)
        self.module = module
        self.main = module.main
        metadata = self.main.metadata
        self.arguments: list[dict[str, Any]] = metadata["arguments"]
        self.state = {
            a["name"]: module.weights.tensor(a["initial"]).clone()
            for a in self.arguments
            if a["kind"] == "state"
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, description = tree.flatten((args, kwargs))
        difference = tree.describe_difference(self.main.metadata["inputs"], description)
        assert not difference, difference
        inputs = [*leaves, *self.state.values()]
        results = interpret(self.main, inputs, self.module.weights)
        for result, kind in zip(results, self.main.metadata["results"]):
            if kind["kind"] == "state":
                self.state[self.arguments[kind["argument"]]["name"]] = result
            elif kind["kind"] == "mutation":
                inputs[kind["argument"]].copy_(result)
        return tree.unflatten(self.main.metadata["outputs"], results)

    @property
    def ops(self) -> list[str]:
        return [op.name for op in self.main.ops]


def captured(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    dynamic_shapes: Any = None,
    **kwargs: Any,
) -> Captured:
    return Captured(capture(model, args, kwargs, dynamic_shapes=dynamic_shapes))


def check(function: Callable[..., Any], *args: Any, tolerance: float = 1e-5) -> Captured:
    """The captured function computes what the function does, and writes what it writes."""
    program = captured(function, *copies(args))
    theirs, ours = copies(args), copies(args)
    wanted, got = function(*theirs), program(*ours)
    assert_close(got, wanted, tolerance)
    assert_close(ours, theirs, tolerance)
    return program


def copies(values: Sequence[Any]) -> tuple[Any, ...]:
    leaves, description = tree.flatten(tuple(values))
    result: tuple[Any, ...] = tree.unflatten(description, [t.detach().clone() for t in leaves])
    return result


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Equal structure, dtypes and shapes; elements within `tolerance`, relative to the largest."""
    ours, our_structure = tree.flatten(got)
    theirs, their_structure = tree.flatten(wanted)
    assert our_structure == their_structure
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert a.dtype == b.dtype and a.shape == b.shape, f"output {i}: {a.dtype} {a.shape}"
        error = relative_error(a, b)
        assert error <= tolerance, f"output {i} is off by {error:.2e}"


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest element of b; NaNs and infinities must agree."""
    if not a.numel():
        return 0.0
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    x, y = a.detach().to(wide), b.detach().to(wide)
    finite = torch.isfinite(y)
    if not torch.equal(torch.nan_to_num(x[~finite]), torch.nan_to_num(y[~finite])):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = y[finite].abs().max().clamp(min=1e-6)
    return float((x[finite] - y[finite]).abs().max() / largest)


def fallbacks(module: Module) -> Mapping[str, int]:
    found: Mapping[str, int] = module.metadata["fallbacks"]
    return found
