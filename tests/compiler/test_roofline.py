"""Floors of steps: every step has its op, bytes and operations are those of the program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.compiler.roofline import Roofline, Row, filled_rows, fold, roofline, time_steps
from accel.compiler.targets import get_target
from accel.ir.parser import parse_module

H200 = get_target("h200")


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def made(
    model: nn.Module, x: Tensor, target: str, **options: object
) -> tuple[accel.Compiled, Roofline]:
    fast = accel.compile(model.eval(), inputs=(x,), target=target, **options)  # type: ignore[arg-type]
    return fast, of(fast)


def of(fast: accel.Compiled, sizes: dict[str, int] | None = None) -> Roofline:
    (plan,) = fast.program.plans.values()
    function = parse_module(fast.ir("kernels")).functions[plan.name]
    return roofline(plan, function, sizes or {}, H200, "datasheet")


@pytest.mark.parametrize("target", ["cpu", "h200", "a100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_step_has_its_op(target: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(Block(), Block(), nn.Softmax(-1)).to(dtype)
    fast, line = made(model, torch.randn(2, 7, 64, dtype=dtype), target)
    (plan,) = fast.program.plans.values()
    assert line.matched
    steps = [n for row in line.rows for n in row.steps]
    assert steps == [n for n, step in enumerate(plan.steps) if step.kind != "view"]
    products = 2 * 2 * 2 * 7 * 64 * 256 * 2
    assert products <= sum(r.flops for r in line.rows) <= 1.5 * products
    weights = 2 * (2 * 64 * 256 + 64 + 256 + 128) * dtype.itemsize
    assert weights <= sum(r.bytes for r in line.rows) <= 2 * weights


def test_the_floor_is_the_longer_of_two_times() -> None:
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    _, line = made(nn.Linear(256, 512, bias=False).bfloat16(), x, "h200")
    (row,) = line.rows
    moved, flops = 2 * (64 * 256 + 256 * 512 + 64 * 512), 2 * 64 * 256 * 512
    assert (row.bytes, row.flops, row.dtype) == (moved, flops, "bfloat16")
    assert row.floor == max(moved / H200.bandwidth, flops / H200.flops["bfloat16"])


def test_sizes_of_a_call_count() -> None:
    fast = accel.compile(
        Block().eval(),
        inputs=(torch.randn(2, 7, 64),),
        dynamic_shapes={"x": {1: torch.export.Dim("length", max=4096)}},
    )
    (name,) = next(iter(fast.program.plans.values())).symbols
    small, large = of(fast, {name: 10}), of(fast, {name: 1000})
    assert large.rows[0].bytes > 50 * small.rows[0].bytes
    assert sum(r.flops for r in large.rows) == 100 * sum(r.flops for r in small.rows)


def test_without_the_ir_there_are_bytes_only() -> None:
    fast, line = made(Block(), torch.randn(2, 7, 64), "cpu")
    (plan,) = fast.program.plans.values()
    bare = roofline(plan, None, {}, H200, "datasheet")
    assert not bare.matched and len(bare.rows) == len(line.rows)
    assert sum(r.bytes for r in bare.rows) > 0 and not any(r.flops for r in bare.rows)


def test_equal_kernels_are_one_row_with_all_their_time() -> None:
    fast, line = made(nn.Sequential(Block(), Block(), Block()), torch.randn(2, 7, 64), "cpu")
    function = next(iter(fast._latest()[1].entry_points.values())).function
    time_steps(line, function, [torch.randn(2, 7, 64)])
    assert line.timed_by == "wall clock" and all(r.seconds > 0 for r in line.rows)
    folded = fold(line.rows)
    assert len(folded) < len(line.rows) and max(r.calls for r in folded) == 3
    for name in ("seconds", "bytes", "flops", "floor", "launches"):
        total = sum(getattr(r, name) for r in line.rows)
        assert sum(getattr(r, name) for r in folded) == pytest.approx(total)
    assert [r.lost for r in line.furthest(3)] == sorted((r.lost for r in folded), reverse=True)[:3]


class Attention(nn.Module):
    """Causal attention over a few tokens, as a language model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 128)
        self.q, self.k, self.v = (nn.Linear(128, 128, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (part(x).unflatten(-1, (2, 64)).transpose(1, 2) for part in
                   (self.q, self.k, self.v))  # fmt: skip
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2) @ self.table.weight.T


def test_a_cache_counts_as_far_as_it_is_filled_and_attention_by_its_pairs() -> None:
    model = accel.compile_generator(Attention().bfloat16().eval(), capacity=512, target="h200")
    functions = parse_module(model.ir("kernels")).functions

    def attention(entry: str, sizes: dict[str, int], filled: int | None) -> Row:
        plan = model.entry_points[entry].function.plan
        line = roofline(plan, functions[entry], sizes, H200, "datasheet", filled)
        assert line.matched
        (row,) = (r for r in line.rows if "attention" in r.what)
        return row

    (length,) = model.entry_points["prefill"].function.plan.symbols
    assert attention("prefill", {length: 256}, None).flops == 2 * 2 * 256 * (64 + 64)  # the last
    _, line = made(Attention().bfloat16(), torch.zeros(1, 256, dtype=torch.int64), "h200")
    flops = sum(r.flops for r in line.rows if "attention" in r.what)
    assert flops == 2 * 2 * (256 * 257 // 2) * (64 + 64)
    whole, few = attention("decode", {}, None), attention("decode", {}, 99)
    rows = 2 * 2 * 64 * 2  # both caches, two heads, a position
    assert whole.bytes - few.bytes == rows * (512 - 100)
    assert rows * 100 < few.bytes < rows * 120
    assert whole.flops - few.flops == 2 * 2 * (512 - 100) * (64 + 64)
    position = torch.tensor(99)
    arguments = functions["decode"].args
    given = [position if a.type.rank == 0 else torch.empty(0) for a in arguments]
    assert filled_rows(functions["decode"], given) == 99
    assert filled_rows(functions["prefill"], given) is None
