"""Autotuning: how each kernel is computed, measured on the device.

    accel.compile(model, target="h200", options={"tune": "quick"})

For each different kernel of a program (equal blocks share one) the variants of
`accel.compiler.variants` are compiled by several processes, timed on random inputs, and compared
with the cost model's kernel: one whose results differ is out. The fastest is kept in the compile
cache by what the kernel computes, the sizes it was timed with, the device and the versions. What
costs the program most is tuned first, and when the time is up the cost model chooses the rest.

Without the device the cost model chooses everything; the report says which it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from accel import __version__
from accel.backends.triton import TritonBackend, kernel_fingerprint
from accel.compiler import measure
from accel.compiler.cache import CompileCache, cache_key
from accel.compiler.kernel_jobs import Workers
from accel.compiler.targets import Target
from accel.compiler.variants import (
    KERNEL,
    LIBRARY,
    Trial,
    Variant,
    build,
    dissolve,
    has_library_variant,
    job_of,
    model_choice,
    variants_of,
)
from accel.config import logger
from accel.errors import AccelError
from accel.ir.capability import Library
from accel.ir.cost import op_cost
from accel.ir.module import Function, Module, Op, SymbolInfo
from accel.passes.base import EXACT, Context, Contract, Pass
from accel.runtime import libraries as runtime_libraries
from accel.runtime.artifact import GoldenCase
from accel.runtime.cuda import CudaLibrary
from accel.runtime.device import DeviceWeights, device_of, load_code
from accel.runtime.executor import CompiledFunction, release_memory
from accel.runtime.golden import compare, tolerance
from accel.runtime.prepare import TensorWeights

MODES = ("off", "quick", "full")
_LIMITS = {"quick": (6, 60.0), "full": (48, 600.0)}  # variants of a kernel, seconds of all
_WORTH = 0.98  # of the model's time: what is hardly faster is noise
_LONG, _SHORT = 512, 64  # a dynamic size that is tuned for: the only one, or one of several
_log = logger("tune")


@dataclass
class Choice:
    """How one kernel is computed.

    Attributes:
        chosen: "kernel" (with the cost model's tile), "library", a tile, or "as" another kind.
        by: "measured", or "cost model".
        seconds, model_seconds: of one call, measured, of this choice and of the cost model's.
        tried: how many variants were timed.
        failed: variants that do not compile, run, or compute the same; and why.
        reason: why the cost model chose.
    """

    name: str
    kind: str
    calls: int
    chosen: str
    by: str
    model: str = KERNEL
    seconds: float = 0.0
    model_seconds: float = 0.0
    tried: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Measurement:
    """Seconds of a call, and its results on the inputs that all variants of a kernel get."""

    seconds: float
    results: list[Tensor]


class Clock(Protocol):
    """Runs and times variants. `name` says what its measurements hold for."""

    name: str

    def measure(self, trial: Trial, sizes: Mapping[str, int]) -> Measurement:
        """Raises AccelError where the variant does not run."""


class DeviceClock:
    """Times on a GPU of this machine."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, measure.device_name(device)

    def measure(self, trial: Trial, sizes: Mapping[str, int]) -> Measurement:
        inputs = measure.sample_inputs(trial.function, sizes, self.device)
        host = load_code(trial.code, self.device) if trial.code else None
        store = trial.module.weights
        constants = {name: store.stored(name) for name in store.names()}
        function = CompiledFunction(
            trial.plan,
            DeviceWeights(TensorWeights(constants), self.device),
            libraries=runtime_libraries.get,
            host=host,
            device=self.device,
            graph=False,
        )
        with torch.no_grad():
            results = [r.clone() for r in function.step_by_step([t.clone() for t in inputs])]
            torch.cuda.synchronize(self.device)
            if isinstance(host, CudaLibrary):
                host.raise_failure()
            return Measurement(measure.function_seconds(function, inputs), results)


def clock_for(target: Target) -> tuple[Clock | None, str]:
    """The clock of a GPU of the target's architecture on this machine; or None, and why."""
    if target.kind != "cuda":
        return None, "kernels for CPUs are not tuned"
    if not torch.cuda.is_available():
        return None, "no GPU is here"
    device = device_of("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    if f"sm_{major}{minor}" != target.arch:
        return None, f"the GPU here is sm_{major}{minor}, the target {target.arch}"
    return DeviceClock(device), ""


class Tuner:
    """Chooses variants of kernels.

    Args:
        backend: generates kernels; the choices of tiles are set on it.
        libraries: what may take a kernel's ops instead.
        mode: "quick" or "full".
        clock: None leaves everything to the cost model, for `reason`.
        remember: take what was measured before from the cache.
    """

    def __init__(
        self,
        backend: TritonBackend,
        libraries: Sequence[Library],
        mode: str,
        clock: Clock | None,
        reason: str = "",
        *,
        remember: bool = True,
    ) -> None:
        self.backend, self.libraries, self.mode = backend, libraries, mode
        self.clock, self.reason, self.remember = clock, reason, remember
        self.most, self.limit = _LIMITS[mode]
        self.seconds = 0.0
        self.tiles_only = False
        self.choices: dict[str, Choice] = {}
        self.workers = Workers() if clock is not None else Workers(0)
        self._cache = CompileCache()

    def tune(self, kernels: Sequence[Op], *, tiles_only: bool = False) -> dict[str, Choice]:
        """Choices by fingerprint, of these kernels and all before; sets the backend's tiles.

        Args:
            tiles_only: kernels stay what they are, only tiles are chosen.
        """
        self.tiles_only = tiles_only
        start = time.monotonic()
        unique: dict[str, Op] = {}
        calls: dict[str, int] = {}
        for op in kernels:
            print_ = kernel_fingerprint(op)
            unique.setdefault(print_, op)
            calls[print_] = calls.get(print_, 0) + 1
        new = {p: op for p, op in unique.items() if p not in self.choices}
        order = sorted(new, key=lambda p: -calls[p] * op_cost(new[p]).bytes)
        found = {p: self._recorded(new[p], calls[p]) for p in order}
        missing = [p for p in order if found[p] is None]
        deadline = start + max(self.limit - self.seconds, 0.0)
        tried = self._compile([new[p] for p in missing], deadline) if self.clock else {}
        for print_ in order:
            known = found[print_]
            if known is None:
                known = self._choose(new[print_], calls[print_], tried, deadline)
            self.choices[print_] = known
            self._use(print_, new[print_], known)
        if self.clock is not None and missing:
            release_memory(device_of("cuda"))
        self.seconds += time.monotonic() - start
        return self.choices

    def _use(self, print_: str, kernel: Op, choice: Choice) -> None:
        if choice.chosen in (KERNEL, LIBRARY):
            return
        for tile in self.backend.candidates(kernel):
            if str(tile) == choice.chosen:
                self.backend.tiles[print_] = tile

    def _compile(self, kernels: Sequence[Op], deadline: float) -> dict[Op, list[Variant]]:
        """What to time; its code is in the cache afterwards, as far as the time allows."""
        if kernels:
            self.workers.start()
        variants = {op: variants_of(op, self.backend, self.most) for op in kernels}
        if self.tiles_only:
            variants = {op: [v for v in found if v.is_tile] for op, found in variants.items()}
        jobs = [
            job_of(op, variant, self.backend)
            for op, found in variants.items()
            for variant in found
            if variant.label != LIBRARY
        ]
        left = deadline - time.monotonic()
        self.workers.compile(jobs, time.monotonic() + 0.6 * left)
        return variants

    def close(self) -> None:
        """Ends the processes that compile."""
        self.workers.close()

    def _choose(
        self, kernel: Op, calls: int, variants: Mapping[Op, list[Variant]], deadline: float
    ) -> Choice:
        model = KERNEL if self.tiles_only else model_choice(kernel, self.backend)
        choice = Choice(_name(kernel), str(kernel.attribute("kind")), calls, model,
                        "cost model", model, reason=self.reason)  # fmt: skip
        if self.clock is None:
            return choice
        times: dict[str, float] = {}
        wanted: GoldenCase | None = None
        for variant in variants.get(kernel, ()):
            if time.monotonic() > deadline:
                choice.reason = f"the time for tuning ({self.limit:.0f} s) was up"
                break
            try:
                trial = build(kernel, variant, self.backend, self.libraries)
                made = self.clock.measure(trial, _sizes(kernel))
            except (AccelError, RuntimeError) as error:
                choice.failed[variant.label] = _short(error)
                _log.info("%s: %s: %s", choice.name, variant.label, _short(error))
                continue
            if wanted is None:
                bounds = [tolerance(r.dtype) for r in made.results]
                wanted = GoldenCase(choice.name, [], made.results, bounds)
            bad = [d for d in compare(choice.name, made.results, wanted) if not d.ok]
            if bad:
                choice.failed[variant.label] = bad[0].note or f"differs by {bad[0].error:.2g}"
                _log.warning("%s: %s computes something else: %s", choice.name, variant.label,
                             choice.failed[variant.label])  # fmt: skip
                continue
            times[variant.label] = made.seconds
        return self._decide(kernel, choice, times)

    def _decide(self, kernel: Op, choice: Choice, times: Mapping[str, float]) -> Choice:
        choice.tried = len(times)
        if choice.model in choice.failed and times:
            choice.model = KERNEL if KERNEL in times else next(iter(times))
        if choice.model not in times or (len(times) < 2 and choice.reason):
            return choice
        best = min(times, key=lambda label: times[label])
        if times[best] > _WORTH * times[choice.model]:
            best = choice.model
        choice.chosen, choice.by, choice.reason = best, "measured", ""
        choice.seconds, choice.model_seconds = times[best], times[choice.model]
        record = asdict(choice) | {"times": dict(times)}
        self._cache.put(self._key(kernel, self.mode), {"choice": record}, b"")
        return choice

    def _recorded(self, kernel: Op, calls: int) -> Choice | None:
        """What was measured before; what a full search found serves a quick one too."""
        if self.clock is None or not self.remember:
            return None
        for mode in dict.fromkeys((self.mode, "full")):
            entry = self._cache.get(self._key(kernel, mode))
            if entry is not None:
                known = {k: v for k, v in entry.header["choice"].items() if k != "times"}
                return Choice(**{**known, "calls": calls})
        return None

    def _key(self, kernel: Op, mode: str) -> str:
        assert self.clock is not None
        sizes = ",".join(f"{n}={v}" for n, v in sorted(_sizes(kernel).items()))
        versions = (__version__, self.backend.version(), torch.__version__)
        what = "tiles" if self.tiles_only and has_library_variant(kernel) else ""
        return cache_key("tuning", *versions, kernel_fingerprint(kernel), sizes,
                         self.clock.name, mode, what)  # fmt: skip

    def report(self) -> dict[str, Any]:
        """For people: what was chosen, by whom, and what a call of the program gains."""
        measured = [c for c in self.choices.values() if c.by == "measured"]
        saved = sum(c.calls * (c.model_seconds - c.seconds) for c in measured)
        return {
            "mode": self.mode,
            "by": "measured" if measured else "cost model",
            "reason": self.reason,
            "device": self.clock.name if self.clock is not None else "",
            "seconds": self.seconds,
            "saved_seconds": saved,
            "kernels": [asdict(c) for c in self.choices.values()],
        }


class TuneProducts(Pass):
    """Chooses for each kernel that a select pass made; what libraries do faster is theirs again."""

    name: ClassVar[str] = "tune"
    contract: ClassVar[Contract] = EXACT

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner

    def run(self, module: Module, context: Context) -> None:
        kernels = [k for k in kernels_of(module) if has_library_variant(k)]
        choices = self.tuner.tune(kernels)
        for kernel in kernels:
            chosen = choices[kernel_fingerprint(kernel)].chosen
            if chosen == LIBRARY and context.rewrite("library", kernel):
                dissolve(kernel)
            elif chosen.startswith("as ") and context.rewrite("kind", kernel):
                kernel.attributes["kind"] = chosen.removeprefix("as ")
        context.notes.update(summary(self.tuner.report()))


def kernels_of(module: Module) -> list[Op]:
    return [op for f in module.functions.values() for op in f.ops if op.name == "kernel"]


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without its list of kernels, for the ledger."""
    counts: dict[str, int] = {}
    for choice in report["kernels"]:
        chosen = str(choice["chosen"])
        kind = "kind" if chosen.startswith("as ") else "tile"
        kind = chosen if chosen in (KERNEL, LIBRARY) else kind
        counts[kind] = counts.get(kind, 0) + 1
    return {k: v for k, v in report.items() if k != "kernels"} | {"chosen": counts}


def _sizes(kernel: Op) -> dict[str, int]:
    """Values of the symbols that the kernel is timed with."""
    around = kernel.parent.parent if kernel.parent is not None else None
    return tuning_sizes(around.symbols) if isinstance(around, Function) else {}


def tuning_sizes(symbols: Mapping[str, SymbolInfo]) -> dict[str, int]:
    """What dynamic sizes are tuned for: long enough that a kernel is more than its launch."""
    wanted = _LONG if len(symbols) == 1 else _SHORT
    return {n: max(s.min, min(wanted, s.max or wanted)) for n, s in symbols.items()}


def _name(kernel: Op) -> str:
    return f"accel_{kernel_fingerprint(kernel)[:16]}"


def _short(error: Exception) -> str:
    text = error.what if isinstance(error, AccelError) else str(error)
    return text.strip().partition("\n")[0][:200]
