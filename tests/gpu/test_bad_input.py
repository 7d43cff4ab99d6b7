"""Odd inputs, which must work as in eager: in memory, in size, in value; and a driver's refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import accel
from accel.errors import MissingDependencyError
from accel.runtime.artifact import Artifact
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack, unpack
from tests.backends.special_values import agrees, cases, poisoned_inputs
from tests.gpu.device_kernels import DeviceKernels, Kernel
from tests.gpu.test_models import Block, agree, target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
BOUNDS = {SINGLE: 1e-5, HALF: 4e-3, BRAIN: 3e-2}


# -- in memory -------------------------------------------------------------------------------


def shifted(x: Tensor) -> Tensor:
    """At an address that is no multiple of anything but an element's size."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return flat.view(x.shape).copy_(x)


def turned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def stepped(x: Tensor) -> Tensor:
    """Every other element of a larger tensor."""
    return torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)[..., 0].copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first of its rows, with no memory for the others."""
    return x[..., :1, :].expand(x.shape)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (shifted, turned, stepped, expanded)


class Heads(nn.Module):
    """Attention of heads of 64, from a fused projection."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.project, self.causal = nn.Linear(128, 384), causal

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(x).unflatten(-1, (6, 64)).transpose(1, 2).chunk(3, 1)
        return nn.functional.scaled_dot_product_attention(*split, is_causal=self.causal)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Hardswish(), nn.Conv2d(16, 8, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Router(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        weights, places = torch.topk(torch.softmax(x, -1, dtype=SINGLE), 4, -1)
        return weights / weights.sum(-1, keepdim=True) + places


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "one row": (lambda: Block(512), (1, 512), BRAIN),
    "some rows": (lambda: Block(512), (2, 12, 512), HALF),
    "many rows": (lambda: Block(512), (512, 512), HALF),
    "float32": (lambda: Block(256), (3, 50, 256), SINGLE),
    "attention": (Heads, (2, 150, 128), HALF),
    "attention to all": (lambda: Heads(False), (2, 150, 128), HALF),
    "images": (Image, (2, 8, 14, 16), HALF),
    "a router": (Router, (70, 64), BRAIN),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_any_memory_will_do(name: str) -> None:
    make, shape, dtype = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    fast = accel.compile(model, inputs=(torch.randn(shape).to(dtype),), target=target())
    model = model.cuda()
    for layout in LAYOUTS:
        for _ in range(3):  # step by step, recorded, replayed
            dense = torch.randn(shape, device="cuda").to(dtype)
            if name == "a router":  # different numbers in each row, so that there is one order
                dense = (torch.rand(shape, device="cuda").argsort(-1) / 16 - 2).to(dtype)
            x = layout(dense)
            agree(fast(x), model(x), BOUNDS[dtype])


# -- in size ---------------------------------------------------------------------------------


@torch.no_grad()
def test_no_and_one_element_along_dynamic_axes() -> None:
    torch.manual_seed(0)
    model = Block().eval()
    fast = accel.compile(
        model,
        inputs=(torch.randn(3, 7, 64),),
        dynamic_shapes={"x": {0: "batch", 1: Dim("length", max=4096)}},
        target=target(),
    )
    model = model.cuda()
    for batch, length in ((2, 5), (2, 1), (2, 0), (1, 5), (0, 5), (1, 1), (1, 30), (4, 6)):
        for _ in range(3):
            x = torch.randn(batch, length, 64, device="cuda")
            got, wanted = fast(x), model(x)
            assert got.shape == wanted.shape
            if x.numel():
                agree(got, wanted, 1e-5)


MANY = (1 << 16) + 8  # rows of 2**15 elements: more than 2**31


class Rows(nn.Module):
    """A product of so many results, with an epilogue."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 1 << 15)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.up(x))


def some_rows() -> Tensor:
    """The first ones, those about the 2**31st element, the last ones."""
    return torch.cat([torch.arange(i - 4, i + 4) for i in (4, 1 << 15, 1 << 16, MANY - 4)])


@torch.no_grad()
def test_a_product_of_more_than_2_to_the_31_results() -> None:
    torch.manual_seed(0)
    model = Rows().half().eval()
    fast = accel.compile(model, inputs=(torch.empty(MANY, 64).half(),), target=target())
    model, x, rows = model.cuda(), torch.randn(MANY, 64, device="cuda").half(), some_rows().cuda()
    agree(fast(x)[rows], model(x[rows]), 4e-3)


class Shares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


@torch.no_grad()
def test_rows_of_more_than_2_to_the_31_elements() -> None:
    shape = (MANY, 1 << 15)
    meta = torch.zeros(1, dtype=HALF).expand(shape)
    fast = accel.compile(Shares(), inputs=(meta,), target=target())
    x, rows = torch.randn(shape, device="cuda", dtype=HALF), some_rows().cuda()
    agree(fast(x)[rows], torch.softmax(x[rows], -1), 4e-3)


class Lookup(nn.Module):
    def forward(self, table: Tensor, places: Tensor) -> Tensor:
        return nn.functional.embedding(places, table) * 2


@torch.no_grad()
def test_a_table_of_more_than_2_to_the_31_elements() -> None:
    shape = (MANY, 1 << 15)
    meta = torch.zeros(1, dtype=torch.int8).expand(shape)
    places = some_rows()
    fast = accel.compile(Lookup(), inputs=(meta, places), target=target())
    table = torch.randint(-50, 50, shape, dtype=torch.int8, device="cuda")
    got = fast(table, places.cuda())
    assert torch.equal(got, table[places.cuda()] * 2)


# -- in value --------------------------------------------------------------------------------

SPECIAL = cases()


def special_kernels() -> list[Kernel]:
    return [
        Kernel(one.function(), one.kind, sms=one.sms, tile=one.tile) for one in cases().values()
    ]


@pytest.fixture(scope="module")
def kernels() -> DeviceKernels:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("some of these kernels are for Hopper")
    return DeviceKernels(special_kernels)


@pytest.mark.parametrize("name", SPECIAL)
def test_nan_and_infinities_reach_what_they_should(kernels: DeviceKernels, name: str) -> None:
    number, special = list(SPECIAL).index(name), SPECIAL[name]
    for operand, inputs in poisoned_inputs(special):
        difference = agrees(special, inputs, kernels(number, inputs))
        assert not difference, f"operand {operand}: {difference}\n{kernels.source(number)}"


# Under a causal mask it is up to each library whether later keys that are infinite are multiplied
# by weights of zero.
PASSING = ("one row", "some rows", "many rows", "float32", "attention to all")


@pytest.mark.parametrize("name", PASSING)
@torch.no_grad()
def test_models_pass_them_on_as_eager_does(name: str) -> None:
    make, shape, dtype = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    fast = accel.compile(model, inputs=(torch.randn(shape).to(dtype),), target=target())
    model = model.cuda()
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(shape, device="cuda").to(dtype)
        x.view(-1, shape[-1])[-1, 3] = bad
        got, wanted = fast(x), model(x)
        assert torch.equal(got.isnan(), wanted.isnan()) and bool(wanted.isnan().any())
        assert torch.equal(got.isinf(), wanted.isinf())
        agree(got.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), BOUNDS[dtype])


# -- a driver that is too old ----------------------------------------------------------------


def test_code_of_a_newer_cuda_is_refused_by_name(tmp_path: Path) -> None:
    """PTX of a version that no driver knows yet, as a driver sees code of a later CUDA."""
    path = tmp_path / "m.accel"
    accel.package(nn.Softmax(-1).eval(), (torch.randn(5, 64),), path=path, target="a100")
    artifact = Artifact(path)
    code = unpack(artifact.read(artifact.manifest.host_code))
    (name,) = code.kernels
    text, count = re.subn(rb"\.version \d+\.\d+", b".version 99.0", code.ptx(name))
    assert count == 1
    newer = pack(code.arch, {name: (code.kernels[name], code.cubin(name))}, {name: text})
    library = CudaLibrary(newer, torch.device("cuda", 0))
    with pytest.raises(MissingDependencyError, match="too old") as caught:
        library.function(name)
    assert name in caught.value.where and "update" in caught.value.advice
