"""Tuning: real variants of real kernels, compiled, run through Triton's interpreter, and timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accel
from accel.backends.triton import TritonBackend, kernel_fingerprint
from accel.backends.triton.attention_tiles import AttentionTile
from accel.backends.triton.gemv import GemvTile
from accel.compiler import fallback, gpu, measure
from accel.compiler.kernel_jobs import Job, Workers, compile_job, not_cached
from accel.compiler.options import Options
from accel.compiler.retune import tune_artifact
from accel.compiler.tune import Measurement, TuneProducts, Tuner, kernels_of
from accel.compiler.variants import KERNEL, LIBRARY, Trial, variants_of
from accel.errors import AccelError, MissingDependencyError, OptionError
from accel.ir import Builder, Function, Module, TensorType, interpret
from accel.ir.module import Op, clone_region_into
from accel.ir.op import Trait
from accel.passes.base import Context
from accel.passes.manager import PassManager
from tests.backends.kernels import function_of, kernel_of
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

CPU = torch.device("cpu")
HALF, SINGLE = torch.float16, torch.float32
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path / "cache"))


def t(*shape: int, dtype: torch.dtype = SINGLE) -> TensorType:
    return TensorType(shape, dtype)


ROWS = function_of([t(48, 96)], lambda b, x: b.softmax(x, axis=-1))
FLAT = function_of([t(3000), t(3000)], lambda b, x, y: b.mul(b.relu(x), y))
GEMV = function_of([t(1, 1024), t(64, 1024)], lambda b, x, w: b.relu(b.linear(x, w)))


def program(*kernels: tuple[Function, str]) -> Module:
    """A function that calls each of the kernels, one after the other, on arguments of its own."""
    module = Module()
    types = [a.type for f, _ in kernels for a in f.args]
    main = module.add(Function("main", types))
    place, results = 0, []
    for function, kind in kernels:
        kernel = kernel_of(function, kind)
        for i in range(len(function.args)):
            kernel.set_operand(i, main.args[place + i])
        place += len(function.args)
        main.body.append(kernel)
        results += kernel.results
    Builder(main.body).op("return", results)
    return module


class InterpreterClock:
    """Runs a trial's kernel through Triton's interpreter, its library calls by their meaning."""

    name = "Triton's interpreter"

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.times: dict[str, float] = {}

    def measure(self, trial: Trial, sizes: Mapping[str, int]) -> Measurement:
        inputs = measure.sample_inputs(trial.function, sizes, CPU)
        if trial.label == LIBRARY:
            start = time.perf_counter()
            results = interpret(trial.function, inputs, trial.module.weights)
        else:
            (kernel,) = (op for op in trial.function.ops if op.name == "kernel")
            kind, backend = str(kernel.attribute("kind")), backend_of(kernel, trial.label)
            run = InterpretedKernels([as_function(kernel)], self.worker, [kind], backend)
            start = time.perf_counter()
            results = run(0, inputs)
        self.times[trial.label] = time.perf_counter() - start
        return Measurement(self.times[trial.label], results)


def as_function(kernel: Op) -> Function:
    region = kernel.regions[0]
    function = Function("main", [a.type for a in region.args])
    clone_region_into(region, function.body, {})
    results = list(function.body.terminator.operands)
    function.body.terminator.erase()
    Builder(function.body).op("return", results)
    return function


def backend_of(kernel: Op, label: str) -> TritonBackend:
    plain = TritonBackend()
    tiles = {str(tile): tile for tile in plain.candidates(kernel)}
    if label == KERNEL or label.startswith("as "):
        return plain
    return TritonBackend(tiles={kernel_fingerprint(kernel): tiles[label]})


def tuner(clock: InterpreterClock | None, mode: str = "quick", reason: str = "") -> Tuner:
    made = Tuner(TritonBackend(), gpu.libraries(), mode, clock, reason)
    made.workers = Workers(0)
    return made


def test_the_fastest_variant_is_chosen_and_used(worker: Worker) -> None:
    module, clock = program((ROWS, "rowwise")), InterpreterClock(worker)
    tuned = tuner(clock)
    (choice,) = tuned.tune(kernels_of(module)).values()
    assert choice.by == "measured" and choice.tried == len(clock.times) >= 3
    assert not choice.failed
    best = min(clock.times, key=lambda label: clock.times[label])
    assert choice.chosen in (best, KERNEL)
    assert choice.seconds == clock.times[choice.chosen]
    assert choice.model_seconds == clock.times[KERNEL]
    (kernel,) = kernels_of(module)
    tile = tuned.backend.tile_of(kernel)
    assert (str(tile) if tile is not None else KERNEL) == choice.chosen
    report = tuned.report()
    assert report["by"] == "measured" and report["device"] == clock.name
    saved = choice.model_seconds - choice.seconds
    assert report["saved_seconds"] == pytest.approx(saved)


def test_what_was_measured_is_known_to_later_compiles(worker: Worker) -> None:
    first, again = InterpreterClock(worker), InterpreterClock(worker)
    (one,) = tuner(first).tune(kernels_of(program((FLAT, "pointwise")))).values()
    (two,) = tuner(again).tune(kernels_of(program((FLAT, "pointwise")))).values()
    assert first.times and not again.times
    assert (one.chosen, one.seconds, one.by) == (two.chosen, two.seconds, two.by)
    again.name = "another device"
    tuner(again).tune(kernels_of(program((FLAT, "pointwise"))))
    assert again.times  # a measurement holds for its device only


def test_equal_kernels_are_tuned_once(worker: Worker) -> None:
    clock = InterpreterClock(worker)
    module = program((FLAT, "pointwise"), (ROWS, "rowwise"), (FLAT, "pointwise"))
    choices = tuner(clock).tune(kernels_of(module))
    assert sorted(c.calls for c in choices.values()) == [1, 2]


def test_when_the_time_is_up_the_cost_model_chooses(worker: Worker) -> None:
    clock = InterpreterClock(worker)
    tuned = tuner(clock)
    tuned.limit = 0.0
    (choice,) = tuned.tune(kernels_of(program((ROWS, "rowwise")))).values()
    assert (choice.chosen, choice.by) == (KERNEL, "cost model") and "time" in choice.reason
    assert not clock.times


def test_without_a_device_the_cost_model_chooses() -> None:
    tuned = tuner(None, reason="no GPU is here")
    (choice,) = tuned.tune(kernels_of(program((ROWS, "rowwise")))).values()
    assert (choice.chosen, choice.by, choice.reason) == (KERNEL, "cost model", "no GPU is here")
    assert tuned.report()["by"] == "cost model"


class Mistaken(InterpreterClock):
    """The results of one variant come out wrong."""

    def __init__(self, worker: Worker, label: str) -> None:
        super().__init__(worker)
        self.label = label

    def measure(self, trial: Trial, sizes: Mapping[str, int]) -> Measurement:
        made = super().measure(trial, sizes)
        if trial.label != self.label:
            return made
        return Measurement(1e-9, [r * 1.5 for r in made.results])


def test_a_variant_that_computes_something_else_is_out(worker: Worker) -> None:
    (kernel,) = kernels_of(program((FLAT, "pointwise")))
    label = variants_of(kernel, TritonBackend(), 6)[2].label
    tuned = tuner(Mistaken(worker, label))
    (choice,) = tuned.tune(kernels_of(program((FLAT, "pointwise")))).values()
    assert set(choice.failed) == {label} and "differs" in choice.failed[label]
    assert choice.chosen != label


def test_variants_have_different_sources_and_the_library() -> None:
    (gemv,) = kernels_of(program((GEMV, "gemv")))
    labels = [v.label for v in variants_of(gemv, TritonBackend(), 8)]
    assert labels[:2] == [KERNEL, LIBRARY] and len(labels) == len(set(labels)) > 3
    types = [t(4, 1024, dtype=HALF), t(64, 1024, dtype=HALF)]
    few = function_of(types, lambda b, x, w: b.relu(b.linear(x, w)))
    (kernel,) = kernels_of(program((few, "gemv")))
    found = variants_of(kernel, TritonBackend(), 4)
    assert {"as skinny", "as matmul"} <= {v.label for v in found}
    assert next(v.label for v in found if v.is_tile) == KERNEL
    (flat,) = kernels_of(program((FLAT, "pointwise")))
    labels = [v.label for v in variants_of(flat, TritonBackend(), 8)]
    assert LIBRARY not in labels and len(labels) > 2


def test_a_product_that_the_library_does_faster_is_the_librarys(worker: Worker) -> None:
    module = program((GEMV, "gemv"), (ROWS, "rowwise"))
    inputs = [torch.randn(1, 1024), torch.randn(64, 1024), torch.randn(48, 96)]
    wanted = interpret(module.main, inputs, module.weights)
    tuned = tuner(InterpreterClock(worker))  # an interpreted kernel is slower than any library
    context = Context(generator=tuned.backend, libraries=gpu.libraries())
    manager = PassManager([TuneProducts(tuned)], context, validate=True)
    (row,) = manager.run(module).rows
    assert row.rewrites == {"library": 1} and row.notes["chosen"] == {"library": 1}
    assert [op.name for op in module.main.ops if not op.has(Trait.TERMINATOR)] == [
        "linear", "relu", "kernel",
    ]  # fmt: skip
    for got, want in zip(interpret(module.main, inputs, module.weights), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_the_model_of_costs_is_asked_about_products() -> None:
    types = [t(8192, 8192, dtype=HALF), t(8192, 8192, dtype=HALF)]
    plain = function_of(types, lambda b, x, w: b.linear(x, w))
    (kernel,) = kernels_of(program((plain, "matmul")))
    tuned = tuner(None)
    (choice,) = tuned.tune([kernel]).values()
    assert choice.chosen == choice.model == LIBRARY  # nothing rides along: cuBLAS multiplies faster


class Favouring(InterpreterClock):
    """One variant is the fastest; what it computes is checked as ever."""

    def __init__(self, worker: Worker, label: str) -> None:
        super().__init__(worker)
        self.label = label

    def measure(self, trial: Trial, sizes: Mapping[str, int]) -> Measurement:
        made = super().measure(trial, sizes)
        return Measurement(1e-9, made.results) if trial.label == self.label else made


def test_a_product_may_become_another_kind_of_kernel(worker: Worker) -> None:
    types = [t(4, 96, dtype=HALF), t(32, 96, dtype=HALF)]
    module = program((function_of(types, lambda b, x, w: b.relu(b.linear(x, w))), "gemv"))
    tuned = tuner(Favouring(worker, "as matmul"))
    context = Context(generator=tuned.backend, libraries=gpu.libraries())
    (row,) = PassManager([TuneProducts(tuned)], context, validate=True).run(module).rows
    assert row.rewrites == {"kind": 1}
    (kernel,) = kernels_of(module)
    assert kernel.attribute("kind") == "matmul"
    tuned.tune([kernel], tiles_only=True)
    choice = tuned.choices[kernel_fingerprint(kernel)]
    assert choice.model == KERNEL and choice.chosen != LIBRARY
    gpu.compile_launches(module, tuned.backend, Options())


# -- compiling -------------------------------------------------------------------------------


def test_processes_compile_what_this_one_would() -> None:
    backend = TritonBackend()
    kernels = [kernels_of(program((f, k)))[0] for f, k in ((ROWS, "rowwise"), (FLAT, "pointwise"))]
    jobs = [Job.of(k, backend, tile) for k in kernels for tile in (None, backend.candidates(k)[0])]
    with Workers(2) as workers:
        done = workers.compile(jobs)
    assert done == {job.key: None for job in jobs} and not not_cached(jobs)
    for kernel, job in zip(kernels, jobs[::2], strict=True):
        entry = gpu.CompileCache().get(job.key)
        assert entry is not None and job.key == gpu.kernel_key(kernel, backend)
        assert entry == gpu.compile_kernel(kernel, backend)


def test_a_job_that_fails_says_why() -> None:
    good = Job.of(kernels_of(program((FLAT, "pointwise")))[0], TritonBackend())
    bad = Job.of(kernels_of(program((WIDE, "gemv")))[0], TritonBackend(), HUGE)
    error = compile_job(bad)
    assert isinstance(error, AccelError) and "Triton does not compile" in error.what
    with Workers(2) as workers:
        done = workers.compile([good, bad])
    assert done[good.key] is None and str(done[bad.key]) == str(error)
    assert not_cached([good, bad]) == [bad]


# -- kernels that do not compile -------------------------------------------------------------


HUGE = GemvTile(1 << 11, 1 << 11, 4)  # more elements than Triton's tensors may have
WIDE = function_of([t(1, 4096), t(4096, 4096)], lambda b, x, w: b.relu(b.linear(x, w)))


@pytest.mark.parametrize("tuned", [True, False])
def test_a_kernel_that_does_not_compile_falls_visibly(
    tuned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module = program((WIDE, "gemv"), (ROWS, "rowwise"))
    bad = kernels_of(module)[0]
    if tuned:
        backend = TritonBackend(tiles={kernel_fingerprint(bad): HUGE})
    else:
        backend = TritonBackend(tile=HUGE)
    logging.getLogger("accel").propagate = True
    context = Context(generator=backend, libraries=gpu.libraries())
    with caplog.at_level("WARNING"):
        made, (failure,) = fallback.compile_launches(module, backend, Options(), context)
    source = Path(failure.source)
    assert failure.kernel in source.name and "@triton.jit" in source.read_text()
    assert failure.kernel in caplog.text and str(source) in caplog.text
    left = [op.name for op in module.main.ops if not op.has(Trait.TERMINATOR)]
    if tuned:
        assert "numel" in failure.reason or "elements" in failure.reason, failure.reason
        assert "tile" in failure.instead and left == ["kernel", "kernel"]
    else:
        assert "torch" in failure.instead and left == ["call", "relu", "kernel"]
    assert set(made[0]) == set(kernels_of(module)) and made[1]


def test_torch_gets_what_it_has_operators_for() -> None:
    """A rotary embedding is none of them, though kernels may hold it."""

    def build(b: Any, q: Any, cos: Any, sin: Any, k: Any, v: Any) -> Any:
        return b.attention(b.rope(q, cos, sin, style="half"), k, v, scale=0.1, causal=True)

    heads, angles = t(1, 2, 64, 128), t(64, 128)
    module = program((function_of([heads, angles, angles, heads, heads], build), "attention"))
    backend = TritonBackend(tile=AttentionTile(1 << 11, 1 << 11, 4))
    context = Context(generator=backend, libraries=gpu.libraries())
    _, (failure,) = fallback.compile_launches(module, backend, Options(), context)
    left = {op.name for op in module.main.ops}
    assert "torch" in failure.instead and "rope" not in left and {"call", "mul"} <= left


# -- programs and artifacts ------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()


@WITHOUT_GPU
def test_an_artifact_says_that_the_cost_model_chose(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    made = accel.package(model().half(), (torch.randn(8, 64).half(),), path=path, target="h200",
                         options={"tune": "quick"})  # fmt: skip
    tuning = made.report()["tuning"]
    assert (tuning["by"], tuning["reason"]) == ("cost model", "no GPU is here")
    assert {c["by"] for c in tuning["kernels"]} == {"cost model"}
    assert made.report()["failed_kernels"] == []
    before = path.read_bytes()
    with pytest.raises(MissingDependencyError, match="GPU"):
        tune_artifact(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir() if p.is_file()] == [
        "m.accel"
    ]


def test_only_artifacts_for_gpus_are_tuned(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    accel.package(model(), (torch.randn(8, 64),), path=path)
    with pytest.raises(OptionError, match="'cpu'"):
        tune_artifact(path)
    with pytest.raises(OptionError, match="off"):
        tune_artifact(path, "off")


def test_a_misspelt_mode_is_an_error() -> None:
    with pytest.raises(OptionError, match="fast"):
        accel.compile(model(), inputs=(torch.randn(8, 64),), options={"tune": "fast"})
