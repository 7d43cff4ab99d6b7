"""Small programs around one weight, and a runner that records rewrites and misses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.ir import Builder, Function, Module, TensorType, Value, interpret, print_module, verify
from accel.passes.base import Context, Pass

F32 = torch.float32


@dataclass
class Outcome:
    """What a pass did to a module."""

    module: Module
    rewrites: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    notes: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        return print_module(self.module)

    def ops(self, name: str = "main") -> list[str]:
        return [op.name for op in self.module.functions[name].ops]


def apply(module: Module, *passes: Pass, fuel: int | None = None) -> Outcome:
    """Runs the passes in place and verifies the program after each."""
    outcome = Outcome(module)
    context = Context(
        fuel=fuel,
        on_rewrite=lambda name, rule, op: outcome.rewrites.append(rule),
        on_miss=lambda rule, op, reason: outcome.misses.append(reason),
    )
    for p in passes:
        context.current_pass = p.name
        p.run(module, context)
        verify(module)
        outcome.notes = context.notes
    return outcome


class Program:
    """Builds @main: `p = Program(); x = p.input(3, 8); p.done(p.b.linear(x, p.weight("w", t)))`."""

    def __init__(self, name: str = "main", module: Module | None = None) -> None:
        self.module = module or Module()
        self.function = self.module.add(Function(name))
        self.b = Builder(self.function.body)

    def input(self, *shape: int, dtype: torch.dtype = F32) -> Value:
        return self.function.body.add_arg(TensorType(shape, dtype), "x")

    def weight(self, name: str, tensor: Tensor | None = None) -> Value:
        if tensor is not None:
            assert self.module.weights.add(name, tensor) == name
        return self.b.constant(name, self.module.weights.type(name))

    def done(self, *values: Value) -> Module:
        self.b.op("return", values)
        verify(self.module)
        return self.module


def linear_program(weight: Tensor, rows: int = 3, name: str = "fc.weight") -> Module:
    p = Program()
    x = p.input(rows, weight.shape[1], dtype=weight.dtype)
    return p.done(p.b.linear(x, p.weight(name, weight)))


def run(module: Module, *inputs: Tensor, oracle: bool = False) -> Tensor:
    """The first result of @main."""
    return interpret(module.main, inputs, module.weights, oracle=oracle)[0]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded_weight(module: Module) -> Tensor:
    """The weight that a one-linear program multiplies by: its answer to the identity."""
    columns = int(module.main.args[0].shape[1])
    assert module.main.args[0].shape[0] == columns, "build the program with `columns` rows"
    return run(module, torch.eye(columns, dtype=module.main.args[0].dtype)).T
