"""Runs Triton sources on the CPU, through Triton's interpreter, in a process of its own.

Triton decides at import whether its functions are compiled or interpreted, so the process that
interprets is not the one that compiles. CUDA's libdevice has no interpreter: the worker replaces
it by functions of torch, in float64 where the operand is float32 and torch's float32 is coarser.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The interpreter has no machine instructions (`accel.backends.triton.powers`).
_POWER = re.compile(r'tl\.inline_asm_elementwise\("ex2\.approx\.ftz\.f32 .*?pack=1\)', re.S)


@dataclass
class Job:
    """One launch: tensors and sizes in the order of the function's parameters."""

    source: str
    name: str
    args: list[Any]
    constants: dict[str, int]
    programs: int
    writes: list[int]  # positions in args that it writes
    awaited: list[int] = field(default_factory=list)  # what earlier launches may have made


def interpretable(source: str) -> str:
    """The source with functions of Triton's where it names machine instructions."""
    return _POWER.sub("tl.exp2(x)", source)


def run(job: Job) -> list[Tensor]:
    """The tensors that the launch wrote.

    In a source with waits (`accel.backends.triton.dependent`) each program finds rubbish in what it
    should await, until it has waited.
    """
    from accel.backends.cubin.compile import loaded
    from accel.backends.triton import dependent
    from tests.backends import gluon_interpreter

    _prepare()
    source, name = interpretable(job.source), job.name
    if gluon_interpreter.is_gluon(source):
        source, name = gluon_interpreter.interpreted(source, name), f"{name}_entry"
    with loaded(source, name) as module:
        vars(module)["libdevice"] = _Libdevice()
        args = list(job.args)
        args = [a.of(args) if isinstance(a, gluon_interpreter.MapOf) else a for a in args]
        awaited = [args[i].untyped_storage() for i in job.awaited]
        meant = [storage.clone() for storage in awaited]

        def start() -> None:
            for storage in awaited:
                storage.fill_(255)

        def wait() -> None:
            for storage, data in zip(awaited, meant):
                storage.copy_(data)

        setattr(module, dependent.LAUNCH, start)
        setattr(module, dependent.WAIT, wait)
        if job.programs:
            try:
                getattr(module, name)[(job.programs,)](*args, **job.constants)
            except Exception as error:
                raise RuntimeError(f"{error}\n{job.source}") from error
    return [args[i] for i in job.writes]


class Worker:
    """A process with an interpreting Triton."""

    def __init__(self) -> None:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(1, mp_context=context)
            self.pool.submit(_prepare).result()
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before

    def run(self, job: Job) -> list[Tensor]:
        return self.pool.submit(run, job).result()

    def close(self) -> None:
        self.pool.shutdown()


_prepared = False


def _prepare() -> None:
    """Mends the interpreter, once per process.

    A `tl.reduce` that folds whole slices, where its own calls the combining function for every
    element; a splat that keeps a condition a bool; products of bfloat16; bfloat16 as torch rounds
    it (its own goes wrong at ties and below the smallest normal number).
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    torch.set_num_threads(1)
    from triton.runtime import interpreter

    interpreter.ReduceOps.generic_reduce = _reduce_slices
    interpreter.InterpreterBuilder.create_splat = _splat
    interpreter.InterpreterBuilder.create_dot = _dot
    own = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        made = _brain(data, str(source), str(target))
        return own(data, source, target, rounding) if made is None else made

    interpreter._convert_float = convert


def _brain(data: Any, source: str, target: str) -> Any:
    """Between float32 and bfloat16 (as uint16), and from float8; None for other types."""
    if (source, target) == ("fp8e4nv", "fp16"):
        return torch.from_numpy(data.copy()).view(torch.float8_e4m3fn).half().numpy()
    if (source, target) == ("fp32", "bf16"):
        return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
    if (source, target) == ("bf16", "fp32"):
        return torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
    return None


def _dot(self: Any, a: Any, b: Any, total: Any, precision: Any, inexact: Any) -> Any:
    """a b + total; bfloat16 and float8, which the interpreter holds as bits, by their values."""

    def values(x: Any) -> Tensor:
        data = torch.from_numpy(x.data.copy())
        if str(x.dtype.scalar) == "fp8e4nv":
            return data.view(torch.float8_e4m3fn).float()
        return data.view(torch.bfloat16).float() if data.dtype == torch.uint16 else data.float()

    made = torch.matmul(values(a), values(b)).numpy() + total.data
    return type(total)(made.astype(total.data.dtype), total.dtype.scalar)


def _splat(self: Any, type_: Any, value: Any) -> Any:
    import numpy as np

    data = np.asarray(value.data)
    return type(value)(np.full(type_.shape, data.reshape(-1)[0], data.dtype), value.dtype.scalar)


def _reduce_slices(self: Any, operands: Sequence[Any]) -> Any:
    import numpy as np

    axis = self.axis
    arrays = [o.handle.data for o in operands]
    count = arrays[0].shape[axis]

    def part(step: int) -> tuple[Any, ...]:
        return tuple(
            self.to_tensor(np.take(a, step, axis=axis), o.dtype) for a, o in zip(arrays, operands)
        )

    total = part(0)
    for step in range(1, count):
        made = self.combine_fn.fn(*total, *part(step))
        total = made if isinstance(made, tuple) else (made,)
    shape = list(arrays[0].shape)
    shape[axis : axis + 1] = [1] if self.keep_dims else []
    found = [np.asarray(t.handle.data).reshape(shape) for t in total]
    return [self.to_tensor(f, o.dtype) for f, o in zip(found, operands)]


class _Libdevice:
    """libdevice's functions on the interpreter's tensors."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = _FUNCTIONS[name]

        def call(*args: Any) -> Any:
            import numpy as np
            import triton.language as tl

            arrays = [torch.from_numpy(np.array(a.handle.data)) for a in args]
            wide = [a.double() for a in arrays]
            result = function(*torch.broadcast_tensors(*wide)).to(arrays[0].dtype).numpy()
            handle = type(args[0].handle)(result, args[0].handle.dtype)
            shaped = max(args, key=lambda a: len(a.shape))
            return tl.tensor(handle, shaped.type)

        return call


def _fmod(x: Tensor, y: Tensor) -> Tensor:
    """C's; torch's vectorized code gives NaN where x / y is huge."""
    import numpy as np

    with np.errstate(all="ignore"):
        return torch.from_numpy(np.fmod(x.numpy(), y.numpy()))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch, name)
    for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan",
                 "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "tanh", "erf",
                 "erfc", "erfinv", "lgamma", "atan2", "pow", "floor", "ceil", "trunc",
                 "rsqrt", "sqrt", "copysign")
} | {"rint": torch.round, "fmod": _fmod}  # fmt: skip
