"""The op sweep: every definition's infer, evaluate and decompose agree, over dtypes and sizes.

For each sample of an op (see `tests.ir.samples`):

- `infer` gives the type of what `evaluate` makes; where `infer` takes operands, so does `evaluate`;
- the decomposition, run down to primitives by the interpreter, equals `evaluate` within the
  rounding of the dtype, and within 1e-9 in the float64 oracle;
- `infer` over symbolic sizes gives, with the sizes put in, what `infer` gives over ints.

A failure prints one line that repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from accel.errors import AccelError, InterpretError, TypeInferenceError
from accel.ir import Builder, Function, Trait, definition, definitions, interpret
from accel.ir.module import clone_function
from accel.ir.types import FLOATS, same_type, value_dtype
from tests.ir.samples import (
    ALL_DTYPES,
    DEFAULT_SIZES,
    OTHER_SIZES,
    REGISTRY,
    Sample,
    op_samples,
    sampled_definitions,
    size_variants,
    substitute_attribute,
)

OPS = sampled_definitions()
COMPOSITES = [name for name in OPS if definition(name).decompose is not None]

# Definitions with a Python meaning that no ATen overload, decomposition or view covers, and why.
PYTHON_ONLY = {
    "constant": "the weight store is read",
    "kernel": "its region is run",
    "call": "its region is run",
    "scan": "its region is run",
    "aten": "its attributes name the overload",
    "return": "a terminator",
    "yield": "a terminator",
}

# Operand and attribute cases of an op that no single ATen overload computes, and why.
NOT_ONE_CALL = {
    "conv": "channels-last programs exist only inside vendor calls",
    "flash_attention": "torch has no window and no cap",
    "flash_attention_backward": "torch has no window and no cap",
    "matmul": "int8 accumulates in int32, which a vendor call does",
}


def repro(sample: Sample, seed: int = 0) -> str:
    """One line that says what failed and makes the function and its inputs again."""
    again = f"s = {sample.origin}; s.function(), s.tensors({seed})"
    return f"repro: {sample} # from tests.ir.samples import op_samples; {again}"


def run(function: Function, inputs: list[Tensor], oracle: bool = False) -> list[Tensor]:
    if any(op.has(Trait.RANDOM) for op in function.ops):
        torch.manual_seed(0)
    return interpret(function, inputs, oracle=oracle)


def lowered(function: Function) -> Function:
    """A copy with every composite decomposed down to primitives."""
    copy = clone_function(function)
    for _ in range(20):
        found = [op for op in copy.ops if op.has(Trait.COMPOSITE)]
        if not found:
            return copy
        for op in found:
            op.replace_with(Builder(before=op).decompose(op))
    raise AssertionError("decompositions do not end")


def concrete_samples(name: str) -> Iterator[Sample]:
    """All dtypes over the default sizes, then float32 (or what the op takes) over small sizes."""
    for dtype in ALL_DTYPES:
        yield from op_samples(name, dtype)
    dtypes = REGISTRY[name].dtypes
    dtype = torch.float32 if torch.float32 in dtypes else sorted(dtypes, key=str)[0]
    for values in size_variants(name, dtype):
        yield from op_samples(name, dtype, values)


def inferred(sample: Sample) -> Function | None:
    """The sample's function; None where `infer` does not take the operands."""
    try:
        return sample.function()
    except TypeInferenceError:
        return None


def test_every_definition_has_samples() -> None:
    assert set(OPS) == set(REGISTRY)


@pytest.mark.parametrize("name", OPS)
def test_infer_is_the_type_of_what_evaluate_makes(name: str) -> None:
    for sample in concrete_samples(name):
        function = inferred(sample)
        if function is None:
            continue
        try:
            made = run(function, sample.tensors())
        except InterpretError as error:
            pytest.fail(f"{repro(sample)}: infer takes what evaluate does not: {error}")
        for value, tensor in zip(function.results, made, strict=True):
            shape, dtype = tuple(tensor.shape), tensor.dtype
            assert value.type.shape == shape, f"{repro(sample)}: {value.type}, made {shape}"
            assert value_dtype(value.dtype) == dtype, f"{repro(sample)}: made {dtype}"


@pytest.mark.parametrize("name", OPS)
def test_infer_takes_the_declared_dtypes(name: str) -> None:
    for dtype in sorted(REGISTRY[name].dtypes, key=str):
        for sample in op_samples(name, dtype):
            try:
                sample.function()
            except TypeInferenceError as error:
                pytest.fail(f"{repro(sample)}: {error}")


@pytest.mark.parametrize("name", OPS)
def test_symbolic_infer_agrees_with_concrete_infer(name: str) -> None:
    for dtype in (torch.float32, torch.int64):
        if dtype not in REGISTRY[name].dtypes:
            continue
        for index, symbolic in enumerate(op_samples(name, dtype, None)):
            try:
                general = [v.type for v in symbolic.function().results]
            except TypeInferenceError as error:
                pytest.fail(f"{repro(symbolic)}: {error}")
            for values in (DEFAULT_SIZES, OTHER_SIZES):
                sample = op_samples(name, dtype, values)[index]
                for wanted, given in zip(sample.function().results, general, strict=True):
                    shape = substitute_attribute(given.shape, values)
                    message = f"{repro(symbolic)}: {given} with {values} is not {wanted.type}"
                    assert same_type(given.with_shape(shape), wanted.type), message


def compare(made: Tensor, wanted: Tensor, exact: Tensor, inner: torch.dtype | None = None) -> str:
    """Empty if both are equal within rounding; `exact` is the float64 result.

    Each of both may round once to the result's dtype, and lose a few bits of the dtype that it
    computes in, relative to the largest element: results near 0 come from cancellation. Where a
    kernel rounds to `inner` on the way, that counts a few times too. Complex numbers are compared
    part by part.
    """
    if wanted.dtype.is_complex:
        made, wanted, exact = (torch.view_as_real(x) for x in (made, wanted, exact))
    if not wanted.dtype.is_floating_point:
        return "" if torch.equal(made, wanted) else f"{made.tolist()} is not {wanted.tolist()}"
    eps = torch.finfo(wanted.dtype).eps
    wide = min(eps, torch.finfo(torch.float32).eps)
    made, wanted = made.double(), wanted.double()  # eight-bit floats have few ops
    if not torch.equal(made.isnan(), wanted.isnan()):
        return f"NaN at other places: {made.tolist()}, {wanted.tolist()}"
    a, b, o = (x.double().nan_to_num(nan=0.0, posinf=1e300, neginf=-1e300) for x in (
        made, wanted, exact
    ))  # fmt: skip
    infinite = made.isinf() | wanted.isinf()
    if not torch.equal(a[infinite], b[infinite]):
        return f"infinity at other places: {made.tolist()}, {wanted.tolist()}"
    a, b, o = (x[~infinite & ~wanted.isnan()] for x in (a, b, o))
    if not a.numel():
        return ""
    largest = o[o.abs() < 1e299].abs().max().item() if (o.abs() < 1e299).any() else 0.0
    bound = 2 * eps * o.abs() + 32 * wide * largest + wide
    if inner is not None:
        bound += 4 * torch.finfo(inner).eps * largest
    worst = ((a - b).abs() / bound).max().item()
    return "" if worst <= 1 else f"off by {worst:.3g} times the rounding"


@pytest.mark.parametrize("name", COMPOSITES)
def test_decompose_equals_evaluate(name: str) -> None:
    floats = sorted(REGISTRY[name].dtypes, key=str)
    cases = [s for dtype in floats for s in op_samples(name, dtype)]
    cases += [s for values in size_variants(name, floats[0]) for s in
              op_samples(name, torch.float32, values)]  # fmt: skip
    for sample in cases:
        whole = inferred(sample)
        if whole is None:
            continue
        parts, inputs = lowered(whole), sample.tensors()
        for made, wanted, exact in zip(
            run(parts, inputs), run(whole, inputs), run(whole, inputs, oracle=True), strict=True
        ):
            assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype), repro(sample)
            message = compare(made, wanted, exact, sample.inner)
            assert not message, f"{repro(sample)}: {message}"


@pytest.mark.parametrize("name", COMPOSITES)
def test_decompose_equals_evaluate_over_the_reals(name: str) -> None:
    for dtype in sorted(FLOATS & REGISTRY[name].dtypes, key=str):
        for sample in op_samples(name, dtype):
            whole = sample.function()
            parts, inputs = lowered(whole), sample.tensors(seed=1)
            for made, wanted in zip(
                run(parts, inputs, oracle=True), run(whole, inputs, oracle=True), strict=True
            ):
                assert made.dtype == wanted.dtype, repro(sample)
                if not made.dtype.is_floating_point:
                    assert torch.equal(made, wanted), repro(sample)
                    continue
                finite = wanted[wanted.isfinite()]
                largest = finite.abs().max().item() if finite.numel() else 0.0
                torch.testing.assert_close(
                    made, wanted, rtol=1e-9, atol=1e-9 * max(largest, 1e-30), equal_nan=True,
                    msg=lambda m, s=sample: f"{repro(s)}: {m}",
                )  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_aten_call_computes_the_op(name: str) -> None:
    """Where `aten_call` names an overload, it computes what `evaluate` does."""
    d = definition(name)
    dtypes = REGISTRY[name].dtypes
    covered = []
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int8):
        for sample in op_samples(name, dtype) if dtype in dtypes else ():
            tensors = iter(sample.tensors())
            given = [None if o is None else next(tensors) for o in sample.operands]
            arguments = given + [None] * (len(d.operands) - len(given))
            attributes = d.complete_attributes(sample.attributes)
            call = d.aten_call(arguments, attributes)
            covered.append(call is not None)
            op = next(sample.function().ops)
            assert (op.aten_call() is None) == (call is None), repro(sample)
            if call is None or not d.evaluate or d.calls == ():
                continue
            assert call.overload.startswith("aten::"), repro(sample)
            wanted = run(sample.function(), sample.tensors())
            if d.has(Trait.RANDOM):
                torch.manual_seed(0)
            namespace, _, overload = call.overload.partition("::")
            function = getattr(getattr(torch.ops, namespace), overload.partition(".")[0])
            function = getattr(function, overload.partition(".")[2] or "default")
            made = function(*call.args, **call.kwargs)
            results = [made] if isinstance(made, Tensor) else [r for r in made if r is not None]
            for a, b in zip(results, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if d.calls and name not in NOT_ONE_CALL:
        assert all(covered), f"accel.{name} has cases without an ATen form"


def test_every_aten_form_names_an_operator() -> None:
    for d in definitions():
        for form in d.calls:
            form.resolve()


def test_every_op_can_be_run_without_its_definition() -> None:
    """By an ATen overload, by decomposition or as a view; the rest is listed with a reason."""
    rest = {
        d.name
        for d in definitions()
        if not d.calls and d.decompose is None and not d.has(Trait.VIEW)
    }
    assert rest == set(PYTHON_ONLY)


def test_compare_can_fail() -> None:
    x = torch.linspace(-1, 1, 9)
    assert compare(x, x.clone(), x) == ""
    assert compare(x * (1 + 1e-4), x, x)
    assert compare(x * (1 + 1e-4), x, x, torch.float16) == ""
    assert compare(x.where(x < 0.5, math.nan), x, x)
    assert compare(x.where(x < 0.5, math.inf), x, x)
    assert compare(torch.tensor([1]), torch.tensor([2]), x)


def test_errors_are_typed() -> None:
    with pytest.raises(AccelError):
        Sample("add", op_samples("add", torch.float32)[0].operands[:1], {}).function()
