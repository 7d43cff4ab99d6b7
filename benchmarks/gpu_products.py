"""Generated products beside cuBLAS on one GPU: linears of one row, and linears with an epilogue.

    python -m benchmarks.gpu_products [--names 1b_qkv,...] [--sweep] [--out FILE]

A figure is the median time of a CUDA graph's replay divided by the calls in it; every call of a
graph has a weight (or an input) of its own, so that nothing is found in the second-level cache.
A weight of codes (int8, int4, fp8) stands beside cuBLAS with the same weight in 16 bits.
cuBLAS is `F.linear`; where a case has a norm or an epilogue, its row for cuBLAS names what else is
in the graph: kernels that PyTorch has for them. Every kernel's result is compared with float64
first. `--sweep` times other tiles than the chosen one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.backends.triton import TritonBackend, gemv, matmul, skinny
from accel.backends.triton.overlapped import OverlappedTile
from accel.compiler.gpu import kernel_binary
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack
from benchmarks.measure import RESULTS, machine
from benchmarks.product_cases import CASES, Case

ROTATED_BYTES, MOST_COPIES, REPLAYS = 400e6, 24, 15
MOST_SHARED = 227 << 10
_SMS = 132


Tile = gemv.AnyTile | skinny.Tile | matmul.Tile


def tiles(case: Case) -> list[Tile]:
    """Tiles to try in a sweep."""
    if case.kind == "gemv":
        return list(gemv.candidates(case.kernel(), _SMS))
    if case.kind == "skinny":
        return list(skinny.candidates(case.kernel(), _SMS))
    if case.rows < 1024:
        sizes = [(16, 32, 2), (16, 64, 4), (32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4),
                 (64, 128, 4), (128, 64, 4), (128, 32, 4)]  # fmt: skip
        return [
            matmul.MatmulTile(rows, columns, depth, warps, stages)
            for (rows, columns, warps), depth, stages in product(sizes, (64, 128), (3, 5))
        ]
    sizes = [(128, 256, 8), (256, 128, 8), (128, 128, 4), (64, 128, 4)]
    halves = 2 if case.after == "gate" else 1
    return [
        *(matmul.MatmulTile(rows, columns // halves, 64, warps, 3)
          for rows, columns, warps in sizes),
        *(OverlappedTile(rows, columns, 64, stages, group)
          for rows, columns, stages in ((128, 128, 4), (128, 128, 5), (64, 256, 3), (64, 128, 6))
          for group in (8, 16)),
    ]  # fmt: skip


@dataclass
class Compiled:
    case: str
    tile: Tile | None  # None is the one that the compiler chooses
    symbol: str
    reads: list[int]
    scratch: list[int]  # bytes of each buffer; all are zeros at first
    code: bytes
    source: str


def compile_one(job: tuple[str, Tile | None, str]) -> Compiled | str:
    """Machine code of a case, or why there is none."""
    name, tile, arch = job
    backend = TritonBackend(arch, tile=tile)
    try:
        compiled = backend.compile([CASES[name].kernel()])
    except Exception as error:
        return f"{name} {tile}: {str(error).splitlines()[0]}"
    (launch,) = compiled.launches[compiled.names[0]]
    if launch.binary.shared > MOST_SHARED:
        return f"{name} {tile}: {launch.binary.shared} bytes of shared memory"
    code = pack(arch, {launch.name: kernel_binary(launch)})
    reads = [slot.number for slot in launch.reads]
    scratch = [int(size) for size in compiled.scratch[compiled.names[0]]]
    return Compiled(name, tile, launch.name, reads, scratch, code, launch.code.source)


def launcher(made: Compiled) -> Callable[[Sequence[Tensor], Tensor], Callable[[], None]]:
    library = CudaLibrary(made.code, torch.device("cuda", 0))
    function = library.function(made.symbol)
    scratch = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in made.scratch]

    def bind(inputs: Sequence[Tensor], out: Tensor) -> Callable[[], None]:
        tensors = [*(inputs[i] for i in made.reads), out, *scratch]
        array = (ctypes.c_int64 * len(tensors))(*(t.data_ptr() for t in tensors))
        return lambda: function(ctypes.addressof(array))

    return bind


def graph_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of a call, of a graph with all of them."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times) / len(calls) * 1e3


def measure(case: Case, versions: Sequence[Compiled]) -> dict[str, Any]:
    """All systems on one case; the fastest tile too where several were compiled."""
    per_call = case.weight_bytes + case.rows * (case.depth + 2 * case.columns) * 2
    copies = max(2, min(MOST_COPIES, int(ROTATED_BYTES / per_call) + 1))
    sets = [case.inputs(seed) for seed in range(copies)]
    with torch.no_grad():
        dense = [[t.to(case.dtype) for t in case.dense(s)] for s in sets] if case.codes else sets
        exact = case.torch(*(t.double() for t in case.dense(sets[0])))
        row: dict[str, Any] = {"case": case.name, "kind": case.kind, "bytes": case.weight_bytes,
                               "flops": 2 * case.rows * case.columns * case.depth}  # fmt: skip
        row["linear"] = graph_time([partial(F.linear, *d[:2]) for d in dense])
        row["linear_and_rest"] = graph_time([partial(case.torch, *d) for d in dense])
        del dense
    timed: list[tuple[float, str]] = []
    for made in versions:
        bind = launcher(made)
        out = torch.full((case.rows, case.results), torch.nan, device="cuda", dtype=case.dtype)
        bind(sets[0], out)()
        torch.cuda.synchronize()
        error = float((out.double() - exact).norm() / exact.norm())
        if not error < 1e-2:
            raise RuntimeError(f"{case.name} {made.tile} is off by {error}\n{made.source}")
        outs = [torch.empty_like(out) for _ in sets]
        time = graph_time([bind(s, o) for s, o in zip(sets, outs)])
        if made.tile is None:
            row |= {"accel": time, "error": error}
        else:
            timed.append((time, str(made.tile)))
    row["tiles"] = sorted(timed)
    return row


def show(row: dict[str, Any]) -> None:
    def speed(time: float) -> str:
        if row["kind"] != "matmul":
            return f"{time:8.2f} us {row['bytes'] / time / 1e6:5.2f} TB/s"
        return f"{time:8.2f} us {row['flops'] / time / 1e6:5.0f} TFLOP/s"

    print(f"{row['case']:14} F.linear {speed(row['linear'])} | with the rest "
          f"{row['linear_and_rest']:8.2f} us | accel, all in one {speed(row['accel'])} | "
          f"error {row['error']:.0e}", flush=True)  # fmt: skip
    for time, tile in row["tiles"][:4]:
        print(f"    {time:8.2f} us {tile}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(CASES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", default=str(RESULTS / "gpu_products.json"))
    chosen = parser.parse_args()
    names = chosen.names.split(",")
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    jobs: list[tuple[str, Tile | None, str]] = [(name, None, arch) for name in names]
    if chosen.sweep:
        jobs += [(name, tile, arch) for name in names for tile in tiles(CASES[name])]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
        made = list(pool.map(compile_one, jobs, chunksize=2))
    problems = [m for m in made if isinstance(m, str)]
    if problems:
        print(f"{len(problems)} tiles do not compile or fit: {problems[0]}...")
    good = [m for m in made if isinstance(m, Compiled)]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for name in names:  # one that is wrong is no reason to lose the others
        versions = [m for m in good if m.case == name]
        if not any(m.tile is None for m in versions):
            failures.append(f"{name} does not compile")
            continue
        try:
            rows.append(measure(CASES[name], versions))
            show(rows[-1])
        except RuntimeError as error:
            failures.append(str(error))
    facts = {**machine(), "gpu": torch.cuda.get_device_name()}
    Path(chosen.out).write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
    if failures:
        raise RuntimeError("\n".join(failures))


if __name__ == "__main__":
    main()
