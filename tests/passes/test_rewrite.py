"""The pattern language and the worklist driver."""

from __future__ import annotations

import pytest
import torch

from accel.errors import RewriteError
from accel.ir import verify
from accel.ir.rewrite import (
    ANY,
    FreeContext,
    Match,
    Matcher,
    Rewrite,
    Rule,
    RuleSet,
    bind,
    maybe,
    op,
    rewrite,
    scalar,
    var,
    where,
)
from accel.ir.types import symbol
from tests.passes.helpers import F16, F32, I64, compute, find, ops, program, run, t

x, y, z = var("x"), var("y"), var("z")


def matches(pattern, module, name) -> Match | None:
    return Matcher(pattern).first(find(module, name))


def test_every_attribute_must_be_mentioned():
    with pytest.raises(RewriteError, match="does not mention axes"):
        op("permute", x)
    with pytest.raises(RewriteError, match="does not mention keepdim"):
        op("sum", x, axes=ANY)
    with pytest.raises(RewriteError, match="no attribute 'axis'"):
        op("permute", x, axes=ANY, axis=1)
    with pytest.raises(RewriteError, match="unknown op"):
        op("permutate", x)
    with pytest.raises(RewriteError, match="2 operands, not 3"):
        op("linear", x, y)


def test_literal_attribute_bind_and_where():
    m = program(lambda b, a: b.permute(a, axes=(0, 2, 1)), t(2, 3, 4))
    assert matches(op("permute", x, axes=(0, 2, 1)), m, "permute") is not None
    assert matches(op("permute", x, axes=(0, 1, 2)), m, "permute") is None
    found = matches(op("permute", x, axes=bind("p")), m, "permute")
    assert found is not None and found["p"] == (0, 2, 1)
    assert matches(op("permute", x, axes=where(lambda v, o: v[0] == 0, "x")), m, "permute")
    assert not matches(op("permute", x, axes=where(lambda v, o: v[0] == 1, "x")), m, "permute")


def test_defaults_are_attributes_too():
    m = program(lambda b, a: b.sum(a, axes=(1,)), t(2, 3))
    assert matches(op("sum", x, axes=(1,), keepdim=False), m, "sum") is not None
    assert matches(op("sum", x, axes=(1,), keepdim=True), m, "sum") is None


def test_symbolic_sizes_are_compared_as_expressions():
    s = symbol("s")
    m = program(lambda b, a: b.reshape(a, shape=(s * 2,)), t(s, 2))
    assert matches(op("reshape", x, shape=(2 * s,)), m, "reshape") is not None
    assert matches(op("reshape", x, shape=(s,)), m, "reshape") is None


def test_commutative_operands_backtrack():
    # (a * b) + (c * a): the shared operand is found whichever way round.
    m = program(lambda b, p, q, r: b.add(b.mul(p, q), b.mul(r, p)), t(2), t(2), t(2))
    found = matches(op("add", op("mul", x, y), op("mul", x, z)), m, "add")
    assert found is not None
    p, q, r = m.main.args
    assert (found["x"], found["y"], found["z"]) == (p, q, r)


def test_a_name_bound_twice_is_one_value():
    same = program(lambda b, a: b.sub(a, a), t(2))
    other = program(lambda b, a, c: b.sub(a, c), t(2), t(2))
    assert matches(op("sub", x, x), same, "sub") is not None
    assert matches(op("sub", x, x), other, "sub") is None


def test_scalars_by_value_name_and_tolerance():
    m = program(lambda b, a: b.mul(a, b.scalar(0.7071, F32)), t(2))
    found = matches(op("mul", x, scalar("c")), m, "mul")
    assert found is not None and found["c"] == pytest.approx(0.7071)
    assert matches(op("mul", x, 0.7071), m, "mul") is not None
    assert matches(op("mul", x, 1), m, "mul") is None
    close = scalar(value=0.70710678, tolerance=1e-4)
    assert matches(op("mul", x, close), m, "mul") is not None


def test_optional_operands():
    m = program(lambda b, a, w: b.linear(a, w), t(2, 3), t(4, 3))
    assert matches(op("linear", x, y, None), m, "linear") is not None
    assert matches(op("linear", x, y, z), m, "linear") is None
    found = matches(op("linear", x, y, maybe("bias")), m, "linear")
    assert found is not None and found["bias"] is None


def test_var_tests():
    m = program(lambda b, a: b.neg(a), t(2, 3))
    assert matches(op("neg", var("x", dtype=F32, rank=2)), m, "neg")
    assert not matches(op("neg", var("x", dtype=F16)), m, "neg")
    assert not matches(op("neg", var("x", rank=3)), m, "neg")
    assert not matches(op("neg", var("x", dtype=lambda d: not d.is_floating_point)), m, "neg")


def test_single_user():
    pattern = op("neg", op("exp", x, single=True))
    one = program(lambda b, a: b.neg(b.exp(a)), t(2))
    assert matches(pattern, one, "neg")

    def two(b, a):
        e = b.exp(a)
        return b.neg(e), e

    module = program(two, t(2))
    matcher = Matcher(pattern, explain=True)
    assert matcher.first(find(module, "neg")) is None
    assert matcher.miss is not None and "has 2 uses" in matcher.miss.reason


class Recording(FreeContext):
    def __init__(self, fuel: int = 10**9) -> None:
        super().__init__("test")
        self.fuel, self.fired, self.misses = fuel, [], []

    def rewrite(self, rule, op=None):
        if self.fuel == 0:
            return False
        self.fuel -= 1
        self.fired.append(rule)
        return True

    def miss(self, rule, op, reason):
        self.misses.append((rule, op.name, reason))


NEG_NEG = Rewrite("neg_neg", op("neg", op("neg", x)), x)
ADD_ZERO = Rewrite("add_zero", op("add", x, 0), x)


def chain(n):
    def make(b, a):
        for _ in range(n):
            a = b.neg(a)
        return a

    return program(make, t(2))


def test_fixpoint_and_dead_ops():
    module = chain(7)
    context = Recording()
    assert rewrite(module, RuleSet([NEG_NEG]), context) == 3
    verify(module)
    assert ops(module) == ["neg"]


def test_fuel_stops_at_an_exact_rewrite():
    module = chain(6)
    rewrite(module, RuleSet([NEG_NEG]), Recording(fuel=2))
    verify(module)
    assert len(ops(module)) == 2
    untouched = chain(6)
    rewrite(untouched, RuleSet([NEG_NEG]), Recording(fuel=0))
    assert len(ops(untouched)) == 6


def test_new_ops_carry_place_and_pass():
    module = program(lambda b, a: b.exp(b.log(a)), t(2))
    rule = Rewrite("weird", op("exp", op("log", x)), lambda b, m: b.abs(m["x"]))
    rewrite(module, RuleSet([rule]), Recording())
    assert find(module, "abs").made_by == "test"


def test_a_larger_zero_is_broadcast():
    module = program(lambda b, a: b.add(a, b.full_of((4, 3), 0.0, F32)), t(3))
    a = torch.randn(3)
    before = run(module, [a])
    rewrite(module, RuleSet([ADD_ZERO]))
    verify(module)
    assert compute(module) == ["broadcast_to"]
    assert torch.equal(run(module, [a])[0], before[0])


def test_a_replacement_of_another_type_is_refused():
    rule = Rewrite("bad", op("neg", x), lambda b, m: b.reshape(m["x"], shape=(4,)))
    module = program(lambda b, a: b.neg(a), t(2, 2))
    with pytest.raises(RewriteError, match=r"rule 'bad' built tensor<4xf32>"):
        rewrite(module, RuleSet([rule]))
    cast = Rewrite("bad", op("neg", x), lambda b, m: b.cast(m["x"], dtype=F16))
    with pytest.raises(RewriteError, match="bad"):
        rewrite(module, RuleSet([cast]))


def test_a_cycle_is_named():
    there = Rewrite("sub_to_add", op("sub", x, y), op("add", x, op("neg", y)))
    back = Rewrite("add_to_sub", op("add", x, op("neg", y)), op("sub", x, y))
    quiet = Rewrite("quiet", op("mul", x, 1), x)
    module = program(lambda b, p, q: b.sub(p, q), t(2), t(2))
    with pytest.raises(RewriteError, match="add_to_sub, sub_to_add") as error:
        rewrite(module, RuleSet([there, back, quiet]))
    assert "quiet" not in str(error.value)


def test_growth_without_end_is_stopped():
    grow = Rewrite("grow", op("neg", x), lambda b, m: b.neg(b.neg(b.neg(m["x"]))))
    with pytest.raises(RewriteError, match="grow"):
        rewrite(chain(3), RuleSet([grow]))


def test_refused_build_leaves_no_trace():
    def make(b, m):
        b.exp(m["x"])

    module = program(lambda b, a: b.neg(a), t(2))
    assert rewrite(module, RuleSet([Rewrite("no", op("neg", x), make)])) == 0
    assert ops(module) == ["neg"]


def test_near_misses_say_what_stood_in_the_way():
    pattern = op("softmax", op("mul", op("matmul", x, y), scalar("s")), axis=3)
    rule = Rewrite("attend", pattern, lambda b, m: None, near=2)

    def close(b, q, k):
        return b.softmax(b.mul(b.sub(q, k), b.scalar(0.5, F32)), axis=3)

    context = Recording()
    rewrite(program(close, t(1, 2, 3, 3), t(1, 2, 3, 3)), RuleSet([rule]), context)
    assert context.misses == [("attend", "mul", "reads accel.sub, not accel.matmul")]
    far = Recording()
    rewrite(program(lambda b, q: b.softmax(q, axis=3), t(1, 2, 3, 3)), RuleSet([rule]), far)
    assert far.misses == []


def test_structural_rule_by_trait_and_several_results():
    from accel.ir.op import Trait

    class SwapTopK(Rule):
        name, roots = "topk_to_sort", ("topk",)

        def apply(self, op, b, context):
            values, indices = b.sort(op.operands[0], axis=0, descending=True)
            k = op.attribute("k")
            return [b.slice(v, axis=0, start=0, stop=k) for v in (values, indices)]

    module = program(lambda b, a: b.topk(a, k=2, axis=0), t(5))
    a = torch.randn(5)
    before = run(module, [a])
    rewrite(module, RuleSet([SwapTopK()]))
    verify(module)
    assert "sort" in ops(module)
    for p, q in zip(before, run(module, [a])):
        assert torch.equal(p, q)

    class Elementwise(Rule):
        name, roots = "elementwise", Trait.ELEMENTWISE
        seen: list[str] = []

        def apply(self, op, b, context):
            self.seen.append(op.name)

    rewrite(program(lambda b, a: b.sum(b.exp(a), axes=(0,)), t(5)), RuleSet([Elementwise()]))
    assert Elementwise.seen == ["exp"]


def test_duplicate_rule_names_are_refused():
    with pytest.raises(RewriteError, match="two rules"):
        RuleSet([NEG_NEG, NEG_NEG])


def test_integer_scalars_keep_their_dtype():
    module = program(lambda b, a: b.mul(a, b.scalar(0, I64)), t(3, dtype=I64))
    rewrite(module, RuleSet([Rewrite("mul_zero", op("mul", x, 0), 0)]))
    verify(module)
    assert run(module, [torch.arange(3)])[0].tolist() == [0, 0, 0]
