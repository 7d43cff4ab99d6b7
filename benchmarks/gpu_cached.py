"""Generated attention of one new token over caches, contiguous and in pages, on one GPU.

    python -m benchmarks.gpu_cached [--names 8b_b32_1k,...] [--out FILE]

The kernel also writes the new keys and values where the cache is contiguous, as in a decoding step.
Caches are taken in turns, so that they come from memory and not from the second-level cache. Peers
are PyTorch's kernels over a cache that already has the new token. Results are compared with
float32 first. `--compile FOLDER` and `--compiled FOLDER` as in benchmarks/gpu_attention.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from accel.backends.triton import TritonBackend
from accel.compiler.gpu import kernel_binary
from accel.ir import Builder, Op, TensorType, definition
from accel.ir.module import Region
from accel.runtime.cuda_code import pack
from benchmarks.gpu_attention import LIBRARIES, ROUNDS, Compiled, Timed, bound, load, store
from benchmarks.measure import RESULTS, machine

BF16 = torch.bfloat16
PAGE = 16
COPIES_BYTES = 200e6  # of caches that are taken in turns


@dataclass(frozen=True)
class Case:
    """`batch` texts of `context` tokens; `groups` key heads of `size` elements."""

    name: str
    batch: int
    heads: int
    groups: int
    size: int
    context: int

    @property
    def bytes_read(self) -> int:
        return 4 * self.batch * self.groups * self.context * self.size

    def kernel(self, paged: bool) -> Op:
        region = Region(self.types(paged))
        Builder(region).op("yield", self.build(Builder(region), paged, *region.args))
        outer = Region(self.types(paged))
        attributes = {"backend": "triton", "kind": "cached_attention"}
        results = [v.type for v in region.results]
        return Op(definition("kernel"), outer.args, attributes, results, regions=[region])

    def types(self, paged: bool) -> list[TensorType]:
        new = [TensorType((self.batch, n, 1, self.size), BF16) for n in (self.heads, self.groups)]
        at = TensorType((), torch.int64)
        if paged:
            pages = self.context // PAGE
            pool = TensorType((self.batch * pages, self.groups, PAGE, self.size), BF16)
            return [new[0], pool, pool, TensorType((self.batch, pages), torch.int32), at]
        cache = TensorType((self.batch, self.groups, self.context, self.size), BF16)
        return [new[0], cache, cache, at, new[1], new[1]]

    def build(self, b: Any, paged: bool, q: Any, keys: Any, values: Any, *more: Any) -> list[Any]:
        made: list[Any] = []
        if paged:
            table, at = more
            tokens = (self.batch, self.groups, self.context, self.size)
            keys, values = (
                b.reshape(
                    b.permute(b.gather(pool, table, axis=0), axes=(0, 2, 1, 3, 4)), shape=tokens
                )
                for pool in (keys, values)
            )
        else:
            at, *new = more
            made = [b.dynamic_update(x, n, at, axis=2) for x, n in zip((keys, values), new)]
            keys, values = made
        y = b.cached_attention(q, keys, values, at, scale=self.size**-0.5)
        merged = (self.batch, 1, self.heads * self.size)
        return [*made, b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=merged)]


CASES = {
    case.name: case
    for case in (
        Case("8b_b1_1k", 1, 32, 8, 128, 1024),
        Case("8b_b8_1k", 8, 32, 8, 128, 1024),
        Case("8b_b32_1k", 32, 32, 8, 128, 1024),
        Case("8b_b1_32k", 1, 32, 8, 128, 32768),
        Case("1b_b1_1k", 1, 32, 8, 64, 1024),
        Case("1b_b8_4k", 8, 32, 8, 64, 4096),
    )
}


def compile_one(case: Case, paged: bool, arch: str) -> Compiled:
    compiled = TritonBackend(arch).compile([case.kernel(paged)])
    made = compiled.launches[compiled.names[0]]
    code = pack(arch, {launch.name: kernel_binary(launch) for launch in made})
    launches = [(x.name, [(s.kind, s.number) for s in (*x.reads, *x.writes)]) for x in made]
    scratch = [int(size) for size in compiled.scratch[compiled.names[0]]]
    return Compiled(case.name, "pages" if paged else "accel", launches, scratch, code)


def in_turns(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """Calls over one cache after another."""

    def call() -> None:
        for one in calls:
            one()

    return call


class Bench:
    """All systems on one case."""

    def __init__(self, case: Case) -> None:
        c = self.case = case
        g = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device="cuda", dtype=BF16)

        self.copies = max(1, int(COPIES_BYTES / c.bytes_read))
        self.q = random(c.batch, c.heads, 1, c.size)
        self.new = [random(c.batch, c.groups, 1, c.size) for _ in range(2)]
        shape = (c.batch, c.groups, c.context, c.size)
        self.caches = [[random(*shape) for _ in range(2)] for _ in range(self.copies)]
        self.at = torch.tensor(c.context - 1, device="cuda")
        for pair in self.caches:
            for cache, new in zip(pair, self.new):
                cache[:, :, -1:] = new
        k, v = (x.float() for x in self.caches[0])
        self.want = F.scaled_dot_product_attention(self.q.float(), k, v, enable_gqa=True)
        self.row: dict[str, Any] = {"case": c.name, "bytes": c.bytes_read, "systems": {},
                                    "refused": {}}  # fmt: skip
        self.timed: dict[str, tuple[Timed, float]] = {}

    def add(self, name: str, calls: Sequence[Callable[[], Any]], got: Tensor) -> None:
        error = float((got.view_as(self.want).float() - self.want).abs().max())
        error /= float(self.want.abs().max())
        if not error < 2e-2:
            raise RuntimeError(f"{self.case.name} {name} is off by {error}")
        flops = 3e14 * self.case.bytes_read / 4e12 * len(calls)  # `Timed` counts calls by these
        self.timed[name] = (Timed(in_turns(calls), flops), error)

    def kernel(self, made: Compiled) -> None:
        c, calls = self.case, []
        out = torch.full((c.batch, 1, c.heads * c.size), torch.nan, device="cuda", dtype=BF16)
        pages = torch.randperm(c.batch * c.context // PAGE, device="cuda").view(c.batch, -1)
        for keys, values in self.caches:
            if made.tile == "pages":
                pools = [self.pool(x, pages) for x in (keys, values)]
                inputs, outs = [self.q, *pools, pages.to(torch.int32), self.at], [out]
            else:
                inputs, outs = [self.q, keys, values, self.at, *self.new], [keys, values, out]
            calls.append(bound(made, inputs, outs))
        calls[0]()
        torch.cuda.synchronize()
        got = out.view(c.batch, 1, c.heads, c.size).transpose(1, 2).clone()
        self.add(made.tile, calls, got)

    def pool(self, x: Tensor, pages: Tensor) -> Tensor:
        c = self.case
        shape = (c.batch, c.groups, c.context // PAGE, PAGE, c.size)
        made = torch.empty(pages.numel(), c.groups, PAGE, c.size, device="cuda", dtype=BF16)
        made[pages] = x.view(shape).transpose(1, 2)
        return made

    def peer(self, name: str) -> None:
        def call(keys: Tensor, values: Tensor) -> Tensor:
            with sdpa_kernel(LIBRARIES[name]):
                return F.scaled_dot_product_attention(self.q, keys, values, enable_gqa=True)

        try:
            got = call(*self.caches[0])
            self.add(name, [partial(call, *pair) for pair in self.caches], got)
        except RuntimeError as problem:
            self.row["refused"][name] = str(problem).splitlines()[0][:200]

    def time(self) -> None:
        for _ in range(ROUNDS):
            for timed, _ in self.timed.values():
                timed.run(3)
        for name, (timed, error) in self.timed.items():
            self.row["systems"][name] = {"seconds": timed.seconds / self.copies, "error": error}
        parts = []
        for name, one in self.row["systems"].items():
            speed = self.case.bytes_read / one["seconds"] / 1e12
            parts.append(f"{name} {1e6 * one['seconds']:.2f} us {speed:.2f} TB/s")
        print(f"{self.case.name:12} " + " | ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(CASES))
    parser.add_argument("--compile", default="")
    parser.add_argument("--compiled", default="")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--out", default=str(RESULTS / "gpu_cached.json"))
    chosen = parser.parse_args()
    cases = [CASES[name] for name in chosen.names.split(",")]
    begin = time.monotonic()
    if chosen.compiled:
        made = load(Path(chosen.compiled))
    else:
        made = [compile_one(case, paged, chosen.arch) for case in cases for paged in (False, True)]
    if chosen.compile:
        for number, one in enumerate(made):
            store(one, Path(chosen.compile), number)
        print(f"{len(made)} kernels in {time.monotonic() - begin:.1f} s")
        return
    rows: list[dict[str, Any]] = []
    facts = {**machine(), "gpu": torch.cuda.get_device_name()}
    for case in cases:
        with torch.no_grad():
            bench = Bench(case)
            for one in made:
                if one.case == case.name:
                    bench.kernel(one)
            for name in LIBRARIES:
                bench.peer(name)
            bench.time()
        rows.append(bench.row)
        Path(chosen.out).write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
        del bench


if __name__ == "__main__":
    main()
