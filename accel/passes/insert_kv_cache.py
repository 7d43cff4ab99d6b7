"""A causal language model becomes a generator: @prefill and @decode, and the state between them.

From @main, a forward over whole texts (ids [B, S] -> logits [B, S, V]) in which attention is
`accel.attention`, the pass derives functions. @decode runs one token at a run-time position: what
it needs of every value of @main is that value at one position (`accel.passes.narrow`), so
positions, rotary tables, masks and biases follow by themselves; keys and values are written into
caches of `capacity` positions and attention reads those. A sliding window needs no more slots than
it is long: its cache is a ring. Convolutions and shifts along the text keep their last operands,
loops over the tokens (`accel.scan`) what they hand on (`accel.passes.recurrent`). @prefill runs a
prompt and fills that state; @extend, if asked for, runs a few tokens and returns the logits of all.
Of an encoder-decoder, @encode computes what every token reads and no token changes, once. The state
is arguments and results, donated (`accel.passes.state`). An op that mixes tokens in any other way
is an error with its name and its line.

Contract: exact, and decode equivalence: prefill(n + 1) == prefill(n), decode(1), which `check`
measures with the interpreter in float64. Before and after:

    %2 = "accel.rope"(%k, %cos, %sin) ...           // cos, sin: of positions 0, 1, 2...
    %3 = "accel.attention"(%q, %2, %v) {scale = 0.25, causal = true} ...

    %2 = "accel.rope"(%k, %cos, %sin) ...           // cos, sin: of %position
    %3 = "accel.dynamic_update"(%keys, %2, %position) {axis = 2} ...
    %4 = "accel.dynamic_update"(%values, %v, %position) {axis = 2} ...
    %5 = "accel.cached_attention"(%q, %3, %4, %position) {scale = 0.25} ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from accel.errors import CaptureError, OptionError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, SymbolInfo, Value
from accel.ir.storage import WeightStore
from accel.ir.types import Dim, TensorType, same_dim, simplify_dim, symbol_names
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.equivalence import check_decode
from accel.passes.every_token import every_token
from accel.passes.mixing import check_order
from accel.passes.narrow import WHOLE, Axes, depend_on, stored
from accel.passes.row_positions import fix_rows, give_positions, row_axis
from accel.passes.state import Held, Item, State
from accel.passes.windows import LastToken, NextTokens

_COUNT = sympy.Symbol("count", integer=True, positive=True)
_ROUND = 16  # slots of a ring with room for several tokens are a multiple of this


@register_pass
@dataclass
class InsertKvCache(Pass):
    """Derives @prefill and @decode from @main; @extend and @encode where there is a use for them.

    Options:
        capacity: positions of the cache: the longest text, prompt included.
        batch: rows of the functions; 0 leaves the number of rows as @main has it.
        extend: the most tokens that @extend takes at a time; 0: there is no @extend.
        rings: whether attention with a sliding window keeps no more tokens than it sees.
        unequal: @decode takes a position for each row, so that texts of unequal length run
            together (`accel.passes.row_positions`). Where an op has no form for that, the report
            names it, and @decode takes one position. Needs @main with a symbol for its rows.
    """

    name: ClassVar[str] = "insert_kv_cache"
    contract: ClassVar[Contract] = EXACT

    capacity: int = 1024
    batch: int = 0
    extend: int = 0
    rings: bool = True
    unequal: bool = False

    def run(self, module: Module, context: Context) -> None:
        if self.capacity < 2:
            raise OptionError(f"insert_kv_cache: a cache of {self.capacity} positions")
        if not 0 <= self.extend <= self.capacity:
            raise OptionError(f"insert_kv_cache: extend = {self.extend}")
        model = _Model(module.main, self, module.weights)
        if not context.rewrite(self.name):
            return
        decode = self._decode(model, context)
        if not model.state.items:
            raise CaptureError(
                "the model has no attention over its tokens, so there is nothing to cache",
                advice="run the exact passes first: raise_attention finds attention",
            )
        made = [model.prefill(), decode]
        if self.extend:
            made.append(model.next_tokens("extend", _COUNT))
        if model.fixed:
            made.append(model.encode())
        facts = {
            "capacity": self.capacity,
            "caches": len(model.state),
            "vocabulary": _table_rows(model.main, model.ids),
            "state": [model.describe_item(item) for item in model.state.items],
            "fixed": len(model.fixed),
            "extend": self.extend,
            "unequal": bool(decode.args[1].shape),
        }
        if self.unequal and self.batch and isinstance(model.batch, sympy.Symbol):
            for function in made:
                fix_rows(function, {model.batch.name: self.batch})
        module.metadata["kv_cache"] = facts
        for function in made:
            module.add(function)
            function.metadata["kv_cache"] = facts
        context.notes["caches"] = len(model.state)

    def _decode(self, model: _Model, context: Context) -> Function:
        """@decode, with a position for each row if so chosen and possible."""
        decode = model.next_tokens("decode", 1)
        if not self.unequal or not isinstance(model.batch, sympy.Symbol):
            return decode
        try:
            for item in model.state.items:
                row_axis(item.type, model.batch)
            give_positions(decode, decode.args[1], model.batch)
        except CaptureError as error:
            context.miss(self.name, next(iter(model.main.ops)), f"{error} ({error.where})")
            return model.next_tokens("decode", 1)
        return decode

    def check(self, module: Module, seed: int) -> float:
        """Decode equivalence (`accel.passes.equivalence`)."""
        return check_decode(module, seed=seed) if "kv_cache" in module.metadata else 0.0


class _Model:
    """What @main says: which argument holds the ids, its sizes, and what must be kept."""

    def __init__(self, main: Function, options: InsertKvCache, weights: WeightStore) -> None:
        self.weights = weights
        self.main, self.capacity, self.extend = main, options.capacity, options.extend
        self.ids, self.length = _ids(main)
        self.others = [a for a in main.args if a is not self.ids]
        limit = main.symbols[self.length.name].max
        # Where keys are turned by their place in the cache, places stay within it.
        names = {op.name for op in main.ops}
        streams = "streaming_attention" in names and "attention" not in names
        if limit is not None and self.capacity > limit and not streams:
            raise OptionError(
                f"insert_kv_cache: a cache of {self.capacity} positions, and the model takes "
                f"{limit}"
            )
        rows = self.ids.shape[0]
        # Rows stay a symbol until each of them has a position.
        later = options.unequal and isinstance(rows, sympy.Symbol)
        batch = 0 if later else options.batch
        self.batch: Dim = batch or rows
        self.sizes: dict[str, Dim] = {}
        if batch and isinstance(rows, sympy.Symbol):
            self.sizes[rows.name] = batch
        elif batch and rows != batch:
            raise OptionError(f"insert_kv_cache: batch = {batch}, captured with {rows}")
        self.state = State()
        self.slots = self._slots(options.rings)
        self.fixed = self._fixed()

    def _slots(self, rings: bool) -> dict[Value, int]:
        """How many tokens' keys and values are kept. Layers may share them."""
        found: dict[Value, int] = {}
        for op in self.main.ops:
            if op.name != "attention" or not _has(op.operands[1], self.length):
                continue
            _check_causal(op, self.length)
            if not same_dim(op.operands[1].shape[2], self.length):
                continue
            window = op.attribute("window")
            slots = self.capacity
            if window is not None and rings and op.arguments()[3] is None:
                slots = window if not self.extend else _rounded(window + self.extend - 1)
            for value in (*stored(op.operands[1]), *stored(op.operands[2])):
                found[value] = max(found.get(value, 0), min(slots, self.capacity))
        return found

    def _fixed(self) -> list[Value]:
        """What the tokens read of the other arguments: an encoder's keys and values."""
        tokens, others = depend_on([self.ids]), depend_on(self.others)
        found: list[Value] = []
        for op in self.main.ops:
            if any(v in tokens for v in op.operands):
                found += [v for v in op.operands if v in others and v not in tokens]
        return list(dict.fromkeys(found))

    def start(self, name: str, count: Dim) -> _Start:
        """An empty function with its first arguments; the state's come after them."""
        function = Function(name)
        add = function.body.add_arg
        ids = add(TensorType((self.batch, count), self.ids.dtype), "input_ids")
        position = None
        if count is not self.length:
            position = add(TensorType((), torch.int64), "position")
        fixed = {v: add(self.here(v.type), f"fixed.{i}") for i, v in enumerate(self.fixed)}
        held = Held(function)
        for item in self.state.items:
            held.argument(item)
        return _Start(held, ids, position, {(v, WHOLE): a for v, a in fixed.items()})

    def here(self, type_: TensorType) -> TensorType:
        return TensorType(tuple(_replaced(d, self.sizes) for d in type_.shape), type_.dtype)

    def finish(self, held: Held, logits: Value, b: Builder) -> Function:
        """The return, and what the runtime must know."""
        function, items = held.function, self.state.items
        b.location = None
        b.op("return", [logits, *(held.now(item) for item in items)])
        self.describe(function, 1 + len(items))
        first = len(function.args) - len(items)
        function.donates = {1 + i: first + i for i in range(len(items))}
        return function

    def describe_item(self, item: Item) -> dict[str, Any]:
        """What the runtime must know of an item; along which axis its rows lie, if they do."""
        facts = item.describe()
        if isinstance(self.batch, sympy.Symbol) and self.batch in item.type.shape:
            facts["rows"] = row_axis(item.type, self.batch)
        return facts

    def describe(self, function: Function, results: int) -> None:
        given = {n for a in function.args for d in a.shape for n in _names(d)}
        function.symbols = {
            n: SymbolInfo(1, s.max) for n, s in self.main.symbols.items() if n in given
        }
        if _COUNT.name in given:
            function.symbols[_COUNT.name] = SymbolInfo(1, self.extend)
        function.metadata = {
            "arguments": [{"name": a.name, "kind": "input"} for a in function.args],
            "results": [{"kind": "output"}] * results,
            "guards": [],
        }

    def prefill(self) -> Function:
        """@main over the prompt, and what the state is after it; the logits of one token."""
        start = self.start("prefill", self.length)
        held, function = start.held, start.held.function
        b = Builder(function.body, made_by=InsertKvCache.name)
        last = LastToken(self.main, self.ids, b, self.length, self.sizes, self.length)
        last.made |= {(self.ids, WHOLE): start.ids} | start.fixed
        for item in self.state.items:  # first: what is there whole is not computed for one token
            last.build(item.value, WHOLE)
        logits = last(self.main.results[0])
        b.location = None
        zero = b.scalar(0, torch.int64)
        for item in self.state.items:
            held.results[item] = last.state(item, held.argument(item), zero)
        self.finish(held, logits, b)
        info = function.symbols[self.length.name]
        info.min = least_tokens(function, self.length)
        info.max = self.capacity if info.max is None else min(info.max, self.capacity)
        function.metadata["guards"] = self.main.metadata.get("guards", [])
        return function

    def next_tokens(self, name: str, count: Dim) -> Function:
        """`count` tokens from a position on: the logits of each."""
        start = self.start(name, count)
        b = Builder(start.held.function.body, made_by=InsertKvCache.name)
        tokens = NextTokens(self.main, self.ids, b, self.length, self.sizes, self.capacity, count)
        assert start.position is not None
        tokens.start(start.position, start.ids, start.held, self.state, self.slots)
        tokens.made |= start.fixed
        logits = tokens(self.main.results[0])
        if tokens.kept or tokens.unproven or tokens.unstable:
            check_order(tokens, self.weights)
        return self.finish(start.held, logits, b)

    def encode(self) -> Function:
        """What is fixed, from the other arguments."""
        function = Function("encode")
        b = Builder(function.body, made_by=InsertKvCache.name)
        whole = LastToken(self.main, self.ids, b, self.length, self.sizes, self.length)
        for value in self.others:
            whole.made[value, WHOLE] = function.body.add_arg(self.here(value.type), value.name)
        made = [whole.build(value, WHOLE) for value in self.fixed]
        b.location = None
        b.op("return", made)
        self.describe(function, len(made))
        function.metadata["guards"] = [
            guard
            for guard in self.main.metadata.get("guards", [])
            if _named(guard, self.main) <= set(function.symbols)
        ]
        return function


@dataclass(frozen=True)
class _Start:
    """A function's first arguments."""

    held: Held
    ids: Value
    position: Value | None
    fixed: dict[tuple[Value, Axes], Value]


def _ids(main: Function) -> tuple[Value, sympy.Symbol]:
    """The argument with the text's ids, and the symbol of its length."""
    result = main.results[0] if len(main.results) == 1 else None
    known = [a for a in main.args if a.dtype in (torch.int64, torch.int32)]
    if len(known) != len(main.args) or not known:
        names = ", ".join(a.name for a in main.args)
        raise CaptureError(
            f"a generator is derived from a forward over token ids alone; this one takes "
            f"{names or 'nothing'}",
            advice="capture the model with input_ids only, and with use_cache=False",
        )
    ids = known[-1]
    shape = ids.shape
    if len(shape) != 2 or not isinstance(shape[1], sympy.Symbol):
        raise CaptureError(
            f"the ids are {ids.type}: the length of the text is no symbol",
            advice='capture with dynamic_shapes={"input_ids": {1: Dim("length")}}',
        )
    if result is not None and not _has(result, shape[1]):
        every_token(main, ids, shape[1])
        result = main.results[0]
    if result is None or not _has(result, shape[1]):
        raise CaptureError(
            "a generator needs one result, logits [batch, length, vocabulary]",
            advice="return the logits alone, with use_cache=False",
        )
    return ids, shape[1]


def least_tokens(function: Function, length: sympy.Symbol) -> int:
    """The shortest text of a function: what selects k tokens (`min(k, length)` of longer ones) has
    no form for fewer. The runtime decodes such prompts token by token."""
    found = [1]
    for op in function.ops:
        if op.name == "topk" and same_dim(op.operands[0].shape[op.attribute("axis")], length):
            k = op.attribute("k")
            found += [k] if isinstance(k, int) else []
    return max(found)


def _named(guard: dict[str, str], main: Function) -> set[str]:
    """The symbols in a condition between sizes."""
    words = re.findall(r"\w+", f"{guard['left']} {guard['right']}")
    return set(words) & set(main.symbols)


def _rounded(slots: int) -> int:
    return -(-slots // _ROUND) * _ROUND


def _table_rows(main: Function, ids: Value) -> Dim:
    """How many different token ids there are."""
    tables = [u.operands[0] for u in ids.users if u.name == "embedding"]
    return tables[0].shape[0] if tables else main.results[0].shape[-1]


def _check_causal(op: Op, length: sympy.Symbol) -> None:
    place = str(op.location or "")
    others = simplify_dim(op.operands[1].shape[2] - length)  # keys in front of the tokens'
    in_front = not same_dim(others, 0) and same_dim(op.attribute("offset"), others)
    if op.attribute("causal") and in_front and op.attribute("window") is None:
        return
    if not op.attribute("causal") and op.attribute("offset") == 0 and op.operand("mask"):
        return  # the mask may say it in its own way: `accel.passes.mixing.check_order`
    if not op.attribute("causal") or op.attribute("offset") != 0:
        raise CaptureError(
            "accel.attention: a token sees tokens after it, or its mask is not known to be causal",
            where=place,
            advice="only causal models generate token by token",
        )


def _names(dim: Dim) -> tuple[str, ...]:
    return () if isinstance(dim, int) else symbol_names(dim)


def _has(value: Value, length: sympy.Symbol) -> bool:
    """Whether the value says something about every token."""
    return any(not isinstance(d, int) and length.name in symbol_names(d) for d in value.shape)


def _replaced(dim: Dim, sizes: dict[str, Dim]) -> Dim:
    if isinstance(dim, int):
        return dim
    made = dim.subs({s: sizes[s.name] for s in dim.free_symbols if s.name in sizes})
    return int(made) if made.is_Integer else made
