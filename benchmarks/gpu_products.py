"""Generated products beside cuBLAS on one GPU: linears of one row, and linears with an epilogue.

    python -m benchmarks.gpu_products [--names 1b_qkv,...] [--sweep] [--out FILE]

A figure is the median time of a CUDA graph's replay divided by the calls in it; every call of a
graph has a weight (or an input) of its own, so that nothing is found in the second-level cache.
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

from accel.backends.triton import TritonBackend, gemv, matmul
from accel.backends.triton.overlapped import OverlappedTile
from accel.compiler.gpu import kernel_binary
from accel.ir import Builder, Op, TensorType, definition
from accel.ir.module import Region, Value
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack
from benchmarks.measure import RESULTS, machine

ROTATED_BYTES, MOST_COPIES, REPLAYS = 400e6, 24, 15
MOST_SHARED = 227 << 10
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One linear: `rows` of x, a weight [columns, depth], and what is around it.

    `before`: "" or "norm"; `after`: "", "gelu", "residual" or "gate" (silu(half) * half).
    """

    name: str
    rows: int
    columns: int
    depth: int
    before: str = ""
    after: str = ""
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def kind(self) -> str:
        return "gemv" if self.rows <= gemv.MOST_ROWS else "matmul"

    @property
    def results(self) -> int:
        return self.columns // 2 if self.after == "gate" else self.columns

    @property
    def weight_bytes(self) -> int:
        return self.columns * self.depth * self.dtype.itemsize

    def types(self) -> list[TensorType]:
        shapes: list[tuple[int, ...]] = [(self.rows, self.depth), (self.columns, self.depth)]
        shapes += [(self.depth,)] if self.before else []
        shapes += [(self.columns,)] if self.bias else []
        shapes += [(self.rows, self.columns)] if self.after == "residual" else []
        return [TensorType(s, self.dtype) for s in shapes]

    def inputs(self, seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return [
            torch.randn(t.shape, generator=generator, device="cuda", dtype=self.dtype)
            for t in self.types()
        ]

    def build(self, b: Any, x: Value, w: Value, *rest: Value) -> Value:
        left = list(rest)
        if self.before:
            x = b.rms_norm(x, left.pop(0), eps=EPS, cast_before_weight=True)
        y = b.linear(x, w, left.pop(0) if self.bias else None)
        if self.after == "gelu":
            return b.gelu(y)
        if self.after == "residual":
            return b.add(y, left.pop(0))
        if self.after == "gate":
            half = self.columns // 2
            gate = b.slice(y, axis=1, start=0, stop=half)
            return b.mul(b.silu(gate), b.slice(y, axis=1, start=half, stop=2 * half))
        return y

    def torch(self, x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        left = list(rest)
        if self.before:
            x = F.rms_norm(x, (self.depth,), left.pop(0), EPS)
        y = F.linear(x, w, left.pop(0) if self.bias else None)
        if self.after == "gelu":
            return F.gelu(y)
        if self.after == "residual":
            return y + left.pop(0)
        if self.after == "gate":
            return F.silu(y[:, : self.columns // 2]) * y[:, self.columns // 2 :]
        return y


def _decode(name: str, hidden: int, inner: int, qkv: int, vocabulary: int) -> list[Case]:
    return [
        Case(f"{name}_qkv", 1, qkv, hidden, before="norm"),
        Case(f"{name}_o", 1, hidden, hidden, after="residual"),
        Case(f"{name}_gate_up", 1, 2 * inner, hidden, before="norm", after="gate"),
        Case(f"{name}_down", 1, hidden, inner, after="residual"),
        Case(f"{name}_head", 1, vocabulary, hidden, before="norm"),
    ]


def _prefill(name: str, rows: int, hidden: int, inner: int, qkv: int) -> list[Case]:
    return [
        Case(f"{name}_qkv", rows, qkv, hidden),
        Case(f"{name}_o", rows, hidden, hidden, after="residual"),
        Case(f"{name}_gate_up", rows, 2 * inner, hidden, after="gate"),
        Case(f"{name}_down", rows, hidden, inner, after="residual"),
    ]


def _encoder(name: str, rows: int) -> list[Case]:
    half = torch.float16
    return [
        Case(f"{name}_qkv", rows, 2304, 768, bias=True, dtype=half),
        Case(f"{name}_o", rows, 768, 768, after="residual", bias=True, dtype=half),
        Case(f"{name}_up", rows, 3072, 768, after="gelu", bias=True, dtype=half),
        Case(f"{name}_down", rows, 768, 3072, after="residual", bias=True, dtype=half),
    ]


CASES = {
    case.name: case
    for case in (
        *_decode("1b", 2048, 8192, 3072, 128256),
        *_decode("8b", 4096, 14336, 6144, 128256),
        *_encoder("bert_b1", 128),
        *_encoder("bert_b32", 4096),
        *_encoder("vit_b1", 197),
        *_encoder("vit_b64", 12608),
        *_prefill("8b_2048", 2048, 4096, 14336, 6144),
    )
}

Tile = gemv.GemvTile | matmul.Tile


def tiles(case: Case) -> list[Tile]:
    """Tiles to try in a sweep."""
    if case.kind == "gemv":
        spans = [(512, 2), (512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8), (1024, 2)]
        return [
            gemv.GemvTile(rows, span, warps, stages)
            for rows, (span, warps), stages in product((1, 2, 4, 8), spans, (1, 3))
            if rows * span <= 8192 and span <= case.depth
        ]
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


def kernel_of(case: Case) -> Op:
    region = Region(case.types())
    made = case.build(Builder(region), *region.args)
    Builder(region).op("yield", [made])
    outer = Region(case.types())
    attributes = {"backend": "triton", "kind": case.kind}
    return Op(definition("kernel"), outer.args, attributes, [made.type], regions=[region])


@dataclass
class Compiled:
    case: str
    tile: Tile | None  # None is the one that the compiler chooses
    symbol: str
    reads: list[int]
    code: bytes
    source: str


def compile_one(job: tuple[str, Tile | None, str]) -> Compiled | str:
    """Machine code of a case, or why there is none."""
    name, tile, arch = job
    backend = TritonBackend(arch, tile=tile)
    try:
        compiled = backend.compile([kernel_of(CASES[name])])
    except Exception as error:
        return f"{name} {tile}: {str(error).splitlines()[0]}"
    (launch,) = compiled.launches[compiled.names[0]]
    if launch.binary.shared > MOST_SHARED:
        return f"{name} {tile}: {launch.binary.shared} bytes of shared memory"
    code = pack(arch, {launch.name: kernel_binary(launch)})
    reads = [slot.number for slot in launch.reads]
    return Compiled(name, tile, launch.name, reads, code, launch.code.source)


def launcher(made: Compiled) -> Callable[[Sequence[Tensor], Tensor], Callable[[], None]]:
    library = CudaLibrary(made.code, torch.device("cuda", 0))
    function = library.function(made.symbol)

    def bind(inputs: Sequence[Tensor], out: Tensor) -> Callable[[], None]:
        words = [inputs[i].data_ptr() for i in made.reads] + [out.data_ptr()]
        array = (ctypes.c_int64 * len(words))(*words)
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
        exact = case.torch(*(t.double() for t in sets[0]))
        row: dict[str, Any] = {"case": case.name, "kind": case.kind, "bytes": case.weight_bytes,
                               "flops": 2 * case.rows * case.columns * case.depth}  # fmt: skip
        row["linear"] = graph_time([partial(F.linear, *s[:2]) for s in sets])
        row["linear_and_rest"] = graph_time([partial(case.torch, *s) for s in sets])
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
        if row["kind"] == "gemv":
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
    rows = [measure(CASES[n], [m for m in good if m.case == n]) for n in names]
    for row in rows:
        show(row)
    facts = {**machine(), "gpu": torch.cuda.get_device_name()}
    Path(chosen.out).write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
