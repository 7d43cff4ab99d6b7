"""What is particular to NVIDIA GPUs in a compile: libraries, lowering passes, generated kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from accel import __version__
from accel.backends.cubin.compile import MapLayout
from accel.backends.cubin.pool import Pool
from accel.backends.triton import (
    CompiledLaunch,
    CompiledLaunches,
    TritonBackend,
    kernel_fingerprint,
)
from accel.backends.triton.anchors import ANCHORS
from accel.backends.triton.backend import Compiling
from accel.backends.triton.maps import MapCode
from accel.backends.vendor import (
    CudaAttention,
    CudnnConv,
    ExpertLinear,
    FlashAttention,
    ScaledLinear,
    TorchLinear,
    UpdatePages,
)
from accel.compiler.cache import CacheEntry, CompileCache, cache_key
from accel.compiler.lower import KernelSymbol, Launch
from accel.compiler.options import Options
from accel.compiler.sizes import size_expr
from accel.compiler.targets import Target
from accel.errors import BackendError
from accel.ir.capability import Library
from accel.ir.module import Module, Op
from accel.runtime.cuda_code import CudaKernel, pack, unpack
from accel.runtime.tensor_map import TensorMap

# Instructions that only one architecture has, by PTX's manual.
_ONE_ARCHITECTURE = ("wgmma.", "setmaxnreg.", "tcgen05.")
_TARGET = re.compile(r"(\.target sm_\d+)[af]\b")

KERNEL_PIPELINE = (
    "select_depthwise",
    "select_products",
    "select_experts",
    "open_pages",
    "select_cached",
    "flash_masks",
    "select_attention{masks=true}",
    "select_batched",
    "select_scans",
    "select_topk",
    "select_embedding_gradients",
    "flash_layout",
    "select_libraries",
    "decompose{keep=embedding_backward}",  # of very many tokens: torch sorts, adds in float32
    "cse",
    "dce",
    "recompute_sums",
    "dce",
    "select_copies",
    "fuse",
    "dce",
    "join_sums",
    "dce",
)


class KernelFailure(BackendError):
    """A kernel that has no code, or whose code does not compile."""

    def __init__(self, kernel: Op, error: BackendError) -> None:
        super().__init__(error.what, where=error.where, advice=error.advice)
        self.kernel = kernel


def generator(target: Target, options: Options | None = None) -> TritonBackend:
    """The kernel generator for a GPU."""
    options = options or Options()
    tf32 = options.float32 == "tf32" or (options.float32 == "torch" and _torch_allows_tf32())
    return TritonBackend(target.arch, target.cores, tf32=tf32)


@contextmanager
def processes(target: Target, options: Options, given: Pool | None = None) -> Iterator[Pool]:
    """What compiles kernels for a target: a pool for as long as a compile takes, or the given one.

    Made before the model is captured, its processes are there when there are kernels.
    """
    if given is not None:
        yield given
        return
    wanted = target.kind == "cuda" and options.kernels
    with Pool(None if wanted else 0) as pool:
        yield pool


def _torch_allows_tf32() -> bool:
    """What `torch.set_float32_matmul_precision`, or its newer form, says of CUDA's products."""
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", None)  # torch 2.9
    return settings.allow_tf32 if precision is None else precision == "tf32"


def libraries(capability: int = 90) -> tuple[Library, ...]:
    """What cuDNN, cuBLAS and PyTorch's attention take on a GPU (90: sm_90), in order of
    preference."""
    return (
        CudaAttention(),
        FlashAttention(),
        CudnnConv(),
        ScaledLinear(capability),
        TorchLinear(),
        ExpertLinear(few=16),
        UpdatePages(),
    )


def compile_launches(
    module: Module,
    backend: TritonBackend,
    options: Options,
    pool: Pool | None = None,
    known: dict[str, CacheEntry] | None = None,
) -> tuple[dict[Op, KernelSymbol], bytes | None, dict[str, str]]:
    """Code for every kernel op: symbols, one file of machine code, readable sources.

    Each kernel is cached by itself, so a model that shares blocks with another compiles the rest.
    Raises KernelFailure if an op has no code, or Triton fails.

    Args:
        pool: processes that compile; by default this one does.
        known: kernels by key, which is filled: what a second attempt need not do again.
    """
    prints = {
        op: kernel_fingerprint(op)
        for f in module.functions.values()
        for op in f.ops
        if op.name == "kernel"
    }
    if not prints:
        return {}, None, {}
    unique = {print_: op for op, print_ in reversed(prints.items())}
    entries = _entries(unique, backend, options, pool or Pool(0), {} if known is None else known)
    symbols: dict[str, KernelSymbol] = {}
    code: dict[str, tuple[CudaKernel, bytes]] = {}
    sources: dict[str, str] = {}
    ptx: dict[str, bytes] = {}
    for print_, entry in entries.items():
        symbols[print_] = _symbol(entry.header)
        sources |= entry.header["sources"]
        unpacked = unpack(entry.payload)
        code |= {n: (k, unpacked.cubin(n)) for n, k in unpacked.kernels.items()}
        ptx |= {n: unpacked.ptx(n) for n in unpacked.kernels}
    return {op: symbols[p] for op, p in prints.items()}, pack(backend.arch, code, ptx), sources


def _entries(
    kernels: Mapping[str, Op],
    backend: TritonBackend,
    options: Options,
    pool: Pool,
    known: dict[str, CacheEntry],
) -> dict[str, CacheEntry]:
    """From the cache, or compiled; raises the first KernelFailure when all others are there."""
    cache = CompileCache()
    found: dict[str, CacheEntry] = {}
    started: dict[str, tuple[str, Compiling]] = {}
    failures: list[KernelFailure] = []
    # Those around an anchor take longest to compile, so they begin.
    for print_, op in sorted(kernels.items(), key=lambda item: not _is_anchored(item[1])):
        key = kernel_key(op, backend)
        entry = known.get(key) or (cache.get(key) if options.cache else None)
        if entry is not None:
            found[print_] = entry
            continue
        try:
            started[print_] = key, backend.start([op], pool)
        except BackendError as error:
            failures.append(_failure(op, error))
    for print_, (key, compiling) in started.items():
        try:
            entry = found[print_] = known[key] = _entry(compiling.result(), backend)
        except BackendError as error:
            failures.append(_failure(kernels[print_], error))
            continue
        if options.cache:
            cache.put(key, entry.header, entry.payload)
    if failures:
        raise failures[0]
    return {print_: found[print_] for print_ in kernels}


def _failure(op: Op, error: BackendError) -> KernelFailure:
    made = KernelFailure(op, error)
    made.__cause__ = error
    return made


def _is_anchored(op: Op) -> bool:
    return str(op.attribute("kind")) in ANCHORS


def kernel_key(op: Op, backend: TritonBackend) -> str:
    """Where the compile cache keeps a kernel's code."""
    tile = backend.tile_of(op)
    return cache_key(
        __version__, backend.name, backend.version(), kernel_fingerprint(op), str(tile)
    )


def compile_kernel(op: Op, backend: TritonBackend, pool: Pool | None = None) -> CacheEntry:
    """One kernel as JSON (how its launches are called) and machine code."""
    return _entry(backend.start([op], pool or Pool(0)).result(), backend)


def _entry(compiled: CompiledLaunches, backend: TritonBackend) -> CacheEntry:
    (name,) = compiled.names
    launches = compiled.launches[name]
    header = {
        "name": name,
        "launches": [_launch(one) for one in launches],
        "scratch": [size_expr(size) for size in compiled.scratch[name]],
        "zeroed": compiled.zeroed[name],
        "sources": compiled.sources | {f"{one.name}.ptx": one.binary.ptx for one in launches},
    }
    packed = {one.name: kernel_binary(one) for one in launches}
    ptx = {one.name: portable(one.binary.ptx) for one in launches}
    return CacheEntry(header, pack(backend.arch, packed, ptx))


def _launch(one: CompiledLaunch) -> dict[str, Any]:
    return {
        "symbol": one.name,
        "reads": [[s.kind, s.number] for s in one.reads],
        "writes": [[s.kind, s.number] for s in one.writes],
        "sizes": list(one.code.sizes),
        "inplace": [list(pair) for pair in one.code.inplace],
        "updates": [list(pair) for pair in one.code.updates],
    }


def kernel_binary(one: CompiledLaunch) -> tuple[CudaKernel, bytes]:
    """How the runtime launches one kernel, and its machine code."""
    kernel = CudaKernel(
        symbol=one.binary.symbol,
        tensors=len(one.reads) + len(one.writes),
        sizes=one.code.sizes,
        checks=one.code.checks,
        spare=one.binary.spare,
        programs=size_expr(one.code.programs),
        warps=one.binary.warps,
        shared=one.binary.shared,
        dependent=one.code.dependent,
        maps=tuple(_tensor_map(one, *m) for m in zip(one.code.maps, one.binary.maps, strict=True)),
    )
    return kernel, one.binary.cubin


def _tensor_map(one: CompiledLaunch, code: MapCode, layout: MapLayout) -> TensorMap:
    names = [slot.name for slot in (*one.reads, *one.writes)]
    return TensorMap(
        tensor=names.index(code.pointer),
        shape=(size_expr(code.rows), code.columns),
        stride=code.stride,
        box=layout.box,
        width=layout.width,
        element=layout.element,
        swizzle=layout.swizzle,
    )


def portable(ptx: str) -> bytes:
    """PTX that newer GPUs can be given; empty where it uses what one architecture alone has.

    Triton names the target with its own features ("sm_90a") whether a kernel uses them or not.
    """
    if any(name in ptx for name in _ONE_ARCHITECTURE):
        return b""
    return _TARGET.sub(r"\1", ptx).encode()


def _symbol(header: dict[str, Any]) -> KernelSymbol:
    launches = tuple(
        Launch(
            one["symbol"],
            tuple((kind, number) for kind, number in one["reads"]),
            tuple((kind, number) for kind, number in one["writes"]),
            tuple(one["sizes"]),
            tuple((result, operand) for result, operand in one["inplace"]),
            tuple((result, operand) for result, operand in one["updates"]),
        )
        for one in header["launches"]
    )
    return KernelSymbol(header["name"], launches=launches, scratch=tuple(header["scratch"]),
                        zeroed=tuple(header["zeroed"]))  # fmt: skip
