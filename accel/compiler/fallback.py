"""A kernel that does not compile: its source is kept, and its ops go to the next candidate.

That is the cost model's tile where tuning had chosen another, then libraries and torch. The log
warns, and the report lists each with the path of its source, so that nothing falls back unseen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accel.backends.cubin.pool import Pool
from accel.backends.triton import TritonBackend, kernel_fingerprint
from accel.compiler import gpu
from accel.compiler.cache import CacheEntry
from accel.compiler.lower import KernelSymbol
from accel.compiler.options import Options
from accel.compiler.variants import dissolve
from accel.config import cache_dir, logger
from accel.errors import AccelError, BackendError
from accel.ir.module import Module, Op
from accel.ir.printer import print_op
from accel.passes.base import Context
from accel.passes.manager import PassManager

# No fusion: it would build the same kernel again.
_PIPELINE = ("select_libraries", "decompose", "cse", "dce")
_log = logger("compiler")


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile: why, where its source lies, and what took its ops."""

    kernel: str
    reason: str
    source: str
    instead: str
    where: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Compiled = tuple[dict[Op, KernelSymbol], bytes | None, dict[str, str]]


def compile_launches(
    module: Module,
    backend: TritonBackend,
    options: Options,
    context: Context,
    pool: Pool | None = None,
) -> tuple[Compiled, list[Failure]]:
    """`gpu.compile_launches`; the module is rewritten where a kernel has no code.

    Raises BackendError for an op that neither a library nor torch runs.
    """
    failures: list[Failure] = []
    known: dict[str, CacheEntry] = {}
    while True:
        try:
            return gpu.compile_launches(module, backend, options, pool, known), failures
        except gpu.KernelFailure as failure:
            failures.append(_next(failure, module, backend, context))


def _next(
    failure: gpu.KernelFailure, module: Module, backend: TritonBackend, context: Context
) -> Failure:
    kernel, print_ = failure.kernel, kernel_fingerprint(failure.kernel)
    source = _save(kernel, backend)
    if backend.tiles.pop(print_, None) is not None:
        instead = "the same kernel with the cost model's tile"
    else:
        instead = "libraries and torch"
        for function in module.functions.values():
            for op in function.ops:
                if op.name == "kernel" and kernel_fingerprint(op) == print_:
                    dissolve(op)
        # Without the generator: what it has code for would stay whole, and torch may have none.
        PassManager(list(_PIPELINE), replace(context, generator=None)).run(module)
    name = f"accel_{print_[:16]}"
    reason = _reason(failure)
    _log.warning("kernel %s does not compile: %s; its source is %s; %s computes it",
                 name, reason, source, instead)  # fmt: skip
    return Failure(name, reason, str(source), instead, str(kernel.location or ""))


def _reason(failure: BaseException) -> str:
    """The last line of what was raised first: the ones before it show Triton's source."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    text = failure.what if isinstance(failure, AccelError) else str(failure)
    return next((line for line in reversed(text.splitlines()) if line.strip()), text)[:300]


def _save(kernel: Op, backend: TritonBackend) -> Path:
    """The kernel's source in the cache folder; its IR where it has none."""
    folder = cache_dir() / "failed"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _, made = backend.generate([kernel])
        text = "\n\n".join(one.source for code in made.values() for one in code.launches)
        path = folder / f"accel_{kernel_fingerprint(kernel)[:16]}.py"
    except BackendError:
        text = print_op(kernel)
        path = folder / f"accel_{kernel_fingerprint(kernel)[:16]}.mlir"
    path.write_text(text)
    return path
