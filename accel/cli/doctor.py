"""`accel doctor`: what is installed, and what each backend can do here, tried for real.

Exit code 0 if models can be compiled and run on this machine, else 6.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from torch import nn
from torch.profiler import ProfilerActivity, profile

import accel
from accel.cli.output import Json, emit, facts, format_bytes, format_seconds, progress, table
from accel.compiler.targets import Target, host_target, list_targets
from accel.config import c_compiler, cache_dir
from accel.errors import AccelError, BackendError
from accel.runtime import libraries
from accel.runtime.cuda import driver
from accel.runtime.cuda_load import driver_version
from accel.runtime.interfaces import Operand

app = typer.Typer()

_PACKAGES = (
    # package, extra that asks for it, what for
    ("torch", "", "tensors, capture, vendor kernels"),
    ("apache-tvm", "tvm", "generated CPU kernels"),
    ("triton", "triton", "generated GPU kernels"),
    ("onnx", "onnx", "ONNX models"),
    ("onnxruntime", "onnx", "benchmarks"),
    ("torch-mlir", "mlir", "reading IR dumps with MLIR"),
    ("transformers", "hf", "checkpoints"),
    ("gguf", "hf", "GGUF checkpoints"),
    ("safetensors", "", "weights files"),
    ("cryptography", "", "signatures of host code"),
)


@dataclass
class Check:
    """One thing that was tried. `needed`: without it nothing compiles."""

    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    advice: str = ""
    needed: bool = False


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed and what each backend can do here."""
    with progress("trying every backend", as_json):
        checks = run_checks()
    host = host_target()
    system = {
        "accel": accel.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": host.cores,
        "cpu_features": list(host.features),
        "torch_threads": torch.get_num_threads(),
        "cache": str(cache_dir()),
    }
    packages = {name: _version(name) for name, _, _ in _PACKAGES}
    usable = all(check.state == "ok" for check in checks if check.needed)
    data = {
        "usable": usable,
        "system": system,
        "packages": packages,
        "checks": [asdict(check) for check in checks],
    }
    emit(data, as_json, *_report(system, packages, checks))
    if not usable:
        raise typer.Exit(BackendError.exit_code)


def _report(
    system: dict[str, Any], packages: dict[str, str | None], checks: list[Check]
) -> list[Any]:
    shown = {**system, "cpu_features": " ".join(system["cpu_features"]) or "unknown"}
    rows = [
        (name, packages[name] or "-", use, "" if packages[name] else _install(extra))
        for name, extra, use in _PACKAGES
    ]
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    tried = [(c.name, f"[{colours[c.state]}]{c.state}[/]", c.detail, c.advice) for c in checks]
    return [
        facts(shown.items()),
        table("installed", ("package", "version", "for", "to install"), rows),
        table("tried here", ("what", "state", "detail", "what to do"), tried),
    ]


def _install(extra: str) -> str:
    return f"pip install 'accel-compiler[{extra}]'" if extra else "pip install accel-compiler"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_checks() -> list[Check]:
    """Tries each backend on something small."""
    return [
        _try("C compiler", _c_compiler, "install a C compiler, or set ACCEL_CC", needed=True),
        _try("oneDNN linear", _onednn, "use a torch build with oneDNN"),
        _try("attention", _attention, "use another torch build"),
        _try("generated CPU kernels", _generated, _install("tvm")),
        _try("compile and run", _end_to_end, "see the checks above", needed=True),
        _try("torch.compile backend", _dynamo, "pip install accel-compiler (its entry point)"),
        _try("cache folder", _cache_folder, "set ACCEL_CACHE_DIR to a folder you may write"),
        _try("MLIR parser", _mlir, _install("mlir")),
        _try("CUDA device", _cuda, "GPU targets need a machine with one"),
        _try("generated GPU kernels", _gpu_kernels, _install("triton")),
        _try("code for a newer GPU (PTX)", _ptx, "update the NVIDIA driver"),
        _try("CUDA graphs", _graphs, "update the NVIDIA driver"),
        _try("times of single kernels", _profiler, "use a torch build with CUPTI"),
    ]


class Missing(Exception):
    """A check's subject is not installed here."""


def _try(name: str, check: Callable[[], str], advice: str, *, needed: bool = False) -> Check:
    """Runs a check. Whatever goes wrong is what the user asked to be told."""
    try:
        return Check(name, "ok", check(), "", needed)
    except (Missing, ImportError) as error:
        return Check(name, "missing", str(error), advice, needed)
    except AccelError as error:
        return Check(name, "broken", error.what, error.advice or advice, needed)
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}", advice, needed)


def _c_compiler() -> str:
    """Compiles a function into a shared library, loads it, and calls it."""
    command = c_compiler()
    if shutil.which(command) is None:
        raise Missing(f"'{command}' is not on the path")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.c", Path(folder) / "probe.so"
        source.write_text("int probe(int x) { return 2 * x; }\n")
        subprocess.run(
            [command, "-shared", "-fPIC", "-o", str(library), str(source)],
            check=True,
            capture_output=True,
        )
        if ctypes.CDLL(str(library)).probe(21) != 42:
            raise BackendError(f"'{command}' makes libraries that compute wrong results")
    said = subprocess.run([command, "--version"], capture_output=True, text=True)
    return (said.stdout.splitlines() or [command])[0]


def _onednn() -> str:
    x, w = torch.randn(8, 16), torch.randn(4, 16)
    operands = [Operand(x.dtype, (8, 16)), Operand(w.dtype, (4, 16), w), None]
    call = libraries.get("onednn.linear").prepare({"unary": "relu"}, operands)
    torch.testing.assert_close(call(x), (x @ w.T).relu(), rtol=1e-4, atol=1e-4)
    return "weights packed, ReLU fused, result checked"


def _attention() -> str:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    operands = [Operand(q.dtype, tuple(q.shape))] * 3
    call = libraries.get("sdpa").prepare({"scale": 8**-0.5, "causal": True}, [*operands, None])
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(call(q, k, v), wanted, rtol=1e-4, atol=1e-4)
    return "causal, result checked"


def _generated() -> str:
    """Compiles kernels that no library has, and checks their results."""
    if _version("apache-tvm") is None:
        raise Missing("apache-tvm is not installed")
    seconds, steps = _compile_probe()
    if not steps.get("kernel"):
        raise BackendError("no kernel was generated")
    return f"{steps['kernel']} kernel(s) in {format_seconds(seconds)}, result checked"


def _end_to_end() -> str:
    seconds, steps = _compile_probe()
    done = ", ".join(f"{n} {kind}" for kind, n in steps.items())
    return f"a small model in {format_seconds(seconds)} ({done}), result checked"


@cache
def _compile_probe() -> tuple[float, dict[str, int]]:
    """Compiles a small model and checks it; seconds, and its steps by kind."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    start = time.perf_counter()
    compiled = accel.compile(model, inputs=(x,), options={"cache": False})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    seconds = time.perf_counter() - start
    steps: dict[str, int] = next(iter(compiled.report()["steps"].values()))
    return seconds, steps


def _dynamo() -> str:
    found = torch._dynamo.list_backends(exclude_tags=None)
    if "accel" not in found:
        raise Missing("torch.compile does not know the backend 'accel'")
    return 'torch.compile(model, backend="accel")'


def _cache_folder() -> str:
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        return str(folder)


def _mlir() -> str:
    ir = importlib.import_module("torch_mlir.ir")
    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        ir.Module.parse('"accel.probe"() : () -> ()')
    return "torch_mlir.ir parses generic form"


def _cuda() -> str:
    _need_gpu()
    major, minor = torch.cuda.get_device_capability()
    number = driver_version(driver().library)
    free, total = torch.cuda.mem_get_info()
    fits = [t.name for t in list_targets().values() if t.arch == f"sm_{major}{minor}"]
    return (
        f"{torch.cuda.get_device_name()}, sm_{major}{minor}, targets {' '.join(fits) or 'none'}, "
        f"driver for CUDA {number // 1000}.{number % 1000 // 10}, torch for {torch.version.cuda}, "
        f"{format_bytes(free)} of {format_bytes(total)} free"
    )


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise Missing("torch sees no CUDA device")


def _gpu_target(*, newer: bool = False) -> Target:
    """A target whose machine code the GPU here runs; or one that it is newer than."""
    here = torch.cuda.get_device_capability()
    for target in list_targets().values():
        if target.kind == "cuda":
            number = int(target.arch.removeprefix("sm_"))
            wanted = (number // 10, number % 10)
            older = wanted[0] < here[0]
            if older if newer else wanted[0] == here[0] and wanted <= here:
                return target
    raise Missing(f"no target for sm_{here[0]}{here[1]}")


def _gpu_probe(target: Target) -> tuple[float, Any]:
    """Compiles a norm for a GPU and compares its calls; seconds, and the compiled model."""
    if _version("triton") is None:
        raise Missing("triton is not installed")
    model, x = nn.Sequential(nn.LayerNorm(64), nn.GELU()).eval(), torch.randn(8, 64)
    start = time.perf_counter()
    compiled = accel.compile(model, inputs=(x,), target=target, options={"cache": False})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x.cuda()).cpu(), model(x), rtol=1e-4, atol=1e-4)
    return time.perf_counter() - start, compiled


def _gpu_kernels() -> str:
    _need_gpu()
    target = _gpu_target()
    seconds, _ = _gpu_probe(target)
    return f"for {target.name}: compiled and called in {format_seconds(seconds)}, result checked"


def _ptx() -> str:
    _need_gpu()
    target = _gpu_target(newer=True)
    _gpu_probe(target)
    return f"code for {target.name} runs here through its PTX, result checked"


def _graphs() -> str:
    _need_gpu()
    _, compiled = _gpu_probe(_gpu_target())
    ((_, found),) = compiled.report()["graphs"].items()
    if not found["recorded"]:
        raise BackendError(f"no graph was recorded: {found['reason']}")
    return "recorded and replayed"


def _profiler() -> str:
    _need_gpu()
    x = torch.randn(1024, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.relu(x)
        torch.cuda.synchronize()
    if not any("CUDA" in str(e.device_type) for e in profiler.events()):
        raise BackendError("torch's profiler reports no kernels")
    return "torch's profiler reports kernels (accel bench, accel explain --measure)"
