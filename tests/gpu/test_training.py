"""torch.compile(model, backend="accel") trains on the device: gradients, curves, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from accel.compiler.dynamo import accel_backend
from benchmarks.training import GPT2, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SMALL = Shape(vocabulary=1001, positions=128, layers=2, heads=4, width=128)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=accel_backend, **options)


def gpt(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return GPT2(SMALL).to("cuda", dtype)


def batch(seed: int, rows: int = 4, length: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL.vocabulary, (rows, length + 1), generator=generator).cuda()
    return {"ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
def test_gradients_of_every_call(dtype: torch.dtype, bound: float) -> None:
    """Step by step, recorded and replayed calls; later ones overwrite nothing."""
    exact, model = gpt(), gpt(dtype)
    call = compiled(model)
    kept: list[tuple[Tensor, Tensor]] = []
    for seed in range(6):
        inputs = batch(seed)
        for one in (exact, model):
            one.zero_grad(set_to_none=True)
        exact(**inputs).backward()
        loss = call(**inputs)
        loss.backward()
        kept.append((gradients(model), gradients(exact)))
        assert loss.dtype == dtype
    for got, wanted in kept:
        assert distance(got, wanted) < bound


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
])  # fmt: skip
def test_loss_curves_follow_eager_float32(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    curves = []
    for wraps in (lambda m: m, compiled):
        model = gpt()
        call, optimizer, losses = wraps(model), make(model.parameters()), []
        for step in range(12):
            optimizer.zero_grad()
            loss = call(**batch(step % 3))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    eager, ours = curves
    assert eager[-1] < eager[0] - 0.1, "the model learns"
    assert max(abs(a - b) for a, b in zip(eager, ours)) < 2e-3


def test_two_forwards_before_a_backward() -> None:
    """A recording whose activations are still wanted is not replayed."""
    exact, model = gpt(), gpt()
    call = compiled(model)
    for seed in range(5):
        first, second = batch(2 * seed), batch(2 * seed + 1)
        for one, run in ((exact, exact), (model, call)):
            one.zero_grad(set_to_none=True)
            losses = [run(**first), run(**second)]
            losses[1].backward()
            losses[0].backward()
        assert distance(gradients(model), gradients(exact)) < 1e-4


def test_gradients_are_added_up() -> None:
    exact, model = gpt(), gpt()
    call = compiled(model)
    for one in (exact, model):
        one.zero_grad(set_to_none=True)
    for seed in range(6):
        exact(**batch(seed)).backward()
        call(**batch(seed)).backward()
        assert distance(gradients(model), gradients(exact)) < 1e-4


def test_a_graph_that_is_kept_runs_backward_twice() -> None:
    exact, model = gpt(), gpt()
    call = compiled(model)
    for seed in range(4):
        for one, run in ((exact, exact), (model, call)):
            one.zero_grad(set_to_none=True)
            loss = run(**batch(seed))
            loss.backward(retain_graph=True)
            run(**batch(seed + 9))  # would overwrite activations that are still needed
            loss.backward()
        assert distance(gradients(model), gradients(exact)) < 1e-4


class Classifier(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(64), nn.Linear(64, 256)
        self.down, self.dropout = nn.Linear(256, 10), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.down(self.dropout(F.gelu(self.up(self.norm(x)))))
        return logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    curves = []
    for wraps in (lambda m: m, compiled):
        torch.manual_seed(0)
        model = Classifier().cuda()
        call, optimizer = wraps(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        losses = []
        for step in range(10):
            generator = torch.Generator().manual_seed(step % 2)
            x = torch.randn(32, 64, generator=generator).cuda()
            target = torch.randint(0, 10, (32,), generator=generator).cuda()
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=dtype):
                logits = call(x)
                assert logits.dtype == dtype
                loss = F.cross_entropy(logits, target)
            scaler.scale(loss).backward()
            assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss.detach()))
        curves.append(losses)
    eager, ours = curves
    assert eager[-1] < eager[0] - 0.5
    assert max(abs(a - b) for a, b in zip(eager, ours)) < 5e-2


def test_dropout_drops_the_same_both_ways_and_anew_each_call() -> None:
    call = compiled(lambda x: F.dropout(x * 2, 0.25))
    seen = []
    for _ in range(5):
        x = torch.ones(512, 512, device="cuda", requires_grad=True)
        y = call(x)
        y.sum().backward()
        kept = y.detach() != 0
        assert abs(float(kept.float().mean()) - 0.75) < 0.01
        assert x.grad is not None
        assert torch.equal(x.grad != 0, kept)
        assert torch.allclose(x.grad[kept], torch.full((), 2 / 0.75, device="cuda"))
        seen.append(kept)
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_a_seed_repeats_dropout() -> None:
    call = compiled(lambda x: F.dropout(x, 0.5))
    x = torch.ones(256, 256, device="cuda", requires_grad=True)
    for _ in range(3):
        call(x).sum().backward()
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        made.append(call(x).detach().clone())
    assert torch.equal(made[0], made[1])


def test_attention_with_dropout_trains() -> None:
    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.2, is_causal=True)

    call = compiled(attend)
    for _ in range(3):
        q = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        call(q).float().square().mean().backward()
        assert q.grad is not None and torch.isfinite(q.grad).all() and float(q.grad.abs().sum()) > 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_kernels_agree_with_float64(masked: bool, dtype: torch.dtype) -> None:
    """Other data in each call: what a recording keeps of an earlier one would show."""
    shape = (2, 4, 100, 64)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked)

    call = compiled(attend)
    for _ in range(6):
        q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in "qkv")
        mask = torch.randn(2, 1, 100, 100, device="cuda", dtype=dtype) if masked else None
        grads = []
        runs: list[tuple[Callable[..., Tensor], torch.dtype]] = [
            (call, dtype), (attend, torch.float64)
        ]  # fmt: skip
        for run, kind in runs:
            own = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
            given = mask.to(kind) if mask is not None else None
            run(*own, given).square().sum().backward()
            grads.append([t.grad for t in own])
        for got, wanted in zip(*grads):
            assert distance(got, wanted) < (1e-4 if dtype == torch.float32 else 2e-2)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(16, 32, 3, stride=2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        y: Tensor = self.last(self.second(x).mean((2, 3)))
        return y


def test_convolutions_and_batch_norm_train() -> None:
    models = []
    for wraps in (lambda m: m, compiled):
        torch.manual_seed(0)
        model = Convolutional().cuda()
        call, optimizer = wraps(model), torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 3, 20, 20, generator=generator).cuda()
            target = torch.randint(0, 10, (8,), generator=generator).cuda()
            optimizer.zero_grad()
            F.cross_entropy(call(x), target).backward()
            optimizer.step()
        models.append(model)
    eager, ours = models
    for (name, a), b in zip(eager.state_dict().items(), ours.state_dict().values()):
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3), name


def test_batches_of_many_sizes_compile_once() -> None:
    exact, model = gpt(), gpt()
    call = compiled(model, dynamic=True)
    for rows, length in ((2, 16), (5, 33), (3, 64), (2, 16), (7, 20)):
        inputs = batch(rows, rows, length)
        for one, run in ((exact, exact), (model, call)):
            one.zero_grad(set_to_none=True)
            run(**inputs).backward()
        assert distance(gradients(model), gradients(exact)) < 1e-4


def test_a_break_in_the_graph() -> None:
    def broken(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.tanh(x @ weight)
        torch._dynamo.graph_break()
        return (y * y).sum()

    call = compiled(broken)
    for _ in range(4):
        x = torch.randn(16, 32, device="cuda")
        weight = torch.randn(32, 8, device="cuda", requires_grad=True)
        (wanted,) = torch.autograd.grad(broken(x, weight), weight)
        (got,) = torch.autograd.grad(call(x, weight), weight)
        assert distance(got, wanted) < 1e-4


class Attention(nn.Module):
    """Self-attention of heads of 64 with a mask that is made in the model; or flex_attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.project, self.out = kind, nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        parts = self.project(x).split(128, -1)
        q, k, v = (p.unflatten(-1, (2, 64)).transpose(1, 2) for p in parts)
        i = torch.arange(x.shape[1], device=x.device)
        distance = i[None, :] - i[:, None]
        if self.kind == "cap":
            y = self.capped(q, k, v)
        elif self.kind == "causal":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=distance <= 0)
        else:
            keep = (distance <= 0) & (distance > -40)
            keep = keep & keys[:, None, None, :] if self.kind == "padded" else keep
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.out(y.transpose(1, 2).flatten(2))

    def capped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = flex_attention(  # type: ignore[assignment]
            q, k, v, score_mod=lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0),
            block_mask=create_block_mask(
                lambda b, h, i, j: (j <= i) & (i - j < 40), None, None, q.shape[2], q.shape[2],
                device=q.device,
            ),
        )  # fmt: skip
        return made


@pytest.mark.parametrize("kind", ["window", "padded", "causal", "cap"])
def test_attention_with_masks(kind: str) -> None:
    """Windows, with padded keys or not; flex_attention with changed scores."""
    model = Attention(kind).to("cuda", torch.bfloat16)
    exact = Attention(kind).to("cuda", torch.float32)
    exact.load_state_dict(model.state_dict())
    call = compiled(model, fullgraph=True)
    keys = torch.arange(200, device="cuda")[None] < torch.tensor([[200], [170]], device="cuda")
    for _ in range(4):
        x = torch.randn(2, 200, 128, device="cuda", dtype=torch.bfloat16)
        for one, run in ((exact, exact), (model, call)):
            one.zero_grad(set_to_none=True)
            y = run(x.to(next(one.parameters()).dtype), keys)
            (y.float() * torch.linspace(0, 1, 128, device="cuda")).sum().backward()
        assert distance(gradients(model), gradients(exact)) < 2e-2
