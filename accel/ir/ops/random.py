"""Random draws from torch's default generator, in program order, so that seeds mean what they do
in eager PyTorch. These ops are not PURE: they are neither merged nor moved past each other."""

from __future__ import annotations

import torch

from accel.errors import TypeInferenceError
from accel.ir.op import Lit, Trait, aten, define
from accel.ir.ops.elementwise import check_dtype
from accel.ir.types import Dim, Shape, TensorType


@define("random_uniform", Trait.RANDOM)
class RandomUniform:
    """Uniform on [0, 1), as torch.rand; scale and shift with `mul` and `add`."""

    @staticmethod
    def infer(*, shape: Shape, dtype: torch.dtype) -> TensorType:
        result = TensorType(shape, dtype)
        check_dtype("random_uniform", "f", result)
        return result

    evaluate = aten("rand", "shape", dtype="dtype")


@define("random_normal", Trait.RANDOM)
class RandomNormal:
    """Standard normal, as torch.randn; scale and shift with `mul` and `add`."""

    @staticmethod
    def infer(*, shape: Shape, dtype: torch.dtype) -> TensorType:
        result = TensorType(shape, dtype)
        check_dtype("random_normal", "fc", result)
        return result

    evaluate = aten("randn", "shape", dtype="dtype")


@define("random_bernoulli", Trait.RANDOM)
class RandomBernoulli:
    """1 with probability p[i], else 0, in p's dtype."""

    @staticmethod
    def infer(p: TensorType) -> TensorType:
        check_dtype("random_bernoulli", "f", p)
        return p

    evaluate = aten("bernoulli", "p")


@define("random_integer", Trait.RANDOM)
class RandomInteger:
    """Uniform integers in [low, high)."""

    @staticmethod
    def infer(*, low: int, high: int, shape: Shape, dtype: torch.dtype = torch.int64) -> TensorType:
        result = TensorType(shape, dtype)
        check_dtype("random_integer", "fi", result)
        if low >= high:
            raise TypeInferenceError(f"accel.random_integer: nothing in [{low}, {high})")
        return result

    evaluate = aten("randint.low", "low", "high", "shape", dtype="dtype")


@define("random_permutation", Trait.RANDOM)
class RandomPermutation:
    """The integers 0 to `length` - 1 in random order."""

    @staticmethod
    def infer(*, length: Dim, dtype: torch.dtype = torch.int64) -> TensorType:
        result = TensorType((length,), dtype)
        check_dtype("random_permutation", "i", result)
        return result

    evaluate = aten("randperm", "length", dtype="dtype")


@define("native_dropout", Trait.RANDOM)
class NativeDropout:
    """(x * mask / (1 - p), mask) with mask true with probability 1 - p (Srivastava 2014)."""

    @staticmethod
    def infer(x: TensorType, *, p: float) -> tuple[TensorType, TensorType]:
        check_dtype("native_dropout", "f", x)
        if not 0 <= p <= 1:
            raise TypeInferenceError(f"accel.native_dropout: p = {p}")
        if x.numel() == 0:  # torch's mask would not be bool
            raise TypeInferenceError(f"accel.native_dropout: {x} is empty")
        return x, x.with_dtype(torch.bool)

    evaluate = aten("native_dropout", "x", "p", Lit(True))
