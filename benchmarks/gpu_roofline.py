"""What the programs of the GPU benchmarks cost at least, beside what they take.

    python -m benchmarks.gpu --systems accel --roofline        # also after a run beside peers
    python -m benchmarks.gpu_decode --systems accel --roofline

A program's steps run one by one and are timed by the device (CUPTI); a step's floor is its bytes
or its operations at the rates that `accel.compiler.measure.ceilings` measured on the device. The
figures go to benchmarks/results/gpu_roofline.json, rows of other workloads stay.

All systems are timed before any step is: a profiler that has run once can slow later launches down.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.cli.figures import kernels_of, measured_function
from accel.compiler.dynamo import compile_graph
from accel.compiler.measure import ceilings
from accel.compiler.roofline import Roofline, Row, fold
from accel.frontends.dynamo import make_backend
from accel.ir.module import Function, Module
from accel.runtime.executor import CompiledFunction
from accel.runtime.model import CompiledModel
from benchmarks.docs_gpu import TITLES
from benchmarks.measure import RESULTS, machine, merged

PATH = RESULTS / "gpu_roofline.json"
_FURTHEST, _PRINTED = 3, 8


@dataclass
class Part:
    """A compiled function, its kernel-level IR, and the arguments of a call."""

    function: CompiledFunction
    ir: Function | None
    inputs: Sequence[Tensor]


@dataclass
class Program:
    """What was timed: functions, and what all of them take together."""

    workload: str
    parts: Sequence[Part]
    milliseconds: float


@dataclass(frozen=True)
class Options:
    """How rows are measured: where peers' caches are, the seconds in which a system must be ready
    (0: any), accel's programs, to be looked at later (None: they are not kept), and the rows that
    accel compiles once more from its cache, in a new process."""

    caches: Path | None = None
    limit: float = 0.0
    programs: list[Program] | None = None
    from_cache: Sequence[str] = ()

    @classmethod
    def of(cls, chosen: argparse.Namespace) -> Options:
        return cls(chosen.caches, chosen.limit, [] if chosen.roofline else None)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--caches", type=Path, help="of peers, from benchmarks.prepare_peers")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds to be ready in; 0: any")
    parser.add_argument("--roofline", action="store_true", help="accel's kernels and their floors")


def parts_of(model: CompiledModel, *calls: tuple[str, Sequence[Tensor]]) -> list[Part]:
    """Calls of a model's entry points, by name, with their arguments."""
    kernels = kernels_of(model)
    functions = [model.entry_points[name].function for name, _ in calls]
    return [Part(f, kernels.get(f.plan.name), given) for f, (_, given) in zip(functions, calls)]


class Recorder:
    """A backend of torch.compile that is accel's, and can keep the calls of what it compiled."""

    def __init__(self) -> None:
        self.parts: list[Part] | None = None  # of the calls that were made since this was a list
        self.backend = make_backend(self._compile)

    def _compile(
        self, module: Module, options: Mapping[str, Any], device: torch.device
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        function = compile_graph(module, options, device)

        def call(inputs: Sequence[Tensor]) -> list[Tensor]:
            if self.parts is not None and isinstance(function, CompiledFunction):
                self.parts.append(Part(function, module.main, list(inputs)))
            return function(inputs)

        return call

    def record(self, call: Callable[[], object]) -> list[Part]:
        """The functions that one call runs."""
        made: list[Part] = []
        self.parts = made
        try:
            call()
        finally:
            self.parts = None
        return made


def measure_all(programs: Sequence[Program], path: Path = PATH) -> None:
    """Times the steps of each, prints and stores them."""
    for program in programs:
        row = figures(program)
        name, floor, steps, call = (row[k] for k in ("workload", "floor_us", "steps_us", "call_us"))
        print(f"{name:16} floor {floor:8.1f} us  steps {steps:8.1f}  call {call:8.1f}  "
              f"share {row['share']:.2f}  launches {row['launches']}", flush=True)  # fmt: skip
        for one in row["kernels"][:_PRINTED]:
            what, floor, took = one["what"][:40], one["floor_us"], one["time_us"]
            print(f"    {one['kind']:16} {what:40} x{one['calls']:<3} floor {floor:8.1f} us, "
                  f"takes {took:8.1f}", flush=True)  # fmt: skip
        store(row, path)


@torch.no_grad()
def figures(program: Program) -> dict[str, Any]:
    """One row of the table."""
    lines = [_line(each) for each in program.parts]
    rows = [row for line in lines for row in line.rows]
    call = program.milliseconds * 1e3
    floor = 1e6 * sum(line.floor for line in lines)
    furthest = sorted(fold(rows), key=lambda r: -r.lost)[:_FURTHEST]
    return {
        "workload": program.workload,
        "floor_us": floor,
        "steps_us": 1e6 * sum(line.seconds for line in lines),
        "call_us": call,
        "share": floor / call,
        "launches": sum(r.launches for r in rows),
        "bytes": sum(r.bytes for r in rows),
        "flops": sum(r.flops for r in rows),
        "matched": all(line.matched for line in lines),
        "furthest": [_kernel(r) for r in furthest],
        "kernels": [_kernel(r) for r in sorted(fold(rows), key=lambda r: -r.seconds)],
    }


def _line(each: Part) -> Roofline:
    sizes = each.function.signature.bind(each.inputs)
    return measured_function(each.function, each.ir, each.inputs, sizes)


def _kernel(row: Row) -> dict[str, Any]:
    made = asdict(row)
    kept = {k: made[k] for k in ("name", "kind", "what", "calls", "launches", "bytes", "flops")}
    return {**kept, "floor_us": 1e6 * row.floor, "time_us": 1e6 * row.seconds}


def store(row: Mapping[str, Any], path: Path) -> None:
    """Adds a row; those that the file has from an equal machine stay."""
    limits = ceilings(torch.device("cuda", torch.cuda.current_device()))
    facts = {**machine(), "gpu": torch.cuda.get_device_name()}
    result = {
        "machine": facts,
        "device": limits.device,
        "bandwidth": limits.bandwidth,
        "peak_flops": limits.flops,
        "rows": merged(path, facts, [dict(row)], list(TITLES)),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
