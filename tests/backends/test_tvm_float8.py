"""Casts to float8_e4m3fn in generated code against torch's, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.ir import TensorType
from tests.backends.kernels import Runner, f32, function_of

COUNT = 1 << 14
E4M3 = torch.float8_e4m3fn


def _values() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (COUNT,), generator=generator)
    spread = torch.randn(COUNT, generator=generator) * 10.0 ** torch.linspace(-6, 4, COUNT)
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    known = codes[codes.isfinite()].sort().values
    middle = (known[1:] + known[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(side)) for side in (-1e9, 1e9)]
    last = torch.tensor([463.9, 464.0, 464.1, 480.0, 1e30, torch.inf, -torch.inf, -0.0])
    edges = torch.cat([known, middle, *near, last])
    padded = torch.cat([edges, edges.new_zeros(COUNT - len(edges))])
    return [bits.to(torch.int32).view(torch.float32), spread, padded]


def test_casts_round_as_torch_does() -> None:
    runner = Runner(
        [
            function_of([f32(COUNT)], lambda b, x: b.cast(x, dtype=E4M3)),
            function_of(
                [f32(COUNT)], lambda b, x: b.cast(b.cast(x, dtype=E4M3), dtype=torch.float32)
            ),
            function_of([TensorType((COUNT,), E4M3)], lambda b, x: b.cast(x, dtype=torch.float32)),
        ],
        ["pointwise"] * 3,
    )
    for values in _values():
        wanted = values.to(E4M3)
        (stored,), (back,) = runner(0, [values]), runner(1, [values])
        there = ~wanted.isnan()
        assert torch.equal(stored.view(torch.uint8)[there], wanted.view(torch.uint8)[there])
        assert bool(stored.isnan()[~there].all())
        torch.testing.assert_close(back, wanted.float(), rtol=0, atol=0, equal_nan=True)
        (read,) = runner(2, [wanted])
        torch.testing.assert_close(read, wanted.float(), rtol=0, atol=0, equal_nan=True)
