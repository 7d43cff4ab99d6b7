"""Delta debugging of programs: the smallest function on which a test still fails.

`reduce_function(module, name, fails, hint)` drops ops (their results become arguments), results and
arguments, and shrinks sizes, as long as `fails(candidate)` stays true (Zeller & Hildebrandt, 2002).
It starts from the neighbourhood of `hint`, the op at which something went wrong, when that alone
fails already; so the cost hardly depends on the program's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accel.errors import AccelError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, SymbolInfo, Value, clone_op
from accel.ir.op import Trait
from accel.ir.types import TensorType
from accel.ir.verify import verify

Fails = Callable[[Module], bool]


def reduce_function(module: Module, name: str, fails: Fails, hint: int | None = None) -> Module:
    """A module with one function, as small as found, for which `fails` is true.

    Args:
        module: `fails(module)` is true; it is not changed.
        name: the function at fault.
        hint: place of the op (in the order of the function's ops) near which the fault is.
    """
    function = module.functions[name]
    ops = [op for op in function.ops if not op.has(Trait.TERMINATOR)]
    kept = list(range(len(ops)))
    if hint is not None:
        kept = _neighbourhood(module, function, ops, hint, fails) or kept
    kept = _minimize(kept, lambda some: fails(extract(module, function, [ops[i] for i in some])))
    smallest = extract(module, function, [ops[i] for i in kept])
    if not fails(smallest):  # cutting alone hides the fault: keep the function whole
        smallest = _only(module, name)
    smallest = _drop_results(smallest, fails)
    return _shrink_sizes(smallest, fails)


def extract(module: Module, function: Function, ops: Sequence[Op]) -> Module:
    """A module with these ops only: what they read from others is an argument.

    Results are the values that the function returns or that ops left out read.
    """
    members = set(ops)
    new = Function(function.name)
    new.symbols = {k: SymbolInfo(v.min, v.max) for k, v in function.symbols.items()}
    mapping: dict[Value, Value] = {}
    for op in ops:
        for value in op.operands:
            if value not in mapping and value.op not in members:
                mapping[value] = new.body.add_arg(value.type, value.name)
        new.body.append(clone_op(op, mapping))
    results = [
        mapping[r]
        for op in ops
        for r in op.results
        if not r.uses or any(user not in members for user in r.users)
    ]
    Builder(new.body).op("return", results)
    copy = Module(weights=module.weights.copy())
    copy.add(new)
    return copy


def _only(module: Module, name: str) -> Module:
    copy = module.clone()
    copy.functions = {name: copy.functions[name]}
    return copy


def _neighbourhood(
    module: Module, function: Function, ops: list[Op], hint: int, fails: Fails
) -> list[int] | None:
    """The ops within a small distance of the hint, if they fail by themselves."""
    number = {op: i for i, op in enumerate(ops)}
    touching: dict[int, set[int]] = {i: set() for i in number.values()}
    for op, i in number.items():
        for value in op.operands:
            if value.op is not None and value.op in number:
                touching[number[value.op]].add(i)
                touching[i].add(number[value.op])
    near = {hint}
    for radius in range(1, 13):
        near |= {j for i in near for j in touching[i]}
        if len(near) > len(ops) // 2 and radius > 1:
            return None
        if radius in (1, 2, 3, 4, 6, 8, 12):
            chosen = sorted(near)
            if fails(extract(module, function, [ops[i] for i in chosen])):
                return chosen
    return None


def _minimize(items: list[int], test: Callable[[list[int]], bool]) -> list[int]:
    """ddmin: removes chunks, halving them, while the test still fails on the rest."""
    size = max(len(items) // 2, 1)
    while items:
        start, removed = 0, False
        while start < len(items):
            rest = items[:start] + items[start + size :]
            if rest and test(rest):
                items, removed = rest, True
            else:
                start += size
        if size == 1 and not removed:
            break
        size = max(size // 2, 1)
    return items


def _drop_results(module: Module, fails: Fails) -> Module:
    (name,) = module.functions
    count = len(module.functions[name].results)
    keep = _minimize(list(range(count)), lambda some: fails(_with_results(module, name, some)))
    candidate = _with_results(module, name, keep)
    return candidate if fails(candidate) else module


def _with_results(module: Module, name: str, keep: Sequence[int]) -> Module:
    copy = module.clone()
    function = copy.functions[name]
    terminator = function.body.terminator
    terminator.set_operands([terminator.operands[i] for i in keep])
    function.donates = {}
    for op in list(function.body.reversed_ops()):
        if op.has(Trait.PURE) and not any(r.uses for r in op.results):
            op.erase()
    for i in reversed(range(len(function.args))):
        if not function.args[i].uses:
            function.body.remove_arg(i)
    return copy


def _shrink_sizes(module: Module, fails: Fails) -> Module:
    """Replaces sizes by smaller ones wherever they occur, one after the other."""
    (name,) = module.functions
    for size in sorted(_sizes(module.functions[name]), reverse=True):
        for smaller in (2, 3, 4):
            if smaller >= size:
                break
            candidate = _resized(module, name, size, smaller)
            if candidate is not None and fails(candidate):
                module = candidate
                break
    return module


def _sizes(function: Function) -> set[int]:
    return {d for a in function.args for d in a.type.shape if isinstance(d, int) and d > 2}


def _resized(module: Module, name: str, old: int, new: int) -> Module | None:
    """The function with another size in arguments and shapes; None if it does not type-check."""
    copy = module.clone()
    function = copy.functions[name]
    for value in function.args:
        value.type = _replace(value.type, old, new)
    try:
        for op in function.ops:
            if op.definition.infer is None:
                return None
            for key, attribute in op.attributes.items():
                if isinstance(attribute, tuple) and key in ("shape", "size"):
                    op.attributes[key] = tuple(new if d == old else d for d in attribute)
                elif key == "stop" and attribute == old:
                    op.attributes[key] = new
            types = [v.type for v in op.operands]
            made = op.definition.infer_types(types, op.attributes, op.segments)
            for result, type in zip(op.results, made):
                result.type = type
        verify(copy)
    except (AccelError, TypeError, IndexError):
        return None
    return copy


def _replace(type: TensorType, old: int, new: int) -> TensorType:
    return type.with_shape(new if d == old else d for d in type.shape)
