"""Random draws from torch's default generator, in program order, so that seeds mean what they do
in eager PyTorch. These ops are not PURE: they are neither merged nor moved past each other."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.ir.op import Trait, define
from accel.ir.types import Shape, TensorType


@define("random_uniform", Trait.RANDOM)
class RandomUniform:
    """Uniform on [low, high)."""

    @staticmethod
    def infer(
        *, shape: Shape, dtype: torch.dtype, low: float = 0.0, high: float = 1.0
    ) -> TensorType:
        return TensorType(shape, dtype)

    @staticmethod
    def evaluate(
        *, shape: tuple[int, ...], dtype: torch.dtype, low: float = 0.0, high: float = 1.0
    ) -> Tensor:
        if (low, high) == (0.0, 1.0):
            return torch.rand(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype).uniform_(low, high)


@define("random_normal", Trait.RANDOM)
class RandomNormal:
    """Normal with the given mean and standard deviation."""

    @staticmethod
    def infer(
        *, shape: Shape, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0
    ) -> TensorType:
        return TensorType(shape, dtype)

    @staticmethod
    def evaluate(
        *, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        draw = torch.randn(shape, dtype=dtype)
        return draw if (mean, std) == (0.0, 1.0) else draw * std + mean


@define("random_bernoulli", Trait.RANDOM)
class RandomBernoulli:
    """1 with probability p[i], else 0, in p's dtype."""

    @staticmethod
    def infer(p: TensorType) -> TensorType:
        return p

    @staticmethod
    def evaluate(p: Tensor) -> Tensor:
        return torch.bernoulli(p)


@define("random_integer", Trait.RANDOM)
class RandomInteger:
    """Uniform integers in [low, high)."""

    @staticmethod
    def infer(*, low: int, high: int, shape: Shape, dtype: torch.dtype = torch.int64) -> TensorType:
        return TensorType(shape, dtype)

    @staticmethod
    def evaluate(
        *, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype)


@define("native_dropout", Trait.RANDOM)
class NativeDropout:
    """(x * mask / (1 - p), mask) with mask true with probability 1 - p (Srivastava 2014)."""

    @staticmethod
    def infer(x: TensorType, *, p: float) -> tuple[TensorType, TensorType]:
        return x, x.with_dtype(torch.bool)

    @staticmethod
    def evaluate(x: Tensor, *, p: float) -> tuple[Tensor, Tensor]:
        y, mask = torch.ops.aten.native_dropout(x, p, True)
        return y, mask
