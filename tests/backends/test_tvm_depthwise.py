"""Generated depthwise convolutions against the interpreter in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from accel.ir import Function, Op, WeightStore, interpret
from tests.backends.kernels import BACKEND, Runner, f32, function_of, sym

S = sym("s0")


@dataclass
class Case:
    """An image [N, H, W, C]; `pad` is (top, left, bottom, right) in an op before."""

    image: tuple[Any, ...]
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pad: tuple[int, int, int, int] | None = None
    pad_value: float = 0.0
    bias: bool = False
    size: int = 0

    def function(self) -> Function:
        channels, (height, width) = self.image[3], self.window

        def build(b: Any, x: Any, w: Any, bias: Any, scale: Any) -> Any:
            weight = b.reshape(b.permute(w, axes=(2, 0, 1)), shape=(channels, 1, height, width))
            if self.pad is not None:
                top, left, bottom, right = self.pad
                low, high = (0, top, left, 0), (0, bottom, right, 0)
                x = b.pad(x, low=low, high=high, value=self.pad_value)
            y = b.conv(
                x, weight, bias if self.bias else None, stride=self.stride, padding=self.padding,
                dilation=(1, 1), groups=channels, layout="nhwc",
            )  # fmt: skip
            return b.mul(b.relu(y), scale)

        types = [f32(*self.image), f32(height, width, channels), f32(channels), f32(channels)]
        return function_of(types, build)


CASES: dict[str, Case] = {
    "plain": Case((2, 9, 11, 32), (3, 3)),
    "padded": Case((1, 7, 7, 64), (5, 5), padding=(2, 2), bias=True),
    "stride": Case((1, 12, 13, 48), (3, 3), (2, 2), (1, 1)),
    "pad before": Case((1, 14, 14, 96), (3, 3), (2, 2), pad=(0, 0, 1, 1)),
    "pad before and own": Case((1, 6, 5, 16), (5, 5), (2, 2), (1, 2), pad=(1, 0, 2, 1)),
    "pad with ones": Case((1, 6, 5, 16), (3, 3), pad=(1, 1, 1, 1), pad_value=1.0),
    "cropped before": Case((1, 8, 8, 16), (3, 3), padding=(1, 1), pad=(-1, 0, 1, 0)),
    "window larger than the image": Case((1, 2, 2, 16), (5, 5), padding=(2, 2)),
    "window above the image": Case((1, 1, 3, 16), (3, 3), (3, 3), (2, 2)),
    "one column": Case((1, 9, 3, 24), (3, 3)),
    "one row, one window": Case((3, 1, 40, 8), (1, 7), padding=(0, 3)),
    "many channels": Case((1, 5, 9, 672), (3, 5), (1, 2), (1, 2), bias=True),
    "symbolic batch": Case((S, 6, 6, 40), (3, 3), padding=(1, 1), size=3),
    "symbolic image": Case((2, S, S, 32), (3, 3), (2, 2), (1, 1), size=13),
}


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner([c.function() for c in CASES.values()], ["depthwise"] * len(CASES))


@pytest.mark.parametrize("name", CASES)
def test_against_the_interpreter(name: str, runner: Runner) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    shapes = [[case.size if d is S else int(d) for d in a.type.shape] for a in case.function().args]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    (got,) = runner(list(CASES).index(name), inputs)
    (wanted,) = interpret(case.function(), inputs, WeightStore(), oracle=True)
    assert float((got - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


def test_nan_in_the_image_reaches_its_windows_only(runner: Runner) -> None:
    x = torch.randn(2, 9, 11, 32)
    x[1, 4, 5, 7] = float("nan")
    (got,) = runner(0, [x, torch.randn(3, 3, 32), torch.randn(32), torch.randn(32)])
    assert got.isnan().nonzero().tolist() == [
        [1, i, j, 7] for i in range(2, 5) for j in range(3, 6)
    ]


def conv_of(**changes: Any) -> Op:
    given: dict[str, Any] = {"groups": 32, "layout": "nhwc", "dilation": (1, 1), "outputs": 32}
    given |= changes
    outputs = given.pop("outputs")
    shape = (1, 9, 9, 32) if given["layout"] == "nhwc" else (1, 32, 9, 9)
    function = function_of(
        [f32(*shape), f32(outputs, 32 // given["groups"], 3, 3)],
        lambda b, x, w: b.conv(x, w, stride=(1, 1), padding=(0, 0), **given),
    )
    return next(op for op in function.ops if op.name == "conv")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"groups": 1}, "not depthwise"),
        ({"layout": "nchw"}, "channels-last"),
        ({"dilation": (2, 2)}, "dilation"),
        ({"outputs": 64}, "several outputs"),
    ],
)
def test_what_has_no_code_says_why(changes: dict[str, Any], wanted: str) -> None:
    assert wanted in str(BACKEND.supports_anchor(conv_of(**changes), "depthwise"))
    assert BACKEND.supports_anchor(conv_of(), "depthwise") is None
