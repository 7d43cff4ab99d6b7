"""The roofline of an entry point, measured if it can be, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from accel.cli.output import format_bytes, format_seconds, table
from accel.compiler.measure import ceilings, device_name
from accel.compiler.roofline import Roofline, Row, filled_rows, fold, roofline, time_steps
from accel.compiler.targets import get_target, host_target
from accel.ir.module import Function
from accel.ir.parser import parse_module
from accel.runtime.artifact import Artifact
from accel.runtime.executor import CompiledFunction
from accel.runtime.model import CompiledModel, EntryPoint
from accel.runtime.plan import FunctionPlan

_STAGE = "kernels"


def measured(
    model: CompiledModel, entry: EntryPoint, inputs: Sequence[Tensor], sizes: Mapping[str, int]
) -> Roofline:
    """Runs the entry point's steps one by one on its device, and times each."""
    ir = kernels_of(model).get(entry.function.plan.name)
    return measured_function(entry.function, ir, inputs, sizes)


def kernels_of(model: CompiledModel) -> Mapping[str, Function]:
    """Kernel-level IR by entry point; empty for a model that does not carry it."""
    return parse_module(model.ir(_STAGE)).functions if _STAGE in model.stages() else {}


def measured_function(
    function: CompiledFunction,
    ir: Function | None,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
) -> Roofline:
    """`measured`, of a function by itself."""
    filled = filled_rows(ir, inputs) if ir is not None else None
    if function.device.type == "cuda":
        limits, source = ceilings(function.device), f"measured on {device_name(function.device)}"
        made = roofline(function.plan, ir, sizes, limits, source, filled)
    else:
        source = "derived from the CPU's clock"
        made = roofline(function.plan, ir, sizes, host_target(), source, filled)
    time_steps(made, function, inputs)
    return made


def predicted(artifact: Artifact, plan: FunctionPlan, sizes: Mapping[str, int]) -> Roofline:
    """Floors by the rates of the artifact's target; nothing runs."""
    ir = None
    if _STAGE in artifact.stages():
        ir = parse_module(artifact.ir(_STAGE)).functions.get(plan.name)
    target = get_target(artifact.manifest.target.name)
    return roofline(plan, ir, sizes, target, f"datasheet of {target.name}")


def rows_table(title: str, rows: Sequence[Row], limits: Roofline) -> Any:
    """Kernels with their bytes, operations, floors, and where they were run, times and shares."""
    timed = any(row.seconds for row in rows)
    columns = ["kernel", "kind", "what", ">calls", ">launches", ">bytes", ">GFLOP", ">floor"]
    columns += [">time", ">of the ceiling"] if timed else []
    lines = []
    for row in rows:
        line = [
            row.name, row.kind, _short(row.what), row.calls, row.launches or "",
            format_bytes(row.bytes), f"{row.flops / 1e9:.3g}" if row.flops else "",
            format_seconds(row.floor),
        ]  # fmt: skip
        if timed:
            line += [format_seconds(row.seconds), f"{row.share:.0%}" if row.seconds else ""]
        lines.append(line)
    return table(title, columns, lines)


def total(made: Roofline, seconds: float = 0.0) -> list[tuple[str, str]]:
    """The whole function: kernels launched, floor, and what a call takes above it."""
    launches = sum(r.launches for r in made.rows)
    rates = ", ".join(f"{n} {rate / 1e12:.3g} TFLOP/s" for n, rate in made.flops.items())
    rows = [
        ("ceilings", f"{made.bandwidth / 1e12:.3g} TB/s, {rates} ({made.source})"),
        ("moved", f"{format_bytes(sum(r.bytes for r in made.rows))}, "
                  f"{sum(r.flops for r in made.rows) / 1e9:.3g} GFLOP"),
        ("floor", format_seconds(made.floor)),
    ]  # fmt: skip
    if made.seconds:
        rows.insert(0, ("kernels launched", str(launches)))
        rows.append(
            ("steps", f"{format_seconds(made.seconds)} by {made.timed_by}, "
                      f"{made.floor / made.seconds:.0%} of the ceiling")
        )  # fmt: skip
    if seconds:
        rows.append(("call", f"{format_seconds(seconds)}, {made.floor / seconds:.0%}"))
    if not made.matched:
        rows.append(("operations", "unknown: the kernel-level IR is missing or does not match"))
    return rows


def heaviest(made: Roofline, most: int) -> list[Row]:
    """Equal kernels together, the longest first."""
    return sorted(fold(made.rows), key=lambda r: -(r.seconds or r.floor))[:most]


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
