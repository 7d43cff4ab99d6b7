"""Checks a plan, and finds who shares memory with whom and how long it must last.

Plans come from files, so `analyze` trusts nothing: every number is in range, every value is defined
once and before its uses, every size has a value. What it finds is independent of sizes, and is
computed once per function; `accel.runtime.binding` adds the sizes of a call.

A value's *roots* are the values whose memory it may read: a view has those of its operand, and so
has the result of an ATen op that may return a view. Memory lasts until the last step that reads any
value with that root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from accel.errors import ArtifactError
from accel.runtime.aten import may_alias
from accel.runtime.plan import FunctionPlan, SizeExpr, Step, dtype_of
from accel.runtime.subbyte import is_sub_byte

_DEFINES = {"kernel": "buffer", "library": "owned", "aten": "owned", "view": "view"}
_VIEWS = {"reshape": (), "expand": (), "permute": ("axes",), "slice": ("axis", "start", "stop")}


@dataclass
class Analysis:
    """Facts about a checked plan; lists are indexed by value.

    `first` is the step that defines a value (-1 for inputs and weights). `last` is the last step
    that reads the memory of a root (the number of steps for results). `slot_last` is the last step
    that names the value itself. `arena` are the buffers that live in the arena, `fresh` those that
    are results and are allocated by each call, `zeroed` those that keep memory of their own between
    calls, zeros at first. `in_place` maps a buffer to the roots that its
    kernel may write it over, `donated` a fresh buffer to the argument whose memory it may take.
    """

    roots: list[tuple[int, ...]]
    first: list[int]
    last: list[int]
    slot_last: list[int]
    arena: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    zeroed: list[int] = field(default_factory=list)
    in_place: dict[int, list[int]] = field(default_factory=dict)
    donated: dict[int, int] = field(default_factory=dict)


def analyze(plan: FunctionPlan) -> Analysis:
    """Checks `plan` and derives its facts. Raises ArtifactError for a malformed plan."""
    _check_values(plan)
    result = _walk(plan)
    _sort_buffers(plan, result)
    _find_in_place(plan, result)
    _find_donations(plan, result)
    return result


def _fail(plan: FunctionPlan, what: str, step: Step | None = None) -> ArtifactError:
    where = f"function '{plan.name}'"
    if step is not None:
        where += f", {step.kind} step '{step.name}'" + (f" ({step.source})" if step.source else "")
    return ArtifactError(what, where=where)


def _check_values(plan: FunctionPlan) -> None:
    for name, (low, high) in plan.symbols.items():
        if low < 0 or (high is not None and high < low):
            raise _fail(plan, f"size '{name}' has the empty range {low}..{high}")
    for number, spec in enumerate(plan.values):
        if is_sub_byte(dtype_of(spec.dtype)) and spec.kind != "weight":
            raise _fail(plan, f"value {number} of kind '{spec.kind}' has dtype {spec.dtype}")
        for expr in spec.shape:
            _check_size(plan, expr)
    if len(set(plan.inputs)) != len(plan.inputs):
        raise _fail(plan, "an input is listed twice")
    for position, value in enumerate(plan.inputs):
        spec = plan.values[_in_range(plan, value)]
        if spec.kind != "input" or spec.index != position:
            raise _fail(plan, f"input {position} is value {value}, which is no such input")
    if sum(v.kind == "input" for v in plan.values) != len(plan.inputs):
        raise _fail(plan, "an input value is not listed in the function's inputs")
    for result, argument in plan.donates.items():
        if not (0 <= result < len(plan.outputs) and 0 <= argument < len(plan.inputs)):
            raise _fail(plan, f"donation of argument {argument} to result {result}")


def _check_size(plan: FunctionPlan, expr: SizeExpr, depth: int = 0) -> None:
    if isinstance(expr, str):
        if expr not in plan.symbols:
            raise _fail(plan, f"size '{expr}' is not declared")
    elif isinstance(expr, list):
        if depth > 32 or not expr or not isinstance(expr[0], str):
            raise _fail(plan, "malformed or too deep size expression")
        for e in expr[1:]:
            _check_size(plan, e, depth + 1)
    elif isinstance(expr, bool) or not isinstance(expr, int) or abs(expr) >= 1 << 62:
        raise _fail(plan, f"bad size {expr!r}")


def _in_range(plan: FunctionPlan, value: int, step: Step | None = None) -> int:
    if not 0 <= value < len(plan.values):
        raise _fail(plan, f"value {value} does not exist", step)
    return value


def _walk(plan: FunctionPlan) -> Analysis:
    count = len(plan.values)
    given = [v.kind in ("input", "weight") for v in plan.values]
    roots: list[tuple[int, ...]] = [(n,) if g else () for n, g in enumerate(given)]
    defined = list(given)
    first, last, slot_last = [-1] * count, [-1] * count, [-1] * count
    for number, step in enumerate(plan.steps):
        for value in _operands(plan, step):
            if not defined[value]:
                raise _fail(plan, f"value {value} is used before it is defined", step)
            slot_last[value] = number
            for root in roots[value]:
                last[root] = number
        for value in step.outputs:
            _check_output(plan, step, value, defined)
            defined[value] = True
            first[value] = slot_last[value] = number
            roots[value] = _roots(plan, step, value, roots)
            for root in roots[value]:
                last[root] = number
    for value in plan.outputs:
        if not defined[_in_range(plan, value)]:
            raise _fail(plan, f"result value {value} is never defined")
        slot_last[value] = len(plan.steps)
        for root in roots[value]:
            last[root] = len(plan.steps)
    return Analysis(roots, first, last, slot_last)


def _operands(plan: FunctionPlan, step: Step) -> Iterator[int]:
    if step.kind == "view" and (len(step.inputs) != 1 or len(step.outputs) != 1):
        raise _fail(plan, "a view step has one operand and one result", step)
    if step.kind == "view" and not set(_VIEWS.get(step.name, ("?",))) <= step.options.keys():
        raise _fail(plan, "unknown view, or a parameter is missing", step)
    for expr in step.dims:
        _check_size(plan, expr)
    for value in step.inputs:
        if value == -1 and step.kind in ("library", "aten"):
            continue
        spec = plan.values[_in_range(plan, value, step)]
        if step.kind == "view" and is_sub_byte(dtype_of(spec.dtype)):
            raise _fail(plan, f"a view of packed {spec.dtype}", step)
        yield value


def _check_output(plan: FunctionPlan, step: Step, value: int, defined: list[bool]) -> None:
    spec = plan.values[_in_range(plan, value, step)]
    if spec.kind != _DEFINES[step.kind]:
        raise _fail(plan, f"defines value {value} of kind '{spec.kind}'", step)
    if defined[value]:
        raise _fail(plan, f"defines value {value} again", step)


def _roots(
    plan: FunctionPlan, step: Step, value: int, roots: list[tuple[int, ...]]
) -> tuple[int, ...]:
    if step.kind == "view":
        return roots[step.inputs[0]]
    if step.kind == "aten" and may_alias(step.name):
        shared = {r for i in step.inputs if i >= 0 for r in roots[i]}
        return tuple(sorted(shared | {value}))
    return (value,)


def _sort_buffers(plan: FunctionPlan, a: Analysis) -> None:
    """Memory that a result reads is never in the arena, where the next call would overwrite it."""
    results = {root for value in plan.outputs for root in a.roots[value]}
    for step in plan.steps:
        for position in step.options.get("zeroed", []) if step.kind == "kernel" else []:
            if not isinstance(position, int) or not 0 <= position < len(step.outputs):
                raise _fail(plan, f"no output {position!r} to set to zero", step)
            a.zeroed.append(step.outputs[position])
    if results & set(a.zeroed):
        raise _fail(plan, "a result that keeps its memory between calls")
    for number, spec in enumerate(plan.values):
        if spec.kind == "buffer" and a.first[number] >= 0 and number not in a.zeroed:
            (a.fresh if number in results else a.arena).append(number)
    a.arena.sort(key=lambda value: a.first[value])


def _find_in_place(plan: FunctionPlan, a: Analysis) -> None:
    """Declared pairs where the operand's memory dies at the step, and the kernel reads all of that
    memory as declared: element by element, in order."""
    sources = {s.outputs[0]: s for s in plan.steps if s.kind == "view"}
    for number, step in enumerate(plan.steps):
        pairs = step.options.get("inplace", []) if step.kind in ("kernel", "library") else []
        for pair in step.options.get("updates", []) if step.kind == "kernel" else []:
            _pair(plan, step, pair)
        for pair in pairs:
            output, operand = _pair(plan, step, pair)
            roots = a.roots[operand]
            if len(roots) != 1 or a.last[roots[0]] != number:
                continue
            declared = {i for o, i in pairs if step.outputs[o] == output}
            readers = {i for i, v in enumerate(step.inputs) if roots[0] in a.roots[v]}
            if readers <= declared and all(_covers(step.inputs[i], sources) for i in readers):
                a.in_place.setdefault(output, []).append(roots[0])


def _pair(plan: FunctionPlan, step: Step, pair: object) -> tuple[int, int]:
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        output, operand = pair
        if (
            isinstance(output, int)
            and isinstance(operand, int)
            and 0 <= output < len(step.outputs)
            and 0 <= operand < len(step.inputs)
        ):
            return step.outputs[output], step.inputs[operand]
    raise _fail(plan, f"bad in-place pair {pair!r}", step)


def _covers(value: int, sources: dict[int, Step]) -> bool:
    """Whether a value is all of its root's memory in the same order: the root, or a reshape."""
    while value in sources:
        if sources[value].name != "reshape":
            return False
        value = sources[value].inputs[0]
    return True


def _find_donations(plan: FunctionPlan, a: Analysis) -> None:
    """Results that may take the memory of their argument: nothing reads it later.

    A result that shares memory with another is not placed there: the argument may be state, which
    the next call overwrites.
    """
    for result, argument in plan.donates.items():
        value, source = plan.outputs[result], plan.inputs[argument]
        if (
            sum(value in a.roots[v] for v in plan.outputs) > 1
            or (value not in a.fresh and plan.values[value].kind != "owned")
            or value in a.donated
            or argument in a.donated.values()
        ):
            continue
        over = plan.values[value].kind == "buffer" and a.last[source] < a.first[value]
        if over or source in a.in_place.get(value, ()):
            a.donated[value] = argument
