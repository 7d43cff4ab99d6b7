"""evict_cache: which tokens stay, against plain Python; equivalence, planted mistakes, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import CaptureError, ContractError, OptionError
from accel.ir import Builder, Function, Module, TensorType, interpret, symbol, verify
from accel.ir.module import Op, SymbolInfo
from accel.passes.cache_kinds import cache_passes
from accel.passes.equivalence import TOLERANCE, check_decode
from accel.passes.manager import run_pipeline
from tests.passes.causal_models import captured, tiny
from tests.runtime.test_state_kinds import varied

pytest.importorskip("transformers")

HEAVY, RECENT, CAPACITY = 3, 4, 20
OPTIONS = f"evict_cache{{heavy={HEAVY},recent={RECENT}}}"


def evicting(family: str, validate: bool = False) -> Module:
    module = captured(tiny(family))
    pipeline = f"{OPTIONS},insert_kv_cache{{capacity={CAPACITY}}}"
    run_pipeline(module, pipeline, validate=validate)
    verify(module)
    return module


def heavy_hitters(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """What the paper does, for one text: sets of tokens, one head after the other."""
    made = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    share = q.shape[0] // k.shape[0]
    for group in range(k.shape[0]):
        kept: list[int] = []
        sums: dict[int, float] = {}
        for i in range(q.shape[1]):
            if len(kept) == HEAVY + RECENT:
                old = [j for j in kept if j <= i - RECENT]
                kept.remove(min(old, key=lambda j: sums[j]))
            kept.append(i)
            sums[i] = 0.0
            for head in range(group * share, (group + 1) * share):
                weights = torch.softmax(k[group, kept] @ q[head, i] * scale, 0)
                made[head, i] = weights @ v[group, kept]
                for j, weight in zip(kept, weights.tolist()):
                    sums[j] += weight
    return made


def test_the_tokens_that_stay_are_the_papers():
    function = Function("main")
    length = symbol("length")
    function.symbols = {"length": SymbolInfo(1, 64)}
    shapes = [(1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 6)]
    args = [function.body.add_arg(TensorType(s, torch.float32)) for s in shapes]
    b = Builder(function.body)
    b.op("return", [b.attention(*args, scale=0.9, causal=True)])
    module = Module()
    module.add(function)
    run_pipeline(module, OPTIONS)
    generator = torch.Generator().manual_seed(0)
    sizes = [[n if isinstance(n, int) else 23 for n in s] for s in shapes]
    given = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    (made,) = interpret(module.main, given, oracle=True)
    wanted = heavy_hitters(*(x[0] for x in given), scale=0.9)
    torch.testing.assert_close(made[0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_decode_equivalence(family: str) -> None:
    module = evicting(family)
    assert check_decode(module, prompts=(1, 6, 11), batches=(1, 2), steps=3) <= TOLERANCE


def test_the_manager_checks_both_contracts():
    module = evicting("llama", validate=True)
    shapes = {a.shape[2] for a in module.functions["decode"].args[2:] if a.type.rank == 4}
    assert shapes == {HEAVY + RECENT}


def test_compiled_text_is_that_of_the_program():
    model = varied("llama")
    fast = accel.compile_generator(model, capacity=48, cache=OPTIONS)
    ids = torch.randint(3, 120, (1, 20))
    one, steps = (fast.generator.logits(ids, count) for count in (1, 16))
    torch.testing.assert_close(one[-1], steps[-1], rtol=1e-3, atol=1e-3)
    # As long as nothing is evicted the text is the model's own.
    whole = accel.compile_generator(model, capacity=48, cache="evict_cache{heavy=20,recent=20}")
    plain = accel.compile_generator(model, capacity=48)
    wanted = plain.generate(ids[:, :10], max_new_tokens=20)
    assert len(set(wanted[0, 10:].tolist())) > 2
    assert torch.equal(whole.generate(ids[:, :10], max_new_tokens=20), wanted)


# -- planted mistakes ----------------------------------------------------------------------------


def _ops(module: Module, name: str) -> list[Op]:
    return [op for op in module.functions["decode"].ops if op.name == name]


def keep_one_recent_token_too_few(module: Module) -> None:
    op = next(o for o in _ops(module, "gt") if o.result.shape[-1:] == (HEAVY + RECENT,))
    b = Builder(before=op)
    op.set_operand(1, b.add(op.operands[1], b.scalar(1, torch.int64)))


def forget_what_was_looked_at(module: Module) -> None:
    """The sums do not grow."""
    op = next(o for o in _ops(module, "add") if o.result.shape[1:] == (2, HEAVY + RECENT))
    op.result.replace_all_uses(op.operands[0])


def write_one_slot_late(module: Module) -> None:
    op = _ops(module, "argmin")[0]
    eq = next(u for u in op.result.users if u.name == "eq")
    b = Builder(before=eq)
    slots = b.scalar(HEAVY + RECENT, torch.int64)
    eq.set_operand(1, b.remainder(b.add(op.result, b.scalar(1, torch.int64)), slots))


@pytest.mark.parametrize(
    "plant", [keep_one_recent_token_too_few, forget_what_was_looked_at, write_one_slot_late]
)
def test_planted_mistakes_are_caught(plant: Callable[[Module], None]) -> None:
    module = evicting("llama")
    plant(module)
    verify(module)
    with pytest.raises(ContractError, match="decode equivalence"):
        check_decode(module, prompts=(6, 11), batches=(2,), steps=3)


# -- refusals ------------------------------------------------------------------------------------


def test_masks_are_refused():
    with pytest.raises(CaptureError, match="a mask or sinks of its own") as caught:
        evicting("bloom")
    assert caught.value.where


def test_wrong_options():
    for options in ("heavy=0", "recent=0", "bound=-1.0"):
        with pytest.raises(OptionError):
            run_pipeline(captured(tiny("llama")), f"evict_cache{{{options}}}")


@pytest.mark.parametrize("text", ["h2o,paged", "int8,h2o", "h2o,sinks"])
def test_kinds_that_contradict_each_other(text: str) -> None:
    with pytest.raises(OptionError, match="contradicts itself"):
        cache_passes(text)
