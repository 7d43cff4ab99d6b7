"""What a program costs, by its definitions: floating point operations, bytes moved, weights stored.

A rough model, the same for every backend, for ledgers and for "does this pay" questions. Each op
reads its operands and writes its results once, views move nothing, and a kernel or vendor call
moves only what crosses its border. Symbolic sizes take the values given, or typical ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from accel.ir.module import Function, Module, Op, Region, SymbolInfo, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, TensorType, product, substitute

_LOOKUPS = ("embedding", "gather", "take_along", "dynamic_slice")

# A symbolic size without a value: as many as this, where its range allows.
_TYPICAL_SIZE = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating point operations, bytes read and written, and bytes of weights read by name.

    `seconds` is the roofline's estimate: each op takes as long as its operations or its bytes,
    whichever is more; 0 where the machine's rates are not given.
    """

    flops: int = 0
    bytes: int = 0
    weight_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.weight_bytes + other.weight_bytes,
            self.seconds + other.seconds,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.flops - other.flops,
            self.bytes - other.bytes,
            self.weight_bytes - other.weight_bytes,
            self.seconds - other.seconds,
        )


class Rates(Protocol):
    """What the roofline needs of a machine (`accel.compiler.targets.Target` has it)."""

    @property
    def flops(self) -> Mapping[str, float]: ...

    @property
    def bandwidth(self) -> float: ...


def typical_sizes(symbols: Mapping[str, SymbolInfo]) -> dict[str, int]:
    """A plausible value for each symbol."""
    return {
        name: max(info.min, min(_TYPICAL_SIZE, info.max or _TYPICAL_SIZE))
        for name, info in symbols.items()
    }


def module_cost(
    module: Module, sizes: Mapping[str, int] | None = None, rates: Rates | None = None
) -> Cost:
    """Sum over the functions; each stored weight that is read counts once."""
    total = Cost()
    for function in module.functions.values():
        total += function_cost(function, sizes, rates)
    names = {str(op.attributes["name"]): op.result.type for op in _constants(module)}
    weights = sum(int(t.nbytes()) for t in names.values())
    return Cost(total.flops, total.bytes, weights, total.seconds)


class CostMeter:
    """`module_cost` of a program that is measured again and again while passes change it.

    Keeps what each op costs; `settled` ops of a later measurement cost what they did, and ops of
    the same types cost the same.
    """

    def __init__(self, rates: Rates | None = None) -> None:
        self.rates = rates
        self._known: dict[Op, _OpCost] = {}
        self._alike: dict[tuple[object, ...], _OpCost] = {}
        self._sizes: dict[str, int] = {}  # that these costs hold for

    def measure(self, module: Module, settled: Set[Op] = frozenset()) -> Cost:
        flops = moved = 0
        seconds = 0.0
        weights: dict[str, int] = {}
        before, self._known = self._known, {}
        for function in module.functions.values():
            sizes = typical_sizes(function.symbols)
            if sizes != self._sizes:
                self._alike, self._sizes = {}, sizes
            for op in function.ops:
                known = before.get(op) if op in settled else None
                if known is None:
                    known = self._cost(op, sizes)
                self._known[op] = known
                flops, moved, seconds = flops + known[0], moved + known[1], seconds + known[2]
                if known[3]:
                    weights.update(known[3])
        return Cost(flops, moved, sum(weights.values()), seconds)

    def _cost(self, op: Op, sizes: Mapping[str, int]) -> _OpCost:
        if op.name == "constant":
            return 0, 0, 0.0, _weights(op)
        if not op.regions:
            return self._plain_cost(op, sizes)
        inner = [each for region in op.regions for each in region.ops]
        flops = sum([self._cost(each, sizes)[0] for each in inner])
        cost = Cost(flops, _moved(op, sizes))
        weights = [w for each in inner for w in _weights(each)]
        return flops, cost.bytes, self._seconds(op, cost), weights

    def _plain_cost(self, op: Op, sizes: Mapping[str, int]) -> _OpCost:
        """By definition, types, and which operands are one value: it is read once."""
        given = op.operands
        key = (
            op.definition,
            *[v.type for v in given],
            *[r.type for r in op.results],
            *[given.index(v) for v in given],
        )
        found = self._alike.get(key)
        if found is None:
            cost = op_cost(op, sizes)
            found = self._alike[key] = (cost.flops, cost.bytes, self._seconds(op, cost), [])
        return found

    def _seconds(self, op: Op, cost: Cost) -> float:
        if self.rates is None or not cost.bytes:
            return 0.0
        return roofline(cost, op.operands or op.results, self.rates)


# Operations, bytes, seconds, and the weights by name with their bytes.
_OpCost: TypeAlias = tuple[int, int, float, list[tuple[str, int]]]


def _weights(op: Op) -> list[tuple[str, int]]:
    if op.name != "constant":
        return []
    return [(str(op.attributes["name"]), int(op.result.type.nbytes()))]


def function_cost(
    function: Function, sizes: Mapping[str, int] | None = None, rates: Rates | None = None
) -> Cost:
    """Operations and bytes of one function (weights are counted by `module_cost`)."""
    values = typical_sizes(function.symbols) | dict(sizes or {})
    return region_cost(function.body, values, rates)


def region_cost(region: Region, sizes: Mapping[str, int], rates: Rates | None = None) -> Cost:
    flops = moved = 0
    seconds = 0.0
    for op in region.ops:
        cost = op_cost(op, sizes)
        flops, moved = flops + cost.flops, moved + cost.bytes
        if rates is not None and cost.bytes:
            seconds += roofline(cost, op.operands or op.results, rates)
    return Cost(flops, moved, 0, seconds)


def roofline(cost: Cost, values: Sequence[Value], rates: Rates) -> float:
    """Seconds that a machine needs at least: for the operations, or for the bytes."""
    name = str(values[0].dtype).removeprefix("torch.")
    peak = rates.flops.get(name) or max(rates.flops.values(), default=0.0)
    compute = cost.flops / peak if peak else 0.0
    memory = cost.bytes / rates.bandwidth if rates.bandwidth else 0.0
    return max(compute, memory)


def op_cost(op: Op, sizes: Mapping[str, int] | None = None) -> Cost:
    """Operations and bytes of one op; regions count their operations only."""
    sizes = sizes or {}
    if op.has(Trait.TERMINATOR) or op.has(Trait.CONSTANT):
        return Cost()
    if op.regions:
        flops = sum(op_cost(inner, sizes).flops for r in op.regions for inner in r.ops)
    else:
        flops = _flops(op, sizes)
    return Cost(flops, _moved(op, sizes))


def _moved(op: Op, sizes: Mapping[str, int]) -> int:
    if op.has(Trait.VIEW):
        return 0
    if op.regions:
        return _moved_by_region(op, sizes)
    written = sum(_written(r, sizes) for r in op.results)
    return written + sum(_read_by(op, v, sizes) for v in dict.fromkeys(op.operands))


def _moved_by_region(op: Op, sizes: Mapping[str, int]) -> int:
    """What crosses a kernel's border: of each argument what its region reads, and its results."""
    read: dict[Value, int] = {}
    written = 0
    for region in op.regions:
        for operand, arg in zip(op.operands, region.args):
            wanted = read.get(operand, 0) + _read(arg, sizes)
            read[operand] = min(wanted, _nbytes(operand.type, sizes))
        results = region.results if region.last is not None else ()
        written += sum(_written(v, sizes) for v in results)
    return written + sum(read.values())


def _read(value: Value, sizes: Mapping[str, int]) -> int:
    """Bytes of a value in memory that are read within a region, views looked through."""
    total = _nbytes(value.type, sizes)
    wanted = 0
    for user in value.users:
        if user.has(Trait.TERMINATOR):
            return total
        if user.has(Trait.VIEW) and user.operands[0] is value:
            wanted += _read(user.result, sizes)
        else:
            wanted = max(wanted, _read_by(user, value, sizes))
        if wanted >= total:
            return total
    return wanted


def _read_by(op: Op, value: Value, sizes: Mapping[str, int]) -> int:
    """Bytes that one op reads of one of its operands."""
    total = _nbytes(value.type, sizes)
    if op.name == "expert_linear" and value is op.operands[1]:  # of the experts that are asked for
        rows, experts = _numel(op.operands[2].type, sizes), _size(value.shape[0], sizes)
        return min(total, rows * total // max(experts, 1))
    if value is not op.operands[0]:
        return total
    if op.has(Trait.UPDATE):
        return 0  # written over in place, as a rule
    if op.name in _LOOKUPS:  # only the rows that are wanted
        count = _numel(op.results[0].type, sizes)
        return min(total, count * total // max(_numel(value.type, sizes), 1))
    return total


def _written(value: Value, sizes: Mapping[str, int]) -> int:
    op = value.op
    while op is not None and op.has(Trait.VIEW):
        op = op.operands[0].op
    if op is not None and op.has(Trait.UPDATE) and len(op.operands) > 1:
        return _nbytes(op.operands[1].type, sizes)
    return _nbytes(value.type, sizes)


def _flops(op: Op, sizes: Mapping[str, int]) -> int:
    if not op.results or op.has(Trait.VIEW):
        return 0
    made = _numel(op.results[0].type, sizes)
    if op.has(Trait.CONTRACTION):
        return _contraction_flops(op, made, sizes)
    if op.has(Trait.REDUCTION):
        return max([made, *(_numel(v.type, sizes) for v in op.operands)])
    if op.has(Trait.ELEMENTWISE) or op.has(Trait.DECODE) or op.has(Trait.RANDOM):
        return made
    return 0


def _contraction_flops(op: Op, made: int, sizes: Mapping[str, int]) -> int:
    x = op.operands[0]
    if op.name in ("attention", "cached_attention", "flash_attention", "flash_attention_backward"):
        backward = op.name == "flash_attention_backward"
        q, k, v = op.operands[1:4] if backward else op.operands[:3]
        rows = _size(product(q.shape[:-1]), sizes)
        width = _size(q.shape[3], sizes) + _size(v.shape[3], sizes)
        forward = 2 * rows * _size(k.shape[2], sizes) * width
        return forward * 5 // 2 if backward else forward  # five products, not two
    if op.name == "conv":
        weight = op.operands[1]
        return 2 * made * _size(product(weight.shape[1:]), sizes)
    if op.name == "conv_transpose":
        weight = op.operands[1]
        return 2 * _numel(x.type, sizes) * _size(product(weight.shape[1:]), sizes)
    return 2 * made * _size(x.shape[-1], sizes)


def _numel(type: TensorType, sizes: Mapping[str, int]) -> int:
    return _size(type.numel(), sizes)


def _nbytes(type: TensorType, sizes: Mapping[str, int]) -> int:
    return _size(type.nbytes(), sizes)


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    value = substitute(dim, sizes)
    if isinstance(value, int):
        return value
    guess = substitute(value, {s.name: _TYPICAL_SIZE for s in value.free_symbols})
    return guess if isinstance(guess, int) else math.floor(float(guess))


def _constants(module: Module) -> list[Op]:
    return [op for op in module.walk() if op.name == "constant"]


def stored_bytes(value: Value) -> int:
    """Bytes of the value if it is a stored constant, else 0."""
    made = value.op
    return int(value.type.nbytes()) if made is not None and made.name == "constant" else 0
