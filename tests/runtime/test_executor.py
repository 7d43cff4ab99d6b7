"""Hand-written and random plans give what their steps mean, call after call."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.errors import ArtifactError, ExecutionError, InputError
from accel.runtime.executor import CompiledFunction
from accel.runtime.plan import Step
from accel.runtime.prepare import PreparedCalls, TensorWeights
from tests.runtime.support import KERNELS, LinearLibrary, Plan, Registry, host_code, operand, same


def test_aten_and_view_steps() -> None:
    p = Plan()
    x = p.input(4, 6, name="x")
    t = p.view("permute", x, [6, 4], axes=[1, 0])
    best = p.aten("aten::topk", [t], [6, 2], operand(0), 2, meaning=lambda a: a.topk(2).values)
    p.values.append(p.values[best].__class__("owned", "int64", [6, 2]))
    p.steps[-1].outputs.append(len(p.values) - 1)
    cut = p.view("slice", best, [3, 2], axis=0, start=1, stop=4)
    y = p.aten("aten::cat", [cut, cut], [6, 2], {"list": [operand(0), operand(1)]}, 0,
               meaning=lambda a, b: torch.cat([a, b]))  # fmt: skip
    run = p.compile(y)
    for _ in range(3):
        inputs = [torch.randn(4, 6)]
        same(run(inputs), p.reference(inputs))


def test_aten_templates() -> None:
    p = Plan(n=(1, None))
    x = p.input("n", 3)
    filled = p.aten(
        "aten::full", [], ["n", 3], {"list": [{"size": "n"}, 3]}, -torch.inf,
        result="float32", dtype={"dtype": "float32"}, device={"torch": "cpu"},
        meaning=lambda: torch.full((5, 3), -torch.inf),
    )  # fmt: skip
    y = p.aten("aten::maximum", [x, filled], ["n", 3], operand(0), operand(1),
               meaning=torch.maximum)  # fmt: skip
    run = p.compile(y)
    inputs = [torch.randn(5, 3)]
    same(run(inputs), p.reference(inputs))


def test_kernels_see_dense_memory() -> None:
    """Strided, negated and weight views are written out before a kernel reads them."""
    p = Plan()
    x, w = p.input(4, 4), p.weight("w", torch.randn(4, 4))
    total = p.kernel("add", p.view("permute", x, [4, 4], axes=[1, 0]), x)
    turned = p.view("permute", total, [4, 4], axes=[1, 0])
    y = p.kernel("mul", turned, p.view("permute", w, [4, 4], axes=[1, 0]))
    run = p.compile(p.kernel("twice", y))
    base = torch.randn(8, 8)
    negated = torch._neg_view(torch.randn(4, 4))
    assert negated.is_neg()
    assert negated.is_contiguous()
    for value in (base[::2, ::2], base[:4, :4].t(), negated, base[0, 0].expand(4, 4)):
        same(run([value]), p.reference([value]))


def test_results_are_not_overwritten_by_the_next_call() -> None:
    p = Plan()
    x = p.input(1000)
    a = p.kernel("twice", x)
    b = p.kernel("twice", a)
    run = p.compile(b, p.view("reshape", a, [10, 100]))
    first = run([torch.ones(1000)])
    kept = [r.clone() for r in first]
    run([torch.full((1000,), 7.0)])
    same(first, kept)


def test_results_share_no_memory() -> None:
    """Twice the same value, a view of another result, a weight."""
    p = Plan()
    x, w = p.input(6), p.weight("w", torch.arange(6.0))
    y = p.kernel("twice", x)
    run = p.compile(y, y, p.view("reshape", y, [2, 3]), w, p.view("reshape", w, [3, 2]), x)
    inputs = [torch.randn(6)]
    expected = p.reference(inputs)
    results = run(inputs)
    for result in results[:-1]:
        same([result], [expected[[r is result for r in results].index(True)]])
        result.fill_(-1.0)
    same(run(inputs), expected)
    assert results[-1] is inputs[0]  # as in eager: the function returns its argument


def test_in_place_chain_needs_one_buffer() -> None:
    p = Plan()
    x = p.input(1024)
    y = x
    for _ in range(10):
        y = p.kernel("twice", y)
    y = p.kernel("reverse", y)
    run = p.compile(y)
    assert run.arena_bytes({}) == (4096, 4096)
    inputs = [torch.randn(1024)]
    before = inputs[0].clone()
    same(run(inputs), p.reference(inputs))
    assert torch.equal(inputs[0], before)


def test_a_kernel_that_reads_elsewhere_is_not_in_place() -> None:
    p = Plan()
    x = p.input(1024)
    run = p.compile(p.kernel("reverse", p.kernel("reverse", p.kernel("reverse", x))))
    assert run.arena_bytes({})[0] == 2 * 4096
    inputs = [torch.randn(1024)]
    same(run(inputs), p.reference(inputs))


def test_in_place_waits_for_other_readers() -> None:
    """`mul` may overwrite either operand, unless a view of it is read out of order, or later."""
    p = Plan()
    a = p.kernel("twice", p.input(64, 64))
    turned = p.view("permute", a, [64, 64], axes=[1, 0])
    b = p.kernel("mul", a, turned)
    c = p.kernel("add", b, a)
    run = p.compile(c, p.kernel("mul", c, c))
    inputs = [torch.randn(64, 64)]
    same(run(inputs), p.reference(inputs))


def test_an_operand_that_is_also_read_elsewhere_is_not_overwritten() -> None:
    """`fold` may overwrite its first operand, but not if the second one is the same memory."""
    p = Plan()
    a = p.kernel("twice", p.input(64, 64))
    b = p.kernel("fold", a, p.view("reshape", a, [64, 64]))
    c = p.kernel("fold", b, b)
    run = p.compile(p.kernel("reverse", c))
    inputs = [torch.randn(64, 64)]
    same(run(inputs), p.reference(inputs))


def test_a_wider_result_is_not_written_in_place() -> None:
    """A declared pair is used only where both have the same size."""
    p = Plan()
    x = p.input(16)
    first, second = p.kernel("twice", x), p.kernel("reverse", x)
    wide, back = p.value("buffer", [16], "float64"), p.value("buffer", [16])
    size, pairs = ["*", 1, 16], {"inplace": [[0, 0]]}
    p.steps.append(Step("kernel", "accel_widen", [first], [wide], pairs, [size]))
    p.steps.append(Step("kernel", "accel_narrow", [wide], [back], pairs, [size]))
    run = p.compile(p.kernel("add", back, second))
    given = torch.randn(16)
    same(run([given]), [2 * given + given.flip(0)])


def test_sizes_that_shrink_as_a_symbol_grows() -> None:
    """Layouts shared between sizes hold the larger buffers of all of them."""
    p = Plan(n=(1, 400))
    rest = ["+", 400, ["*", -1, "n"]]
    x, z = p.input("n"), p.input(rest)
    outputs = []
    for start in (x, z):
        y = start
        for _ in range(3):
            y = p.kernel("reverse", y)
        outputs.append(p.kernel("reverse", y))
    run = p.compile(*outputs)
    for n in (399, 1, 200, 100, 50, 101, 102, 103, 97, 98, 399, 5, 4, 3, 2, 97):
        inputs = [torch.randn(n), torch.randn(400 - n)]
        same(run(inputs), p.reference(inputs))


def test_library_results_are_taken_over() -> None:
    """A kernel that may work in place writes over what the library allocated."""
    p = Plan()
    x, w = p.input(8, 16), p.weight("w", torch.randn(32, 16))
    h = p.library(x, w)
    run = p.compile(p.kernel("twice", p.kernel("twice", h)))
    inputs = [torch.randn(8, 16)]
    same(run(inputs), p.reference(inputs))
    assert run.arena_bytes({})[0] == 0


def test_weights_are_packed_once_per_model() -> None:
    library, shared = LinearLibrary(), PreparedCalls()
    p = Plan(n=(1, None))
    x, w = p.input("n", 16), p.weight("w", torch.randn(16, 16))
    plan = p.done(p.library(p.library(x, w), w, scale=1.0), p.library(x, w, scale=2.0))
    functions = [
        CompiledFunction(
            plan, TensorWeights(p.weights), libraries=Registry(library), prepared=shared
        )
        for _ in range(2)
    ]
    for run in functions:
        for n in (1, 5):
            inputs = [torch.randn(n, 16)]
            same(run(inputs), p.reference(inputs))
    assert library.prepared == 3  # no options, scale 1, scale 2


class TestDonation:
    def _plan(self, symbol: str) -> Plan:
        p = Plan()
        state, x = p.input(32, name="state"), p.input(32, name="x")
        p.donates = {0: 0}
        p.new = p.kernel(symbol, state, x)  # type: ignore[attr-defined]
        p.out = p.kernel("twice", p.new)  # type: ignore[attr-defined]
        return p

    def test_state_is_updated_in_its_own_memory(self) -> None:
        p = self._plan("add")
        run = p.compile(p.new, p.out)  # type: ignore[attr-defined]
        state, total = torch.zeros(32), torch.zeros(32)
        for step in range(4):
            x = torch.full((32,), float(step))
            address = state.data_ptr()
            state, doubled = run([state, x])
            total = total + x
            assert state.data_ptr() == address
            same([state, doubled], [total, 2 * total])

    def test_shared_arguments_are_not_overwritten(self) -> None:
        p = self._plan("mul")
        run = p.compile(p.new, p.out)  # type: ignore[attr-defined]
        x = torch.randn(32)
        expected = p.reference([x, x])
        same(run([x, x]), expected)
        same(run([x, x]), expected)  # x is as it was

    def test_a_result_that_is_given_out_too_is_not_placed_in_the_argument(self) -> None:
        p = self._plan("add")
        p.donates = {1: 0}
        run = p.compile(p.new, p.new)  # type: ignore[attr-defined]
        given = torch.zeros(32)
        result, state = run([given, torch.ones(32)])
        given.fill_(7.0)
        run([state, torch.ones(32)])
        assert torch.equal(result, torch.ones(32))

    def test_memory_that_is_still_read_is_not_taken(self) -> None:
        p = Plan()
        state = p.input(32)
        p.donates = {0: 0}
        new = p.kernel("reverse", state)
        run = p.compile(new, p.kernel("add", state, new))
        inputs = [torch.randn(32)]
        same(run([inputs[0].clone()]), p.reference(inputs))

    def test_strided_arguments(self) -> None:
        p = self._plan("add")
        run = p.compile(p.new, p.out)  # type: ignore[attr-defined]
        inputs = [torch.randn(64)[::2], torch.randn(64)[::2]]
        same(run([t.clone() for t in inputs]), p.reference(inputs))


class TestSymbols:
    def _plan(self) -> Plan:
        p = Plan(n=(1, 100), m=(2, None))
        x = p.input("n", ["*", 2, "m"], name="x")
        w = p.weight("w", torch.randn(3))
        y = p.kernel("twice", x)
        column = p.aten("aten::sum.dim_IntList", [y], ["n", 1], operand(0), {"list": [1]}, True,
                        meaning=lambda a: a.sum(1, True))  # fmt: skip
        wide = p.view("expand", w, ["n", 3])
        z = p.aten("aten::mul.Tensor", [column, wide], ["n", 3], operand(0), operand(1),
                   meaning=torch.mul)  # fmt: skip
        p.out = p.kernel("split", z)  # type: ignore[attr-defined]
        return p

    def test_one_plan_for_all_sizes(self) -> None:
        p = self._plan()
        run = p.compile(*p.out)  # type: ignore[attr-defined]
        generator = random.Random(0)
        sizes = [(n, m) for n in (1, 2, 7, 99, 100) for m in (2, 3, 40)]
        for n, m in [generator.choice(sizes) for _ in range(60)]:
            x = torch.randn(n, 2 * m)
            same(run([x]), [t + d for t, d in _reference(p, x, n)])

    @pytest.mark.parametrize(
        ("shape", "says"),
        [
            ((101, 4), "compiled for n of 1 to 100; axis 0 of argument 'x' gives 101"),
            ((0, 4), "compiled for n of 1 to 100"),
            ((3, 2), "compiled for m of 2 and up"),
            ((3, 5), "cannot tell the size 'm'"),
            ((3, 4, 1), r"wants shape \[n, 2\*m\] for argument 'x', got \[3, 4, 1\]"),
        ],
    )
    def test_sizes_out_of_range(self, shape: tuple[int, ...], says: str) -> None:
        p = self._plan()
        run = p.compile(*p.out)  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=says):
            run([torch.zeros(shape)])


def test_empty_tensors() -> None:
    """Kernels without work are not called; everything else goes on."""
    p = Plan(n=(0, None))
    x, w = p.input("n", 8), p.weight("w", torch.randn(8, 8))
    y = p.kernel("reverse", p.kernel("twice", p.library(p.kernel("twice", x), w)))
    run = p.compile(y, p.kernel("reverse", x))
    for n in (3, 0, 1, 0):
        inputs = [torch.randn(n, 8)]
        same(run(inputs), p.reference(inputs))


def test_guards_are_checked_at_each_call() -> None:
    p = Plan(n=(1, None), m=(1, None))
    x, y = p.input("n", name="x"), p.input("m", name="y")
    plan = p.done(p.kernel("twice", x), p.kernel("twice", y))
    plan.guards = [["<", ["*", 2, "n"], "m"], ["not", ["or", ["==", "n", 3], ["==", "m", 9]]]]
    run = CompiledFunction(plan, TensorWeights({}), libraries=Registry(), host=host_code())
    run([torch.ones(2), torch.ones(5)])
    for n, m, says in (
        (2, 4, r"compiled for 2\*n < m; this call has n = 2, m = 4"),
        (3, 7, r"compiled for not \(\(n == 3\) or \(m == 9\)\)"),
        (1, 9, "this call has n = 1, m = 9"),
    ):
        with pytest.raises(InputError, match=says):
            run([torch.ones(n), torch.ones(m)])
    for bad in (["<", "n"], ["is", 1, 2], ["and"], "n < m", ["not", ["<", 1, "k"]]):
        plan.guards = [bad]  # type: ignore[list-item]
        run = CompiledFunction(plan, TensorWeights({}), libraries=Registry(), host=host_code())
        with pytest.raises(ArtifactError):
            run([torch.ones(2), torch.ones(5)])


def _reference(p: Plan, x: Tensor, n: int) -> list[tuple[Tensor, float]]:
    z = (2 * x).sum(1, True) * p.weights["w"].expand(n, 3)
    return [(z, 1.0), (z, -1.0)]


class TestBadInput:
    def _run(self) -> CompiledFunction:
        p = Plan("forward")
        x = p.input(2, 3, name="x")
        ids = p.input(4, name="ids", dtype="int64")
        rows = p.aten("aten::index_select", [x, ids], [4, 3], operand(0), 0, operand(1),
                      meaning=lambda a, i: a[i])  # fmt: skip
        return p.compile(rows)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda x, i: [x], "takes 2 tensors, got 1"),
            (lambda x, i: [x, [1, 2]], "wants a tensor for argument 'ids', got list"),
            (lambda x, i: [x, None], "wants a tensor for argument 'ids', got NoneType"),
            (lambda x, i: [x.double(), i], "wants float32 for argument 'x', got float64"),
            (lambda x, i: [x, i.float()], "wants int64 for argument 'ids', got float32"),
            (lambda x, i: [x.t(), i], r"shape \[2, 3\] for argument 'x', got \[3, 2\]: axis 0"),
            (lambda x, i: [x[0], i], r"shape \[2, 3\] for argument 'x', got \[3\]"),
            (lambda x, i: [x.to("meta"), i], "runs on cpu; argument 'x' is on meta"),
            (lambda x, i: [x.to_sparse(), i], "a dense tensor for argument 'x'"),
            (lambda x, i: [x.requires_grad_(), i], "argument 'x' of 'forward' requires grad"),
        ],
    )
    def test_typed_errors_name_the_argument(self, change: Any, says: str) -> None:
        run = self._run()
        good = [torch.randn(2, 3), torch.tensor([0, 1, 1, 0])]
        expected = good[0][good[1]]
        for _ in range(2):  # before and after the first good call
            with pytest.raises(InputError, match=says) as caught:
                run(change(torch.randn(2, 3), good[1]))
            assert caught.value.id == "ACCEL011"
            same(run(good), [expected])

    def test_an_input_that_requires_grad_is_fine_under_no_grad(self) -> None:
        x, ids = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1, 1, 0])
        with torch.no_grad():
            (rows,) = self._run()([x, ids])
        assert not rows.requires_grad

    def test_a_failing_step_says_which(self) -> None:
        run = self._run()
        run.plan.steps[0].source = "model.py:12"
        for _ in range(2):
            with pytest.raises(
                ExecutionError, match=r"(?s)out of range.*index_select.*model.py:12"
            ):
                run([torch.randn(2, 3), torch.tensor([0, 1, 5, 0])])
        same(run([torch.ones(2, 3), torch.tensor([0, 1, 1, 0])]), [torch.ones(4, 3)])


def test_modes_of_the_caller_change_nothing() -> None:
    p = Plan()
    x, w = p.input(4, 4), p.weight("w", torch.randn(4, 4))
    product = p.aten("aten::mm", [x, w], [4, 4], operand(0), operand(1), meaning=torch.mm)
    y = p.kernel("twice", product)
    run = p.compile(y)
    inputs = [torch.randn(4, 4)]
    expected = p.reference(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(run(inputs), expected)
    with torch.device("meta"):
        same(run(inputs), expected)
    with torch.inference_mode():
        same(run(inputs), expected)
    (result,) = run(inputs)
    assert not result.is_inference()


def test_a_wrong_shape_from_a_library_is_caught() -> None:
    p = Plan()
    x, w = p.input(2, 4), p.weight("w", torch.randn(4, 4))
    h = p.library(x, w)
    p.values[h].shape = [2, 5]
    run = p.compile(p.kernel("twice", h))
    with pytest.raises(ExecutionError, match=r"where torch.float32 \[2, 5\] is declared"):
        run([torch.zeros(2, 4)])


def test_threads_share_a_function() -> None:
    p = Plan(n=(1, None))
    x, w = p.input("n", 64), p.weight("w", torch.randint(-1, 2, (64, 64)).float())
    y = x
    for _ in range(4):
        y = p.kernel("reverse", p.kernel("twice", p.library(y, w, scale=0.25)))
    run = p.compile(y)
    sizes = (1, 3, 200)
    inputs = {n: torch.randint(-2, 3, (n, 64)).float() for n in sizes}  # sums are exact
    expected = {n: p.reference([inputs[n]])[0] for n in sizes}
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(60):
            n = generator.choice(sizes)
            if not torch.equal(run([inputs[n]])[0], expected[n]):
                failures.append(f"thread {seed}, {n} rows")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def _random_plan(generator: random.Random) -> tuple[Plan, list[int]]:
    """A DAG of all kinds of steps over vectors of one symbolic and some fixed lengths."""
    p = Plan(n=(1, None))
    rows: list[Any] = ["n", 4, 4]
    pool = [p.input(r, 8, name=f"x{i}") for i, r in enumerate(rows)]
    pool += [p.weight("w", torch.randn(4, 8)), p.weight("v", torch.randn(8, 8))]
    square = pool[-1]
    for _ in range(generator.randint(5, 30)):
        x = generator.choice(pool)
        shape = p.values[x].shape
        match generator.choice(["kernel", "kernel", "kernel", "library", "aten", "alias", "view"]):
            case "kernel":
                symbol = generator.choice(list(KERNELS))
                partners = [v for v in pool if p.values[v].shape == shape]
                operands = [x, generator.choice(partners)][: KERNELS[symbol][0]]
                made = p.kernel(symbol, *operands)
                pool += made if isinstance(made, list) else [made]
            case "library" if shape[-1] == 8 and len(shape) == 2:
                pool.append(p.library(x, square, scale=0.3))
            case "aten":
                pool.append(p.aten("aten::tanh", [x], shape, operand(0), meaning=torch.tanh))
            case "alias":
                pool.append(p.aten("aten::contiguous", [x], shape, operand(0),
                                   meaning=torch.Tensor.contiguous))  # fmt: skip
            case "view" if len(shape) == 2 and shape[0] == 4:
                kind = generator.choice(["permute", "slice", "reshape"])
                options: dict[str, Any] = {
                    "permute": {"axes": [1, 0]},
                    "slice": {"axis": 0, "start": 1, "stop": 3},
                    "reshape": {},
                }[kind]
                new = {"permute": [8, 4], "slice": [2, 8], "reshape": [2, 16]}[kind]
                if shape == [4, 8]:
                    pool.append(p.view(kind, x, new, **options))
    outputs = [generator.choice(pool) for _ in range(generator.randint(1, 4))]
    donated = generator.randint(0, 2)
    p.donates = {0: donated} if p.values[outputs[0]].kind == "buffer" else {}
    return p, outputs


@pytest.mark.parametrize("seed", range(200))
def test_random_plans(seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    p, outputs = _random_plan(generator)
    run = p.compile(*outputs)
    history: list[tuple[list[Tensor], list[Tensor]]] = []
    for _ in range(6):
        n = generator.choice([1, 3, 50])
        inputs = [torch.randn(n, 8), torch.randn(4, 8), torch.randn(4, 8)]
        if generator.random() < 0.3:
            inputs[1] = inputs[1].t().contiguous().t()
        expected = p.reference(inputs)
        results = run(inputs)
        same(results, expected)
        history.append(([r.clone() for r in results], results))
    for kept, results in history:  # later calls left them alone
        assert all(
            torch.equal(
                a,
                b,
            )
            or a.isnan().any()
            for a, b in zip(kept, results)
        )


class TestMalformedPlans:
    def _good(self) -> Plan:
        p = Plan(n=(1, 4))
        x = p.input("n", 4)
        y = p.kernel("twice", x)
        p.y = p.view("reshape", y, [["*", "n", 4]])  # type: ignore[attr-defined]
        return p

    @pytest.mark.parametrize(
        ("edit", "says"),
        [
            (lambda f: f.outputs.append(99), "value 99 does not exist"),
            (lambda f: f.outputs.append(-1), "value -1 does not exist"),
            (lambda f: f.steps[0].inputs.append(2), "used before it is defined"),
            (lambda f: f.steps.append(f.steps[0]), "defines value 1 again"),
            (lambda f: f.steps[0].outputs.append(0), "defines value 0 of kind 'input'"),
            (lambda f: f.steps.pop(0), "used before it is defined"),
            (lambda f: f.inputs.append(0), "an input is listed twice"),
            (lambda f: f.inputs.clear(), "is not listed"),
            (lambda f: f.values[0].shape.append("k"), "size 'k' is not declared"),
            (lambda f: f.values[1].shape.append(["*", "k"]), "size 'k' is not declared"),
            (lambda f: f.values[1].shape.append(True), "bad size True"),
            (lambda f: f.symbols.update(n=(5, 4)), "empty range"),
            (lambda f: f.values[0].shape.__setitem__(0, 4), "no argument's shape gives"),
            (lambda f: setattr(f.values[1], "dtype", "int4"), "has dtype int4"),
            (lambda f: setattr(f.values[1], "dtype", "nn"), "unknown dtype 'nn'"),
            (lambda f: setattr(f.steps[1], "name", "as_strided"), "unknown view"),
            (lambda f: f.steps[0].options.update(inplace=[[0, 5]]), "bad in-place pair"),
            (lambda f: f.donates.update({0: 7}), "donation of argument 7"),
        ],
    )
    def test_refused(self, edit: Any, says: str) -> None:
        p = self._good()
        plan = p.done(p.y)  # type: ignore[attr-defined]
        edit(plan)
        with pytest.raises(ArtifactError, match=says):
            CompiledFunction(plan, TensorWeights({}), libraries=Registry(), host=host_code())

    @pytest.mark.parametrize(
        ("edit", "says"),
        [
            (lambda f: setattr(f.steps[0], "name", "accel_nothing"), "no function 'accel_nothing'"),
            (lambda f: setattr(f.values[2], "shape", [["*", "n", 5]]), "invalid for input"),
            (lambda f: setattr(f.values[1], "shape", [["+", "n", -9], 4]), r"of shape \(-7, 4\)"),
            (lambda f: setattr(f.values[1], "shape", [["**", 9, 60]]), "bad size expression"),
        ],
    )
    def test_refused_in_the_first_call(self, edit: Any, says: str) -> None:
        p = self._good()
        plan = p.done(p.y)  # type: ignore[attr-defined]
        edit(plan)
        run = CompiledFunction(plan, TensorWeights({}), libraries=Registry(), host=host_code())
        with pytest.raises((ArtifactError, ExecutionError), match=says):
            run([torch.zeros(2, 4)])
