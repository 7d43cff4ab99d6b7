"""fold_batch_norm, fold_pad, merge_linears, layout: they fire, near misses stay, meanings stay."""

from __future__ import annotations

import pytest
import torch

from accel.compiler.targets import get_target
from accel.passes.base import Context
from accel.passes.manager import PassManager
from tests.passes.helpers import ops, program, t

GEOMETRY = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


def run(pipeline, module, context=None):
    """Runs with contracts checked; returns the ledger."""
    return PassManager(pipeline, context or Context(), validate=True).run(module)


def conv(b, x, out, kernel=3, bias=True, **attributes):
    channels = x.shape[1]
    given = {**GEOMETRY, **attributes}
    weight = b.weight(torch.randn(out, channels // given.get("groups", 1), kernel, kernel), "w")
    return b.conv(x, weight, b.weight(torch.randn(out), "bias") if bias else None, **given)


def norm(b, x, channels, affine=True):
    mean, variance = b.weight(torch.randn(channels), "m"), b.weight(torch.rand(channels) + 0.1, "v")
    scale = (b.weight(torch.randn(channels), "g"), b.weight(torch.randn(channels), "b"))
    return b.batch_norm(x, mean, variance, *(scale if affine else ()), eps=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_goes_into_the_convolution(bias, affine) -> None:
    module = program(lambda b, x: norm(b, conv(b, x, 8, bias=bias), 8, affine), t(2, 4, 6, 6))
    ledger = run("fold_batch_norm,dce", module)
    assert ops(module) == ["constant", "constant", "conv"]
    assert ledger.rows[0].rewrites == {"fold_batch_norm": 1}
    assert all("folded" in name for name in module.weights.names())


def test_batch_norm_goes_into_a_grouped_convolution_and_a_linear() -> None:
    module = program(lambda b, x: norm(b, conv(b, x, 8, groups=4), 8), t(2, 8, 5, 5))
    run("fold_batch_norm,dce", module)
    assert "batch_norm" not in ops(module)

    def linear(b, x):
        return norm(b, b.linear(x, b.weight(torch.randn(6, 4))), 6)

    module = program(linear, t(3, 4))
    run("fold_batch_norm,dce", module)
    assert "batch_norm" not in ops(module)


def second_user(b, x):
    y = conv(b, x, 4)
    return norm(b, y, 4), y


def norm_of_three_axes(b, x):
    return norm(b, b.linear(x, b.weight(torch.randn(6, 4))), 5)


def live_statistics(b, x, mean):
    y = conv(b, x, 4)
    return b.batch_norm(y, mean, b.weight(torch.rand(4) + 0.1), eps=1e-5)


@pytest.mark.parametrize(
    ("make", "types", "reason"),
    [
        (second_user, (t(1, 3, 5, 5),), "another user"),
        (norm_of_three_axes, (t(2, 5, 4),), "not on axis 1"),
        (live_statistics, (t(1, 3, 5, 5), t(4)), "not a constant"),
    ],
)
def test_batch_norm_stays(make, types, reason) -> None:
    module = program(make, *types)
    weights = module.weights.names()
    ledger = run("fold_batch_norm", module)
    assert weights[0] in module.weights, "the weight before it is as it was"
    assert ("batch_norm" in ops(module)) == (reason == "not a constant")
    assert any(reason in miss.reason for miss in ledger.misses)


SHAPES = {"nchw": (8, 1, 1), "nchw with batch": (1, 8, 1, 1), "nhwc": (8,)}


@pytest.mark.parametrize("layout", SHAPES)
def test_a_batch_norm_written_as_arithmetic(layout) -> None:
    """(y - mean) * scale / 2 + beta, all constants of one number per channel."""
    last = layout == "nhwc"

    def make(b, x):
        weight = b.weight(torch.randn(8, 4, 3, 3))
        y = b.conv(x, weight, **GEOMETRY, layout="nhwc" if last else "nchw")
        for name in ("sub", "mul", "div", "add"):
            y = getattr(b, name)(y, b.weight(torch.rand(*SHAPES[layout]) + 0.5, name))
        return y

    module = program(make, t(2, 6, 6, 4) if last else t(2, 4, 6, 6))
    ledger = run("fold_batch_norm,dce", module)
    assert ops(module) == ["constant", "constant", "conv"] and len(module.weights) == 2
    assert ledger.rows[0].error < 1e-12


def test_scales_of_linears_and_transposed_convolutions() -> None:
    def linear(b, x):
        y = b.mul(b.linear(x, b.weight(torch.randn(6, 4))), b.weight(torch.randn(6), "s"))
        return b.add(y, b.weight(torch.randn(6), "shift"))

    module = program(linear, t(2, 3, 4))
    run("fold_batch_norm,dce", module)
    assert ops(module) == ["constant", "constant", "linear"]

    def transposed(b, x):
        weight = b.weight(torch.randn(4, 6, 3, 3))
        y = b.conv_transpose(x, weight, **GEOMETRY, output_padding=(0, 0))
        return norm(b, y, 6)

    module = program(transposed, t(1, 4, 5, 5))
    run("fold_batch_norm,dce", module)
    assert "batch_norm" not in ops(module) and "mul" not in ops(module)


def test_only_a_bias_keeps_the_weight() -> None:
    def make(b, x):
        y = conv(b, x, 8, bias=False)
        return b.add(y, b.weight(torch.randn(8, 1, 1), "late"))

    module = program(make, t(1, 4, 6, 6))
    run("fold_batch_norm,dce", module)
    assert ops(module) == ["constant", "constant", "conv"] and "w" in module.weights


@pytest.mark.parametrize(
    "shape", [(6, 1), (6,), (8, 6, 6), (1, 1, 6, 6)], ids=["rows", "columns", "full", "image"]
)
def test_constants_that_are_not_per_channel_stay(shape) -> None:
    def make(b, x):
        y = b.conv(x, b.weight(torch.randn(8, 4, 1, 1)), **GEOMETRY)
        return b.mul(y, b.weight(torch.randn(*shape), "s"))

    module = program(make, t(1, 4, 6, 6))
    assert not run("fold_batch_norm", module).rows[0].changed


def test_a_batch_norm_after_something_else_becomes_arithmetic() -> None:
    module = program(lambda b, x: norm(b, b.relu(x), 8), t(2, 8, 4, 4))
    ledger = run("fold_batch_norm,dce", module)
    assert ledger.rows[0].rewrites == {"batch_norm_as_affine": 1}
    assert [n for n in ops(module) if n != "constant"] == ["relu", "mul", "add"]


def padded(low, high, value=0.0):
    def make(b, x):
        pad = b.pad(x, low=(0, 0, *low), high=(0, 0, *high), value=value)
        return conv(b, pad, 4, padding=(1, 0))

    return make


def test_padding_goes_into_the_convolution() -> None:
    module = program(padded((1, 2), (1, 2)), t(1, 3, 6, 6))
    run("fold_pad", module)
    assert "pad" not in ops(module)
    made = next(op for op in module.main.ops if op.name == "conv")
    assert made.attributes["padding"] == (2, 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (padded((0, 0), (1, 1)), "sides differ"),
        (padded((1, 1), (1, 1), value=1.0), "not zero"),
        (padded((-1, -1), (-1, -1)), "crops"),
    ],
)
def test_padding_stays(make, reason) -> None:
    module = program(make, t(1, 3, 8, 8))
    ledger = run("fold_pad", module)
    assert "pad" in ops(module)
    assert any(reason in miss.reason for miss in ledger.misses)


def parallel(bias=(True, True, True), rows=(8, 4, 4)):
    def make(b, x):
        return [
            b.linear(
                x, b.weight(torch.randn(n, 6)), b.weight(torch.randn(n), "b") if with_bias else None
            )
            for n, with_bias in zip(rows, bias)
        ]

    return make


@pytest.mark.parametrize("bias", [(True,) * 3, (False,) * 3])
def test_linears_of_one_input_merge(bias) -> None:
    module = program(parallel(bias), t(2, 5, 6))
    run("merge_linears,dce", module)
    assert ops(module).count("linear") == 1
    assert ops(module).count("slice") == 3
    assert len(module.weights) == (2 if bias[0] else 1)


def test_linears_that_differ_do_not_merge() -> None:
    def two_inputs(b, x, y):
        return [b.linear(v, b.weight(torch.randn(4, 6))) for v in (x, y)]

    module = program(two_inputs, t(2, 6), t(2, 6))
    run("merge_linears", module)
    assert ops(module).count("linear") == 2

    module = program(parallel(rows=(20, 4, 4)), t(2, 6))
    run("merge_linears{largest_rows=16}", module)
    assert ops(module).count("linear") == 2


def test_a_missing_bias_counts_as_zeros() -> None:
    module = program(parallel((True, False, True)), t(2, 5, 6))
    run("merge_linears,dce", module)
    assert ops(module).count("linear") == 1 and len(module.weights) == 2
    bias = module.weights.tensor(module.weights.names()[1])
    assert bias.shape == (16,) and not bias[8:12].any()


def test_tied_layers_share_what_is_merged() -> None:
    w, v = torch.randn(6, 6), torch.randn(6, 6)

    def make(b, x):
        shared = [b.weight(w), b.weight(v)]
        for _ in range(3):
            q, k = (b.linear(x, each) for each in shared)
            x = b.mul(q, k)
        return x

    module = program(make, t(2, 6))
    run("merge_linears,dce", module)
    assert ops(module).count("linear") == 3 and len(module.weights) == 1


def test_linears_far_apart_do_not_merge() -> None:
    def make(b, x):
        y = b.linear(x, b.weight(torch.randn(6, 6)))
        for _ in range(60):
            y = b.tanh(y)
        return b.add(y, b.linear(x, b.weight(torch.randn(6, 6))))

    module = program(make, t(2, 6))
    assert not run("merge_linears", module).rows[0].changed
    assert run("merge_linears{window=100}", module).rows[0].changed


def test_an_argument_is_no_weight() -> None:
    def make(b, x, w):
        return b.linear(x, w), b.linear(x, b.weight(torch.randn(4, 6)))

    assert not run("merge_linears", program(make, t(2, 6), t(4, 6))).rows[0].changed


def network(b, x):
    y = b.relu(conv(b, x, 8, padding=(1, 1)))
    z = conv(b, y, 8, padding=(1, 1), groups=2)
    z = b.add(z, y)
    z = b.mul(z, b.reshape(b.weight(torch.randn(8), "scale"), shape=(8, 1, 1)))
    z = b.pad(z, low=(0, 0, 1, 0), high=(0, 0, 0, 2))
    z = b.cat(z, z, axis=1)
    z = b.max_pool(z, kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1))
    return b.mean(conv(b, z, 4, kernel=1), axes=(2, 3)), b.amax(z, axes=(1,), keepdim=True)


def test_layout_moves_the_network() -> None:
    module = program(network, t(2, 3, 8, 8))
    run("fold,layout,canonicalize,cse,dce", module)
    made = [op for op in module.main.ops if op.name == "conv"]
    assert len(made) == 2  # the 1x1 convolution is a linear
    assert all(op.attributes["layout"] == "nhwc" for op in made)
    # One permute in, one pair around the max pool (which has no channels-last form).
    assert ops(module).count("permute") <= 4


def test_layout_leaves_other_convolutions_alone() -> None:
    def one_dimension(b, x):
        geometry = {"stride": (1,), "padding": (0,), "dilation": (1,)}
        return b.conv(x, b.weight(torch.randn(4, 3, 3)), **geometry)

    module = program(one_dimension, t(1, 3, 9))
    ledger = run("layout", module)
    assert not ledger.rows[0].changed


def test_a_reduction_that_mixes_axes_stays_channels_first() -> None:
    def make(b, x):
        return b.sum(conv(b, x, 4), axes=(3,))

    module = program(make, t(1, 3, 6, 6))
    run("layout", module)
    assert module.main.results[0].shape == (1, 4, 4)


def on_gpu() -> Context:
    return Context(target=get_target("h200"))


def test_patches_are_a_linear_on_gpus() -> None:
    module = program(lambda b, x: conv(b, x, 8, kernel=4, stride=(4, 4)), t(2, 3, 12, 8))
    run("layout,canonicalize,dce", module, on_gpu())
    assert "linear" in ops(module) and "conv" not in ops(module)
    overlap = program(lambda b, x: conv(b, x, 8, kernel=4, stride=(2, 2)), t(2, 3, 12, 8))
    run("layout", overlap, on_gpu())
    assert "conv" in ops(overlap)


@pytest.mark.parametrize(("groups", "apart"), [(1, True), (4, True), (8, False)])
def test_a_bias_that_no_call_adds_comes_after_on_gpus(groups: int, apart: bool) -> None:
    """A depthwise kernel adds its bias; cuDNN does with a ReLU only."""

    def make(b, x):
        return b.hardswish(conv(b, x, 8, padding=(1, 1), groups=groups))

    module = program(make, t(2, 8, 6, 6))
    run("layout", module, on_gpu())
    assert ("add" in ops(module)) == apart
    if groups == 1:
        fused = program(lambda b, x: b.relu(conv(b, x, 8)), t(2, 8, 6, 6))
        run("layout", fused, on_gpu())
        assert "add" not in ops(fused)


def test_few_channels_are_filled_up_on_gpus() -> None:
    def make(b, x):
        weight = b.weight(torch.randn(16, x.shape[1], 3, 3).half())
        return b.relu(b.conv(x, weight, None, stride=(2, 2), padding=(1, 1), dilation=(1, 1)))

    photograph = program(make, t(2, 3, 8, 8, dtype=torch.float16))
    run("layout,dce", photograph, on_gpu())
    (made,) = (op for op in photograph.main.ops if op.name == "conv")
    assert made.operands[0].shape == (2, 8, 8, 4) and made.operands[1].shape == (16, 4, 3, 3)
    assert list(photograph.weights.names()) == ["w.wide"]
    deep = program(make, t(2, 8, 8, 8, dtype=torch.float16))
    run("layout", deep, on_gpu())
    assert "pad" not in ops(deep)


@pytest.mark.parametrize(("channels", "linear"), [(24, True), (512, False)])
def test_thin_pointwise_convolutions_are_linears_on_gpus(channels: int, linear: bool) -> None:
    def make(b, x):
        weight = b.weight(torch.randn(channels, channels, 1, 1).half())
        return b.relu(b.conv(x, weight, None, **GEOMETRY))

    module = program(make, t(2, channels, 8, 8, dtype=torch.float16))
    run("layout", module, on_gpu())
    assert ("linear" in ops(module)) == linear


def shortcut(b, x):
    return b.relu(b.add(conv(b, x, 8, padding=(1, 1)), conv(b, x, 8, kernel=1)))


def test_of_two_convolutions_that_are_added_one_gets_the_biases() -> None:
    module = program(shortcut, t(2, 4, 6, 6))
    ledger = run("fold_batch_norm,dce", module)
    assert ledger.rows[0].rewrites == {"join_biases": 1}
    first, second = (op for op in module.main.ops if op.name == "conv")
    assert first.arguments()[2] is not None and second.arguments()[2] is None
