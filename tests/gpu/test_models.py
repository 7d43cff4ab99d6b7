"""Whole models on the device against eager, and artifacts that were made without it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.compiler.dynamo import accel_backend
from accel.errors import InputError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def target() -> str:
    return "h200" if "H200" in torch.cuda.get_device_name() else "h100"


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def agree(got: Tensor, wanted: Tensor, bound: float) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.is_cuda
    error = (got.double() - wanted.double()).abs().max()
    assert float(error) <= bound * float(wanted.double().abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_in_all_its_calls(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Block().to(dtype).eval()
    fast = accel.compile(model, inputs=(torch.randn(2, 7, 64, dtype=dtype),), target=target())
    model = model.cuda()
    results = []
    with torch.no_grad():
        for _ in range(4):  # step by step, recorded, replayed
            x = torch.randn(2, 7, 64, dtype=dtype, device="cuda")
            results.append((fast(x), model(x)))
    for got, wanted in results:  # later calls have overwritten nothing
        agree(got, wanted, {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2))


def test_strided_and_misaligned_inputs() -> None:
    model = Block().eval()
    fast = accel.compile(model, inputs=(torch.randn(2, 7, 64),), target=target())
    model = model.cuda()
    with torch.no_grad():
        for _ in range(3):
            wide = torch.randn(2 * 7 * 64 + 1, device="cuda")
            odd = wide[1:].view(2, 7, 64)
            agree(fast(odd), model(odd), 1e-5)
            strided = torch.randn(2, 64, 7, device="cuda").transpose(1, 2)
            agree(fast(strided), model(strided), 1e-5)


def test_dynamic_sizes() -> None:
    model = Block().eval()
    fast = accel.compile(
        model,
        inputs=(torch.randn(2, 7, 64),),
        dynamic_shapes={"x": {1: torch.export.Dim("length", max=4096)}},
        target=target(),
    )
    model = model.cuda()
    with torch.no_grad():
        for length in (2, 5, 7, 128, 1000, 5, 7, 2):
            x = torch.randn(2, length, 64, device="cuda")
            agree(fast(x), model(x), 1e-5)


def test_an_input_on_the_cpu_is_an_error() -> None:
    fast = accel.compile(Block().eval(), inputs=(torch.randn(2, 7, 64),), target=target())
    with pytest.raises(InputError, match="cuda"):
        fast(torch.randn(2, 7, 64))


def bert(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=layers)
    model = transformers.BertModel(config).half().eval()
    return model, {"input_ids": torch.randint(0, 30000, (1, 128))}


def test_bert(tmp_path: Path) -> None:
    model, inputs = bert()
    fast = accel.compile(model, kwargs=inputs, target=target())
    path = tmp_path / "bert.accel"
    fast.save(path)
    loaded = accel.load(path, trust=True)
    model = model.cuda()
    inputs = {k: v.cuda() for k, v in inputs.items()}
    with torch.no_grad():
        for _ in range(3):
            wanted = model(**inputs)
            for made in (fast(**inputs), loaded(**inputs)):
                agree(made.last_hidden_state, wanted.last_hidden_state, 1e-2)
                agree(made.pooler_output, wanted.pooler_output, 1e-2)


class Counter(nn.Module):
    """A model with state: a running total of its inputs, and how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4096))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x
        self.calls += 1
        return self.total / self.calls


def test_state_is_kept_from_call_to_call() -> None:
    fast = accel.compile(Counter(), inputs=(torch.randn(4096),), target=target())
    model = Counter().cuda()
    results = []
    for _ in range(6):
        x = torch.randn(4096, device="cuda")
        results.append((fast(x), model(x)))
    for got, wanted in results:
        agree(got, wanted, 1e-6)


def test_calls_on_other_streams_and_threads() -> None:
    model = Block().eval()
    fast = accel.compile(model, inputs=(torch.randn(2, 7, 64),), target=target())
    model = model.cuda()

    def work(seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator("cuda").manual_seed(seed)
        made = []
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                x = torch.randn(2, 7, 64, device="cuda", generator=generator)
                made.append((fast(x), model(x)))
            torch.cuda.current_stream().synchronize()
        return made

    work(0)  # one thread has recorded; the others find a lane of their own
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(work, range(1, 5)):
            for got, wanted in made:
                agree(got, wanted, 1e-5)


class Resident(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + torch.sigmoid(x))
        return torch.relu(self.depth(self.narrow(x))).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convolutions_with_what_follows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Resident().to(dtype).eval(), torch.randn(2, 3, 20, 24, dtype=dtype)
    fast = accel.compile(model, inputs=(x,), target=target())
    (plan,) = fast.program.plans.values()
    calls = [s.name for s in plan.steps if s.kind == "library"]
    assert calls == ["cudnn.conv", "cudnn.conv", "torch.linear"]  # the last is a generated kernel
    model, x = model.cuda(), x.cuda()
    with torch.no_grad():
        for _ in range(3):
            agree(fast(x), model(x), 3e-3)


def test_a_model_on_the_gpu_compiles() -> None:
    model = Block().eval().cuda()
    fast = accel.compile(model, target=target())
    with torch.no_grad():
        for length in (3, 5):
            x = torch.randn(2, length, 64, device="cuda")
            for _ in range(3):
                agree(fast(x), model(x), 1e-5)


def test_torch_compile_trains() -> None:
    torch.manual_seed(0)
    plain = Block().cuda()
    fast = Block().cuda()
    fast.load_state_dict(plain.state_dict())
    compiled = torch.compile(fast, backend=accel_backend, options={"target": target()})
    for module, call in ((plain, plain), (fast, compiled)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(4):
            x = torch.randn(4, 16, 64, device="cuda")
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        agree(b.detach(), a.detach(), 1e-4)
