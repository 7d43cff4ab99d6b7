"""Generated products over blocked weights against the interpreter in float64."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.tvm import blocked
from accel.backends.tvm.blocked import Registers, block_columns, registers, tile_rows
from accel.errors import BackendError
from accel.ir import Function, Op, WeightStore, interpret
from accel.runtime.manifest import cpu_features
from tests.backends.kernels import BACKEND, Runner, f32, function_of, kernel_of, sym

S = sym("s0")


def plain(x: tuple[Any, ...], columns: int) -> Op:
    function = function_of([f32(*x), f32(columns, x[-1])], lambda b, x, w: b.linear(x, w))
    return next(op for op in function.ops if op.name == "linear")


def product(x: tuple[Any, ...], columns: int, epilogue: Any = None) -> tuple[Function, int]:
    """A linear with its weight in blocks, as the pass makes it; and a block's size."""
    lanes = block_columns(plain(x, columns))
    blocks = -(-columns // lanes)

    def build(b: Any, x: Any, weight: Any, *rest: Any) -> Any:
        turned = b.permute(weight, axes=(0, 2, 1))
        wide = b.reshape(turned, shape=(blocks * lanes, x.shape[-1]))
        y = b.linear(x, wide)
        if blocks * lanes != columns:
            y = b.slice(y, axis=len(x.shape) - 1, start=0, stop=columns)
        return epilogue(b, y, *rest) if epilogue is not None else y

    types = [f32(*x), f32(blocks, x[-1], lanes)]
    if epilogue is not None:
        types += [f32(columns), f32(*x[:-1], columns)]
    return function_of(types, build), lanes


def finish(b: Any, y: Any, bias: Any, other: Any) -> Any:
    return b.add(b.gelu(b.add(y, bias)), other)


def in_blocks(weight: Tensor, lanes: int) -> Tensor:
    columns, depth = weight.shape
    padded = torch.zeros(-(-columns // lanes) * lanes, depth)
    padded[:columns] = weight
    return padded.reshape(-1, lanes, depth).transpose(1, 2).contiguous()


SHAPES = [
    ((49, 40), 112), ((1, 64), 48), ((7, 3), 1), ((13, 17), 16), ((2, 3, 33), 24), ((196, 24), 144),
    ((100, 576), 960), ((64, 1), 80), ((3, 100), 1000), ((5, 2, 4, 8), 33), ((31, 300), 400),
]  # fmt: skip


def check(function: Function, runner: Runner, number: int, inputs: list[Tensor]) -> None:
    (got,) = runner(number, inputs)
    (wanted,) = interpret(function, inputs, WeightStore(), oracle=True)
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= 3e-6 * float(wanted.abs().max())


def test_shapes_and_epilogues() -> None:
    """One library for all; sizes that leave rows, columns and lanes over."""
    made = [product(x, n, e) for x, n in SHAPES for e in (None, finish)]
    runner = Runner([f for f, _ in made], ["matmul"] * len(made))
    cases = [(x, n) for x, n in SHAPES for _ in range(2)]
    for number, ((x, n), (function, lanes)) in enumerate(zip(cases, made)):
        inputs = [torch.randn(x), in_blocks(torch.randn(n, x[-1]), lanes)]
        if len(function.args) == 4:
            inputs += [torch.randn(n), torch.randn(*x[:-1], n)]
        check(function, runner, number, inputs)


def test_symbolic_rows() -> None:
    function, lanes = product((2, S, 40), 100, finish)
    runner = Runner([function], ["matmul"])
    weight = in_blocks(torch.randn(100, 40), lanes)
    for size in (0, 1, 3, 64):
        inputs = [torch.randn(2, size, 40), weight, torch.randn(100), torch.randn(2, size, 100)]
        if size == 0:
            assert runner(0, inputs)[0].shape == (2, 0, 100)
        else:
            check(function, runner, 0, inputs)


def test_rows_read_through_views() -> None:
    """x as every second pixel of an image: its rows do not merge into one loop."""

    def build(b: Any, x: Any, weight: Any) -> Any:
        x = b.slice(b.slice(x, axis=1, start=0, stop=9, step=2), axis=2, start=1, stop=9, step=2)
        wide = b.reshape(b.permute(weight, axes=(0, 2, 1)), shape=(48, 24))
        return b.relu(b.linear(x, wide))

    function = function_of([f32(2, 9, 9, 24), f32(1, 24, 48)], build)
    inputs = [torch.randn(2, 9, 9, 24), torch.randn(1, 24, 48)]
    check(function, Runner([function], ["matmul"]), 0, inputs)


def test_nan_and_infinity_stay_in_their_row() -> None:
    function, lanes = product((20, 40), 100)
    x, weight = torch.randn(20, 40), torch.randn(100, 40)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    (got,) = Runner([function], ["matmul"])(0, [x, in_blocks(weight, lanes)])
    wanted = x @ weight.T
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())


@pytest.mark.parametrize("rows", [1, 2, 49, 196, 3136, S])
@pytest.mark.parametrize("columns", [1, 24, 112, 144, 1000, 3072])
def test_tiles_fit_the_registers_and_cover_the_rows(rows: Any, columns: int) -> None:
    lanes = block_columns(plain((rows, 64), columns))
    tile = tile_rows(lanes, rows)
    unit = registers()
    assert lanes % unit.lanes == 0
    assert 1 <= tile * (lanes // unit.lanes) <= (25 if unit.tiles == blocked._MANY else 12)
    if isinstance(rows, int):
        assert tile * -(-rows // tile) - rows < tile


@pytest.mark.parametrize("unit", [Registers(8, blocked._FEW), Registers(4, blocked._MANY)])
def test_tiles_of_other_vector_units(unit: Registers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tile's size depends on the unit: any machine can run any tile."""
    monkeypatch.setattr(blocked, "registers", lambda: unit)
    made = [product((13, 40), 100, finish), product((49, 17), 24)]
    runner = Runner([f for f, _ in made], ["matmul"] * 2)
    first = [torch.randn(13, 40), in_blocks(torch.randn(100, 40), made[0][1])]
    check(made[0][0], runner, 0, [*first, torch.randn(100), torch.randn(13, 100)])
    second = [torch.randn(49, 17), in_blocks(torch.randn(24, 17), made[1][1])]
    check(made[1][0], runner, 1, second)


def test_code_for_another_cpu() -> None:
    """A CPU name that LLVM knows is taken, with its own vectors."""
    function, _ = product((8, 16), 16)
    kernel = kernel_of(function, "matmul")
    cpu = {"x86_64": "haswell", "AMD64": "haswell"}.get(platform.machine(), "generic")
    assert BACKEND.compile([kernel], cpu=cpu).library != BACKEND.compile([kernel]).library


REFUSED = {
    "dtype": (lambda b, x, w: b.linear(*(b.cast(v, dtype=torch.float64) for v in (x, w))),
              "float64"),
    "other op": (lambda b, x, w: b.matmul(x, b.permute(w, axes=(1, 0))), "accel.matmul"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_code_says_why(name: str) -> None:
    build, wanted = REFUSED[name]
    function = function_of([f32(20, 8), f32(16, 8)], build)
    op = next(o for o in function.ops if o.name in ("linear", "matmul"))
    assert wanted in str(BACKEND.supports_anchor(op, "matmul"))


def test_a_weight_that_is_not_in_blocks_is_an_error() -> None:
    function = function_of([f32(20, 8), f32(16, 8)], lambda b, x, w: b.linear(x, w))
    with pytest.raises(BackendError, match="not stored in blocks"):
        BACKEND.compile([kernel_of(function, "matmul")])


@dataclass
class Image:
    """A channels-last convolution of an image [N, H, W, C]."""

    image: tuple[Any, ...]
    outputs: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    size: int = 0

    def function(self) -> tuple[Function, int]:
        channels = self.image[3]
        geometry: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation}
        geometry |= {"groups": 1, "layout": "nhwc", "padding": (0, 0)}
        border = (0, *self.padding, 0)
        plain_conv = function_of(
            [f32(*self.image), f32(self.outputs, channels, *self.window)],
            lambda b, x, w: b.conv(b.pad(x, low=border, high=border), w, **geometry),
        )
        lanes = block_columns(next(op for op in plain_conv.ops if op.name == "conv"))
        blocks = -(-self.outputs // lanes)

        def build(b: Any, x: Any, weight: Any, bias: Any) -> Any:
            turned = b.permute(weight, axes=(0, 4, 3, 1, 2))
            wide = b.reshape(turned, shape=(blocks * lanes, channels, *self.window))
            if any(border):
                x = b.pad(x, low=border, high=border)
            y = b.conv(x, wide, **geometry)
            if blocks * lanes != self.outputs:
                y = b.slice(y, axis=3, start=0, stop=self.outputs)
            return b.relu(b.add(y, bias))

        stored = f32(blocks, *self.window, channels, lanes)
        return function_of([f32(*self.image), stored, f32(self.outputs)], build), lanes


IMAGES = [
    Image((1, 23, 21, 3), 32, (3, 3), (2, 2), (1, 1)),
    Image((2, 9, 9, 24), 40, (1, 1), (2, 2)),
    Image((1, 12, 10, 4), 100, (5, 3), (1, 2), (2, 0), (1, 2)),
    Image((3, 1, 30, 8), 16, (1, 7), padding=(0, 3)),
    Image((S, 6, 7, 5), 24, (3, 3), padding=(1, 1), size=4),
]


def test_convolutions() -> None:
    made = [i.function() for i in IMAGES]
    runner = Runner([f for f, _ in made], ["matmul"] * len(made))
    for number, (image, (function, _)) in enumerate(zip(IMAGES, made)):
        shapes = [[image.size if d is S else int(d) for d in a.type.shape] for a in function.args]
        check(function, runner, number, [torch.randn(s) for s in shapes])


@pytest.mark.skipif("avx512f" not in cpu_features(), reason="needs a CPU with AVX-512")
@pytest.mark.parametrize("cpu", ["skylake-avx512", "rocketlake", "sapphirerapids", "znver4"])
def test_sums_stay_in_wide_registers(cpu: str, tmp_path: Path) -> None:
    """LLVM would halve a tile's vectors where it thinks of the clock, and spill them; and the hint
    for what is read once is slow on some CPUs."""
    function, _ = product((1, 576), 4096)
    library = tmp_path / "kernels.so"
    library.write_bytes(BACKEND.compile([kernel_of(function, "matmul")], cpu).library)
    found = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True)
    added = [line for line in found.stdout.splitlines() if "vfmadd" in line]
    assert added and all("%zmm" in line for line in added)
    assert "prefetcht1" in found.stdout and "prefetchnta" not in found.stdout
