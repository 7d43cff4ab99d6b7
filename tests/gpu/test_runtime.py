"""What the runtime promises on a device: bounded graphs, memory that runs out, odd inputs, code for
other GPUs, and tuning."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import accel
from accel.compiler.measure import ceilings, function_seconds
from accel.compiler.retune import tune_artifact
from accel.compiler.roofline import roofline, time_steps
from accel.errors import ArtifactError, InputError, OutOfMemoryError, TrustError
from accel.ir.parser import parse_module
from accel.runtime.cuda_graph import GraphLimit
from accel.runtime.executor import CompiledFunction
from accel.runtime.verify import verify_artifact
from tests.gpu.test_models import Block, Counter, agree, target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def function_of(fast: accel.Compiled) -> CompiledFunction:
    return next(iter(fast._latest()[1].entry_points.values())).function


def dynamic_block() -> tuple[accel.Compiled, nn.Module]:
    torch.manual_seed(0)
    model = Block().eval()
    fast = accel.compile(
        model,
        inputs=(torch.randn(2, 7, 64),),
        dynamic_shapes={"x": {1: Dim("length", max=1 << 20)}},
        target=target(),
    )
    return fast, model.cuda()


# -- graphs ----------------------------------------------------------------------------------


@torch.no_grad()
def test_recordings_are_bounded_and_their_memory_comes_back() -> None:
    fast, model = dynamic_block()
    most = GraphLimit().most
    function = function_of(fast)
    for length in range(100, 100 + 2 * most):
        for _ in range(3):
            x = torch.randn(2, length, 64, device="cuda")
            agree(fast(x), model(x), 1e-5)
    found = function.graphs()
    assert found["recorded"] == most and not found["reason"]
    assert fast.report()["graphs"] == {"main": found}
    x = torch.randn(2, 100, 64, device="cuda")  # dropped long ago
    agree(fast(x), model(x), 1e-5)
    before = torch.cuda.memory_reserved()
    function.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before and function.graphs()["recorded"] == 0
    agree(fast(x), model(x), 1e-5)


@torch.no_grad()
def test_sizes_that_come_once_are_not_recorded() -> None:
    fast, model = dynamic_block()
    for length in range(30, 60):
        x = torch.randn(2, length, 64, device="cuda")
        agree(fast(x), model(x), 1e-5)
    assert function_of(fast).graphs()["recorded"] == 0


class Inverse(nn.Module):
    """Its inverse waits for the device: it looks whether the matrix has one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x + 4 * torch.eye(8, device=x.device)).relu()


@torch.no_grad()
def test_a_call_that_cannot_be_recorded_says_why(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.rand(8, 8, device="cuda")
    fast = accel.compile(Inverse().cuda(), inputs=(x,), target=target())
    for _ in range(4):
        agree(fast(x), Inverse()(x), 1e-5)
    found = fast.report()["graphs"]["main"]
    assert bool(found["recorded"]) != bool(found["reason"])


class Patches(nn.Module):
    """The first kernel alone reads the image."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.out = nn.Conv2d(3, 64, 8, stride=8), nn.Linear(64, 64)

    def forward(self, image: Tensor, shift: Tensor) -> Tensor:
        tokens: Tensor = self.cut(image).flatten(2).transpose(1, 2)
        return self.out(tokens + shift).relu()


@torch.no_grad()
def test_a_first_step_reads_its_argument_where_it_is() -> None:
    torch.manual_seed(0)
    model = Patches().half().eval()
    kwargs = {"image": torch.randn(4, 3, 64, 64).half(), "shift": torch.randn(64, 64).half()}
    fast = accel.compile(model, kwargs=kwargs, target=target())
    model.cuda()
    for number in range(12):
        image = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.float16)
        if number % 4 == 1:  # strided
            image = image.transpose(2, 3)
        if number % 4 == 2:  # at an odd address
            flat = torch.empty(image.numel() + 1, device="cuda", dtype=torch.float16)
            image = flat[1:].view(image.shape).copy_(image)
        shift = torch.randn(64, 64, device="cuda", dtype=torch.float16)
        agree(fast(image=image, shift=shift), model(image, shift), 1e-2)
    assert fast.report()["graphs"]["main"]["recorded"] == 1
    (bound,) = function_of(fast)._lanes[0].bound.values()
    assert bound.graph is not None and bound.graph.opening is not None
    assert bound.graph.opening.arguments == {0}


# -- memory ----------------------------------------------------------------------------------


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.T, -1) @ x


@torch.no_grad()
def test_out_of_memory_leaves_the_process_usable() -> None:
    other, model = dynamic_block()
    length = Dim("n", max=1 << 22)
    fast = accel.compile(
        Pairs(), inputs=(torch.randn(64, 64),), target=target(), dynamic_shapes=({0: length},)
    )
    small = torch.randn(256, 64, device="cuda")
    wanted = Pairs()(small)
    x = torch.randn(2, 9, 64, device="cuda")
    for _ in range(3):
        agree(fast(small), wanted, 1e-3)
        agree(other(x), model(x), 1e-5)
    rows = 1 << 19  # 2**38 scores: a terabyte
    with pytest.raises(OutOfMemoryError, match="not enough memory") as caught:
        fast(torch.randn(rows, 64, device="cuda"))
    assert caught.value.id == "ACCEL054" and torch.cuda.memory_reserved() < 8 << 30
    for _ in range(3):
        agree(fast(small), wanted, 1e-3)
        agree(other(x), model(x), 1e-5)
    assert function_of(fast).graphs()["recorded"] == 1


@torch.no_grad()
def test_memory_that_idle_models_keep_is_given_to_one_that_needs_it() -> None:
    length = Dim("n", max=1 << 22)
    made = [
        accel.compile(
            Pairs(), inputs=(torch.randn(64, 64),), target=target(), dynamic_shapes=({0: length},)
        )
        for _ in range(2)
    ]
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    permitted = torch.cuda.memory_reserved() + (6 << 30)
    rows = int(((6 << 30) / 3 / 4) ** 0.5) // 64 * 64  # scores and softmax take two thirds
    x = torch.randn(rows, 64, device="cuda")
    torch.cuda.set_per_process_memory_fraction(permitted / total)
    try:
        first = made[0](x).clone()
        torch.cuda.empty_cache()  # what the arena holds stays
        agree(made[1](x), first, 1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# -- inputs ----------------------------------------------------------------------------------


@torch.no_grad()
def test_several_models_and_threads_at_once() -> None:
    torch.manual_seed(0)
    models = [Block(w).eval() for w in (64, 128, 256)]
    fast = [
        accel.compile(m, inputs=(torch.randn(2, 7, w),), target=target())
        for m, w in zip(models, (64, 128, 256), strict=True)
    ]
    models = [m.cuda() for m in models]

    def work(seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator("cuda").manual_seed(seed)
        made = []
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(24):
                which = (turn + seed) % 3
                width = 64 << which
                x = torch.randn(2, 7, width, device="cuda", generator=generator)
                made.append((fast[which](x), models[which](x)))
            torch.cuda.current_stream().synchronize()
        return made

    with ThreadPoolExecutor(6) as pool:
        for made in pool.map(work, range(6)):
            for got, wanted in made:
                agree(got, wanted, 1e-5)


@pytest.mark.parametrize("shape", [(0, 7, 64), (2, 0, 64), (1, 1, 64)])
@torch.no_grad()
def test_sizes_of_none_and_one(shape: tuple[int, ...]) -> None:
    model = Block().eval()
    fast = accel.compile(model, inputs=(torch.randn(shape),), target=target())
    model = model.cuda()
    for _ in range(3):
        x = torch.randn(shape, device="cuda")
        got, wanted = fast(x), model(x)
        assert got.shape == wanted.shape
        if x.numel():
            agree(got, wanted, 1e-5)


@torch.no_grad()
def test_no_numbers_and_infinities_propagate() -> None:
    model = nn.Sequential(Block(), nn.Softmax(-1), nn.LayerNorm(64), nn.ReLU()).eval()
    fast = accel.compile(model, inputs=(torch.randn(8, 7, 64),), target=target())
    model = model.cuda()
    for _ in range(3):
        x = torch.randn(8, 7, 64, device="cuda")
        x[1, 2, 3], x[3, 4, 5], x[5, 0, 0] = float("nan"), float("inf"), float("-inf")
        got, wanted = fast(x), model(x)
        assert torch.equal(got.isnan(), wanted.isnan()) and bool(wanted.isnan().any())
        assert torch.equal(got.isinf(), wanted.isinf())
        agree(got.nan_to_num(0), wanted.nan_to_num(0), 1e-5)


class Long(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(x - 1), x.sum(1, dtype=torch.int64)


@torch.no_grad()
def test_more_than_2_to_the_31_elements() -> None:
    shape = ((1 << 16) + 3, 1 << 15)
    meta = torch.zeros(1, dtype=torch.int8).expand(shape)
    fast = accel.compile(Long(), inputs=(meta,), target=target())
    x = torch.randint(0, 3, shape, dtype=torch.int8, device="cuda")
    for got, wanted in zip(fast(x), Long()(x), strict=True):
        assert torch.equal(got, wanted)


@torch.no_grad()
def test_inputs_elsewhere_are_refused() -> None:
    fast = accel.compile(Block().eval(), inputs=(torch.randn(2, 7, 64),), target=target())
    with pytest.raises(InputError, match=r"move it|cuda"):
        fast(torch.randn(2, 7, 64))
    if torch.cuda.device_count() > 1:
        with pytest.raises(InputError, match="cuda:1"):
            fast(torch.randn(2, 7, 64, device="cuda:1"))


# -- code for other GPUs ---------------------------------------------------------------------


@torch.no_grad()
def test_code_for_an_older_gpu_runs_through_its_ptx(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.LayerNorm(64), nn.GELU()).eval(), tmp_path / "m.accel"
    x = torch.randn(5, 64)
    accel.package(model, (x,), path=path, target="a100")
    loaded, wanted = accel.load(path), model(x)
    for _ in range(3):
        agree(loaded(x.cuda()), wanted.cuda(), 1e-5)
    assert verify_artifact(path).ok


def test_code_for_a_newer_gpu_is_refused() -> None:
    fast = accel.compile(nn.Softmax(-1), inputs=(torch.randn(5, 64),), target="b200")
    if torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("this GPU runs it")
    with pytest.raises(ArtifactError, match="sm_100"), torch.no_grad():
        fast(torch.randn(5, 64, device="cuda"))


# -- measuring and tuning --------------------------------------------------------------------


@torch.no_grad()
def test_each_step_is_timed_beside_its_floor() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 128, 768).half()
    fast = accel.compile(Block(768).half().eval(), inputs=(x,), target=target())
    function, limits = function_of(fast), ceilings(torch.device("cuda", 0))
    assert 1e12 < limits.bandwidth < 1e13 and limits.flops["bfloat16"] > 1e14
    ir = parse_module(fast.ir("kernels")).functions["main"]
    line = roofline(function.plan, ir, {}, limits, limits.device)
    time_steps(line, function, [x.cuda()])
    assert line.matched and line.timed_by == "CUPTI"
    for row in line.rows:
        assert row.launches >= len(row.steps) and 0 < row.floor < row.seconds
    assert 0.3 < function_seconds(function, [x.cuda()]) / line.seconds < 3


@torch.no_grad()
def test_an_artifact_is_tuned_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, path = Block(256).half().eval(), tmp_path / "m.accel"
    x = torch.randn(1, 4, 256).half()
    accel.package(model, (x,), path=path, target=target())
    made = tune_artifact(path)
    assert made.tuning["by"] == "measured" and made.tuning["kernels"]
    assert made.replaced == (sum(made.after.values()) < 0.995 * sum(made.before.values()))
    assert [p.name for p in tmp_path.iterdir()] == ["m.accel"] and verify_artifact(path).ok
    loaded: Any = accel.load(path)
    if made.replaced:
        assert loaded.report()["tuning"]["device"] == made.tuning["device"]
    model, x = model.cuda(), x.cuda()
    for _ in range(3):
        agree(loaded(x), model(x), 4e-3)
    before = path.read_bytes()
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path / "somebody"))
    with pytest.raises(TrustError):
        tune_artifact(path)
    assert path.read_bytes() == before


@torch.no_grad()
def test_state_is_whole_after_out_of_memory() -> None:
    fast = accel.compile(Counter(), inputs=(torch.randn(4096),), target=target())
    x = torch.ones(4096, device="cuda")
    for call in range(1, 6):
        agree(fast(x), torch.ones(4096, device="cuda"), 1e-6)
        if call == 3:
            function_of(fast).release()
