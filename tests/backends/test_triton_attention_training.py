"""Generated attention for training: forward with logsumexp, and gradients, interpreted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.attention_tiles import AttentionTile, BackwardTile
from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
# Largest error over the largest value. In 16 bits weights and slopes are rounded before products.
LIMITS = {F32: 5e-6, BF16: 2e-2, FP16: 3e-3}
FORWARD, BACKWARD = AttentionTile(32, 16, 4, 2), BackwardTile(32, 16, 4, 2)


@dataclass(frozen=True)
class Case:
    """q [batch, heads, queries, size], `groups` key heads; `mask` is a shape of an additive one."""

    batch: int = 2
    heads: int = 2
    groups: int = 2
    queries: int = 70
    keys: int = 70
    size: int = 32
    dtype: torch.dtype = F32
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: tuple[int, ...] | None = None
    turned: bool = False  # results [B, S, H, D]

    def types(self) -> list[TensorType]:
        q = TensorType((self.batch, self.heads, self.queries, self.size), self.dtype)
        k = TensorType((self.batch, self.groups, self.keys, self.size), self.dtype)
        return [q, k, k, *([TensorType(self.mask, self.dtype)] if self.mask is not None else [])]

    def attributes(self) -> dict[str, Any]:
        return {"scale": self.size**-0.5, "causal": self.causal, "window": self.window,
                "softcap": self.softcap}  # fmt: skip

    def forward(self) -> Function:
        def build(b: Any, *x: Any) -> Any:
            y, total = b.flash_attention(*x, **self.attributes())
            return [b.permute(y, axes=(0, 2, 1, 3)) if self.turned else y, total]

        return function_of(self.types(), build)

    def backward(self) -> Function:
        q, k, v, *mask = self.types()
        total = TensorType(q.shape[:3], F32)

        def build(b: Any, grad: Any, *x: Any) -> Any:
            made = b.flash_attention_backward(grad, *x, **self.attributes())
            return [b.permute(y, axes=(0, 2, 1, 3)) if self.turned else y for y in made]

        return function_of([q, q, k, v, q, total, *mask], build)

    def inputs(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(list(map(int, t.shape)), generator=generator) for t in self.types()]
        if self.mask is not None:  # some keys are not seen at all, and one query sees none
            made[3][..., 5:9] = float("-inf")
            made[3][..., -1, :] = float("-inf")
        return [x.to(self.dtype) for x in made]


def compare(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, text: str) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
        error = (a.double() - b.double()).abs().max()
        # Gradients of nothing (a window of one) are sums that cancel: of values around 1.
        assert float(error) <= LIMITS[dtype] * max(float(b.abs().max()), 0.5), text


def check(
    worker: Worker,
    case: Case,
    seed: int = 0,
    forward: AttentionTile = FORWARD,
    backward: BackwardTile = BACKWARD,
) -> list[str]:
    """Both kernels against the op's definition in float64; their sources."""
    inputs, sources = case.inputs(seed), []
    first = InterpretedKernels([case.forward()], worker, ["flash_attention"],
                               TritonBackend(tile=forward))  # fmt: skip
    want = interpret(case.forward(), inputs, WeightStore(), oracle=True)
    compare(first(0, inputs), want, case.dtype, first.source(0))
    sources.append(first.source(0))
    y = want[0].permute(0, 2, 1, 3) if case.turned else want[0]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1))
    given = [grad.to(case.dtype), *inputs[:3], y.to(case.dtype), want[1].float(), *inputs[3:]]
    second = InterpretedKernels([case.backward()], worker, ["flash_attention_backward"],
                                TritonBackend(tile=backward))  # fmt: skip
    want = interpret(case.backward(), given, WeightStore(), oracle=True)
    compare(second(0, given), want, case.dtype, second.source(0))
    return [*sources, second.source(0)]


CASES = {
    "plain": Case(),
    "causal": Case(causal=True),
    "causal, merged": Case(causal=True, turned=True, dtype=BF16, size=64),
    "other lengths": Case(queries=33, keys=101, causal=True),
    "more queries than keys": Case(queries=90, keys=40, causal=True),
    "whole blocks": Case(queries=64, keys=96, dtype=FP16),
    "groups": Case(heads=6, groups=2, causal=True, batch=1),
    "one group": Case(heads=3, groups=1, dtype=BF16, batch=1),
    "a window": Case(causal=True, window=20, queries=130, keys=130, batch=1),
    "a window of one": Case(causal=True, window=1, batch=1),
    "a window on one side": Case(window=9, batch=1),
    "a cap": Case(softcap=1.5, causal=True, batch=1),
    "a cap and a window": Case(softcap=1.5, causal=True, window=33, heads=4, groups=2, batch=1),
    "padding": Case(mask=(2, 1, 1, 70), dtype=BF16),
    "a bias of heads": Case(mask=(1, 2, 70, 70), causal=True, softcap=3.0),
    "a bias of pairs": Case(mask=(70, 70)),
    "one head": Case(batch=1, heads=1, groups=1),
    "odd head": Case(size=72, batch=1),
    "large head": Case(size=256, batch=1, heads=1, groups=1, dtype=FP16, queries=40, keys=40),
    "one query": Case(queries=1, keys=20, batch=1),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(worker: Worker, name: str) -> None:
    check(worker, CASES[name])


def random_case(seed: int) -> tuple[Case, AttentionTile, BackwardTile]:
    r = random.Random(seed)
    groups, share = r.choice((1, 2)), r.choice((1, 1, 2, 3))
    queries = r.randrange(1, 120)
    keys = queries if r.random() < 0.6 else r.randrange(1, 120)
    causal = r.random() < 0.6
    window = r.choice((None, None, 1, 13, 40)) if keys >= queries else None
    batch = r.choice((1, 2))
    mask = None
    if keys > 9 and not causal and window is None and r.random() < 0.5:
        mask = r.choice(((batch, 1, 1, keys), (1, groups * share, queries, keys), (1, keys)))
    case = Case(batch, groups * share, groups, queries, keys, r.choice((16, 24, 64)),
                r.choice((F32, BF16, FP16)), causal, window,
                r.choice((None, None, 1.5)), mask, r.random() < 0.5)  # fmt: skip
    sizes = (16, 32, 64)
    return (
        case,
        AttentionTile(r.choice(sizes), r.choice(sizes), 4, 2),
        BackwardTile(r.choice(sizes), r.choice(sizes), 4, 2),
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_cases(worker: Worker, seed: int) -> None:
    case, forward, backward = random_case(seed)
    check(worker, case, seed, forward, backward)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_compiles_without_a_gpu(arch: str, size: int) -> None:
    case = Case(1, 4, 2, 256, 256, size, BF16, causal=True, window=100, softcap=20.0)
    kernels = [
        kernel_of(case.forward(), "flash_attention"),
        kernel_of(case.backward(), "flash_attention_backward"),
    ]
    made = TritonBackend(arch).compile(kernels)
    launches = [launch for name in made.names for launch in made.launches[name]]
    assert len(launches) == 3
    room = (163 if arch == "sm_80" else 227) << 10
    assert all(x.binary.cubin and x.binary.shared <= room for x in launches)


def test_the_library_keeps_what_it_takes() -> None:
    def why(case: Case, arch: str = "sm_90") -> str | None:
        op = next(op for op in case.forward().ops if op.name == "flash_attention")
        return TritonBackend(arch).supports_anchor(op, "flash_attention")

    assert "cuDNN" in str(why(Case(dtype=BF16)))
    assert "float32" in str(why(Case(mask=(70, 70))))
    for case in (Case(dtype=BF16, mask=(70, 70)), Case(dtype=BF16, causal=True, window=4),
                 Case(softcap=2.0), Case(dtype=BF16, heads=4)):  # fmt: skip
        assert why(case) is None
