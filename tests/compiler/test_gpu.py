"""Programs for a GPU, compiled, written and read on a machine without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.cli.app import main
from accel.compiler.gpu import generator
from accel.compiler.targets import get_target
from accel.errors import ArtifactError, MissingDependencyError
from accel.ir import TensorType
from accel.runtime.artifact import Artifact
from accel.runtime.cuda_code import CudaKernel, is_cuda_code, pack, unpack
from accel.runtime.verify import verify_artifact
from tests.backends.kernels import f32, function_of, kernel_of

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y, nn.functional.softmax(y.sum(1), -1)


@pytest.fixture(scope="module")
def compiled() -> accel.Compiled:
    torch.manual_seed(0)
    model = Block().half().eval()
    x = torch.randn(2, 7, 64).half()
    return accel.compile(model, inputs=(x,), target="h100")


def test_all_steps_are_generated_or_library_calls(compiled: accel.Compiled) -> None:
    (plan,) = compiled.program.plans.values()
    kinds = [s.kind for s in plan.steps]
    assert "aten" not in kinds and kinds.count("kernel") >= 3
    sources = compiled.program.sources
    for step in plan.steps:
        if step.kind == "kernel":
            assert f"def {step.name}(" in sources[step.name]
            assert f".entry {step.name}" in sources[f"{step.name}.ptx"]


def test_equal_blocks_compile_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(5)))
    made = accel.compile(model.eval(), inputs=(torch.randn(3, 64),), target="h200")
    (plan,) = made.program.plans.values()
    names = [s.name for s in plan.steps if s.kind == "kernel"]
    assert len(names) % 5 == 0 and len(set(names)) == len(names) // 5


@WITHOUT_GPU
def test_an_artifact_is_made_and_checked_without_a_gpu(
    compiled: accel.Compiled, tmp_path: Path
) -> None:
    path = tmp_path / "block.accel"
    compiled.save(path)
    artifact = Artifact(path)
    assert artifact.manifest.host_code == "kernels/kernels.cuda"
    assert artifact.manifest.target.name == "h100" and artifact.manifest.golden
    assert unpack(artifact.read(artifact.manifest.host_code)).arch == "sm_90"
    loaded = accel.load(path, trust=True)
    with pytest.raises(MissingDependencyError, match="torch finds none here"):
        loaded(torch.randn(2, 7, 64).half())
    with pytest.raises(MissingDependencyError, match="torch finds none here"):
        loaded.prepare()
    for verb in (["run"], ["bench"], ["explain", "--measure"], ["tune"]):
        with pytest.raises(SystemExit) as ended:
            main([*verb, str(path)])
        assert ended.value.code == MissingDependencyError.exit_code
    assert not verify_artifact(path, trust=True).ok


@WITHOUT_GPU
def test_golden_vectors_are_the_models_own_without_a_gpu(
    compiled: accel.Compiled, tmp_path: Path
) -> None:
    path = tmp_path / "block.accel"
    compiled.save(path)
    artifact = Artifact(path)
    inputs, outputs = artifact.golden(artifact.manifest.golden[0])
    with torch.no_grad():
        wanted = compiled.model(*inputs)
    assert all(torch.equal(o, w) for o, w in zip(outputs, wanted, strict=True))


def test_a_split_reduction_is_two_steps_with_a_buffer_between() -> None:
    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum().exp()

    made = accel.compile(Total(), inputs=(torch.randn(1000, 500),), target="h200")
    (plan,) = made.program.plans.values()
    first, second = (s for s in plan.steps if s.kind == "kernel")
    (between,) = first.outputs
    assert between in second.inputs
    assert plan.values[between].kind == "buffer" and plan.values[between].dtype == "uint8"


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x
        return self.total * 1


def test_first_values_of_state_are_kept() -> None:
    made = accel.compile(Total(), inputs=(torch.ones(4),))
    assert [float(made(torch.ones(4))[0]) for _ in range(3)] == [3.0, 4.0, 5.0]
    on_gpu = accel.compile(Total(), inputs=(torch.ones(4),), target="h200")
    assert "total" in on_gpu.program.weights


def kernel_code() -> bytes:
    kernel = CudaKernel("k", 2, ("s0",), False, 2, ["//", "s0", 4], 4, 0)
    return pack("sm_90", {"a": (kernel, b"cubin a"), "b": (kernel, b"longer cubin b")})


def test_code_round_trips() -> None:
    data = kernel_code()
    assert is_cuda_code(data) and data == kernel_code()
    code = unpack(data)
    assert code.arch == "sm_90" and code.cubin("a") == b"cubin a"
    assert code.cubin("b") == b"longer cubin b" and code.kernels["b"].sizes == ("s0",)


def test_damaged_code_is_a_typed_error() -> None:
    data = kernel_code()
    refused = 0
    for position in range(len(data)):
        for flip in (1, 0x80):
            damaged = bytearray(data)
            damaged[position] ^= flip
            try:
                code = unpack(bytes(damaged))
                for name in code.kernels:
                    code.cubin(name)
            except ArtifactError:
                refused += 1
    for length in range(len(data)):
        try:
            unpack(data[:length])
        except ArtifactError:
            refused += 1
    assert refused > len(data)


def test_the_generator_takes_the_targets_architecture() -> None:
    assert generator(get_target("a100")).arch == "sm_80"
    assert generator(get_target("b200")).arch == "sm_100"
    assert generator(get_target("h200")).sms == 132


def test_results_may_overwrite_operands_that_are_read_in_place() -> None:
    backend = generator(get_target("h200"))

    def pairs(types: list[TensorType], build: object) -> list[tuple[int, int]]:
        _, made = backend.generate([kernel_of(function_of(types, build))])  # type: ignore[arg-type]
        (code,) = made.values()
        return [p for launch in code.launches for p in launch.inplace]

    square = [f32(8, 8), f32(8, 8)]
    assert pairs(square, lambda b, x, y: b.add(b.exp(x), y)) == [(0, 0), (0, 1)]
    assert pairs(square, lambda b, x, y: b.add(b.permute(x, axes=(1, 0)), y)) == [(0, 1)]
    assert pairs(square[:1], lambda b, x: b.softmax(x, axis=1)) == [(0, 0)]
    assert pairs(square[:1], lambda b, x: b.flip(x, axes=(0,))) == []
    assert pairs(square[:1], lambda b, x: b.sum(x, axes=(1,))) == []
    assert pairs(square[:1], lambda b, x: (b.exp(x), b.neg(x))) == []
