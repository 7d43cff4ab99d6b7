"""What the pass tests share: small programs in a line, running passes, comparing meanings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.ir import Builder, Function, Module, SymbolInfo, TensorType, Value, interpret, verify
from accel.ir.module import Op

F32 = torch.float32
F16 = torch.float16
BF16 = torch.bfloat16
F64 = torch.float64
I64 = torch.int64
I32 = torch.int32
BOOL = torch.bool


def t(*shape: Any, dtype: torch.dtype = F32) -> TensorType:
    """A type: `t(2, 3)`, `t(4, dtype=I64)`; sizes may be symbols."""
    return TensorType(tuple(shape), dtype)


class ProgramBuilder(Builder):
    """A builder that also stores weights: `b.weight(tensor)`."""

    def __init__(self, module: Module, function: Function) -> None:
        super().__init__(function.body)
        self.module = module

    def weight(self, tensor: Tensor, name: str = "w") -> Value:
        stored = self.module.weights.add(name, tensor)
        return self.constant(stored, self.module.weights.type(stored))


def program(make: Callable[..., Any], *types: TensorType) -> Module:
    """A module whose @main is `make(b, *arguments)`, which returns one value or several."""
    module = Module()
    function = module.add(Function("main", types, [f"a{i}" for i in range(len(types))]))
    for type in types:
        for dim in type.shape:
            if not isinstance(dim, int):
                for s in dim.free_symbols:
                    function.symbols[s.name] = SymbolInfo(1, 64)
    b = ProgramBuilder(module, function)
    made = make(b, *function.args)
    b.op("return", [made] if isinstance(made, Value) else list(made))
    verify(module)
    return module


def ops(module: Module) -> list[str]:
    """Names of the ops of @main, in order, without the return."""
    return [op.name for op in module.main.ops if op.name != "return"]


def compute(module: Module) -> list[str]:
    """Like `ops`, without constants."""
    return [n for n in ops(module) if n not in ("constant", "full", "iota")]


def find(module: Module, name: str) -> Op:
    """The only op of this name in @main."""
    (found,) = [op for op in module.main.ops if op.name == name]
    return found


def run(module: Module, inputs: Sequence[Tensor], oracle: bool = True) -> list[Tensor]:
    return interpret(module.main, inputs, module.weights, oracle=oracle)
