"""fold_norm_weights and defer_norms: norms go into the products around them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from accel.backends.triton import TritonBackend
from accel.backends.tvm import TvmBackend
from accel.compiler.language import derive_generator
from accel.errors import ContractError
from accel.frontends.export import capture
from accel.ir import Function, Module, Op, TensorType
from accel.passes import defer_norms, fold_norm_weights, norm_parts
from accel.passes.base import Context
from accel.passes.ledger import Ledger
from accel.passes.manager import PassManager
from accel.passes.pipelines import EXACT_PIPELINE
from accel.passes.registry import load_passes
from tests.passes.helpers import BF16, F16, F32, compute, ops, program, run, t

load_passes()
PASSES = ["fold_norm_weights", "defer_norms", "dce"]
WIDTH = 256  # of what is normalized: two parts


class Folds(TritonBackend):
    """Says of every norm of at least so many rows that it pays to defer it."""

    fewest = 2

    def folds_norm(
        self, norm: Op, maker: Sequence[Op], readers: Sequence[Sequence[Op]]
    ) -> str | None:
        rows = norm.result.type.numel()
        few = isinstance(rows, int) and rows < self.fewest * int(norm.result.shape[-1])
        return "few rows" if few else None


def deferred(
    module: Module, generator: Any = None, passes: Sequence[str] = PASSES
) -> tuple[Ledger, set[str]]:
    """Runs the passes with contracts checked: the ledger, and why norms stay."""
    misses: set[str] = set()
    context = Context(generator=generator or Folds("sm_90"))
    context.on_miss = lambda rule, op, reason: misses.add(reason) if "norm" in rule else None
    return PassManager(passes, context, validate=True).run(module), misses


def stored(b: Any, *shape: int, dtype: torch.dtype = BF16, name: str = "w") -> Any:
    return b.weight((0.2 * torch.randn(shape)).to(dtype), name)


def made(b: Any, a: Any, h: Any) -> Any:
    """What is normalized: a product and the residual."""
    return b.add(h, b.linear(a, stored(b, WIDTH, 64, dtype=a.dtype, name="v")))


def factor(b: Any, dtype: torch.dtype, name: str = "g") -> Any:
    return b.weight((1 + 0.3 * torch.randn(WIDTH)).to(dtype), name)


def rms(b: Any, x: Any, **attributes: Any) -> Any:
    return b.rms_norm(x, factor(b, x.dtype), **{"eps": 1e-5, **attributes})


def layer(b: Any, x: Any, *, weight: bool = True, bias: bool = True) -> Any:
    g = factor(b, x.dtype) if weight else None
    c = stored(b, WIDTH, dtype=x.dtype, name="c") if bias else None
    return b.layer_norm(x, g, c, rank=1, eps=1e-6)


NORMS: dict[str, Callable[..., Any]] = {
    "rms": rms,
    "rms rounded first": lambda b, x: rms(b, x, cast_before_weight=True),
    "Gemma": lambda b, x: rms(b, x, offset=1.0),
    "float32 weight": lambda b, x: b.rms_norm(x, factor(b, F32), eps=1e-6),
    "rms without weight": lambda b, x: b.rms_norm(x, eps=1e-6),
    "layer": layer,
    "layer without bias": lambda b, x: layer(b, x, bias=False),
    "layer without weight": lambda b, x: layer(b, x, weight=False),
    "layer without parameters": lambda b, x: b.layer_norm(x, rank=1, eps=1e-6),
}


def types(*lead: Any, dtype: torch.dtype = BF16) -> list[TensorType]:
    return [t(*lead, 64, dtype=dtype), t(*lead, WIDTH, dtype=dtype)]


def inputs(*lead: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> list[Tensor]:
    return [torch.randn(*lead, 64).to(dtype), (scale * torch.randn(*lead, WIDTH)).to(dtype)]


def block(norm: Callable[..., Any], bias: bool = True) -> Callable[..., Any]:
    """A norm between products, and a residual: queries and keys, one with a bias."""

    def make(b: Any, a: Any, h: Any) -> Any:
        x = made(b, a, h)
        n = norm(b, x)
        q = b.linear(n, stored(b, 96, WIDTH, dtype=a.dtype, name="q"))
        c = stored(b, 32, dtype=a.dtype, name="d") if bias else None
        k = b.gelu(b.linear(n, stored(b, 32, WIDTH, dtype=a.dtype, name="k"), c))
        return q, k, b.relu(x)

    return make


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("norm", list(NORMS))
def test_a_norm_between_products_disappears(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = program(block(NORMS[norm]), *types(3, 5, dtype=dtype))
    given = inputs(3, 5, dtype=dtype)
    before, exact = run(module, given, oracle=False), run(module, given)
    ledger, _ = deferred(module)
    assert ledger.rows[1].rewrites == {"defer_norms": 1}
    assert not any("norm" in name for name in ops(module))
    bare = norm in ("rms without weight", "layer without parameters")
    assert ledger.rows[0].changed != bare
    names = {n.split(".")[0] for n in module.weights.names()}
    assert names & {"g", "c"} == set()  # the norm's parameters are no constants any more
    for old, new, want in zip(before, run(module, given, oracle=False), exact, strict=True):
        error = float((new.double() - want.double()).abs().max())
        allowed = float((old.double() - want.double()).abs().max())
        assert error <= 2 * allowed + torch.finfo(dtype).eps * float(want.abs().max())


def test_products_take_the_sums_and_the_scaling() -> None:
    module = program(block(layer), *types(3, 100))
    deferred(module, passes=[*PASSES, "select_products", "cse", "dce", "fuse", "dce"])
    kernels = [op for op in module.main.ops if op.name == "kernel"]
    found = [
        (str(k.attribute("kind")), [o.name for o in k.regions[0].ops if o.name != "yield"])
        for k in kernels
    ]
    parts = ["linear", "add", "cast", "mul", "reshape", "sum", "reshape", "sum"]
    assert ("matmul", parts) in found
    scaled = ["cast", "cast", "linear", "mul", "sub", "mul", "cast"]
    scaled[-1:] = ["cast", "add", "cast"]  # the norm's bias, which a product without one has now
    assert ("matmul", scaled) in found
    assert ("matmul", [*scaled, "gelu"]) in found
    maker = kernels[0]
    assert [r.shape for r in maker.results] == [(3, 100, WIDTH), (3, 100, 2), (3, 100, 2)]
    assert [k for k, _ in found].count("rowwise") == 1  # the mean, and 1 / the deviation
    assert "linear" not in ops(module) and "cast" not in ops(module)


class Sums(Folds):
    """Products add up the sums of what they scale for themselves."""

    def folds_statistics(self, parts: int) -> bool:
        return parts == 2


@pytest.mark.parametrize("norm", [rms, layer])
def test_products_add_up_what_scales_them(norm: Callable[..., Any]) -> None:
    module = program(block(norm), *types(3, 100))
    passes = [*PASSES, "select_products", "cse", "dce", "fuse", "dce"]
    deferred(module, Sums("sm_90"), passes)
    kernels = [op for op in module.main.ops if op.name == "kernel"]
    assert [str(k.attribute("kind")) for k in kernels].count("rowwise") == 0
    readers = [k for k in kernels if any(o.name == "rsqrt" for o in k.regions[0].ops)]
    assert len(readers) == 2
    for kernel in readers:
        assert (3, 100, 2) in [v.shape for v in kernel.operands]
        assert (3, 100, 1) not in [v.shape for v in kernel.operands]


def test_gate_and_up_are_halves_of_what_was_scaled() -> None:
    def make(b: Any, a: Any, h: Any) -> Any:
        y = b.linear(rms(b, made(b, a, h)), stored(b, 64, WIDTH))
        gate, up = (b.slice(y, axis=1, start=i, stop=i + 32) for i in (0, 32))
        return b.mul(b.silu(gate), up)

    module = program(make, *types(300))
    deferred(module, passes=[*PASSES, "select_products", "dce"])
    last = [op for op in module.main.ops if op.name == "kernel"][-1]
    found = [op.name for op in last.regions[0].ops if op.name != "yield"]
    assert found == ["cast", "cast", "linear", "mul", "cast", "slice", "slice", "silu", "mul"]
    assert last.results[0].dtype == BF16 and len(last.operands) == 3


def test_two_norms_of_one_sum_share_its_parts() -> None:
    """Attention and what follows it side by side."""

    def make(b: Any, a: Any, h: Any) -> Any:
        x = made(b, a, h)
        return [b.linear(layer(b, x), stored(b, 16, WIDTH, name=n)) for n in ("q", "k")]

    module = program(make, *types(3, 5))
    ledger, _ = deferred(module)
    assert ledger.rows[1].rewrites == {"defer_norms": 2}
    assert ops(module).count("sum") == 4 and ops(module).count("rsqrt") == 1


def with_reader(b: Any, a: Any, h: Any) -> Any:
    n = rms(b, made(b, a, h))
    return b.linear(n, stored(b, 16, WIDTH)), b.relu(n)


def after_a_norm(b: Any, a: Any, h: Any) -> Any:
    """As post-norm models have it: what is normalized is no sum of a product."""
    x = rms(b, made(b, a, h))
    return b.linear(rms(b, b.add(x, b.gelu(x))), stored(b, 16, WIDTH))


def compressed(b: Any, a: Any, h: Any) -> Any:
    q = b.weight(torch.randint(-127, 128, (16, WIDTH)).to(torch.int8), "q")
    w = b.dequantize(q, b.weight(torch.rand(16, 1).bfloat16(), "s"), axis=1)
    return b.linear(rms(b, made(b, a, h)), w)


def of_several_axes(b: Any, a: Any, h: Any) -> Any:
    g = b.weight(torch.ones(5, WIDTH).bfloat16(), "g")
    n = b.layer_norm(made(b, a, h), g, rank=2, eps=1e-5)
    return b.linear(n, stored(b, 16, WIDTH))


def product_of_two(b: Any, a: Any, h: Any) -> Any:
    y = b.linear(a, stored(b, WIDTH, 64, name="v"))
    x = b.add(h, y)
    return b.linear(rms(b, x), stored(b, 16, WIDTH)), b.relu(y)


NO_MAKER = "what it normalizes is not the sum of a product and something else"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_reader, "accel.relu reads its result, or a product of no stored weight"),
        (after_a_norm, NO_MAKER),
        (compressed, "accel.linear reads its result, or a product of no stored weight"),
        (of_several_axes, "a norm of several axes"),
        (product_of_two, NO_MAKER),
    ],
)
def test_norms_that_stay(make: Callable[..., Any], reason: str) -> None:
    module = program(make, *types(3, 5))
    names = compute(module)
    ledger, misses = deferred(module)
    assert reason in misses
    assert not any(row.changed for row in ledger.rows[:2])
    assert compute(module) == names


def test_weights_that_are_arguments_stay() -> None:
    """As in training."""
    weight = t(16, WIDTH, dtype=BF16)

    def make(b: Any, a: Any, h: Any, w: Any) -> Any:
        return b.linear(rms(b, made(b, a, h)), w)

    ledger, _ = deferred(program(make, *types(3, 5), weight))
    assert not any(row.changed for row in ledger.rows)


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    ledger, _ = deferred(program(block(rms), *types(3, 5, dtype=dtype)))
    assert not any(row.changed for row in ledger.rows)


def test_a_tied_embedding_stays() -> None:
    def make(b: Any, a: Any, h: Any, ids: Any) -> Any:
        table = stored(b, 16, WIDTH)
        return b.linear(rms(b, made(b, a, h)), table), b.embedding(table, ids)

    ids = t(4, dtype=torch.int64)
    ledger, misses = deferred(program(make, *types(3, 5), ids))
    assert not any(row.changed for row in ledger.rows)
    assert "a weight after it has other readers" in misses


def test_one_weight_behind_two_norms_stays() -> None:
    def make(b: Any, a: Any, h: Any) -> Any:
        x, w = made(b, a, h), stored(b, 16, WIDTH)
        one = b.rms_norm(x, factor(b, BF16), eps=1e-5)
        other = b.rms_norm(x, factor(b, BF16, "g2"), eps=1e-5)
        return b.linear(one, w), b.linear(other, w)

    ledger, misses = deferred(program(make, *types(3, 5)))
    assert not any(row.changed for row in ledger.rows)
    assert "a weight after it has other readers" in misses


def test_cpus_and_gpus_without_a_gain_stay() -> None:
    for generator in (TvmBackend(), TritonBackend("sm_80"), TritonBackend("sm_90")):
        module = program(block(rms), *types(3, 5))
        ledger, misses = deferred(module, generator)
        assert not any(row.changed for row in ledger.rows) and misses


def test_digits_that_float16_would_lose_stay() -> None:
    """A weight of 1e-4 times one of 1e-4 is 0 in float16."""

    def make(b: Any, a: Any, h: Any, least: float) -> Any:
        g = b.weight((least * torch.rand(WIDTH)).to(a.dtype), "g")
        w = b.weight((least * torch.randn(16, WIDTH)).to(a.dtype), "w")
        return b.linear(b.rms_norm(made(b, a, h), g, eps=1e-5), w)

    for dtype, least, stays in ((F16, 1e-4, True), (F16, 0.1, False), (BF16, 1e-4, False)):
        module = program(lambda b, *x, n=least: make(b, *x, n), *types(3, 5, dtype=dtype))
        ledger, misses = deferred(module)
        assert ledger.rows[0].changed != stays
        assert ("its weight times the product's lose digits" in misses) == stays


def test_sums_that_float16_cannot_hold_do_not_overflow() -> None:
    """x W^T is far over 65504 before it is scaled."""
    module = program(block(layer), *types(4, 7, dtype=F16))
    given = inputs(4, 7, dtype=F16, scale=9000.0)
    exact = run(module, given)
    deferred(module)
    for new, want in zip(run(module, given, oracle=False), exact, strict=True):
        assert bool(torch.isfinite(new).all())
        torch.testing.assert_close(new.double(), want.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_rows_of_zeros_stay_finite(norm: str) -> None:
    module = program(block(NORMS[norm]), *types(4, 7, dtype=F16))
    given = [torch.zeros(4, 7, 64).half(), torch.zeros(4, 7, WIDTH).half()]
    before = run(module, given, oracle=False)
    deferred(module)
    for old, new in zip(before, run(module, given, oracle=False), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-2, atol=1e-2)


# -- mistakes that the contracts find -------------------------------------------------------


def without_offset(weights: Any, name: str, parameters: Any) -> Tensor:
    given = weights.tensor(parameters.weight).double()
    scaled: Tensor = weights.tensor(name).double() * given
    return scaled


def without_bias(weights: Any, name: str, bias: str, parameters: Any) -> Tensor:
    return torch.zeros(len(weights.tensor(name)), dtype=torch.float64)


def of_the_wrong_width(b: Any, parts: Any, columns: int, eps: float) -> Any:
    return statistics(b, parts, columns - 1, eps)


def without_the_mean(b: Any, parts: Any, columns: int, eps: float) -> Any:
    return statistics(b, parts[-1:], columns, eps)


def sums_of_x(b: Any, x: Any, *, sums: bool) -> Any:
    return [norm_parts.emit_parts(b, x, sums=True)[0]] * (1 + sums)


statistics = defer_norms._statistics


@pytest.mark.parametrize(
    ("where", "name", "mistake", "norm"),
    [
        (fold_norm_weights, "scaled", without_offset, NORMS["Gemma"]),
        (fold_norm_weights, "shifted", without_bias, layer),
        (defer_norms, "_statistics", of_the_wrong_width, rms),
        (defer_norms, "_statistics", without_the_mean, layer),
        (defer_norms, "emit_parts", sums_of_x, rms),
    ],
)
def test_contracts_find_planted_mistakes(
    where: Any, name: str, mistake: Any, norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = program(block(norm), *types(3, 5))
    monkeypatch.setattr(where, name, mistake)
    with pytest.raises(ContractError):
        deferred(module)


# -- whole models ---------------------------------------------------------------------------


def names_of(function: Function) -> list[str]:
    return [op.name for op in function.ops]


@pytest.mark.parametrize("tied", [False, True])
def test_all_functions_of_a_generator_share_the_folded_weights(tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = (1 + 0.2 * torch.randn_like(weight)).bfloat16()
    module = derive_generator(model, 32, extend=4)
    PassManager(list(EXACT_PIPELINE), Context()).run(module)
    ledger, _ = deferred(module)
    # All but the first, of embeddings, and the last, whose product a table may be.
    assert ledger.rows[0].rewrites == {"fold_norm_weights": 5 if tied else 6}
    prefill, decode = module.functions["prefill"], module.functions["decode"]
    assert names_of(prefill).count("rms_norm") == 3
    bare = [op for op in decode.ops if op.name == "rms_norm" and len(op.operands) == 1]
    assert names_of(decode).count("rms_norm") == 7 and len(bare) == 5 + (not tied)
    scaled = [n for n in module.weights.names() if n.endswith(".scaled")]
    assert len(scaled) == 5 + (not tied)
    assert all(n.removesuffix(".scaled") not in module.weights for n in scaled)
    if tied:
        assert any(".embed_tokens." in n or "lm_head" in n for n in module.weights.names())


def test_a_vision_model_keeps_its_first_and_last_norm() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192,
        image_size=32, patch_size=8, num_labels=7,
    )  # fmt: skip
    model = ViTForImageClassification(config).half().eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = (0.2 * torch.randn_like(weight) + float("weight" in name)).half()
    module = capture(model, kwargs={"pixel_values": torch.randn(2, 3, 32, 32).half()})
    PassManager(list(EXACT_PIPELINE), Context()).run(module)
    given = [torch.randn(2, 3, 32, 32).half()]
    (before,) = run(module, given)
    deferred(module)
    assert names_of(module.main).count("layer_norm") == 2
    (after,) = run(module, given)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-3)


def test_a_post_norm_model_stays() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=160, max_position_embeddings=32,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).bfloat16().eval()
    module = capture(model, kwargs={"input_ids": torch.randint(0, 64, (2, 16))})
    PassManager(list(EXACT_PIPELINE), Context()).run(module)
    ledger, misses = deferred(module)
    assert not any(row.changed for row in ledger.rows[:2])
    assert "accel.add reads its result, or a product of no stored weight" in misses
