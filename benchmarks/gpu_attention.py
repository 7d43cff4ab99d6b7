"""Generated attention beside cuDNN, FlashAttention-2 and flex_attention on one GPU.

    python -m benchmarks.gpu_attention [--names causal_8k,...] [--sweep] [--out FILE]

Queries, keys and values lie in memory as a projection leaves them ([B, S, H, D]), and so does the
result. A figure is the median time of a CUDA graph's replays, all systems in turns. FLOPs are those
of the pairs of query and key that the mask lets through, 4 a pair and element of the head. Every
system's result is compared with float64 on some of its rows first. `--sweep` times other tiles than
the chosen one (`--tiles Overlapped`: of that kind). `--compile FOLDER` only compiles, without
touching the GPU; `--compiled FOLDER` takes it from there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from accel.backends.triton import TritonBackend
from accel.backends.triton.attention_tiles import Tile, candidates
from accel.compiler.gpu import kernel_binary
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack
from benchmarks.attention_cases import CASES, FLEX, Case, kernel_of
from benchmarks.measure import RESULTS, machine

CHECKED_ROWS = 48
ROUNDS, REPLAYS = 5, 3
LIBRARIES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def library_choice(case: Case) -> str | None:
    """Why the compiler leaves a case to the library; None if it takes its own kernel."""
    (op,) = (op for op in kernel_of(case).regions[0].ops if op.name == "attention")
    major, minor = torch.cuda.get_device_capability()
    return TritonBackend(f"sm_{major}{minor}").supports_anchor(op, "attention")


# -- compiling -------------------------------------------------------------------------------


@dataclass
class Compiled:
    case: str
    tile: str  # "" is the one that the compiler chooses
    launches: list[tuple[str, list[tuple[str, int]]]]  # the function, and what it gets
    scratch: list[int]
    code: bytes


def compile_one(name: str, tile: Tile | None, arch: str) -> Compiled | str:
    """Machine code of a case, or why there is none."""
    backend = TritonBackend(arch, tile=tile)
    try:
        compiled = backend.compile([kernel_of(CASES[name])])
    except Exception as error:
        return f"{name} {tile}: {type(error).__name__} {str(error).splitlines()[0]}"
    made = compiled.launches[compiled.names[0]]
    code = pack(arch, {launch.name: kernel_binary(launch) for launch in made})
    launches = [(x.name, [(s.kind, s.number) for s in (*x.reads, *x.writes)]) for x in made]
    scratch = [int(size) for size in compiled.scratch[compiled.names[0]]]
    return Compiled(name, "" if tile is None else str(tile), launches, scratch, code)


def compile_all(
    names: Sequence[str], tiles: str | None, arch: str, workers: int, folder: Path | None = None
) -> list[Compiled]:
    """All kernels, and those with tiles that `tiles` names; each is stored in `folder` as soon as
    there is one."""
    jobs: list[tuple[str, Tile | None]] = [(name, None) for name in names]
    if tiles is not None:
        more = ((n, tile) for n in names for tile in candidates(kernel_of(CASES[n]), 132))
        jobs += [(n, tile) for n, tile in more if tiles in str(tile)]
    context = multiprocessing.get_context("spawn")
    made: list[Compiled] = []
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = [pool.submit(compile_one, name, tile, arch) for name, tile in jobs]
        for future in as_completed(pending):
            one = future.result()
            if isinstance(one, str):
                print("does not compile:", one[:300], flush=True)
                continue
            made.append(one)
            if folder is not None:
                store(one, folder, len(made))
    return made


def store(one: Compiled, folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number}.bin").write_bytes(one.code)
    facts = {k: v for k, v in asdict(one).items() if k != "code"}
    (folder / f"{number}.json").write_text(json.dumps(facts))


def load(folder: Path) -> list[Compiled]:
    return [
        Compiled(**json.loads(path.read_text()), code=path.with_suffix(".bin").read_bytes())
        for path in sorted(folder.glob("*.json"))
    ]


# -- timing ----------------------------------------------------------------------------------


class Timed:
    """Calls of one system as a CUDA graph that runs for some milliseconds."""

    def __init__(self, call: Callable[[], Any], flops: float) -> None:
        self.call = call  # and the memory that the graph knows by address
        self.count = max(1, min(40, int(1.5e-3 / (flops / 3e14 + 4e-6))))
        self.times: list[float] = []
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(self.count):
                call()
        self.graph.replay()

    def run(self, replays: int) -> None:
        for _ in range(replays):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            self.graph.replay()
            last.record()
            torch.cuda.synchronize()
            self.times.append(first.elapsed_time(last) / self.count * 1e-3)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def bound(made: Compiled, inputs: Sequence[Tensor], outs: Sequence[Tensor]) -> Callable[[], None]:
    library = CudaLibrary(made.code, torch.device("cuda", 0))
    scratch = [torch.zeros(n, dtype=torch.uint8, device="cuda") for n in made.scratch]
    memory = {"input": inputs, "result": outs, "scratch": scratch}
    functions = []
    for symbol, slots in made.launches:
        words = [memory[kind][number].data_ptr() for kind, number in slots]
        functions.append((library.function(symbol), (ctypes.c_int64 * len(words))(*words)))

    def call(keep: object = (library, memory)) -> None:  # a graph writes there later
        for function, words in functions:
            function(ctypes.addressof(words))

    return call


def library_call(case: Case, name: str, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    q, k, v = (case.split(x) for x in inputs[:3])
    mask, causal = None, case.causal
    if case.mask == "keys":
        mask = inputs[3][:, None, None]
    elif case.mask == "texts":
        mask, causal = (inputs[3][:, None] == inputs[3])[None, None], False
        mask = mask.tril() if case.causal else mask

    def call() -> Tensor:
        with sdpa_kernel(LIBRARIES[name]):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
            )

    return call


def flex_call(case: Case, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (case.split(x) for x in inputs[:3])
    slopes = case.slopes()

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = case.window if case.window is not None else case.length
        near = (i >= j) & (i - j < far)
        return near & (inputs[3][i] == inputs[3][j]) if case.mask == "texts" else near

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if case.softcap is not None:
            s = case.softcap * torch.tanh(s / case.softcap)
        return s + slopes[h] * (j - i) if case.mask == "alibi" else s

    changed = score if case.softcap is not None or case.mask == "alibi" else None
    blocks = None
    if case.causal:
        blocks = create_block_mask(keep, None, None, case.length, case.length, device="cuda")
    run = torch.compile(flex_attention, dynamic=False)
    grouped = k.shape[1] != q.shape[1]
    return lambda: run(q, k, v, score_mod=changed, block_mask=blocks, enable_gqa=grouped)


class Bench:
    """All systems on one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs = case.inputs(0)
        generator = torch.Generator("cuda").manual_seed(1)
        rows = torch.randint(case.length, (CHECKED_ROWS,), generator=generator, device="cuda")
        self.rows = rows
        self.want = case.exact(self.inputs, rows)
        self.timed: dict[str, tuple[Timed, float]] = {}
        self.row: dict[str, Any] = {"case": case.name, "flops": case.flops, "systems": {},
                                    "tiles": [], "refused": {},
                                    "library": library_choice(case)}  # fmt: skip

    def error(self, got: Tensor) -> float:
        """Relative to the largest value; `got` is [B, S, H * D] or [B, H, S, D]."""
        flat = got if got.dim() == 3 else got.transpose(1, 2).flatten(2)
        off = (flat[-1, self.rows].double() - self.want).abs().max() / self.want.abs().max()
        return float(off)

    def kernel(self, made: Compiled) -> None:
        out = torch.full_like(self.inputs[0], torch.nan)
        call = bound(made, self.inputs, [out])
        call()
        torch.cuda.synchronize()
        error = self.error(out)
        if not error < 2e-2:
            raise RuntimeError(f"{self.case.name} {made.tile or 'chosen'} is off by {error}")
        self.timed[made.tile or "accel"] = (Timed(call, self.case.flops), error)

    def peer(self, name: str, call: Callable[[], Tensor]) -> None:
        try:
            error = self.error(call())
            self.timed[name] = (Timed(call, self.case.flops), error)
        except RuntimeError as problem:
            self.row["refused"][name] = str(problem).splitlines()[0][:200]

    def time(self) -> None:
        """All systems in turns, so that none has the device cooler than another."""
        for _ in range(ROUNDS):
            for timed, _ in self.timed.values():
                timed.run(REPLAYS)
        for name, (timed, error) in self.timed.items():
            if "(" in name:
                self.row["tiles"].append([timed.seconds, name, error])
            else:
                self.row["systems"][name] = {"seconds": timed.seconds, "error": error}

    def show(self, most: int = 5) -> None:
        flops = self.case.flops
        parts = [
            f"{name} {1e6 * one['seconds']:.1f} us {flops / one['seconds'] / 1e12:.0f} TF "
            f"(error {one['error']:.0e})"
            for name, one in self.row["systems"].items()
        ]
        print(f"{self.case.name:15} " + " | ".join(parts), flush=True)
        for seconds, tile, error in sorted(self.row["tiles"])[:most]:
            speed = flops / seconds / 1e12
            print(f"    {1e6 * seconds:8.1f} us {speed:4.0f} TF {tile} {error:.0e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(CASES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiles", default="")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--compile", default="")
    parser.add_argument("--compiled", default="")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", default=str(RESULTS / "gpu_attention.json"))
    chosen = parser.parse_args()
    names, begin = chosen.names.split(","), time.monotonic()
    tiles = chosen.tiles if chosen.sweep else None
    if chosen.compile:
        folder = Path(chosen.compile)
        made = compile_all(names, tiles, chosen.arch, chosen.workers, folder)
        print(f"{len(made)} kernels in {time.monotonic() - begin:.1f} s")
        return
    made = (
        load(Path(chosen.compiled))
        if chosen.compiled
        else compile_all(names, tiles, chosen.arch, chosen.workers)
    )
    rows: list[dict[str, Any]] = []
    facts = {**machine(), "gpu": torch.cuda.get_device_name()}
    for name in names:
        if time.monotonic() - begin > chosen.seconds:
            break
        case = CASES[name]
        with torch.no_grad():
            bench = Bench(case)
            for one in made:
                if one.case == name:
                    bench.kernel(one)
            if not chosen.no_peers and case.plain:
                for library in LIBRARIES:
                    bench.peer(library, library_call(case, library, bench.inputs))
            if not chosen.no_peers and not chosen.no_flex and name in FLEX:
                bench.peer("flex", flex_call(case, bench.inputs))
            bench.time()
        bench.show()
        rows.append(bench.row)
        Path(chosen.out).write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
        del bench


if __name__ == "__main__":
    main()
