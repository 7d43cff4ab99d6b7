"""Timing on a GPU: a function's steps, and what the device can do at best.

A function is timed as a CUDA graph that holds it several times over, each time on inputs of its
own, so that what one call leaves in the L2 cache does not serve the next. A device's ceilings (the
bandwidth of a long read or copy, a large matrix product by dtype) are measured once and kept in the
compile cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from accel.compiler.cache import CompileCache, cache_key
from accel.errors import ExecutionError
from accel.ir.module import Function, Op, Value
from accel.ir.op import Trait
from accel.ir.types import SUB_BYTE_BITS, substitute
from accel.runtime.cuda import driver
from accel.runtime.cuda_graph import RECORDING, leave_recording
from accel.runtime.cuda_load import driver_version
from accel.runtime.executor import CompiledFunction

_MOST_SETS = 32
_MOST_BYTES = 4 << 30
_REPLAYS = 7
_LEAST_SECONDS = 4e-4  # of one replay: shorter ones are mostly the start of a graph


def device_name(device: torch.device) -> str:
    """What measurements on a device hold for: the GPU, its driver, torch."""
    number = driver_version(driver().library)
    return f"{torch.cuda.get_device_name(device)}, driver {number}, torch {torch.__version__}"


def graph_seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median seconds of one of `runs`, which are recorded one after the other in a CUDA graph."""
    with torch.cuda.device(device), torch.no_grad():
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            runs[0]()
            start, end = _event(), _event()
            start.record()
            runs[-1]()
            end.record()
        side.synchronize()
        once = max(start.elapsed_time(end) * 1e-3, 1e-6)
        repeats = min(64, max(1, round(_LEAST_SECONDS / (once * len(runs)))))
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with (
                RECORDING,
                torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"),
            ):
                for _ in range(repeats):
                    for run in runs:
                        run()
        except RuntimeError:
            leave_recording(device, pool)
            raise
        graph.replay()
        times = []
        for _ in range(_REPLAYS):
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return statistics.median(times) / (repeats * len(runs))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def function_seconds(function: CompiledFunction, inputs: Sequence[Tensor]) -> float:
    """Seconds of one call's steps on the device, inputs rotated out of the L2 cache."""
    device = function.device
    sets = [list(inputs)]
    size = sum(t.nbytes for t in inputs)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(_MOST_SETS, 1 + 3 * cache // max(size, 1), max(1, _MOST_BYTES // max(size, 1)))
    sets += [[t.clone() for t in inputs] for _ in range(count - 1)]
    runs = [partial(function.step_by_step, given) for given in sets]
    return graph_seconds(runs, device)


# -- inputs ----------------------------------------------------------------------------------


def sample_inputs(
    function: Function, sizes: Mapping[str, int], device: torch.device, seed: int = 0
) -> list[Tensor]:
    """Random arguments. Integers are indices that fit whatever reads them; a position in a cache is
    the last one, where a call costs the most."""
    generator = torch.Generator(device).manual_seed(seed)
    made = []
    for arg in function.args:
        shape = [int(substitute(d, sizes)) for d in arg.shape]
        if arg.dtype in SUB_BYTE_BITS:
            raise ExecutionError(f"no random values of {arg.dtype}", where=arg.name)
        if arg.dtype.is_floating_point or arg.dtype.is_complex:
            wide = torch.complex64 if arg.dtype.is_complex else torch.float32
            value = torch.randn(shape, dtype=wide, device=device, generator=generator)
            made.append((value * 0.5).to(arg.dtype))
        elif arg.dtype == torch.bool:
            value = torch.randint(0, 2, shape, device=device, generator=generator)
            made.append(value.to(torch.bool))
        else:
            low, high = _index_range(arg, sizes, set())
            value = torch.randint(low, high, shape, device=device, generator=generator)
            made.append(value.to(arg.dtype))
    return made


def _index_range(value: Value, sizes: Mapping[str, int], seen: set[Value]) -> tuple[int, int]:
    """[low, high) of integers that every reader takes."""
    low, high = 0, 127
    seen.add(value)
    for user in value.users:
        first = user.operands[0]
        if user.regions:
            for operand, arg in zip(user.operands, user.regions[0].args):
                if operand is value and arg not in seen:
                    return _index_range(arg, sizes, seen)
        if user.name in _POSITIONS and first is not value and value.type.rank == 0:
            last = _last_position(user, sizes)
            return last, last + 1
        if first is not value and value.dtype in (torch.int32, torch.int64):
            rows = min((int(substitute(d, sizes)) for d in first.shape), default=1)
            high = min(high, max(rows, 1))
        elif not user.has(Trait.TERMINATOR):
            for result in user.results:
                if result not in seen and result.dtype in (torch.int32, torch.int64):
                    inner = _index_range(result, sizes, seen)
                    low, high = max(low, inner[0]), max(inner[0] + 1, min(high, inner[1]))
    return low, high


_POSITIONS = ("dynamic_update", "dynamic_slice", "cached_attention")


def _last_position(user: Op, sizes: Mapping[str, int]) -> int:
    """The last position at which an op reads or writes rows of its cache."""
    if user.name == "cached_attention":
        q, k = user.operands[0], user.operands[1]
        return max(0, int(substitute(k.shape[2] - q.shape[2], sizes)))
    axis = int(user.attribute("axis"))
    whole = int(substitute(user.operands[0].shape[axis], sizes))
    part = user.operands[1] if user.has(Trait.UPDATE) else user.results[0]
    return max(0, whole - int(substitute(part.shape[axis], sizes)))


# -- what a device can do --------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured: bytes/s of a long read or of a copy (read and written), whichever is faster, and
    FLOP/s of a large product by dtype name."""

    device: str
    bandwidth: float
    flops: dict[str, float]


def ceilings(device: torch.device, *, cached: bool = True) -> Ceilings:
    """The device's ceilings; measured in half a second where the cache does not know them."""
    name = device_name(device)
    key = cache_key("ceilings", "3", name)
    cache = CompileCache()
    entry = cache.get(key) if cached else None
    if entry is None:
        made = _measure_ceilings(device, name)
        cache.put(key, {"bandwidth": made.bandwidth, "flops": made.flops}, b"")
        return made
    flops = {str(k): float(v) for k, v in entry.header["flops"].items()}
    return Ceilings(name, float(entry.header["bandwidth"]), flops)


def _measure_ceilings(device: torch.device, name: str) -> Ceilings:
    room = torch.cuda.mem_get_info(device)[0]
    count = int(min(2 << 30, room // 8))
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        size = 8192 if dtype != torch.float32 else 4096
        seconds = _product_seconds(size, dtype, device)
        flops[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    bandwidth = max(2 * count / _copy_seconds(count, device), count / _read_seconds(count, device))
    return Ceilings(name, bandwidth, flops)


def _copy_seconds(count: int, device: torch.device) -> float:
    """A kernel's copy: the copy engines, which `copy_` may use, are slower on some GPUs."""
    source = torch.randint(0, 1 << 30, (count // 4,), dtype=torch.int32, device=device)
    return graph_seconds([partial(torch.neg, source, out=torch.empty_like(source))] * 8, device)


def _read_seconds(count: int, device: torch.device) -> float:
    source = torch.randint(0, 1 << 30, (count // 4,), dtype=torch.int32, device=device)
    return graph_seconds([partial(torch.sum, source.view(torch.float32))] * 8, device)


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return graph_seconds([partial(torch.mm, a, b, out=torch.empty_like(a))] * 2, device)


def peak(limits: Ceilings, dtype: torch.dtype) -> float:
    """FLOP/s of a dtype; of half precision for those that were not measured."""
    name = str(dtype).removeprefix("torch.")
    return limits.flops.get(name) or limits.flops["bfloat16"]
