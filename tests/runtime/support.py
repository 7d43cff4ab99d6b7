"""Plans by hand: a builder, a few real kernels in C, and a vendor call made of torch functions."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.config import c_compiler
from accel.errors import ArtifactError, MissingDependencyError
from accel.runtime.executor import CompiledFunction
from accel.runtime.host import HostLibrary
from accel.runtime.interfaces import Library, LibraryCall, Operand
from accel.runtime.plan import FunctionPlan, SizeExpr, Step, ValueSpec
from accel.runtime.prepare import TensorWeights

C_SOURCE = r"""
#include <stdint.h>
#define F(i) ((float*)w[i])
#define KERNEL(name) int32_t accel_##name(int64_t* w, int64_t threads)
void accel_use_pool(void* a, void* b, void* c) {}
KERNEL(add)   { for (int64_t i = 0; i < w[3]; i++) F(2)[i] = F(0)[i] + F(1)[i]; return 0; }
KERNEL(mul)   { for (int64_t i = 0; i < w[3]; i++) F(2)[i] = F(0)[i] * F(1)[i]; return 0; }
KERNEL(twice) { for (int64_t i = 0; i < w[2]; i++) F(1)[i] = 2.0f * F(0)[i]; return 0; }
KERNEL(reverse) { for (int64_t i = 0; i < w[2]; i++) F(1)[i] = F(0)[w[2] - 1 - i]; return 0; }
KERNEL(fold) {
  for (int64_t i = 0; i < w[3]; i++) F(2)[i] = F(0)[i] + F(1)[w[3] - 1 - i];
  return 0;
}
KERNEL(widen) { for (int64_t i = w[2] - 1; i >= 0; i--) ((double*)w[1])[i] = F(0)[i]; return 0; }
KERNEL(narrow) { for (int64_t i = 0; i < w[2]; i++) F(1)[i] = ((double*)w[0])[i]; return 0; }
KERNEL(split) {
  for (int64_t i = 0; i < w[3]; i++) { float x = F(0)[i]; F(1)[i] = x + 1.0f; F(2)[i] = x - 1.0f; }
  return 0;
}
"""
# symbol -> (number of inputs, number of outputs, in-place pairs, meaning)
KERNELS: dict[str, tuple[int, int, list[list[int]], Callable[..., Any]]] = {
    "add": (2, 1, [[0, 0], [0, 1]], lambda a, b: a + b),
    "mul": (2, 1, [[0, 0], [0, 1]], lambda a, b: a * b),
    "twice": (1, 1, [[0, 0]], lambda a: 2.0 * a),
    "reverse": (1, 1, [], lambda a: a.reshape(-1).flip(0).reshape(a.shape)),
    "fold": (2, 1, [[0, 0]], lambda a, b: a + b.reshape(-1).flip(0).reshape(b.shape)),
    "split": (1, 2, [[0, 0], [1, 0]], lambda a: (a + 1.0, a - 1.0)),
}


@functools.cache
def shared_object() -> bytes:
    """The kernels above, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "k.c", Path(folder) / "k.so"
        source.write_text(C_SOURCE)
        command = [c_compiler(), "-O1", "-shared", "-fPIC", "-o", str(target), str(source)]
        subprocess.run(command, check=True)
        return target.read_bytes()


@functools.cache
def host_code() -> HostLibrary:
    return HostLibrary(shared_object())


class LinearLibrary:
    """x @ weight.T, with the transposed weight packed once."""

    name = "test.linear"

    def __init__(self) -> None:
        self.prepared = 0

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        self.prepared += 1
        weight = operands[1].weight if len(operands) > 1 and operands[1] is not None else None
        if weight is None:
            raise ArtifactError("test.linear wants a constant weight")
        packed = weight.t().contiguous()
        scale = options.get("scale", 1.0)
        fixed = operands[0].weight if operands[0] is not None else None
        if fixed is not None:
            return lambda: (fixed @ packed) * scale
        return lambda x: (x @ packed) * scale


class Registry:
    def __init__(self, *libraries: Library) -> None:
        self._libraries = {entry.name: entry for entry in libraries}

    def __call__(self, name: str) -> Library:
        if name not in self._libraries:
            raise MissingDependencyError(f"no library entry '{name}'")
        return self._libraries[name]


class Plan:
    """Builds a FunctionPlan and, beside it, its meaning: `reference(inputs)`."""

    def __init__(self, name: str = "main", **symbols: tuple[int, int | None]) -> None:
        self.values: list[ValueSpec] = []
        self.steps: list[Step] = []
        self.inputs: list[int] = []
        self.weights: dict[str, Tensor] = {}
        self.name, self.symbols = name, symbols
        self.donates: dict[int, int] = {}
        self._meaning: list[Callable[[dict[int, Any]], None]] = []

    def value(self, kind: Any, shape: Sequence[SizeExpr], dtype: str = "float32", **k: Any) -> int:
        self.values.append(ValueSpec(kind, dtype, list(shape), **k))
        return len(self.values) - 1

    def input(self, *shape: SizeExpr, dtype: str = "float32", name: str = "") -> int:
        value = self.value("input", shape, dtype, name=name, index=len(self.inputs))
        self.inputs.append(value)
        return value

    def weight(self, name: str, tensor: Tensor) -> int:
        self.weights[name] = tensor
        value = self.value("weight", list(tensor.shape), str(tensor.dtype)[6:], name=name)
        self._meaning.append(lambda env: env.__setitem__(value, tensor))
        return value

    def kernel(self, symbol: str, *operands: int) -> Any:
        _, count, pairs, meaning = KERNELS[symbol]
        assert all(self.values[v].dtype == "float32" for v in operands)
        shape = self.values[operands[0]].shape
        outputs = [self.value("buffer", shape) for _ in range(count)]
        size: SizeExpr = ["*", 1, *shape]
        options = {"inplace": pairs} if pairs else {}
        self.steps.append(Step("kernel", f"accel_{symbol}", [*operands], outputs, options, [size]))
        self._mean(meaning, operands, outputs)
        return outputs[0] if count == 1 else outputs

    def library(self, x: int, weight: int, **options: Any) -> int:
        features = self.values[weight].shape[0]
        output = self.value("owned", [*self.values[x].shape[:-1], features])
        self.steps.append(Step("library", "test.linear", [x, weight], [output], options))
        scale = options.get("scale", 1.0)
        self._mean(lambda a, w: (a @ w.t()) * scale, [x, weight], [output])
        return output

    def aten(
        self,
        name: str,
        operands: Sequence[int],
        shape: Sequence[SizeExpr],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        dtype = kwargs.pop("result", self.values[operands[0]].dtype if operands else "float32")
        meaning = kwargs.pop("meaning")
        output = self.value("owned", shape, dtype)
        options = {"args": list(args), "kwargs": kwargs}
        self.steps.append(Step("aten", name, [*operands], [output], options))
        self._mean(meaning, operands, [output])
        return output

    def view(self, kind: str, x: int, shape: Sequence[SizeExpr], **options: Any) -> int:
        output = self.value("view", shape, self.values[x].dtype)
        self.steps.append(Step("view", kind, [x], [output], options))
        meaning: dict[str, Callable[[Tensor], Tensor]] = {
            "reshape": lambda a: a.reshape(self._sizes(shape, a)),
            "expand": lambda a: a.expand(self._sizes(shape, a)),
            "permute": lambda a: a.permute(options["axes"]),
            "slice": lambda a: a.narrow(
                options["axis"], options["start"], options["stop"] - options["start"]
            ),
        }
        self._mean(meaning[kind], [x], [output])
        return output

    def _sizes(self, shape: Sequence[SizeExpr], like: Tensor) -> list[int]:
        return [s if isinstance(s, int) else -1 for s in shape]

    def _mean(
        self, meaning: Callable[..., Any], operands: Sequence[int], outputs: Sequence[int]
    ) -> None:
        def run(env: dict[int, Any]) -> None:
            found = meaning(*[env[v] for v in operands])
            for value, result in zip(outputs, found if len(outputs) > 1 else [found]):
                env[value] = result

        self._meaning.append(run)

    def done(self, *outputs: int) -> FunctionPlan:
        self.outputs = list(outputs)
        return FunctionPlan(
            self.name,
            self.values,
            self.inputs,
            self.outputs,
            self.steps,
            dict(self.symbols),
            self.donates,
        )

    def compile(self, *outputs: int, library: Library | None = None) -> CompiledFunction:
        return CompiledFunction(
            self.done(*outputs),
            TensorWeights(self.weights),
            libraries=Registry(library or LinearLibrary()),
            host=host_code(),
        )

    def reference(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        env: dict[int, Any] = {v: t.clone() for v, t in zip(self.inputs, inputs)}
        for run in self._meaning:
            run(env)
        return [env[v].clone() for v in self.outputs]


def operand(i: int) -> dict[str, int]:
    return {"operand": i}


def same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)
