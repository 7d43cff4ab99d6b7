"""From a captured module to a compiled program: passes, kernels, plans.

tensor level:  exact clean-up, the user's techniques, clean-up again
kernel level:  select_libraries, decompose, fuse
code:          equal kernels are compiled once; the cache answers for those seen before
plan:          one per function
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from accel import __version__
from accel.backends.cubin.compile import capability
from accel.backends.cubin.pool import Pool
from accel.backends.triton import TritonBackend
from accel.backends.tvm import TvmBackend
from accel.backends.vendor import (
    CachedAttention,
    ExpertLinear,
    OneDnnConv,
    OneDnnLinear,
    PagedAttention,
    ScaledDotProduct,
    TorchLinear,
    Update,
    UpdatePages,
)
from accel.compiler import fallback, gpu
from accel.compiler.cache import CompileCache, cache_key
from accel.compiler.lower import KernelSymbol, lower_function
from accel.compiler.options import Options
from accel.compiler.targets import Target
from accel.compiler.tune import TuneProducts, Tuner, clock_for, kernels_of
from accel.compiler.variants import place_in
from accel.frontends import autocast
from accel.ir.capability import Library
from accel.ir.fingerprint import region_fingerprint
from accel.ir.module import Module, Op
from accel.ir.printer import print_module
from accel.ir.storage import WeightStore
from accel.passes.base import Context, Pass
from accel.passes.ledger import Ledger
from accel.passes.manager import PassManager
from accel.passes.pipelines import EXACT_PIPELINE, PLAIN_PIPELINE
from accel.passes.registry import load_passes
from accel.runtime.plan import FunctionPlan

KERNEL_PIPELINE = (
    "select_depthwise",
    "select_matmul",
    "select_products",
    "open_pages{kernels=true}",
    "select_cached",
    "select_attention",
    "select_libraries",
    "decompose",
    "cse",
    "dce",
    "fuse",
    "dce",
)

CPU_LIBRARIES: tuple[Library, ...] = (
    OneDnnLinear(),
    OneDnnConv(),
    ScaledDotProduct(),
    CachedAttention(),
    Update(),
    PagedAttention(),
    UpdatePages(),
    TorchLinear(),
    ExpertLinear(),
)


@dataclass
class Program:
    """A compiled program, in memory: what the runtime executes and the artifact stores.

    Attributes:
        plans: one per entry point.
        weights: what the plans' weights are read from.
        library: the shared object with the generated kernels; None if there are none.
        sources: readable source by kernel symbol.
        stages: IR text by stage name: "captured", "optimized", "kernels".
        seconds: compile time by phase.
        facts: more for the report: what tuning chose, kernels that did not compile.
        fallbacks: how many ops of each ATen overload torch runs.
    """

    plans: dict[str, FunctionPlan]
    weights: WeightStore
    target: Target
    ledger: Ledger
    library: bytes | None = None
    sources: dict[str, str] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fallbacks(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for plan in self.plans.values():
            for step in plan.steps:
                if step.kind == "aten":
                    counts[step.name] = counts.get(step.name, 0) + 1
        return dict(sorted(counts.items()))


def compile_module(
    module: Module,
    target: Target,
    options: Options,
    *,
    calibration: Sequence[Sequence[Tensor]] = (),
    pool: Pool | None = None,
) -> Program:
    """Compiles a captured module, which is rewritten in place.

    `pool`: processes that compile kernels (`gpu.processes`); by default they are started here.

    Raises AccelError subclasses: ContractError where a pass breaks its promise, BackendError where
    no backend takes an op, OptionError for a pipeline that does not parse.
    """
    with gpu.processes(target, options, pool) as pool, autocast.suspended(autocast.current()):
        return _compile(module, target, options, calibration, pool)


def _compile(
    module: Module,
    target: Target,
    options: Options,
    calibration: Sequence[Sequence[Tensor]],
    pool: Pool,
) -> Program:
    load_passes()
    context = make_context(target, options, calibration)
    stages = {"captured": print_module(module, locations=True)}
    start = time.perf_counter()
    manager = PassManager(
        tensor_pipeline(options),
        context,
        validate=options.validate,
        on_violation="undo" if options.on_violation == "undo" else "raise",
        dump_dir=options.dump_dir or None,
        print_after=options.print_after or (),
        stop_after=options.stop_after or None,
    )
    ledger = manager.run(module)
    if any(row.changed for row in ledger.rows):
        stages["optimized"] = print_module(module, locations=True)
    else:
        stages["optimized"] = stages["captured"]
    seconds = {"passes": time.perf_counter() - start}
    program = lower_module(module, target, options, context, after=manager, pool=pool)
    ledger.extend(program.ledger)
    program.ledger, program.stages = ledger, stages | program.stages
    program.seconds["passes"] += seconds["passes"]
    return program


def make_context(
    target: Target, options: Options, calibration: Sequence[Sequence[Tensor]] = ()
) -> Context:
    """What passes know about a target: its kernel generator and libraries."""
    on_gpu = target.kind == "cuda"
    backend: TvmBackend | TritonBackend | None = None
    if options.kernels:
        backend = gpu.generator(target, options) if on_gpu else TvmBackend()
    return Context(
        target=target,
        generator=backend,
        libraries=gpu.libraries(capability(target.arch)) if on_gpu else CPU_LIBRARIES,
        calibration=calibration,
        fuel=None if options.fuel < 0 else options.fuel,
    )


def lower_module(
    module: Module,
    target: Target,
    options: Options,
    context: Context,
    after: PassManager | None = None,
    pool: Pool | None = None,
) -> Program:
    """From the tensor level to a program: kernels, tuning, code, plans. `after` ran last."""
    tuner = _tuner(target, options, context)
    try:
        with gpu.processes(target, options, pool) as pool:
            return _lower(module, target, options, context, after, tuner, pool)
    finally:
        if tuner is not None:
            tuner.close()


def _lower(
    module: Module,
    target: Target,
    options: Options,
    context: Context,
    after: PassManager | None,
    tuner: Tuner | None,
    pool: Pool,
) -> Program:
    start = time.perf_counter()
    backend = context.generator
    names = gpu.KERNEL_PIPELINE if target.kind == "cuda" else KERNEL_PIPELINE
    pipeline: list[str | Pass] = list(names)
    if tuner is not None:
        pipeline.insert(place_in(pipeline), TuneProducts(tuner))
    lowering = PassManager(pipeline, context, validate=options.validate)
    ledger = lowering.run(module, after=after)
    seconds = {"passes": time.perf_counter() - start}
    start = time.perf_counter()
    facts: dict[str, Any] = {}
    if tuner is not None:
        tuner.tune(kernels_of(module), tiles_only=True)
        facts["tuning"] = tuner.report()
    if isinstance(backend, TritonBackend):
        made, failures = fallback.compile_launches(module, backend, options, context, pool)
        symbols, library, sources = made
        facts["failed_kernels"] = [f.to_json() for f in failures]
    else:
        cpu = backend if isinstance(backend, TvmBackend) else None
        symbols, library, sources = compile_kernels(module, cpu, target, options)
    stages = {"kernels": print_module(module, locations=True)}
    seconds["kernels"] = time.perf_counter() - start
    start = time.perf_counter()
    plans = {f.name: lower_function(f, module, symbols) for f in module.functions.values()}
    _drop_unused_weights(module, plans)
    seconds["plan"] = time.perf_counter() - start
    return Program(
        plans=plans,
        weights=module.weights,
        target=target,
        ledger=ledger,
        library=library,
        sources=sources,
        stages=stages,
        seconds=seconds,
        metadata=dict(module.metadata),
        facts=facts,
    )


def _tuner(target: Target, options: Options, context: Context) -> Tuner | None:
    """Chooses kernels by measuring, if that is wanted; without a device the cost model does."""
    backend = context.generator
    if options.tune == "off" or not isinstance(backend, TritonBackend):
        return None
    clock, reason = clock_for(target)
    backend.measures = clock is not None
    remember = options.cache
    return Tuner(backend, context.libraries, options.tune, clock, reason, remember=remember)


def tensor_pipeline(options: Options) -> list[str]:
    """Pass strings before lowering: exact passes around the user's techniques."""
    if options.pipeline is not None:
        return [options.pipeline] if options.pipeline else []
    if options.passes:
        return [*PLAIN_PIPELINE, options.passes, *EXACT_PIPELINE]
    return list(EXACT_PIPELINE)


def compile_kernels(
    module: Module, backend: TvmBackend | None, target: Target, options: Options
) -> tuple[dict[Op, KernelSymbol], bytes | None, dict[str, str]]:
    """Code for every kernel op; equal bodies share one symbol."""
    kernels = [op for f in module.functions.values() for op in f.ops if op.name == "kernel"]
    if not kernels or backend is None:
        return {}, None, {}
    prints = {op: region_fingerprint(op.regions[0]) + str(op.attributes["kind"]) for op in kernels}
    unique: dict[str, Op] = {}
    for op in kernels:
        unique.setdefault(prints[op], op)
    cache = CompileCache()
    key = cache_key(__version__, backend.version(), target.arch, ",".join(target.features), *unique)
    entry = cache.get(key) if options.cache else None
    if entry is None:
        compiled = backend.compile(list(unique.values()))
        header: dict[str, Any] = {
            "names": dict(zip(unique, compiled.symbols)),
            "sources": compiled.sources,
            "inplace": compiled.inplace,
            "updates": compiled.updates,
        }
        library = compiled.library
        if options.cache:
            cache.put(key, header, library)
    else:
        header, library = entry.header, entry.payload
    names, inplace, updates = header["names"], header["inplace"], header.get("updates", {})
    found: dict[str, KernelSymbol] = {}
    for print_, op in unique.items():
        name = names[print_]
        pairs = tuple((int(r), int(i)) for r, i in inplace.get(name, ()))
        written = tuple((int(r), int(i)) for r, i in updates.get(name, ()))
        found[print_] = KernelSymbol(name, backend.dims(op), pairs, updates=written)
    return {op: found[prints[op]] for op in kernels}, library, header["sources"]


def _drop_unused_weights(module: Module, plans: dict[str, FunctionPlan]) -> None:
    used = {v.name for plan in plans.values() for v in plan.values if v.kind == "weight"}
    for plan in plans.values():  # first values of state, which calls pass as arguments
        used |= {str(a.get("initial", "")) for a in plan.metadata.get("arguments", ())}
    for name in module.weights.names():
        if name not in used:
            module.weights.remove(name)
