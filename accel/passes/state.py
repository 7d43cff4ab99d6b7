"""What a generator keeps between tokens: the items of its state, and their tensors in a function.

An item is found while @decode is built (`accel.passes.windows`) and has one tensor, an argument and
a result of @prefill, @decode and @extend, donated, in the order of `State.items`:

    tokens   a value of @main that attention reads, along `axis` all tokens so far, or in a ring
             of fewer slots the last ones: position p in slot p modulo the number of slots; with
             `sinks`, that many first tokens, then a ring of the others (`accel.passes.streaming`)
    window   the last few tokens' values of what a convolution or a shift reads
    carry    what a loop over the tokens (`accel.scan`) hands on
    sum      what a running sum, product or extreme has come to

`Function.metadata["kv_cache"]["state"]` describes them to the runtime, which makes them of zeros;
dtypes and shapes are those of the arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accel.ir.module import Function, Value
from accel.ir.types import TensorType


@dataclass(frozen=True)
class Item:
    """One tensor of the state.

    Attributes:
        value: of @main, which it is about: keys, a convolution's operand, a loop's result.
        type: of the tensor.
        axis: along which tokens lie; -1 where none do.
        ring: whether a token's slot is its position modulo the number of slots.
        finite: whether places that no token has reached are read, and count for nothing.
        streams: whether `sinks` first tokens stay, in front of the ring.
    """

    name: str
    kind: str
    value: Value
    type: TensorType
    axis: int = -1
    ring: bool = False
    streams: bool = False
    sinks: int = 0
    finite: bool = False

    def describe(self) -> dict[str, Any]:
        """As JSON, for the runtime and for checks."""
        facts: dict[str, Any] = {"name": self.name, "kind": self.kind, "axis": self.axis}
        if self.ring:
            facts["ring"] = True
        if self.finite:
            facts["finite"] = True
        if self.streams:
            facts["sinks"] = self.sinks
        return facts


class State:
    """The items of a generator, by kind and value."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, Value, int], Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list[Item]:
        return list(self._items.values())

    def find(self, kind: str, value: Value, size: int = 0) -> Item | None:
        return self._items.get((kind, value, size))

    def add(self, item: Item, size: int = 0) -> Item:
        """`size` tells items of one kind about one value apart."""
        return self._items.setdefault((item.kind, item.value, size), item)

    def name(self, kind: str) -> str:
        """A name for the next item of a kind: "keys.0", "window.1"."""
        taken = sum(item.name.rpartition(".")[0] == kind for item in self.items)
        return f"{kind}.{taken}"


@dataclass
class Held:
    """The state inside of one function: arguments, and what they are at its end."""

    function: Function
    arguments: dict[Item, Value] = field(default_factory=dict)
    results: dict[Item, Value] = field(default_factory=dict)

    def argument(self, item: Item) -> Value:
        """The item's tensor at the start; the function gets the argument if it has none."""
        if item not in self.arguments:
            self.arguments[item] = self.function.body.add_arg(item.type, item.name)
        return self.arguments[item]

    def now(self, item: Item) -> Value:
        return self.results.get(item) or self.argument(item)
