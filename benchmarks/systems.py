"""The systems that are compared: each turns a model and its inputs into a function of no arguments.

call = SYSTEMS["inductor"](model, inputs)   # compiles, and runs once
outputs = call()                            # a list of tensors
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import accel
from accel.cli.timing import relative_error
from benchmarks.measure import THREADS

# The exporter says at each export that torchvision is missing.
logging.getLogger("torch.onnx").setLevel(logging.ERROR)

Call: TypeAlias = Callable[[], list[Tensor]]

# A system may be this much further from float64 than eager float32 is, and always 1e-6.
ERROR_FACTOR = 10
ERROR_FLOOR = 1e-6


def eager(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    return _torch_call(model, inputs)


def inductor(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """`torch.compile` with its defaults: weights are not frozen, while accel's and ONNX's are."""
    call = _torch_call(torch.compile(model), inputs)
    call()
    return call


def inductor_freezing(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """`torch.compile` with `freezing`: constant weights, packed for oneDNN."""
    compiled = torch.compile(model, options={"freezing": True})
    call = _torch_call(compiled, inputs)
    call()
    return call


def onnx_runtime(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """Exported by `torch.onnx`, all graph optimizations, as many threads as the others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, inputs, path, dynamo=True, verbose=False, external_data=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed: dict[str, np.ndarray] = {n: t.numpy() for n, t in zip(names, inputs)}

    def call() -> list[Tensor]:
        return [torch.from_numpy(r) for r in session.run(None, feed)]

    call()
    return call


def accel_compile(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """`accel.compile` with its defaults: exact passes only."""
    call = _torch_call(accel.compile(model, inputs=inputs), inputs)
    call()
    return call


def _torch_call(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            out = function(*inputs)
        return [out] if isinstance(out, Tensor) else list(out)

    return call


def reference(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], float]:
    """The results of eager PyTorch in float64, and the error that any system may have.

    The bound is measured on the model itself: `ERROR_FACTOR` times the error of eager float32.
    """
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    wanted = eager(copy.deepcopy(model).double(), wide)()
    own = relative_error(eager(model, inputs)(), wanted)
    return wanted, max(ERROR_FLOOR, ERROR_FACTOR * own)


SYSTEMS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Call]] = {
    "eager": eager,
    "inductor": inductor,
    "inductor-freezing": inductor_freezing,
    "onnxruntime": onnx_runtime,
    "accel": accel_compile,
}
