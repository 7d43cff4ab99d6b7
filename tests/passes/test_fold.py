"""Constant folding: in float64, rounded once, never inflating weights."""

from __future__ import annotations

import torch

from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from tests.passes.helpers import BF16, BOOL, F16, F32, F64, I64, compute, find, ops, program, run, t


def folded(make, *types, options=""):
    module = program(make, *types)
    ledger = run_pipeline(module, f"fold{options},dce", validate=True)
    return module, ledger.rows[0]


def rand(*shape, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_a_transposed_weight_takes_the_originals_place():
    module, row = folded(
        lambda b, a: b.matmul(a, b.permute(b.weight(rand(8, 64)), axes=(1, 0))), t(2, 64)
    )
    assert ops(module) == ["constant", "matmul"] and row.rewrites == {"fold": 1}
    assert module.weights.names() == ["w.permute"]
    assert torch.equal(module.weights.tensor("w.permute"), rand(8, 64).T)


def test_a_weight_with_another_user_is_not_copied():
    big = rand(256, 64)

    def make(b, ids, a):
        w = b.weight(big)
        return b.embedding(w, ids), b.matmul(a, b.permute(w, axes=(1, 0)))

    module, row = folded(make, t(3, dtype=I64), t(2, 64))
    assert "permute" in ops(module) and not row.changed


def test_computed_in_float64_and_rounded_once():
    w = rand(5, dtype=F16)

    def make(b, a):
        scaled = b.div(b.mul(b.weight(w), b.scalar(3.0, F16)), b.scalar(7.0, F16))
        return b.add(a, scaled)

    module, _ = folded(make, t(5, dtype=F16))
    stored = module.weights.tensor(module.weights.names()[0])
    assert torch.equal(stored, (w.double() * 3 / 7).half())


def test_one_value_everywhere_becomes_full():
    def make(b, a):
        ones = b.weight(torch.ones(4, 4))
        mask = b.gt(b.add(ones, b.scalar(1.0, F32)), b.scalar(1.5, F32))
        return b.where(mask, a, b.scalar(0.0, F32))

    module, _ = folded(make, t(4, 4))
    assert compute(module) == ["where"] and len(module.weights) == 0
    assert run_pipeline(module, "canonicalize,dce").rows[0].rewrites["where_true"] == 1
    assert compute(module) == []


def test_scalars_fold_without_storing():
    def make(b, a):
        scale = b.rsqrt(b.cast(b.scalar(64, I64), dtype=F32))
        return b.mul(a, scale)

    module, _ = folded(make, t(3))
    assert ops(module) == ["full", "mul"]
    assert find(module, "full").attribute("value") == 0.125


def test_a_generated_mask_is_stored_only_below_the_limit():
    def make(b, a):
        i = b.iota(shape=(128, 128), axis=0, dtype=I64)
        j = b.iota(shape=(128, 128), axis=1, dtype=I64)
        return b.where(b.le(j, i), a, b.scalar(0.0, F32))

    module, _ = folded(make, t(128, 128))
    assert sorted(ops(module)) == ["constant", "full", "where"]
    module, _ = folded(make, t(128, 128), options="{limit_bytes=100}")
    assert "iota" in ops(module)


def test_a_large_broadcast_is_not_stored():
    def make(b, a):
        w = b.weight(rand(1, 2048))
        return b.matmul(a, b.exp(b.broadcast_to(w, shape=(64, 2048))))

    module, _ = folded(make, t(2, 64))
    assert module.weights.nbytes() <= 2048 * 4 + 4096


def test_rotary_angles_are_stored():
    def make(b, a):
        frequencies = b.weight(rand(8), "inv_freq")
        positions = b.cast(b.arange(length=64, dtype=I64), dtype=F32)
        angles = b.mul(b.reshape(positions, shape=(64, 1)), frequencies)
        both = b.cat(angles, angles, axis=1)
        return b.mul(a, b.cos(both)), b.mul(a, b.sin(both))

    module, _ = folded(make, t(64, 16))
    assert compute(module) == ["mul", "mul"] and len(module.weights) == 2


def test_encoded_weights_stay_encoded():
    def make(b, a):
        q = b.weight(torch.randint(-8, 8, (8, 4), dtype=torch.int8), "q")
        w = b.dequantize(q, b.weight(rand(8, 1).abs(), "scale"), axis=1)
        return b.linear(a, w)

    module, row = folded(make, t(2, 4))
    assert "dequantize" in ops(module) and not row.changed

    def clustered(b, a):
        index = b.weight(torch.randint(0, 4, (64, 64), dtype=torch.uint8), "index")
        return b.linear(a, b.gather(b.weight(rand(4), "book"), index, axis=0))

    misses = []
    module = program(clustered, t(2, 64))
    context = Context(on_miss=lambda rule, op, reason: misses.append((rule, op.name, reason)))
    run_pipeline(module, "fold", context)
    assert "gather" in ops(module)
    assert misses[0][:2] == ("fold", "gather") and "16384 bytes" in misses[0][2]


def test_a_widened_weight_is_not_stored_wide():
    w = rand(64, 64, dtype=BF16)
    module, _ = folded(lambda b, a: b.linear(a, b.cast(b.weight(w), dtype=F32)), t(2, 64))
    assert module.weights.nbytes() == 64 * 64 * 2


def test_position_embeddings_become_their_rows():
    table = rand(512, 16)

    def make(b, a):
        ids = b.iota(shape=(1, 8), axis=1, dtype=I64)
        return b.add(a, b.embedding(b.weight(table), ids))

    module, _ = folded(make, t(2, 8, 16))
    assert compute(module) == ["add"] and module.weights.nbytes() == 8 * 16 * 4


def test_random_draws_and_symbolic_sizes_stay():
    from accel.ir.types import symbol

    s = symbol("s")

    def make(b, a):
        noise = b.random_normal(shape=(3,), dtype=F32)
        count = b.cast(b.size(value=s), dtype=F32)
        return b.add(b.add(a, noise), count)

    module, row = folded(make, t(s, 3))
    assert not row.changed and {"random_normal", "size", "cast"} <= set(ops(module))


def test_bits_are_read_in_their_own_dtype():
    def make(b, a):
        bits = b.bitcast(b.weight(torch.tensor([1.0, 2.0, -3.0])), dtype=torch.int32)
        return b.add(a, b.cast(b.shift_right(bits, b.scalar(23, torch.int32)), dtype=F32))

    module, _ = folded(make, t(3))
    assert compute(module) == ["add"]
    x = torch.zeros(3)
    expected = (torch.tensor([1.0, 2.0, -3.0]).view(torch.int32) >> 23).double()
    assert torch.equal(run(module, [x])[0], expected)


def test_several_results_and_nans():
    def make(b, a):
        values, indices = b.topk(b.weight(torch.tensor([3.0, 1.0, 2.0])), k=2, axis=0)
        nan = b.log(b.weight(torch.tensor([-1.0, -1.0])))
        return b.add(a, values), indices, b.isnan(nan)

    module, _ = folded(make, t(2))
    results = run(module, [torch.zeros(2)])
    assert results[0].tolist() == [3.0, 2.0] and results[1].tolist() == [0, 2]
    assert results[2].tolist() == [True, True]


def test_fuel_and_dtypes():
    def make(b, a, p):
        return (
            b.add(a, b.exp(b.weight(rand(3, dtype=F64)))),
            b.logical_and(p, b.logical_not(b.weight(torch.tensor([True, False, True])))),
        )

    module = program(make, t(3, dtype=F64), t(3, dtype=BOOL))
    context = Context(fuel=1)
    run_pipeline(module, "fold", context)
    assert compute(module) == ["add", "logical_not", "logical_and"]
