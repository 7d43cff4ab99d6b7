"""Runs a function of tensor-level ops as one generated kernel, for tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from accel.backends.tvm import CompiledKernels, TvmBackend
from accel.ir import Builder, Function, Op, TensorType, Value, WeightStore, definition, interpret
from accel.ir.interpret import bind_symbols
from accel.ir.module import Region, clone_region_into
from accel.ir.types import SUB_BYTE_BITS, substitute
from accel.runtime.host import HostLibrary

BACKEND = TvmBackend()
Build = Callable[..., Value | Sequence[Value]]


def function_of(types: Sequence[TensorType], build: Build) -> Function:
    """A function whose body `build(builder, *arguments)` makes."""
    function = Function("main", list(types))
    made = build(Builder(function.body), *function.args)
    results = [made] if isinstance(made, Value) else list(made)
    Builder(function.body).op("return", results)
    return function


def kernel_of(function: Function, kind: str = "pointwise", weights: int | None = None) -> Op:
    """An `accel.kernel` op with the function's body. Operands from number `weights` on are
    constants, if it is given."""
    region = Region([a.type for a in function.args])
    mapping: dict[Value, Value] = {}
    clone_region_into(function.body, region, mapping)
    last = region.last
    assert last is not None
    results = list(last.operands)
    last.erase()
    Builder(region).op("yield", results)
    outer = Region([a.type for a in function.args])
    count = len(outer.args) if weights is None else weights
    made = [Builder(outer).constant(f"w{i}", a.type) for i, a in enumerate(outer.args[count:])]
    return Op(
        definition("kernel"),
        [*outer.args[:count], *made],
        {"backend": "tvm", "kind": kind},
        [v.type for v in results],
        regions=[region],
    )


class Runner:
    """Compiles functions into one library and runs them."""

    def __init__(self, functions: Sequence[Function], kinds: Sequence[str] = ()) -> None:
        self.functions = list(functions)
        kinds = kinds or ["pointwise"] * len(self.functions)
        self.kernels = [kernel_of(f, kind) for f, kind in zip(self.functions, kinds)]
        self.compiled: CompiledKernels = BACKEND.compile(self.kernels)
        self.library = HostLibrary(self.compiled.library)

    def __call__(self, number: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        function = self.functions[number]
        shapes = [
            tuple(map(int, a.shape)) if a.dtype in SUB_BYTE_BITS else tuple(t.shape)
            for a, t in zip(function.args, inputs)
        ]  # sub-byte tensors come packed
        symbols = bind_symbols(function, shapes)
        outputs = []
        for r in function.results:
            shape = [int(substitute(d, symbols)) for d in r.shape]
            outputs.append(poisoned(shape, r.dtype))
        for result, operand in self.compiled.updates.get(self.compiled.symbols[number], ()):
            outputs[result].copy_(inputs[operand])
        dense = [t.contiguous() for t in inputs]
        names = [str(d) for d in BACKEND.dims(self.kernels[number])]
        words = [t.data_ptr() for t in (*dense, *outputs)] + [symbols[n] for n in names]
        array = (ctypes.c_int64 * len(words))(*words)
        self.library.function(self.compiled.symbols[number])(ctypes.addressof(array))
        return outputs


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that no kernel leaves as it is by accident."""
    out = torch.empty(tuple(shape), dtype=dtype)
    if out.numel():
        out.reshape(-1).view(torch.uint8).fill_(0x5A if dtype != torch.bool else 1)
    return out


def run_kernel(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    return Runner([function])(0, inputs)


def reference(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    return interpret(function, inputs, WeightStore())


def sym(name: str) -> sympy.Expr:
    from accel.ir.types import symbol

    return symbol(name)


def f32(*shape: Any) -> TensorType:
    return TensorType(tuple(shape), torch.float32)
