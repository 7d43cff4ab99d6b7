"""The program: values, ops, regions, functions, and the module that holds them.

SSA with def-use chains. A region is one list of ops with arguments and results; a function is a
region with a name, and so is the body of a kernel. Ops sit in a doubly linked list, so a pass may
insert and erase while it walks. Nothing is mutated *inside* a program: state is an argument and a
result, and `Function.donates` says which result may take which argument's buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel.errors import VerifyError
from accel.ir.op import AtenCall, Attribute, OpDefinition, Trait
from accel.ir.storage import WeightStore
from accel.ir.types import Dim, TensorType


@dataclass(frozen=True, slots=True)
class Location:
    """A place in the user's model."""

    file: str
    line: int
    scope: str = ""  # module path, e.g. "model.layers.0.self_attn"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        return f"{place} ({self.scope})" if self.scope else place


class Value:
    """An SSA value: made once, by an op or as a region's argument; knows its users."""

    __slots__ = ("index", "name", "owner", "type", "uses")

    def __init__(self, type: TensorType, owner: Op | Region, index: int, name: str = "") -> None:
        self.type = type
        self.owner = owner
        self.index = index
        self.name = name  # a hint for printing
        self.uses: dict[tuple[Op, int], None] = {}  # insertion ordered set of (user, operand index)

    @property
    def op(self) -> Op | None:
        """The op that makes this value; None for a region argument."""
        return self.owner if isinstance(self.owner, Op) else None

    @property
    def users(self) -> list[Op]:
        """Each using op once, in order of first use."""
        return list(dict.fromkeys(op for op, _ in self.uses))

    @property
    def single_user(self) -> Op | None:
        """The user, if this value is used exactly once."""
        return next(iter(self.uses))[0] if len(self.uses) == 1 else None

    def replace_all_uses(self, new: Value) -> None:
        if new is self:
            return
        for op, i in list(self.uses):
            op.set_operand(i, new)

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def dtype(self) -> Any:
        return self.type.dtype

    def __repr__(self) -> str:
        return f"<%{self.name or '?'}: {self.type}>"


class Op:
    """One operation in a region."""

    __slots__ = (
        "_operands",
        "attributes",
        "definition",
        "location",
        "made_by",
        "next",
        "parent",
        "prev",
        "regions",
        "results",
        "segments",
    )

    def __init__(
        self,
        definition: OpDefinition,
        operands: Sequence[Value],
        attributes: Mapping[str, Attribute],
        result_types: Sequence[TensorType],
        *,
        regions: Sequence[Region] = (),
        segments: tuple[int, ...] | None = None,
        location: Location | None = None,
        made_by: str = "",
    ) -> None:
        self.definition = definition
        self._operands: list[Value] = []
        self.attributes: dict[str, Attribute] = dict(attributes)
        self.results = [Value(t, self, i) for i, t in enumerate(result_types)]
        self.regions = list(regions)
        for region in self.regions:
            region.parent = self
        self.segments = segments
        self.location = location
        self.made_by = made_by
        self.parent: Region | None = None
        self.prev: Op | None = None
        self.next: Op | None = None
        self.set_operands(operands)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def operands(self) -> tuple[Value, ...]:
        return tuple(self._operands)

    @property
    def result(self) -> Value:
        """The only result."""
        if len(self.results) != 1:
            raise VerifyError(f"accel.{self.name} has {len(self.results)} results, not one")
        return self.results[0]

    def has(self, trait: Trait) -> bool:
        return bool(self.definition.traits._value_ & trait._value_)  # Flag.__and__ is slow

    def set_operand(self, index: int, value: Value) -> None:
        self._operands[index].uses.pop((self, index))
        self._operands[index] = value
        value.uses[(self, index)] = None

    def set_operands(self, values: Sequence[Value]) -> None:
        for i, old in enumerate(self._operands):
            old.uses.pop((self, i))
        self._operands = list(values)
        for i, new in enumerate(self._operands):
            new.uses[(self, i)] = None

    def operand(self, name: str) -> Value | None:
        """The operand of this name in the definition's signature (None if optional and absent)."""
        names = [o.name for o in self.definition.operands]
        found: Value | None = self.arguments()[names.index(name)]
        return found

    def arguments(self) -> list[Any]:
        """Operands in the definition's argument order, None for absent optional ones."""
        return self.definition.group_operands(self._operands, self.segments)

    def aten_call(self) -> AtenCall | None:
        """The one ATen overload that computes this op, or None; operands appear as Values."""
        attributes = self.definition.complete_attributes(self.attributes)
        return self.definition.aten_call(self.arguments(), attributes)

    def attribute(self, name: str) -> Any:
        """An attribute's value, its default if left out."""
        if name in self.attributes:
            return self.attributes[name]
        for spec in self.definition.attributes:
            if spec.name == name and not spec.required:
                return spec.default
        raise KeyError(f"accel.{self.name} has no attribute '{name}'")

    def erase(self) -> None:
        """Removes the op, which must have no users left."""
        for r in self.results:
            if r.uses:
                raise VerifyError(f"cannot erase accel.{self.name}: {r!r} still has users")
            r.owner = _NOWHERE  # else the two would wait for Python's garbage collector
        self.set_operands(())
        for region in self.regions:
            region.clear()
        if self.parent is not None:
            self.parent._unlink(self)

    def replace_with(self, values: Sequence[Value]) -> None:
        """Points all users of the results to `values`, then erases the op."""
        if len(values) != len(self.results):
            raise VerifyError(f"accel.{self.name}: {len(values)} values for its results")
        for old, new in zip(self.results, values):
            if old.name and not new.name:
                new.name = old.name
            old.replace_all_uses(new)
        self.erase()

    def move_before(self, other: Op) -> None:
        if self.parent is not None:
            self.parent._unlink(self)
        assert other.parent is not None
        other.parent._link(self, other)

    def walk(self) -> Iterator[Op]:
        """This op, then the ops of its regions."""
        yield self
        for region in self.regions:
            yield from region.walk()

    def __repr__(self) -> str:
        types = ", ".join(str(v.type) for v in self._operands)
        results = ", ".join(str(v.type) for v in self.results)
        return f"<accel.{self.name}({types}) {self.attributes} -> {results}>"


class Region:
    """Arguments, a list of ops, and results (the operands of its terminator)."""

    __slots__ = ("args", "first", "last", "parent", "size")

    def __init__(self, arg_types: Sequence[TensorType] = (), names: Sequence[str] = ()) -> None:
        self.args = [Value(t, self, i) for i, t in enumerate(arg_types)]
        for value, name in zip(self.args, names):
            value.name = name
        self.first: Op | None = None
        self.last: Op | None = None
        self.size = 0
        self.parent: Op | Function | None = None

    def add_arg(self, type: TensorType, name: str = "", index: int | None = None) -> Value:
        """A new argument: the last one, or in front of the one at `index`."""
        place = len(self.args) if index is None else index
        for value in self.args[place:]:
            value.index += 1
        self.args.insert(place, made := Value(type, self, place, name))
        return made

    def remove_arg(self, index: int) -> None:
        if self.args[index].uses:
            raise VerifyError(f"cannot remove argument {index}: it has users")
        for value in self.args[index:]:
            value.index -= 1
        del self.args[index]

    @property
    def ops(self) -> Iterator[Op]:
        """The ops in order. Any op may be erased and others inserted while iterating.

        An erased op keeps its `next`, so the walk finds its way back; ops moved ahead of the walk's
        position are seen (again) there.
        """
        op = self.first
        while op is not None:
            if op.parent is self:
                yield op
            op = op.next

    def reversed_ops(self) -> Iterator[Op]:
        op = self.last
        while op is not None:
            previous = op.prev
            yield op
            op = previous

    def walk(self) -> Iterator[Op]:
        for op in self.ops:
            yield from op.walk()

    @property
    def terminator(self) -> Op:
        if self.last is None or not self.last.has(Trait.TERMINATOR):
            raise VerifyError("a region has no terminator")
        return self.last

    @property
    def results(self) -> tuple[Value, ...]:
        return self.terminator.operands

    def append(self, op: Op) -> Op:
        return self._link(op, None)

    def insert_before(self, op: Op, other: Op) -> Op:
        return self._link(op, other)

    def clear(self) -> None:
        for op in list(self.reversed_ops()):
            for r in op.results:
                r.uses.clear()
            op.erase()

    def _link(self, op: Op, before: Op | None) -> Op:
        prev = self.last if before is None else before.prev
        op.parent, op.prev, op.next = self, prev, before
        if prev is None:
            self.first = op
        else:
            prev.next = op
        if before is None:
            self.last = op
        else:
            before.prev = op
        self.size += 1
        return op

    def _unlink(self, op: Op) -> None:
        if op.prev is None:
            self.first = op.next
        else:
            op.prev.next = op.next
        if op.next is None:
            self.last = op.prev
        else:
            op.next.prev = op.prev
        op.parent = op.prev = None  # `next` stays for walks in progress
        self.size -= 1


_NOWHERE = Region()  # holds what erased ops made


@dataclass
class SymbolInfo:
    """The allowed values of one symbolic size: min <= value <= max (None: no bound)."""

    min: int = 2
    max: int | None = None


class Function:
    """A named region. `donates[result] = argument` lets a result take an argument's buffer."""

    def __init__(self, name: str, arg_types: Sequence[TensorType] = (), names: Sequence[str] = ()):
        self.name = name
        self.body = Region(arg_types, names)
        self.body.parent = self
        self.symbols: dict[str, SymbolInfo] = {}
        self.donates: dict[int, int] = {}
        # JSON-able facts for the calling side: argument names, pytree specs, kinds of results...
        self.metadata: dict[str, Any] = {}

    @property
    def args(self) -> list[Value]:
        return self.body.args

    @property
    def ops(self) -> Iterator[Op]:
        return self.body.ops

    @property
    def results(self) -> tuple[Value, ...]:
        return self.body.results

    def walk(self) -> Iterator[Op]:
        return self.body.walk()

    def __repr__(self) -> str:
        return f"<function @{self.name}: {len(self.args)} args, {self.body.size} ops>"


@dataclass
class Module:
    """Functions, the weights they refer to by name, and JSON-able metadata."""

    functions: dict[str, Function] = field(default_factory=dict)
    weights: WeightStore = field(default_factory=WeightStore)
    metadata: dict[str, Any] = field(default_factory=dict)

    def add(self, function: Function) -> Function:
        if function.name in self.functions:
            raise VerifyError(f"function @{function.name} is defined twice")
        self.functions[function.name] = function
        return function

    @property
    def main(self) -> Function:
        """@main, or the only function."""
        if "main" in self.functions:
            return self.functions["main"]
        if len(self.functions) == 1:
            return next(iter(self.functions.values()))
        raise VerifyError("the module has no @main function")

    def walk(self) -> Iterator[Op]:
        for function in self.functions.values():
            yield from function.walk()

    def dissolve(self) -> None:
        """Takes the program apart (metadata and weights stay), so that it leaves no garbage."""
        for op in list(self.walk()):
            op._operands.clear()
            op.parent = op.prev = op.next = None
            for value in op.results:
                value.uses.clear()
                value.owner = _NOWHERE
            while op.regions:
                op.regions.pop().args.clear()
        self.functions.clear()

    def clone(self) -> Module:
        """A deep copy of the program; weight tensors are shared (they are never written)."""
        copy = Module(weights=self.weights.copy(), metadata=dict(self.metadata))
        copy.functions = {name: clone_function(f) for name, f in self.functions.items()}
        return copy


def clone_function(function: Function, name: str | None = None) -> Function:
    new = Function(name or function.name, [a.type for a in function.args])
    new.symbols = {k: SymbolInfo(v.min, v.max) for k, v in function.symbols.items()}
    new.donates, new.metadata = dict(function.donates), dict(function.metadata)
    clone_region_into(function.body, new.body, {})
    return new


def clone_region_into(source: Region, target: Region, mapping: dict[Value, Value]) -> None:
    """Copies the ops of `source` to the end of `target`, whose arguments stand for source's."""
    for old, new in zip(source.args, target.args):
        mapping[old] = new
        new.name = new.name or old.name
    for op in source.ops:
        target.append(clone_op(op, mapping))


def clone_op(op: Op, mapping: dict[Value, Value]) -> Op:
    """A copy of `op` over mapped operands (unmapped ones stay); extends `mapping`."""
    regions = []
    for region in op.regions:
        copy = Region([a.type for a in region.args])
        clone_region_into(region, copy, mapping)
        regions.append(copy)
    new = Op(
        op.definition,
        [mapping.get(v, v) for v in op.operands],
        op.attributes,
        [r.type for r in op.results],
        regions=regions,
        segments=op.segments,
        location=op.location,
        made_by=op.made_by,
    )
    for old, result in zip(op.results, new.results):
        result.name = old.name
        mapping[old] = result
    return new


def constant_name(value: Value) -> str | None:
    """The weight's name if the value is an `accel.constant`."""
    op = value.op
    return str(op.attributes["name"]) if op is not None and op.name == "constant" else None
