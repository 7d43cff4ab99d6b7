"""Training attention: masks become attributes, and what libraries do not take becomes kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.backends.triton import TritonBackend
from accel.backends.vendor import FlashAttention
from accel.compiler import gpu
from accel.frontends import dynamo
from accel.ir import Module
from accel.ir.module import Op, Value
from accel.passes.base import Context
from accel.passes.manager import PassManager, run_pipeline
from accel.passes.registry import load_passes
from tests.passes.helpers import BF16, BOOL, F32, I64, compute, find, program, t

load_passes()
INF, LOWEST = float("-inf"), torch.finfo(F32).min
Q = t(2, 2, 12, 8)


def band(b: Any, window: int | None = None) -> Value:
    i = b.reshape(b.arange(length=12, dtype=I64), shape=(12, 1))
    j = b.reshape(b.arange(length=12, dtype=I64), shape=(1, 12))
    keep = b.le(j, i)
    if window is not None:
        keep = b.logical_and(keep, b.gt(j, b.sub(i, b.scalar(window, I64))))
    made: Value = keep
    return made


def hidden_unless(b: Any, keep: Value, low: float) -> Value:
    made: Value = b.where(keep, b.scalar(0.0, F32), b.scalar(low, F32))
    return made


def masked(make: Any, *types: Any) -> tuple[Module, Op, list[str]]:
    """The op after its mask was read, and what was nearly done."""
    misses: list[str] = []
    module = program(lambda b, q, k, v, *x: b.flash_attention(q, k, v, make(b, *x), scale=0.4),
                     Q, Q, Q, *types)  # fmt: skip
    context = Context(on_miss=lambda rule, op, reason: misses.append(reason))
    run_pipeline(module, "canonicalize,cse,dce,flash_masks,dce", context, validate=True)
    return module, find(module, "flash_attention"), misses


@pytest.mark.parametrize("low", [INF, LOWEST])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_bands_become_attributes(low: float, window: int | None) -> None:
    _, op, misses = masked(lambda b: hidden_unless(b, band(b, window), low))
    assert op.attribute("causal") and op.attribute("window") == window
    assert op.arguments()[3] is None and not misses


def test_padding_stays_a_mask() -> None:
    def mask(b: Any, keys: Value) -> Value:
        keep = b.logical_and(band(b, 4), b.reshape(keys, shape=(2, 1, 1, 12)))
        return hidden_unless(b, keep, INF)

    _, op, _ = masked(mask, t(2, 12, dtype=BOOL))
    assert op.attribute("causal") and op.attribute("window") == 4
    assert op.arguments()[3].shape == (2, 1, 1, 12)


def test_numbers_that_hide_only_nearly_stay() -> None:
    """With padding, a row may see nothing: then finite numbers are averaged, infinite ones not."""

    def mask(b: Any, keys: Value) -> Value:
        keep = b.logical_and(band(b), b.reshape(keys, shape=(2, 1, 1, 12)))
        return hidden_unless(b, keep, LOWEST)

    _, op, misses = masked(mask, t(2, 12, dtype=BOOL))
    assert not op.attribute("causal") and "average" in misses[0]


def test_a_bias_beside_the_band_stays() -> None:
    def mask(b: Any, bias: Value) -> Value:
        made: Value = b.add(hidden_unless(b, band(b), INF), bias)
        return made

    module, op, _ = masked(mask, t(1, 2, 12, 12))
    assert op.attribute("causal") and op.arguments()[3] is module.main.args[3]


def test_a_mask_that_hides_nothing_goes() -> None:
    def mask(b: Any) -> Value:
        keep = b.full_of((12, 12), True, BOOL)
        return hidden_unless(b, keep, INF)

    _, op, _ = masked(mask)
    assert op.arguments()[3] is None and not op.attribute("causal")


def test_kernels_and_calls() -> None:
    """A window is a kernel, with the views around it; plain attention is the library's."""

    def build(b: Any, g: Any, q: Any, k: Any, v: Any) -> list[Any]:
        made: list[Any] = []
        for window in (3, None):
            options = {"scale": 0.4, "causal": True, "window": window}
            q4, k4, v4 = (b.permute(x, axes=(0, 2, 1, 3)) for x in (q, k, v))
            y, total = b.flash_attention(q4, k4, v4, **options)
            grads = b.flash_attention_backward(g, q4, k4, v4, y, total, **options)
            made += [b.permute(x, axes=(0, 2, 1, 3)) for x in (y, *grads)]
        return made

    turned = t(2, 12, 2, 8, dtype=BF16)
    module = program(build, t(2, 2, 12, 8, dtype=BF16), turned, turned, turned)
    context = Context(generator=TritonBackend(), libraries=(FlashAttention(),))
    PassManager(list(gpu.KERNEL_PIPELINE), context).run(module)
    kinds = [str(op.attribute("kind")) for op in module.main.ops if op.name == "kernel"]
    assert kinds.count("flash_attention") == kinds.count("flash_attention_backward") == 1
    assert compute(module).count("call") == 2
    (backward,) = (op for op in module.main.ops if op.name == "kernel"
                   and op.attribute("kind") == "flash_attention_backward")  # fmt: skip
    names = [op.name for op in backward.regions[0].ops]
    # The output is turned back on its way in; queries, keys, values and their gradients are turned.
    assert names.count("permute") >= 6


class Windowed(nn.Module):
    """Attention with a mask of positions, and perhaps of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        parts = self.project(x).split(32, -1)
        q, k, v = (p.view(batch, length, 2, 16).transpose(1, 2) for p in parts)
        i = torch.arange(length, device=x.device)
        keep = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 5)
        if keys is not None:
            keep = keep[None, None] & keys[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.out(y.transpose(1, 2).reshape(batch, length, 32)).sum()


def test_a_symbolic_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of positions are computed in both halves whatever the length is."""
    backward: list[Module] = []
    whole = dynamo.import_aten_graph

    def importing(*args: Any, **options: Any) -> Any:
        made = whole(*args, **options)
        if not options.get("may_fix", True):
            backward.append(made.module)
            mask = find(made.module, "flash_attention_backward").arguments()[-1]
            assert mask is not None and mask.op is not None, "it is no argument"
        return made

    monkeypatch.setattr(dynamo, "import_aten_graph", importing)
    torch._dynamo.reset()
    model, exact = Windowed(), Windowed()
    exact.load_state_dict(model.state_dict())
    call = torch.compile(model, backend="accel", fullgraph=True, dynamic=True)
    for length in (9, 14):
        x = torch.randn(2, length, 32)
        for one, run in ((exact, exact), (model, call)):
            one.zero_grad()
            run(x).backward()
        got, want = model.project.weight.grad, exact.project.weight.grad
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert len(backward) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_both_halves_compute_their_mask(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing with an element for each pair is kept, and both halves read the window."""
    programs: list[Module] = []
    whole = dynamo.import_aten_graph

    def importing(*args: Any, **options: Any) -> Any:
        made = whole(*args, **options)
        copy = whole(*args, **options).module
        run_pipeline(copy, "canonicalize,cse,dce,flash_masks,dce")
        programs.append(copy)
        return made

    monkeypatch.setattr(dynamo, "import_aten_graph", importing)
    torch.manual_seed(0)
    model = Windowed()
    inputs = [torch.randn(2, 12, 32)]
    if padded:
        inputs.append(torch.arange(12).expand(2, 12) < torch.tensor([[12], [9]]))
    model(*inputs).backward()
    assert model.project.weight.grad is not None
    want = model.project.weight.grad.clone()
    model.zero_grad()
    torch.compile(model, backend="accel", fullgraph=True)(*inputs).backward()
    torch.testing.assert_close(model.project.weight.grad, want, atol=1e-5, rtol=1e-5)
    forward, backward = programs
    for module, name in ((forward, "flash_attention"), (backward, "flash_attention_backward")):
        op = find(module, name)
        assert op.attribute("causal") and op.attribute("window") == 5
        mask = op.arguments()[-1]
        assert (mask is None) if not padded else mask.shape[-2:] == (1, 12)
        assert all(tuple(a.shape[-2:]) != (12, 12) for a in module.main.args)
