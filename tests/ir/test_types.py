"""Types and symbolic sizes: broadcasting, equality, substitution, bytes, MLIR spelling."""

from __future__ import annotations

import pytest
import sympy
import torch

from accel.errors import TypeInferenceError
from accel.ir import TensorType, symbol
from accel.ir.types import (
    DTYPE_BY_NAME,
    DTYPE_NAMES,
    SUB_BYTE_BITS,
    at_least,
    broadcast_shapes,
    normalize_axis,
    product,
    same_dim,
    same_shape,
    substitute,
    symbol_names,
    value_dtype,
)

N, M = symbol("n"), symbol("m")


def test_every_dtype_has_a_spelling() -> None:
    assert len(DTYPE_BY_NAME) == len(DTYPE_NAMES)
    assert str(TensorType((2, N), torch.uint4)) == "tensor<2x?xui4>"
    assert str(TensorType((), torch.complex64)) == "tensor<complex<f32>>"


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ([(2, 3), (3,)], (2, 3)),
        ([(2, 1), (1, 3), ()], (2, 3)),
        ([(N, 1), (1, M)], (N, M)),
        ([(N, 3), (N, 3)], (N, 3)),
        ([(2 * N,), (N + N,)], (2 * N,)),
        ([(0, 1), (1, 4)], (0, 4)),
        ([(1,), (0,)], (0,)),
        ([], ()),
    ],
)
def test_broadcasting(shapes: list[tuple[object, ...]], wanted: tuple[object, ...]) -> None:
    assert broadcast_shapes(*shapes) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("shapes", [[(2,), (3,)], [(N,), (M,)], [(N,), (2,)], [(0,), (2,)]])
def test_shapes_that_do_not_broadcast(shapes: list[tuple[object, ...]]) -> None:
    with pytest.raises(TypeInferenceError, match="do not broadcast"):
        broadcast_shapes(*shapes)  # type: ignore[arg-type]


def test_equal_sizes_are_found_equal() -> None:
    assert same_dim(2 * (N + 1), 2 * N + 2) and same_dim(N * (M + 1), N * M + N)
    assert not same_dim(N, M) and not same_dim(N, 2) and not same_dim(3, 2)
    assert same_dim(sympy.Integer(3), 3)
    assert same_shape((N, 2), (N, 2)) and not same_shape((N,), (N, 2))


def test_products_and_bytes() -> None:
    assert product(()) == 1 and product((2, 3)) == 6 and product((N, 0)) == 0
    assert product((N, 2, M)) == 2 * N * M
    assert TensorType((3, 5), torch.uint4).nbytes() == 9
    assert TensorType((3, 5), torch.int3).nbytes() == 6
    assert TensorType((), torch.uint1).nbytes() == 1
    assert TensorType((N, 4), torch.float32).nbytes() == 16 * N


def test_substitution() -> None:
    assert substitute(7, {"n": 2}) == 7 and substitute(N, {"n": 2}) == 2
    assert substitute(N, {"m": 2}) is N
    assert substitute(2 * N + M, {"n": 3}) == M + 6
    made = substitute(sympy.floor(N / 2) + 1, {"n": 5})
    assert made == 3 and type(made) is int
    assert symbol_names(M * N + N) == ("m", "n")


def test_comparisons_as_far_as_known() -> None:
    assert at_least(3, 3) and not at_least(3, 3, more=True) and at_least(N + 1, N, more=True)
    assert not at_least(N, M) and not at_least(N, 2)


def test_axes() -> None:
    assert [normalize_axis(a, 3) for a in (-3, -1, 0, 2)] == [0, 2, 0, 2]
    for axis, rank in ((3, 3), (-4, 3), (0, 0)):
        with pytest.raises(TypeInferenceError, match="out of range"):
            normalize_axis(axis, rank)


def test_values_of_sub_byte_dtypes_are_bytes() -> None:
    assert {value_dtype(d) for d in SUB_BYTE_BITS} == {torch.int8, torch.uint8}
    assert value_dtype(torch.int3) == torch.int8 and value_dtype(torch.uint1) == torch.uint8
    assert value_dtype(torch.bfloat16) == torch.bfloat16
