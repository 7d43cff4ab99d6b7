"""The op sweep through the compiler: every definition's samples, compiled, against the interpreter.

Each sample is one function; those of an op compile as one module, as programs are: generated
kernels where the generator takes the op, vendor calls, ATen elsewhere. Integers must be equal,
floats within the rounding of their dtype.

Left out: what only weights may be (sub-byte dtypes), and layouts that exist inside calls only.
"""

from __future__ import annotations

import pytest
import torch

from accel.compiler.assemble import to_function
from accel.compiler.options import Options
from accel.compiler.pipeline import Program, compile_module
from accel.compiler.targets import host_target
from accel.errors import TypeInferenceError
from accel.ir import Function, Trait, definition, interpret
from accel.ir.module import Module, clone_function
from accel.ir.types import SUB_BYTE_BITS
from tests.ir.samples import OTHER_SIZES, REGISTRY, Sample, op_samples, sampled_definitions
from tests.ir.test_ops_sweep import PYTHON_ONLY, compare, repro

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
OPS = [name for name in sampled_definitions() if name in REGISTRY.keys() - PYTHON_ONLY.keys()]


# int8 products accumulate in int32, which no library here does: a typed error.
REFUSED = {("matmul", torch.int8)}


def compiled(name: str) -> tuple[Program, list[tuple[Sample, Function]]]:
    """One program of all samples of an op, and the functions as they were."""
    module = Module()
    cases = []
    dtypes = [d for d in DTYPES if d in REGISTRY[name].dtypes and (name, d) not in REFUSED]
    samples = [s for dtype in dtypes for s in op_samples(name, dtype)]
    samples += op_samples(name, (dtypes or sorted(REGISTRY[name].dtypes, key=str))[0], OTHER_SIZES)
    for sample in samples:
        try:
            function = sample.function()
        except TypeInferenceError:
            continue
        types = [v.dtype for v in (*function.args, *function.results)]
        if any(t in SUB_BYTE_BITS for t in types) or sample.attributes.get("layout") == "nhwc":
            continue
        function.name = f"f{len(cases)}"
        cases.append((sample, clone_function(function)))
        module.add(function)
    return compile_module(module, host_target(), Options(cache=False)), cases


@pytest.mark.parametrize("name", OPS)
def test_compiled_ops_equal_the_interpreter(name: str) -> None:
    program, cases = compiled(name)
    for sample, function in cases:
        inputs = sample.tensors()
        torch.manual_seed(0)
        wanted = interpret(function, inputs)
        exact = interpret(function, inputs, oracle=True)
        torch.manual_seed(0)
        got = to_function(program, function.name)(inputs)
        for a, b, o in zip(got, wanted, exact, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), repro(sample)
            # Vendor attention and products may round to the dtype on the way.
            inner = sample.inner or (a.dtype if definition(name).has(Trait.CONTRACTION) else None)
            message = compare(a, b, o, inner)
            assert not message, f"{repro(sample)}: {message}"
