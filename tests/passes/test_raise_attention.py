"""Attention in the forms in which models write it, and what only looks like it."""

from __future__ import annotations

import math

import pytest
import torch

from accel.ir.types import symbol
from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from accel.passes.masks import Band, band_of
from tests.passes.helpers import BF16, BOOL, F16, F32, I64, compute, find, program, t

PIPELINE = "canonicalize,fold,canonicalize,cse,dce,raise_attention,canonicalize,dce"
B, H, S, D = 2, 4, 6, 8
Q = t(B, H, S, D)
INF = float("-inf")
LOWEST = torch.finfo(F32).min


def sc(b, value, dtype=F32):
    return b.scalar(value, dtype)


def transpose(b, k):
    rank = len(k.shape)
    return b.permute(k, axes=(*range(rank - 2), rank - 1, rank - 2))


def attend(b, q, k, v, scores=lambda b, s: s, scale=0.25):
    """softmax(scores(scale * q k^T)) v"""
    s = b.mul(b.matmul(q, transpose(b, k)), sc(b, scale, q.dtype))
    return b.matmul(b.softmax(scores(b, s), axis=len(q.shape) - 1), v)


def raised(make, *types, pipeline=PIPELINE):
    module = program(make, *types)
    misses = []
    context = Context(on_miss=lambda rule, op, reason: misses.append((rule, op.name, reason)))
    run_pipeline(module, pipeline, context, validate=True)
    return module, misses


def causal_where(b, s, fill=INF, lower=None):
    rows, columns = s.shape[-2:]
    i = b.reshape(b.arange(length=rows, dtype=I64), shape=(rows, 1))
    j = b.reshape(b.arange(length=columns, dtype=I64), shape=(1, columns))
    mask = b.le(j, i)
    if lower is not None:
        mask = b.bitwise_and(mask, b.gt(j, b.sub(i, sc(b, lower, I64))))
    return b.where(mask, s, sc(b, fill, s.dtype))


def causal_stored(b, s):
    rows, columns = s.shape[-2:]
    mask = torch.full((rows, columns), LOWEST).triu(1)[None, None]
    return b.add(s, b.weight(mask, "mask"))


def causal_masked_fill(b, s):
    rows, columns = s.shape[-2:]
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    return b.where(b.weight(hidden, "hidden"), sc(b, -1e9), s)


def test_plain():
    module, misses = raised(attend, Q, Q, Q)
    assert compute(module) == ["attention"] and not misses
    op = find(module, "attention")
    assert op.attribute("scale") == 0.25 and not op.attribute("causal")
    assert op.arguments()[3] is None


SCALES = {
    "div": lambda b, q, k, v: b.matmul(
        b.softmax(b.div(b.matmul(q, transpose(b, k)), sc(b, 4.0)), axis=3), v
    ),
    "sqrt": lambda b, q, k, v: b.matmul(
        b.softmax(b.div(b.matmul(q, transpose(b, k)), b.sqrt(sc(b, 16.0))), axis=3), v
    ),
    "on q": lambda b, q, k, v: attend(b, b.mul(q, sc(b, 0.25)), k, v, scale=1.0),
    "on q and k": lambda b, q, k, v: attend(
        b, b.mul(q, sc(b, 0.5)), b.mul(k, sc(b, 0.5)), v, scale=1.0
    ),
    "none, then q": lambda b, q, k, v: b.matmul(
        b.softmax(b.matmul(b.mul(q, sc(b, 0.25)), transpose(b, k)), axis=3), v
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales(name):
    module, _ = raised(SCALES[name], Q, Q, Q)
    assert compute(module) == ["attention"]
    assert find(module, "attention").attribute("scale") == pytest.approx(0.25)


def test_a_scale_under_the_views_of_a_projection():
    def make(b, x, k, v):
        q = b.permute(b.reshape(b.mul(x, sc(b, 0.5)), shape=(B, S, H, D)), axes=(0, 2, 1, 3))
        return attend(b, q, k, v, scale=1.0)

    module, _ = raised(make, t(B, S, H * D), Q, Q)
    assert find(module, "attention").attribute("scale") == 0.5 and "mul" not in compute(module)


CAUSAL = {
    "where": causal_where,
    "where lowest": lambda b, s: causal_where(b, s, LOWEST),
    "where -1e9": lambda b, s: causal_where(b, s, -1e9),
    "stored additive": causal_stored,
    "stored hidden": causal_masked_fill,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks(name):
    module, misses = raised(lambda b, q, k, v: attend(b, q, k, v, CAUSAL[name]), Q, Q, Q)
    assert compute(module) == ["attention"] and not misses
    op = find(module, "attention")
    assert op.attribute("causal") and op.attribute("offset") == 0
    assert op.attribute("window") is None and op.arguments()[3] is None


def test_an_additive_causal_mask_on_another_axis_is_no_causal_mask():
    def make(b, q, k, v):
        mask = torch.full((S, S), LOWEST).triu(1)
        mask[0, 3] = 0  # one element off
        return attend(b, q, k, v, lambda b, s: b.add(s, b.weight(mask, "mask")))

    module, _ = raised(make, Q, Q, Q)
    op = find(module, "attention")
    assert not op.attribute("causal") and op.arguments()[3] is not None


def test_sliding_window_and_offset():
    module, _ = raised(
        lambda b, q, k, v: attend(b, q, k, v, lambda b, s: causal_where(b, s, lower=3)), Q, Q, Q
    )
    op = find(module, "attention")
    assert (op.attribute("causal"), op.attribute("offset"), op.attribute("window")) == (True, 0, 3)

    def longer_keys(b, q, k, v):
        mask = torch.ones(S, S + 2, dtype=torch.bool).tril(2)
        return attend(b, q, k, v, lambda b, s: b.where(b.weight(mask, "mask"), s, sc(b, INF)))

    module, _ = raised(longer_keys, Q, t(B, H, S + 2, D), t(B, H, S + 2, D))
    assert find(module, "attention").attribute("offset") == 2


def test_symbolic_causal_and_window():
    s = symbol("s")
    q = t(1, H, s, D)
    module, _ = raised(
        lambda b, q, k, v: attend(b, q, k, v, lambda b, x: causal_where(b, x, lower=4)), q, q, q
    )
    assert compute(module) == ["attention"]
    op = find(module, "attention")
    assert op.attribute("causal") and op.attribute("window") == 4


def test_soft_cap():
    def capped(b, s):
        return causal_where(b, b.mul(sc(b, 30.0), b.tanh(b.div(s, sc(b, 30.0)))))

    module, _ = raised(lambda b, q, k, v: attend(b, q, k, v, capped), Q, Q, Q)
    assert compute(module) == ["attention"]
    op = find(module, "attention")
    assert op.attribute("softcap") == pytest.approx(30.0)
    assert op.attribute("scale") == pytest.approx(0.25) and op.attribute("causal")


def test_position_bias_stays_the_mask_beside_causal():
    def biased(b, s):
        return causal_where(b, b.add(s, b.weight(torch.randn(1, H, S, S), "bias")), LOWEST)

    module, _ = raised(lambda b, q, k, v: attend(b, q, k, v, biased), Q, Q, Q)
    op = find(module, "attention")
    assert op.attribute("causal") and op.arguments()[3].type == t(1, H, S, S)


def test_a_bias_inside_the_causal_where():
    """T5 with SDPA: where(causal, bias, lowest) is the mask of the composite."""

    def make(b, q, k, v, bias):
        return sdpa(b, q, k, v, b.where(b.tri_mask(rows=S, columns=S), bias, sc(b, LOWEST)))

    module, _ = raised(make, Q, Q, Q, t(1, H, S, S))
    op = find(module, "attention")
    assert op.attribute("causal") and op.operands[3] is module.main.args[3]


def test_padding_from_an_argument_is_kept_exactly():
    """Rows that see nothing average over all keys when filled with the lowest number."""

    def make(b, q, k, v, keep):
        mask = b.where(b.reshape(keep, shape=(B, 1, 1, S)), sc(b, 0.0), sc(b, LOWEST))
        return attend(b, q, k, v, lambda b, s: b.add(s, mask))

    module, misses = raised(make, Q, Q, Q, t(B, S, dtype=BOOL))
    assert find(module, "attention").arguments()[3].dtype == F32
    assert misses and "see nothing" in misses[0][2]


def test_masked_fill_by_an_argument_with_a_small_number_is_not_raised():
    def make(b, q, k, v, keep):
        return attend(b, q, k, v, lambda b, s: b.where(keep, s, sc(b, -1e9)))

    module, misses = raised(make, Q, Q, Q, t(B, 1, 1, S, dtype=BOOL))
    assert "attention" not in compute(module) and "would average" in misses[0][2]


GROUPED = t(B, 2, S, D)


def repeat(b, x, times=2):
    batch, groups, length, width = x.shape
    five = b.reshape(x, shape=(batch, groups, 1, length, width))
    wide = b.broadcast_to(five, shape=(batch, groups, times, length, width))
    return b.reshape(wide, shape=(batch, groups * times, length, width))


def test_repeated_keys_and_values_are_read_once():
    module, _ = raised(
        lambda b, q, k, v: attend(b, q, repeat(b, k), repeat(b, v)), Q, GROUPED, GROUPED
    )
    assert compute(module) == ["attention"]
    assert find(module, "attention").operands[1].type == GROUPED


def test_one_key_head_for_all():
    one = t(B, 1, S, D)
    module, _ = raised(attend, Q, one, one)
    assert compute(module) == ["attention"]
    module, _ = raised(
        lambda b, q, k, v: attend(
            b, q, b.broadcast_to(k, shape=(B, H, S, D)), b.broadcast_to(v, shape=(B, H, S, D))
        ),
        Q, one, one,
    )  # fmt: skip
    assert compute(module) == ["attention"] and find(module, "attention").operands[1].type == one


def test_heads_repeated_the_other_way_round_are_not_grouped():
    """[G, R] and [R, G] heads look alike in shape: query head h must use key head h // R."""

    def tiled(b, x):
        five = b.reshape(x, shape=(B, 1, 2, S, D))
        return b.reshape(b.broadcast_to(five, shape=(B, 2, 2, S, D)), shape=(B, 4, S, D))

    module, misses = raised(
        lambda b, q, k, v: attend(b, q, tiled(b, k), tiled(b, v)), Q, GROUPED, GROUPED
    )
    assert find(module, "attention").operands[1].type == Q and not misses


def test_only_the_keys_repeated_is_a_near_miss():
    module, misses = raised(lambda b, q, k, v: attend(b, q, repeat(b, k), v), Q, GROUPED, Q)
    assert find(module, "attention").operands[1].type == Q
    assert misses == [("grouped_heads", "attention", "the values are not repeated in the same way")]


def test_queries_grouped_on_five_axes():
    q5, k5 = t(B, 2, 3, S, D), t(B, 2, 1, S, D)

    def make(b, q, k, v):
        s = b.mul(b.matmul(q, transpose(b, k)), sc(b, 0.5))
        return b.matmul(b.softmax(s, axis=4), v)

    module, _ = raised(make, q5, k5, k5)
    op = find(module, "attention")
    assert op.operands[0].shape == (B, 6, S, D) and op.operands[1].shape == (B, 2, S, D)


def test_windows_of_swin_on_five_axes():
    """[windows * batch, heads] scores, masked per window on five axes."""
    windows = 3
    q = t(B * windows, H, S, D)

    def make(b, q, k, v, mask):
        def masked(b, s):
            five = b.reshape(s, shape=(B, windows, H, S, S))
            five = b.add(five, b.reshape(mask, shape=(1, windows, 1, S, S)))
            return b.reshape(five, shape=s.shape)

        return attend(b, q, k, v, masked)

    module, _ = raised(make, q, q, q, t(windows, S, S))
    op = find(module, "attention")
    assert op.operands[3].shape == (B * windows, 1, S, S)


def test_batched_products_on_three_axes():
    flat = t(B * H, S, D)
    module, _ = raised(attend, flat, flat, flat)
    assert compute(module).count("attention") == 1 and "matmul" not in compute(module)

    def make(b, q, k, v):
        q3, k3, v3 = (b.reshape(x, shape=(B * H, S, D)) for x in (q, k, v))

        def masked(b, s):
            four = causal_stored(b, b.reshape(s, shape=(B, H, S, S)))
            return b.reshape(four, shape=(B * H, S, S))

        return b.reshape(attend(b, q3, k3, v3, masked), shape=(B, H, S, D))

    module, _ = raised(make, Q, Q, Q)
    assert compute(module) == ["attention"] and find(module, "attention").attribute("causal")


def test_the_trap_of_permuted_keys():
    """K given as permute(0, 2, 3, 1) with batch 1: k must be read as the product reads it."""
    one, keys = t(1, H, S, D), t(1, S, H, D)

    def make(b, q, k, v):
        s = b.mul(b.matmul(q, b.permute(k, axes=(0, 2, 3, 1))), sc(b, 0.25))
        return b.matmul(b.softmax(s, axis=3), v)

    module, _ = raised(make, one, keys, one)  # validate: equal to the product as written
    op = find(module, "attention")
    assert op.operands[1].op.attribute("axes") == (0, 2, 1, 3)

    # The wrong reading has the same shapes when S == H: only the axes tell.
    def square(b, q, k, v):
        s = b.matmul(q, b.permute(k, axes=(0, 2, 3, 1)))
        return b.matmul(b.softmax(s, axis=3), v)

    module, _ = raised(square, t(1, 4, 4, D), t(1, 4, 4, D), t(1, 4, 4, D))
    assert find(module, "attention").operands[1].op.attribute("axes") == (0, 2, 1, 3)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sixteen_bits_with_casts_around_the_softmax(dtype):
    def make(b, q, k, v):
        s = b.mul(b.matmul(q, transpose(b, k)), sc(b, 0.25, dtype))
        weights = b.softmax(b.cast(s, dtype=F32), axis=3)
        return b.matmul(b.cast(weights, dtype=dtype), v)

    q = t(B, H, S, D, dtype=dtype)
    module, _ = raised(make, q, q, q)
    assert compute(module) == ["attention"]


def test_mixed_precision_is_a_near_miss():
    def make(b, q, k, v):
        s = b.matmul(q, transpose(b, k))
        return b.matmul(b.cast(b.softmax(s, axis=3), dtype=BF16), v)

    module, misses = raised(make, Q, Q, t(B, H, S, D, dtype=BF16))
    assert "attention" not in compute(module) and "differ in dtype" in misses[0][2]


def test_second_users_are_near_misses():
    def weights_too(b, q, k, v):
        w = b.softmax(b.matmul(q, transpose(b, k)), axis=3)
        return b.matmul(w, v), w

    module, misses = raised(weights_too, Q, Q, Q)
    assert "attention" not in compute(module) and "another user" in misses[0][2]

    def scores_too(b, q, k, v):
        s = b.matmul(q, transpose(b, k))
        return b.matmul(b.softmax(s, axis=3), v), b.sum(s, axes=(0, 1, 2, 3))

    module, misses = raised(scores_too, Q, Q, Q)
    assert "attention" not in compute(module) and "another user" in misses[0][2]


def with_sinks(b, q, k, v, sinks, part=None, columns=1, scores=lambda b, s: s):
    """gpt-oss: a column of sinks beside the scores, whose weight is dropped."""
    batch, heads, rows, _ = q.shape
    s = scores(b, b.mul(b.matmul(q, transpose(b, k)), sc(b, 0.25, q.dtype)))
    one = sinks if sinks.type.rank == 4 else b.reshape(sinks, shape=(1, heads, 1, 1))
    whole = b.cat(s, b.broadcast_to(one, shape=(batch, heads, rows, columns)), axis=3)
    whole = b.sub(whole, b.amax(whole, axes=(3,), keepdim=True))
    weights = b.softmax(whole, axis=3)
    weights = b.slice(weights, axis=3, start=0, stop=part or k.shape[2])
    return b.matmul(weights, v)


def test_sinks():
    def make(b, q, k, v, sinks):
        return with_sinks(b, q, k, v, sinks, scores=CAUSAL["stored additive"])

    module, misses = raised(make, Q, Q, Q, t(H))
    op = find(module, "attention")
    assert op.attribute("causal") and op.arguments()[3] is None and not misses
    assert op.arguments()[4] is module.main.args[3]


def test_stored_sinks_that_were_broadcast():
    column = torch.randn(H)[None, :, None, None].expand(B, H, S, 1).contiguous()
    module, _ = raised(lambda b, q, k, v: with_sinks(b, q, k, v, b.weight(column)), Q, Q, Q)
    assert find(module, "attention").arguments()[4].shape == (H,)

    column = torch.randn(B, H, S, 1)
    module, misses = raised(lambda b, q, k, v: with_sinks(b, q, k, v, b.weight(column)), Q, Q, Q)
    assert "attention" not in compute(module) and "one number a head" in misses[0][2]


@pytest.mark.parametrize("changes", [{"part": S - 1}, {"columns": 2}])
def test_other_columns_beside_scores_are_no_sinks(changes):
    module, _ = raised(
        lambda b, q, k, v, sinks: with_sinks(b, q, k, v, sinks, **changes),
        Q, Q, t(B, H, changes.get("part", S), D), t(H),
    )  # fmt: skip
    assert "attention" not in compute(module) and "softmax" in compute(module)


NEARLY = {
    "softmax over rows": lambda b, q, k, v: b.matmul(
        b.softmax(b.matmul(q, transpose(b, k)), axis=2), v
    ),
    "scale from a tensor": lambda b, q, k, v, s: b.matmul(
        b.softmax(b.mul(b.matmul(q, transpose(b, k)), s), axis=3), v
    ),
    "negative scale": lambda b, q, k, v: attend(b, q, k, v, scale=-1.0),
    "relu before": lambda b, q, k, v: attend(b, q, k, v, lambda b, s: b.relu(s)),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_attention_is_reported(name):
    types = [Q, Q, Q] + ([t()] if "tensor" in name else [])
    module, misses = raised(NEARLY[name], *types)
    assert "attention" not in compute(module)
    assert misses and misses[0][0] == "attention"


def sdpa(b, q, k, v, mask=None, **attributes):
    return b.attention(q, k, v, mask, **{"scale": 0.25, **attributes})


def test_boolean_masks_of_the_composite():
    def make(b, q, k, v, keep):
        causal = b.tri_mask(rows=S, columns=S)
        mask = b.logical_and(causal, b.reshape(keep, shape=(B, 1, 1, S)))
        return sdpa(b, q, k, v, b.broadcast_to(mask, shape=(B, H, S, S)))

    module, _ = raised(make, Q, Q, Q, t(B, S, dtype=BOOL))
    op = find(module, "attention")
    assert op.attribute("causal") and op.operands[3].shape == (B, 1, 1, S)

    module, _ = raised(
        lambda b, q, k, v: sdpa(b, q, k, v, b.weight(torch.ones(S, S, dtype=torch.bool))), Q, Q, Q
    )
    assert compute(module) == ["attention"] and len(find(module, "attention").operands) == 3


def test_a_causal_mask_on_a_causal_attention_adds_nothing():
    module, _ = raised(
        lambda b, q, k, v: sdpa(
            b, q, k, v, b.tri_mask(rows=S, columns=S, diagonal=1), causal=True, offset=0
        ),
        Q, Q, Q,
    )  # fmt: skip
    op = find(module, "attention")
    assert op.attribute("offset") == 0 and len(op.operands) == 3


def test_negated_and_hidden_masks():
    def make(b, q, k, v):
        hidden = b.logical_not(b.tri_mask(rows=S, columns=S))
        bias = b.where(hidden, sc(b, INF), sc(b, 0.0))
        return sdpa(b, q, k, v, b.reshape(bias, shape=(1, 1, S, S)))

    module, _ = raised(make, Q, Q, Q, pipeline="canonicalize,raise_attention,dce")
    assert compute(module) == ["attention"] and find(module, "attention").attribute("causal")


@pytest.mark.parametrize("seed", range(20))
def test_bands_read_from_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns, upper, width = (
        int(torch.randint(low, high, (), generator=generator))
        for low, high in ((1, 7), (1, 7), (-3, 6), (1, 6))
    )
    distance = torch.arange(columns)[None] - torch.arange(rows)[:, None]
    mask = (distance <= upper) & (distance > upper - width)
    band = band_of(mask)
    if not mask.any():
        assert band is None
        return
    assert band is not None
    high = math.inf if band.upper is None else band.upper
    low = -math.inf if band.lower is None else band.lower
    assert torch.equal(mask, (distance <= high) & (distance > low))
    sees = Band(band.upper, band.lower).every_row_sees_something(rows, columns)
    if sees:
        assert bool(mask.any(-1).all())


def test_a_band_with_a_hole_is_none():
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2, 1] = False
    assert band_of(mask) is None
    assert band_of(torch.tensor([[0.0, -3.0], [0.0, 0.0]])) is None
