"""What each step of a plan costs at least, beside what it takes.

A step's floor is the longer of two times: its bytes at the bandwidth of a long read or copy, its
operations at the rate of a large matrix product, both measured on the device (`measure.ceilings`)
or, on a machine that is not there, the target's datasheet. Operations come from the kernel-level
IR, whose ops are matched with the plan's steps in order; bytes are what crosses a kernel's border.
Of a cache only the rows count that hold keys (`filled`), of attention only the pairs that its mask
lets through. A plan whose IR is missing or does not match has bytes only, and `matched` says so.

Every byte counts at the speed of memory: a small kernel whose operands still lie in the L2 cache
can take less than its floor.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from accel.ir.cost import op_cost
from accel.ir.module import Function, Op, Value
from accel.ir.op import Trait
from accel.ir.types import TensorType, substitute
from accel.runtime.executor import CompiledFunction
from accel.runtime.plan import FunctionPlan, Step, dtype_of, evaluate_size
from accel.runtime.subbyte import is_sub_byte, stored_shape

_VIEWS = ("reshape", "permute", "slice", "broadcast_to")
_LAUNCH = re.compile(r"(accel_[0-9a-f]{16})_\d+")
_MARK = "accel.step."
_RUNS = 5


class Limits(Protocol):
    """A machine's rates: `measure.Ceilings`, or a target of the compiler."""

    @property
    def bandwidth(self) -> float: ...

    @property
    def flops(self) -> Mapping[str, float]: ...


@dataclass
class Row:
    """One op of the kernel-level program: a generated kernel with all its launches, a vendor call,
    an operator of torch.

    Attributes:
        steps: numbers of its steps in the plan.
        calls: how many equal rows this one stands for (`fold`); figures are of all together.
        launches: kernels that the device ran.
        seconds: measured; 0 where nothing was.
    """

    name: str
    kind: str
    what: str
    steps: list[int]
    bytes: int = 0
    flops: int = 0
    dtype: str = ""
    floor: float = 0.0
    seconds: float = 0.0
    launches: int = 0
    calls: int = 1

    @property
    def share(self) -> float:
        """Of the ceiling that bounds it; 0 where nothing was measured."""
        return self.floor / self.seconds if self.seconds else 0.0

    @property
    def lost(self) -> float:
        """Seconds above the floor."""
        return max(self.seconds - self.floor, 0.0)


@dataclass
class Roofline:
    """A function's rows, and the ceilings that they are compared with."""

    rows: list[Row]
    bandwidth: float
    flops: dict[str, float]
    source: str
    matched: bool
    timed_by: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        return sum(r.floor for r in self.rows)

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.rows)

    def furthest(self, most: int = 10) -> list[Row]:
        """Kinds of rows by the seconds that they lose, equal kernels together."""
        return sorted(fold(self.rows), key=lambda r: -r.lost)[:most]

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(r) | {"share": r.share} for r in self.rows]
        return {
            "floor_seconds": self.floor,
            "step_seconds": self.seconds,
            "launches": sum(r.launches for r in self.rows),
            "bytes": sum(r.bytes for r in self.rows),
            "flops": sum(r.flops for r in self.rows),
            "bandwidth": self.bandwidth,
            "peak_flops": self.flops,
            "ceilings": self.source,
            "matched": self.matched,
            "timed_by": self.timed_by,
            "sizes": self.sizes,
            "rows": rows,
        }


def roofline(
    plan: FunctionPlan,
    function: Function | None,
    sizes: Mapping[str, int],
    limits: Limits,
    source: str,
    filled: int | None = None,
) -> Roofline:
    """Bytes, operations and floors of a plan's steps. `function` is its kernel-level IR, `filled`
    how many rows its caches hold before the call (None: all that fit)."""
    rows = _matched(plan, function, sizes, filled) if function is not None else None
    matched = rows is not None
    if rows is None:
        rows = [_plain(number, step, plan, sizes) for number, step in enumerate(plan.steps)]
    rows = [r for r in rows if r.kind != "view"]
    for row in rows:
        peak = limits.flops.get(row.dtype) or max(limits.flops.values(), default=0.0)
        compute = row.flops / peak if peak else 0.0
        memory = row.bytes / limits.bandwidth if limits.bandwidth else 0.0
        row.floor = max(compute, memory)
    return Roofline(rows, limits.bandwidth, dict(limits.flops), source, matched, sizes=dict(sizes))


def fold(rows: Sequence[Row]) -> list[Row]:
    """Rows of equal kernels and of equal calls as one."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row.name, row.kind, row.what, row.bytes, row.flops)
        known = found.get(key)
        if known is None:
            found[key] = Row(**asdict(row))
            continue
        known.calls += row.calls
        known.steps += row.steps
        known.floor += row.floor
        known.seconds += row.seconds
        known.launches += row.launches
    for row in found.values():
        row.bytes, row.flops = row.bytes * row.calls, row.flops * row.calls
    return list(found.values())


# -- which op a step is of -------------------------------------------------------------------


def _plain(number: int, step: Step, plan: FunctionPlan, sizes: Mapping[str, int]) -> Row:
    values = {v for v in (*step.inputs, *step.outputs) if v >= 0}
    moved = sum(_nbytes(plan, v, sizes) for v in values)
    name = _stem(step.name)
    dtype = plan.values[step.outputs[0]].dtype if step.outputs else ""
    return Row(name, step.kind, step.source, [number], moved, 0, dtype)


def _nbytes(plan: FunctionPlan, value: int, sizes: Mapping[str, int]) -> int:
    spec = plan.values[value]
    dtype, shape = dtype_of(spec.dtype), tuple(evaluate_size(s, sizes) for s in spec.shape)
    if is_sub_byte(dtype):
        return math.prod(stored_shape(shape, dtype))
    return math.prod(shape) * dtype.itemsize


def _matched(
    plan: FunctionPlan, function: Function, sizes: Mapping[str, int], filled: int | None
) -> list[Row] | None:
    """A row for each op that has steps; None where ops and steps do not go together."""
    rows: list[Row] = []
    position = 0
    for op in function.ops:
        if op.has(Trait.TERMINATOR):
            break
        if op.name == "constant" or not (any(r.uses for r in op.results) or not op.has(Trait.PURE)):
            continue
        count = _steps_of(op, plan.steps, position)
        if count is None:
            return None
        if count:
            rows.append(_row(op, plan.steps[position : position + count], position, sizes, filled))
        position += count
    return rows if position == len(plan.steps) else None


def _steps_of(op: Op, steps: Sequence[Step], position: int) -> int | None:
    """How many steps from `position` on are of this op; None if they are of another."""
    step = steps[position] if position < len(steps) else None
    if op.name == "full" and op.result.type.is_static:
        return int(step is not None and step.kind == "view" and step.name == "expand")
    if step is None:
        return None
    if op.name == "kernel":
        if step.kind != "kernel":
            return None
        stem = _stem(step.name)
        count = 1
        while stem != step.name and _is_next_launch(steps, position + count, stem, count):
            count += 1
        return count
    wanted = {"call": "library"}.get(op.name, "view" if op.name in _VIEWS else "aten")
    return 1 if step.kind == wanted else None


def _stem(name: str) -> str:
    """A GPU kernel's name without its launch's number; other names as they are."""
    found = _LAUNCH.fullmatch(name)
    return found[1] if found is not None else name


def _is_next_launch(steps: Sequence[Step], position: int, stem: str, number: int) -> bool:
    if position >= len(steps) or steps[position].kind != "kernel":
        return False
    return steps[position].name == f"{stem}_{number}"


def _row(
    op: Op, steps: Sequence[Step], first: int, sizes: Mapping[str, int], filled: int | None
) -> Row:
    cost, step = op_cost(op, sizes), steps[0]
    name = _stem(step.name)
    kind = str(op.attribute("kind")) if op.name == "kernel" else step.kind
    inner = [o for region in op.regions for o in region.ops if not o.has(Trait.TERMINATOR)]
    what = ", ".join(dict.fromkeys(o.name for o in inner if not o.has(Trait.VIEW))) or op.name
    numbers = list(range(first, first + len(steps)))
    moved, flops = cost.bytes, cost.flops
    for each in (op, *inner):
        more = _of_attention(each, sizes, filled)
        moved, flops = moved + more[0], flops + more[1]
    return Row(name, kind, what, numbers, moved, flops, _dtype(op))


def _dtype(op: Op) -> str:
    """The dtype that its operations run in: of its contraction, if it has one."""
    for inner in (op, *(o for region in op.regions for o in region.ops)):
        if inner.has(Trait.CONTRACTION):
            return str(inner.operands[0].dtype).removeprefix("torch.")
    values = op.results or op.operands
    return str(values[0].dtype).removeprefix("torch.") if values else ""


# -- attention: what types do not say -----------------------------------------------------------

_ATTENTION = ("attention", "cached_attention", "flash_attention", "flash_attention_backward")


def filled_rows(function: Function, inputs: Sequence[Tensor]) -> int | None:
    """How many rows of its caches a call with these arguments finds: the position that its
    attention gets. None for a function without caches, or whose position is not an argument."""
    places = {arg: number for number, arg in enumerate(function.args)}
    for op in function.ops:
        for region in op.regions:
            places |= {
                inner: places[outer]
                for outer, inner in zip(op.operands, region.args)
                if outer in places
            }
        for each in (op, *(o for region in op.regions for o in region.ops)):
            if each.name == "cached_attention" and each.operands[3] in places:
                return int(inputs[places[each.operands[3]]].max())
    return None


def _of_attention(op: Op, sizes: Mapping[str, int], filled: int | None) -> tuple[int, int]:
    """What an attention moves and computes beyond what `op_cost` says of it: a cache that its
    kernel writes as well counts as written there, and pairs that a mask leaves out count."""
    if op.name not in _ATTENTION:
        return 0, 0
    first = 1 if op.name == "flash_attention_backward" else 0
    q, k, v = op.operands[first : first + 3]
    queries, keys = (int(substitute(t.shape[2], sizes)) for t in (q, k))
    window = op.attributes.get("window")
    reach = int(window) if isinstance(window, int) else keys + queries
    if op.name == "cached_attention":
        start = keys - queries if filled is None else min(filled, keys - queries)
        held = min(keys, start + queries, reach + queries - 1)
        moved = sum(_held(t, held / keys, sizes) for t in (k, v))
    elif op.attributes.get("causal"):
        start, moved = int(substitute(_offset(op), sizes)), 0
    else:
        return 0, 0
    pairs = sum(min(max(start + i + 1, 0), keys, reach) for i in range(queries))
    flops = op_cost(op, sizes).flops
    return moved, flops * pairs // max(queries * keys, 1) - flops


def _offset(op: Op) -> Any:
    offset = op.attributes.get("offset")
    return 0 if offset is None else offset


def _held(cache: Value, share: float, sizes: Mapping[str, int]) -> int:
    """Bytes of a cache's filled rows, less those that `op_cost` counts."""
    spec: TensorType = cache.type
    total = int(substitute(spec.nbytes(), sizes))
    made = cache.op
    counted = 0 if made is not None and made.has(Trait.UPDATE) else total
    return int(total * share) - counted


# -- time ------------------------------------------------------------------------------------


def time_steps(made: Roofline, function: CompiledFunction, inputs: Sequence[Tensor]) -> None:
    """Fills in the seconds and launches of each row: the device's own clock on a GPU (CUPTI,
    through torch's profiler), else this process's. The steps run one by one."""
    function.step_by_step(inputs)
    if function.device.type == "cuda":
        seconds, launches = _on_device(function, inputs)
        made.timed_by = "CUPTI"
    else:
        seconds, launches = _on_host(function, inputs)
        made.timed_by = "wall clock"
    for row in made.rows:
        row.seconds = sum(seconds.get(n, 0.0) for n in row.steps)
        row.launches = sum(launches.get(n, 0) for n in row.steps)


def _on_host(
    function: CompiledFunction, inputs: Sequence[Tensor]
) -> tuple[dict[int, float], dict[int, int]]:
    times: dict[int, list[float]] = {}

    @contextmanager
    def around(number: int) -> Iterator[None]:
        start = perf_counter()
        yield
        times.setdefault(number, []).append(perf_counter() - start)

    for _ in range(_RUNS):
        function.step_by_step(inputs, around)
    return {n: sorted(t)[len(t) // 2] for n, t in times.items()}, dict.fromkeys(times, 1)


def _on_device(
    function: CompiledFunction, inputs: Sequence[Tensor]
) -> tuple[dict[int, float], dict[int, int]]:
    """Device time of the kernels that each step launched: a kernel belongs to the step within
    whose mark the process asked for it."""
    torch.cuda.synchronize(function.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(_RUNS):
            function.step_by_step(inputs, lambda number: record_function(f"{_MARK}{number}"))
        torch.cuda.synchronize(function.device)
    events = list(profiler.profiler.kineto_results.events())
    on_host = [e for e in events if "CPU" in str(e.device_type())]
    marks = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns(), int(e.name().removeprefix(_MARK)))
        for e in on_host
        if e.name().startswith(_MARK)
    )
    asked = {e.correlation_id(): e.start_ns() for e in on_host if e.name().startswith("cu")}
    seconds: dict[int, float] = {}  # by mark: one run of one step
    launches: dict[int, int] = {}
    for event in events:
        if "CUDA" not in str(event.device_type()) or event.name().startswith(_MARK):
            continue
        mark = _mark_at(marks, asked.get(event.correlation_id(), -1))
        if mark is not None:
            seconds[mark] = seconds.get(mark, 0.0) + event.duration_ns() * 1e-9
            launches[marks[mark][2]] = launches.get(marks[mark][2], 0) + 1
    runs: dict[int, list[float]] = {}
    for mark, took in seconds.items():
        runs.setdefault(marks[mark][2], []).append(took)
    times = {n: statistics.median(taken) for n, taken in runs.items()}
    return times, {n: round(count / _RUNS) for n, count in launches.items()}


def _mark_at(marks: Sequence[tuple[int, int, int]], time: int) -> int | None:
    """Number of the mark that a time lies in."""
    low, high = 0, len(marks)
    while low < high:
        middle = (low + high) // 2
        if marks[middle][0] <= time:
            low = middle + 1
        else:
            high = middle
    if low and marks[low - 1][1] >= time:
        return low - 1
    return None
