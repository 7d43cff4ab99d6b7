"""compile, package, load as a user calls them, and whole random programs through real code."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import accel
from accel.compiler.assemble import to_function
from accel.compiler.cache import CompileCache, cache_key
from accel.compiler.options import Options
from accel.compiler.pipeline import compile_module
from accel.compiler.sizes import size_expr
from accel.compiler.targets import host_target
from accel.errors import (
    AccelError,
    ArtifactError,
    CaptureError,
    ExecutionError,
    InputError,
    OptionError,
    TrustError,
)
from accel.ir import interpret, parse_module, symbol, verify
from accel.runtime.plan import evaluate_size
from tests.ir.random_program import OTHER_SIZES, random_program

# Steps without jumps: where a rounding error cannot change which element is the largest.
SMOOTH = ("unary", "binary", "divide", "select", "reduce", "softmax", "norm", "linear", "matmul",
          "attention", "permute", "reshape", "slice", "broadcast", "flip", "cat", "pad", "lookup",
          "mask", "scan")  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        y = self.down(torch.nn.functional.gelu(self.up(self.norm(x)))) * scale
        return {"y": x + y, "mean": y.mean(-1)}


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path / "cache"))


def check(got, want) -> None:
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("symbolic", [False, True])
def test_random_programs_run_as_they_mean(seed, symbolic) -> None:
    made = random_program(seed, symbolic=symbolic, kinds=SMOOTH)
    reference = made.module.clone()
    program = compile_module(made.module, host_target(), Options())
    for sizes in (made.sizes, OTHER_SIZES) if symbolic else (made.sizes,):
        inputs = made.inputs(sizes=sizes)
        wanted = interpret(reference.main, inputs, reference.weights)
        got = to_function(program, "main")(inputs)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_is_called_as_the_model_is(model) -> None:
    fast = accel.compile(model)
    for shape in ((2, 16), (3, 5, 16)):
        x = torch.randn(shape)
        check(fast(x), model(x))
    check(fast(x=x, scale=2.0), model(x, 2.0))
    assert "accel.kernel" in fast.ir() and "layer_norm" in fast.ir("captured")
    assert fast.report()["fallbacks"] == {}
    assert "fuse" in fast.explain()


def test_fixed_inputs_refuse_others(model) -> None:
    fast = accel.compile(model, inputs=(torch.randn(2, 16),))
    for wrong in (torch.randn(3, 16), torch.randn(2, 16, dtype=torch.float64), "text"):
        with pytest.raises(InputError):
            fast(wrong)
    with pytest.raises(InputError):
        fast(torch.randn(2, 16), 3.0)


def test_one_program_for_all_sizes(model) -> None:
    sizes = {"x": {0: "batch", 1: torch.export.Dim("length", min=2, max=32)}}
    fast = accel.compile(model, inputs=(torch.randn(4, 6, 16),), dynamic_shapes=sizes)
    for shape in ((4, 6, 16), (2, 32, 16), (9, 2, 16)):
        x = torch.randn(shape)
        check(fast(x), model(x))
    with pytest.raises(InputError, match=r"length|33"):
        fast(torch.randn(2, 33, 16))
    assert len(fast._programs) == 1


def test_conditions_on_sizes_are_checked_at_each_call() -> None:
    """The program was traced for x longer than y; another call must not run it."""

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[: y.shape[0]] + y if x.shape[0] > y.shape[0] else x.sum() * y

    sizes = {"x": {0: "a"}, "y": {0: "b"}}
    fast = accel.compile(model, inputs=(torch.randn(9), torch.randn(4)), dynamic_shapes=sizes)
    x, y = torch.randn(7), torch.randn(5)
    torch.testing.assert_close(fast(x, y), model(x, y))
    with pytest.raises(InputError):
        fast(y, x)


def test_threads_share_a_compiled_model(model) -> None:
    fast = accel.compile(model, inputs=(torch.randn(8, 16),))
    failures = []

    def work(seed: int) -> None:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            try:
                check(fast(x), model(x))
            except (AccelError, AssertionError) as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_package_and_load(model, tmp_path) -> None:
    path = tmp_path / "m.accel"
    x = torch.randn(4, 16)
    accel.package(model, (x,), path=path, dynamic_shapes={"x": {0: "batch"}})
    loaded = accel.load(path)
    for rows in (4, 7):
        y = torch.randn(rows, 16)
        check(loaded(y), model(y))
    for stage in loaded.stages():
        verify(parse_module(loaded.ir(stage), check=False))
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".accel"] == ["m.accel"]


def test_untrusted_code_is_refused_or_rebuilt(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.accel"
    x = torch.randn(4, 16)
    accel.package(model, (x,), path=path)
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path / "another user"))
    with pytest.raises(TrustError):
        accel.load(path, rebuild=False)
    check(accel.load(path)(x), model(x))
    check(accel.load(path, trust=True)(x), model(x))


def test_a_failed_package_leaves_nothing(model, tmp_path) -> None:
    path = tmp_path / "m.accel"
    with pytest.raises(CaptureError, match="training mode"):
        accel.package(model.train(), (torch.randn(4, 16),), path=path)
    model.eval().norm.train()
    with pytest.raises(CaptureError, match="'norm' is in training mode"):
        accel.package(model, (torch.randn(4, 16),), path=path)

    def by_data(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x

    with pytest.raises(CaptureError) as caught:
        accel.package(by_data, (torch.randn(4),), path=path)
    assert "test_api.py" in caught.value.where
    with pytest.raises(ArtifactError):
        accel.package(model.eval(), (torch.randn(4, 16),), path=tmp_path / "no folder" / "m.accel")
    assert not list(tmp_path.rglob("*.accel*"))


def test_unknown_options_say_what_is_known(model) -> None:
    x = torch.randn(2, 16)
    for options, near in (
        ({"pases": "cse"}, "passes"),
        ({"passes": "quantise{bits=8}"}, "quantize"),
        ({"passes": "quantize{bit=8}"}, "bits"),
    ):
        with pytest.raises(OptionError) as caught:
            accel.compile(model, inputs=(x,), options=options)
        assert near in str(caught.value)
    with pytest.raises(OptionError, match="validate"):
        accel.compile(model, options={"validate": "yes"})
    with pytest.raises(OptionError, match="target"):
        accel.compile(model, target="tpu")
    with pytest.raises(OptionError, match="quantise"):  # before the first call
        accel.compile(model, options={"passes": "quantise"})
    with pytest.raises(OptionError, match="fuel = -7"):
        accel.compile(model, options={"fuel": -7})
    with pytest.raises(OptionError, match="not a mapping"):
        accel.compile(model, options=["cse"])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"name\{option=value"):
        accel.compile(model, options={"passes": "quantize{bits=8"})
    with pytest.raises(OptionError, match="folder for dumps"):
        accel.compile(model, inputs=(x,), options={"dump_dir": f"{__file__}/dumps"})


def test_a_model_that_is_none() -> None:
    with pytest.raises(CaptureError, match="not a int"):
        accel.compile(3, inputs=())  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="not a int"):
        accel.compile_generator(3, capacity=8)  # type: ignore[arg-type]


def test_inputs_that_are_no_arguments(model) -> None:
    for inputs, kwargs in ((torch.randn(2, 16), None), ("text", None), (None, [1])):
        with pytest.raises(InputError, match="not a"):
            accel.compile(model, inputs=inputs, kwargs=kwargs)
    fast = accel.compile(model, inputs=(torch.randn(2, 16),))
    wrong = (
        torch.randn(16),
        torch.randn(2, 16, device="meta"),
        torch.randn(2, 16).to_sparse(),
        None,
    )
    for x in wrong:
        with pytest.raises(InputError) as caught:
            fast(x)
        assert "'x'" in caught.value.what


def test_torch_compile_says_what_is_wrong_with_its_options(model) -> None:
    for options in ({"options": {"pases": "cse"}}, {"mode": "max-autotune"}):
        torch._dynamo.reset()
        fast = torch.compile(model, backend="accel", **options)
        with torch.no_grad(), pytest.raises(Exception, match="ACCEL001") as caught:
            fast(torch.randn(2, 16))
        assert isinstance(caught.value.inner_exception, OptionError)


def by_size_of_data(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0] * 2


def until_large(x: torch.Tensor) -> torch.Tensor:
    while x.max() < 10:
        x = x * 2
    return x


@pytest.mark.parametrize("function", [by_size_of_data, until_large])
def test_a_failed_compile_leaves_no_trace(model, tmp_path, function) -> None:
    """No file, no cache entry; the next compile and its answer are as if it had not been."""
    x = torch.rand(2, 16) + 0.1
    for make in (
        lambda: accel.compile(function, inputs=(x,)),
        lambda: accel.package(function, (x,), path=tmp_path / "m.accel"),
        lambda: accel.compile(model, inputs=(x,), options={"passes": "quantize{bits=99}"}),
    ):
        with pytest.raises(AccelError) as caught:
            make()
        assert caught.value.advice
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    check(accel.compile(model, inputs=(x,))(x), model(x))


def test_the_cache_answers_the_second_compile(model, tmp_path) -> None:
    x = torch.randn(2, 16)
    first = accel.compile(model, inputs=(x,))
    entries = CompileCache().entries()
    assert len(entries) == 1
    second = accel.compile(model, inputs=(x,))
    assert first.program.library == second.program.library
    check(second(x), model(x))
    damaged = bytearray(entries[0].read_bytes())
    damaged[-100] ^= 1
    entries[0].write_bytes(damaged)
    check(accel.compile(model, inputs=(x,))(x), model(x))  # a damaged entry is a miss
    assert CompileCache().clear() == 1


def test_cache_keys_respect_boundaries() -> None:
    assert cache_key("ab", "c") != cache_key("a", "bc")


def test_sizes_become_json() -> None:
    s, n = symbol("s"), symbol("n")
    for expr in (s * 2 + n, (s + 3) // 4, s * n // 2, s**2 - 1, (s + 1) % 3 + n):
        value = int(expr.subs({s: 7, n: 10}))
        assert evaluate_size(size_expr(expr), {"s": 7, "n": 10}) == value


@pytest.mark.parametrize("train", [False, True])
def test_torch_compile_finds_the_backend(model, train) -> None:
    torch._dynamo.reset()
    model.train(train)
    fast = torch.compile(model, backend="accel")
    x = torch.randn(4, 16)
    with torch.set_grad_enabled(train):
        check(fast(x), model(x))
    if train:
        fast(x)["y"].square().sum().backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        model(x)["y"].square().sum().backward()
        check(got, {n: p.grad for n, p in model.named_parameters()})


def test_operators_that_only_check() -> None:
    """`aten::_linalg_check_errors` returns nothing, and says what is wrong with the matrix."""

    def solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(a, b)

    compiled = torch.compile(solve, backend="accel", fullgraph=True)
    a, b = torch.randn(4, 4) + 4 * torch.eye(4), torch.randn(4, 2)
    torch.testing.assert_close(compiled(a, b), solve(a, b))
    with pytest.raises(ExecutionError, match="singular"):
        compiled(torch.zeros(4, 4), b)
