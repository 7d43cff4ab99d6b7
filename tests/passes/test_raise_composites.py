"""Composites written as arithmetic: each form is raised, what only looks alike is not."""

from __future__ import annotations

import math

import pytest
import torch

from accel.ir.builder import Builder
from accel.ir.op import definition
from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from tests.passes.helpers import BF16, F16, F32, I64, compute, find, program, t

PIPELINE = "canonicalize,raise_composites,canonicalize,dce"
X = t(2, 5, 8)


def sc(b, value, dtype=F32):
    return b.scalar(value, dtype)


def raised(make, *types, pipeline=PIPELINE):
    module = program(make, *types)
    misses = []
    context = Context(on_miss=lambda rule, op, reason: misses.append((rule, op.name, reason)))
    run_pipeline(module, pipeline, context, validate=True)
    return module, misses


# -- norms ------------------------------------------------------------------------------------


def rms(b, x, eps=1e-6, axes=(2,)):
    mean = b.mean(b.pow(x, sc(b, 2.0)), axes=axes, keepdim=True)
    return b.mul(x, b.rsqrt(b.add(mean, sc(b, eps))))


RMS = {
    "llama": lambda b, x, w: b.mul(w, rms(b, x)),
    "by division": lambda b, x, w: b.mul(
        b.div(x, b.sqrt(b.add(b.mean(b.mul(x, x), axes=(2,), keepdim=True), sc(b, 1e-6)))), w
    ),
    "one over root": lambda b, x, w: b.mul(
        b.mul(
            x,
            b.div(
                sc(b, 1.0),
                b.sqrt(b.add(b.mean(b.mul(x, x), axes=(2,), keepdim=True), sc(b, 1e-6))),
            ),
        ),
        w,
    ),
    "mean by sum": lambda b, x, w: b.mul(
        w,
        b.mul(
            x,
            b.rsqrt(
                b.add(b.div(b.sum(b.mul(x, x), axes=(2,), keepdim=True), sc(b, 8.0)), sc(b, 1e-6))
            ),
        ),
    ),
    "unsqueezed mean": lambda b, x, w: b.mul(
        w,
        b.mul(
            x,
            b.rsqrt(b.add(b.reshape(b.mean(b.mul(x, x), axes=(2,)), shape=(2, 5, 1)), sc(b, 1e-6))),
        ),
    ),
    "weight with axes": lambda b, x, w: b.mul(rms(b, x), b.reshape(w, shape=(1, 1, 8))),
    "gemma": lambda b, x, w: b.mul(rms(b, x), b.add(w, sc(b, 1.0))),
}


@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name):
    module, misses = raised(RMS[name], X, t(8))
    expected = ["add", "rms_norm"] if name == "gemma" else ["rms_norm"]
    assert compute(module) == expected and not misses
    assert find(module, "rms_norm").attribute("eps") == 1e-6


def half_llama(b, x, w):
    return b.mul(w, b.cast(rms(b, b.cast(x, dtype=F32)), dtype=x.dtype))


def half_after(b, x, w):
    return b.cast(b.mul(rms(b, b.cast(x, dtype=F32)), b.cast(w, dtype=F32)), dtype=x.dtype)


def half_gemma(b, x, w):
    weight = b.add(b.cast(w, dtype=F32), sc(b, 1.0))
    return b.cast(b.mul(rms(b, b.cast(x, dtype=F32)), weight), dtype=x.dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("make", "before", "offset"),
    [(half_llama, True, 0.0), (half_after, False, 0.0), (half_gemma, False, 1.0)],
)
def test_rms_norm_of_sixteen_bits(make, before, offset, dtype):
    module, _ = raised(make, t(2, 5, 8, dtype=dtype), t(8, dtype=dtype))
    assert compute(module) == ["rms_norm"]
    op = find(module, "rms_norm")
    assert op.attribute("cast_before_weight") is before and op.attribute("offset") == offset


def test_rms_near_misses():
    module, misses = raised(lambda b, x, w: b.mul(w, rms(b, x, axes=(1,))), X, t(8))
    assert "rms_norm" not in compute(module)

    def other_value(b, x, y):
        mean = b.mean(b.mul(y, y), axes=(2,), keepdim=True)
        return b.mul(x, b.rsqrt(b.add(mean, sc(b, 1e-6))))

    module, misses = raised(other_value, X, X)
    assert "rms_norm" not in compute(module) and "another value" in misses[0][2]
    module, misses = raised(lambda b, x: rms(b, x, axes=(1, 2)), X)
    assert "rms_norm" not in compute(module) and "2 axes" in misses[0][2]

    def second_user(b, x, w):
        n = rms(b, x)
        return b.mul(w, n), b.exp(n)

    module, misses = raised(second_user, X, t(8))
    assert sorted(compute(module)) == ["exp", "mul", "rms_norm"]
    assert "another user" in misses[0][2]
    # A weight per row only looks like one per column where the axes have equal sizes.
    square = t(2, 8, 8)
    module, _ = raised(lambda b, x, w: b.mul(rms(b, x), b.reshape(w, shape=(8, 1))), square, t(8))
    assert sorted(compute(module)) == ["mul", "reshape", "rms_norm"]


def centered(b, x, axes=(2,)):
    return b.sub(x, b.mean(x, axes=axes, keepdim=True))


def layer(b, x, eps=1e-5, axes=(2,)):
    c = centered(b, x, axes)
    variance = b.mean(b.pow(c, sc(b, 2.0)), axes=axes, keepdim=True)
    return b.div(c, b.sqrt(b.add(variance, sc(b, eps))))


LAYER = {
    "mean of squares": lambda b, x, w, v: b.add(b.mul(layer(b, x), w), v),
    "var": lambda b, x, w, v: b.add(
        b.mul(
            w,
            b.mul(
                centered(b, x),
                b.rsqrt(b.add(b.var(x, axes=(2,), correction=0, keepdim=True), sc(b, 1e-5))),
            ),
        ),
        v,
    ),
    "weight only": lambda b, x, w, v: b.mul(layer(b, x), w),
    "bias only": lambda b, x, w, v: b.add(layer(b, x), v),
}


@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(name):
    module, _ = raised(LAYER[name], X, t(8), t(8))
    assert compute(module) == ["layer_norm"]


def test_layer_norm_over_two_axes_and_half():
    module, _ = raised(lambda b, x, w: b.mul(layer(b, x, axes=(1, 2)), w), X, t(5, 8))
    assert compute(module) == ["layer_norm"] and find(module, "layer_norm").attribute("rank") == 2

    def half(b, x, w, v):
        wide = layer(b, b.cast(x, dtype=F32))
        wide = b.add(b.mul(wide, b.cast(w, dtype=F32)), b.cast(v, dtype=F32))
        return b.cast(wide, dtype=F16)

    module, _ = raised(half, t(2, 5, 8, dtype=F16), t(8, dtype=F16), t(8, dtype=F16))
    assert compute(module) == ["layer_norm"]


def test_layer_norm_near_misses():
    def sample_variance(b, x):
        variance = b.var(x, axes=(2,), correction=1, keepdim=True)
        return b.mul(centered(b, x), b.rsqrt(b.add(variance, sc(b, 1e-5))))

    assert "layer_norm" not in compute(raised(sample_variance, X)[0])

    def other_axis(b, x):
        c = centered(b, x, (1,))
        variance = b.mean(b.mul(c, c), axes=(2,), keepdim=True)
        return b.mul(c, b.rsqrt(b.add(variance, sc(b, 1e-5))))

    assert "layer_norm" not in compute(raised(other_axis, X)[0])
    # eps outside of the root is another function.
    module, _ = raised(
        lambda b, x: b.div(
            centered(b, x),
            b.add(b.sqrt(b.var(x, axes=(2,), correction=0, keepdim=True)), sc(b, 1e-5)),
        ),
        X,
    )
    assert "layer_norm" not in compute(module)


# -- activations ------------------------------------------------------------------------------

R = math.sqrt(0.5)
C = math.sqrt(2 / math.pi)


def phi(b, x):
    return b.add(b.erf(b.div(x, sc(b, math.sqrt(2.0)))), sc(b, 1.0))


def cubic(b, x):
    cube = b.mul(sc(b, 0.044715), b.pow(x, sc(b, 3.0)))
    return b.add(b.tanh(b.mul(sc(b, C), b.add(x, cube))), sc(b, 1.0))


def fast(b, x):
    inner = b.add(sc(b, 1.0), b.mul(b.mul(sc(b, 0.044715), x), x))
    return b.add(sc(b, 1.0), b.tanh(b.mul(b.mul(x, sc(b, 0.7978845608)), inner)))


GELU = {
    "x * 0.5 * phi": (lambda b, x: b.mul(b.mul(x, sc(b, 0.5)), phi(b, x)), "none"),
    "0.5 * (x * phi)": (lambda b, x: b.mul(sc(b, 0.5), b.mul(x, phi(b, x))), "none"),
    "x * (phi * 0.5)": (lambda b, x: b.mul(x, b.mul(phi(b, x), sc(b, 0.5))), "none"),
    "x * phi / 2": (lambda b, x: b.div(b.mul(x, phi(b, x)), sc(b, 2.0)), "none"),
    "gelu_new": (lambda b, x: b.mul(b.mul(sc(b, 0.5), x), cubic(b, x)), "tanh"),
    "gelu_fast": (lambda b, x: b.mul(b.mul(sc(b, 0.5), x), fast(b, x)), "tanh"),
    "by sigmoid": (
        lambda b, x: b.mul(
            x,
            b.sigmoid(b.mul(sc(b, 2 * C), b.add(x, b.mul(sc(b, 0.044715), b.mul(b.mul(x, x), x))))),
        ),
        "tanh",
    ),
}


@pytest.mark.parametrize("name", GELU)
def test_gelu(name):
    make, approximate = GELU[name]
    module, _ = raised(make, X)
    assert compute(module) == ["gelu"]
    assert find(module, "gelu").attribute("approximate") == approximate


ACTIVATIONS = {
    "silu": lambda b, x: b.mul(b.sigmoid(x), x),
    "silu by exp": lambda b, x: b.div(x, b.add(sc(b, 1.0), b.exp(b.neg(x)))),
    "sigmoid": lambda b, x: b.div(sc(b, 1.0), b.add(sc(b, 1.0), b.exp(b.neg(x)))),
    "hardswish": lambda b, x: b.div(
        b.mul(x, b.clamp(b.add(x, sc(b, 3.0)), min=0.0, max=6.0)), sc(b, 6.0)
    ),
    "hardswish by hardsigmoid": lambda b, x: b.mul(x, b.hardsigmoid(x)),
    "hardsigmoid": lambda b, x: b.div(b.clamp(b.add(x, sc(b, 3.0)), min=0.0, max=6.0), sc(b, 6.0)),
    "leaky_relu": lambda b, x: b.where(b.gt(x, sc(b, 0.0)), x, b.mul(x, sc(b, 0.2))),
    "softmax": lambda b, x: b.div(
        b.exp(b.sub(x, b.amax(x, axes=(1,), keepdim=True))),
        b.sum(b.exp(b.sub(x, b.amax(x, axes=(1,), keepdim=True))), axes=(1,), keepdim=True),
    ),
    "log_softmax": lambda b, x: b.log(b.softmax(x, axis=1)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    module, _ = raised(ACTIVATIONS[name], X, pipeline="cse," + PIPELINE)
    assert compute(module) == [name.split(" ")[0]]


NOT = {
    "quick gelu": lambda b, x, y: b.mul(x, b.sigmoid(b.mul(x, sc(b, 1.702)))),
    "gelu of another": lambda b, x, y: b.mul(b.mul(y, sc(b, 0.5)), phi(b, x)),
    "gelu with 1.41": lambda b, x, y: b.mul(
        b.mul(x, sc(b, 0.5)), b.add(b.erf(b.div(x, sc(b, 1.41))), sc(b, 1.0))
    ),
    "gelu without half": lambda b, x, y: b.mul(x, phi(b, x)),
    "silu of another": lambda b, x, y: b.mul(b.sigmoid(x), y),
    "softmax of another": lambda b, x, y: b.div(b.exp(x), b.sum(b.exp(y), axes=(1,), keepdim=True)),
    "softmax of two axes": lambda b, x, y: _normalized(b, b.exp(x), (1, 2)),
    "tanh gelu, cube of another": lambda b, x, y: b.mul(
        b.mul(x, sc(b, 0.5)),
        b.add(
            b.tanh(b.mul(sc(b, C), b.add(x, b.mul(sc(b, 0.044715), b.mul(b.mul(y, y), y))))),
            sc(b, 1.0),
        ),
    ),
    "leaky of another": lambda b, x, y: b.where(b.gt(x, sc(b, 0.0)), x, b.mul(y, sc(b, 0.2))),
}


def _normalized(b, e, axes):
    return b.div(e, b.sum(e, axes=axes, keepdim=True))


@pytest.mark.parametrize("name", NOT)
def test_what_only_looks_like_an_activation(name):
    module, _ = raised(NOT[name], X, X)
    raised_names = {"gelu", "silu", "softmax", "leaky_relu"}
    assert not raised_names & set(compute(module))


def test_a_broadcast_in_a_product_is_no_activation():
    # x [8] times sigmoid(x) spread over rows: the result is larger than x.
    def make(b, x):
        gate = b.sigmoid(b.reshape(x, shape=(8, 1)))
        return b.mul(x, gate)

    assert "silu" not in compute(raised(make, t(8))[0])


# -- linears and rope -------------------------------------------------------------------------


def test_linear():
    module, _ = raised(
        lambda b, x, w, v: b.add(b.matmul(x, b.permute(w, axes=(1, 0))), v), X, t(6, 8), t(6)
    )
    assert compute(module) == ["linear"] and len(find(module, "linear").operands) == 3
    w = torch.randn(8, 6)
    module, _ = raised(lambda b, x: b.matmul(x, b.weight(w)), X, pipeline=PIPELINE + ",fold,dce")
    assert compute(module) == ["linear"]
    assert torch.equal(module.weights.tensor("w.permute"), w.T)


def test_linear_near_misses():
    # An argument as the second matrix is no weight; a bias over rows is no bias.
    assert compute(raised(lambda b, x, y: b.matmul(x, y), X, t(8, 6))[0]) == ["matmul"]
    module, _ = raised(
        lambda b, x, w, v: b.add(b.linear(x, w), b.reshape(v, shape=(6, 1))),
        t(2, 6, 8), t(6, 8), t(6),
    )  # fmt: skip
    assert sorted(compute(module)) == ["add", "linear", "reshape"]

    def second_user(b, x, w, v):
        y = b.linear(x, w)
        return b.add(y, v), y

    module, misses = raised(second_user, X, t(6, 8), t(6))
    assert "add" in compute(module) and misses[0][0] == "linear_bias"
    batched = raised(lambda b, x, y: b.matmul(x, b.permute(y, axes=(0, 2, 1))), X, t(2, 6, 8))
    assert sorted(compute(batched[0])) == ["matmul", "permute"]


Q = t(2, 4, 6, 8)
ANGLES = t(6, 8)


def rotate_half(b, x, swap=False):
    half = x.shape[-1] // 2
    low = b.slice(x, axis=3, start=0, stop=half)
    high = b.slice(x, axis=3, start=half, stop=2 * half)
    return b.cat(b.neg(low), high, axis=3) if swap else b.cat(b.neg(high), low, axis=3)


def rotate_pairs(b, x):
    even = b.slice(x, axis=3, start=0, stop=8, step=2)
    odd = b.slice(x, axis=3, start=1, stop=8, step=2)
    five = (*even.shape, 1)
    pairs = b.cat(b.reshape(b.neg(odd), shape=five), b.reshape(even, shape=five), axis=4)
    return b.reshape(pairs, shape=x.shape)


def rope(b, x, cos, sin, rotate=rotate_half):
    return b.add(b.mul(x, cos), b.mul(rotate(b, x), sin))


@pytest.mark.parametrize(
    ("rotate", "style"), [(rotate_half, "half"), (rotate_pairs, "interleaved")]
)
def test_rope(rotate, style):
    module, _ = raised(lambda b, x, c, s: rope(b, x, c, s, rotate), Q, ANGLES, ANGLES)
    assert compute(module) == ["rope"] and find(module, "rope").attribute("style") == style


def test_rope_of_a_part_of_the_head():
    def make(b, x, c, s):
        head = b.slice(x, axis=3, start=0, stop=4)
        rest = b.slice(x, axis=3, start=4, stop=8)
        return b.cat(rope(b, head, c, s), rest, axis=3)

    module, _ = raised(make, Q, t(6, 4), t(6, 4))
    assert compute(module) == ["slice", "slice", "rope", "cat"]


def test_rope_near_misses():
    other = lambda b, x, c, s: b.add(b.mul(x, c), b.mul(rotate_half(b, b.exp(x)), s))  # noqa: E731
    module, misses = raised(other, Q, ANGLES, ANGLES)
    assert "rope" not in compute(module) and "not the one that meets cos" in misses[0][2]
    swapped = lambda b, x, c, s: rope(  # noqa: E731
        b, x, c, s, lambda b, x: rotate_half(b, x, swap=True)
    )
    assert "rope" not in compute(raised(swapped, Q, ANGLES, ANGLES)[0])


# -- what decomposes is raised again ----------------------------------------------------------

ROUND_TRIP = {
    "softmax": lambda b, x: b.softmax(x, axis=2),
    "layer_norm": lambda b, x: b.layer_norm(x, b.weight(torch.rand(8)), rank=1, eps=1e-5),
    "rms_norm": lambda b, x: b.rms_norm(x, b.weight(torch.rand(8)), eps=1e-6),
    "gelu": lambda b, x: b.gelu(x),
    "silu": lambda b, x: b.silu(x),
    "hardswish": lambda b, x: b.hardswish(x),
    "hardsigmoid": lambda b, x: b.hardsigmoid(x),
    "leaky_relu": lambda b, x: b.leaky_relu(x, slope=0.1),
}


@pytest.mark.parametrize("name", ROUND_TRIP)
def test_decompositions_are_raised_again(name):
    module = program(ROUND_TRIP[name], X)
    pending = [op for op in module.main.ops if op.definition.decompose is not None]
    while pending:
        op = pending.pop()
        b = Builder(before=op)
        op.replace_with(b.decompose(op))
        pending = [op for op in module.main.ops if op.name in ("mean", "clamp")]
    assert name not in compute(module)
    run_pipeline(module, PIPELINE, validate=True)
    assert compute(module) == [name]


def test_attention_decomposed_is_raised_again():
    def make(b, q, k, v):
        return b.attention(q, k, v, scale=0.5, causal=True)

    q = t(1, 2, 4, 8)
    module = program(make, q, q, q)
    op = find(module, "attention")
    op.replace_with(Builder(before=op).decompose(op))
    assert definition("attention").name not in compute(module)
    run_pipeline(module, "canonicalize,fold,canonicalize,raise_attention,dce", validate=True)
    assert {"matmul", "softmax"} <= set(compute(module)) or "attention" in compute(module)


def test_integer_arithmetic_is_left_alone():
    module, _ = raised(
        lambda b, x: b.where(b.gt(x, sc(b, 0, I64)), x, b.mul(x, sc(b, 2, I64))), t(3, dtype=I64)
    )
    assert sorted(compute(module)) == ["gt", "mul", "where"]


def test_a_product_with_one_of_several_results_is_left_alone():
    """Activations are looked for in products; a factor may be a result of an op with more."""

    def make(b, grad, x, w):
        options = {"stride": (1,), "padding": (0,), "dilation": (1,), "mask": (True, True, True)}
        by_x, _, _ = b.conv_backward(grad, x, w, **options)
        return b.mul(b.mul(by_x, b.sigmoid(x)), x)

    module = program(make, t(2, 4, 5), t(2, 3, 6), t(4, 3, 2))
    run_pipeline(module, "raise_composites", validate=True)
    assert "conv_backward" in compute(module)
