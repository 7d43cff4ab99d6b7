"""A causal language model becomes a generator: @prefill and @decode, with a key/value cache.

From @main, a forward over whole texts (ids [B, S] -> logits [B, S, V]) in which attention is
`accel.attention`, the pass derives two functions. @prefill runs a prompt, writes keys and values
into caches of `capacity` positions, and returns the logits of the last token. @decode runs one
token at a run-time position: what it needs of every value of @main is that value at one position
(`accel.passes.narrow`), so positions, rotary tables, masks and biases follow by themselves; keys
and values are written into the caches and attention reads those. Caches are arguments and results,
donated. An op that mixes tokens in any other way is an error with its name and its line.

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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from accel.errors import CaptureError, OptionError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, SymbolInfo, Value
from accel.ir.types import Dim, TensorType, symbol_names
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.equivalence import check_decode
from accel.passes.narrow import WHOLE
from accel.passes.windows import LastToken, OneToken


@register_pass
@dataclass
class InsertKvCache(Pass):
    """Derives @prefill and @decode from @main.

    Options:
        capacity: positions of the cache: the longest text, prompt included.
        batch: rows of the functions; 0 leaves the number of rows as @main has it.
    """

    name: ClassVar[str] = "insert_kv_cache"
    contract: ClassVar[Contract] = EXACT

    capacity: int = 1024
    batch: int = 0

    def run(self, module: Module, context: Context) -> None:
        main = module.main
        if self.capacity < 2:
            raise OptionError(f"insert_kv_cache: a cache of {self.capacity} positions")
        model = _Model(main, self.capacity, self.batch)
        if not context.rewrite(self.name):
            return
        prefill = _prefill(model)
        decode = _decode(model)
        module.add(prefill)
        module.add(decode)
        facts = {
            "capacity": self.capacity,
            "caches": len(model.cached),
            "vocabulary": _table_rows(main),
        }
        module.metadata["kv_cache"] = facts
        for function in (prefill, decode):
            function.metadata["kv_cache"] = facts
        context.notes["caches"] = len(model.cached)

    def check(self, module: Module, seed: int) -> float:
        """Decode equivalence (`accel.passes.equivalence`)."""
        return check_decode(module, seed=seed) if "kv_cache" in module.metadata else 0.0


class _Model:
    """What @main says: which argument holds the ids, its sizes, and what must be cached."""

    def __init__(self, main: Function, capacity: int, batch: int) -> None:
        self.main, self.capacity = main, capacity
        if len(main.args) != 1 or main.args[0].dtype not in (torch.int64, torch.int32):
            names = ", ".join(a.name for a in main.args)
            raise CaptureError(
                f"a generator is derived from a forward over token ids alone; this one takes "
                f"{names or 'nothing'}",
                advice="capture the model with input_ids only, and with use_cache=False",
            )
        shape = main.args[0].shape
        if len(shape) != 2 or not isinstance(shape[1], sympy.Symbol):
            raise CaptureError(
                f"the ids are {main.args[0].type}: the length of the text is no symbol",
                advice='capture with dynamic_shapes={"input_ids": {1: Dim("length")}}',
            )
        self.length = shape[1]
        if len(main.results) != 1 or not _has(main.results[0], self.length):
            raise CaptureError(
                "a generator needs one result, logits [batch, length, vocabulary]",
                advice="return the logits alone, with use_cache=False",
            )
        limit = main.symbols[self.length.name].max
        if limit is not None and capacity > limit:
            raise OptionError(
                f"insert_kv_cache: a cache of {capacity} positions, and the model takes {limit}"
            )
        self.batch: Dim = batch or shape[0]
        self.sizes: dict[str, Dim] = {}
        if batch and isinstance(shape[0], sympy.Symbol):
            self.sizes[shape[0].name] = batch
        elif batch and shape[0] != batch:
            raise OptionError(f"insert_kv_cache: batch = {batch}, captured with {shape[0]}")
        # Keys and values, each once: layers may share them.
        self.cached: list[Value] = list(dict.fromkeys(self._cached()))

    def _cached(self) -> Iterator[Value]:
        found = False
        for op in self.main.ops:
            if op.name != "attention" or not _has(op.operands[1], self.length):
                continue
            found = True
            _check_causal(op)
            yield from op.operands[1:3]
        if not found:
            raise CaptureError(
                "the model has no attention over its tokens, so there is nothing to cache",
                advice="run the exact passes first: raise_attention finds attention",
            )

    def function(self, name: str, count: Dim, position: bool) -> tuple[Function, dict[str, Any]]:
        """An empty function with its arguments: ids, the position if wanted, caches."""
        function = Function(name)
        ids = self.main.args[0]
        arguments = [(TensorType((self.batch, count), ids.dtype), "input_ids")]
        if position:
            arguments.append((TensorType((), torch.int64), "position"))
        for i, value in enumerate(self.cached):
            shape = [_replaced(d, self.sizes) for d in value.shape]
            shape[2] = self.capacity
            kind = "values" if i % 2 else "keys"
            arguments.append((TensorType(tuple(shape), value.dtype), f"{kind}.{i // 2}"))
        made = [function.body.add_arg(t, label) for t, label in arguments]
        function.symbols = {
            n: SymbolInfo(1, s.max) for n, s in self.main.symbols.items() if n not in self.sizes
        }
        first = 2 if position else 1
        function.metadata = {
            "arguments": [{"name": label, "kind": "input"} for _, label in arguments],
            "results": [{"kind": "output"}] * (1 + len(self.cached)),
            "guards": self.main.metadata.get("guards", []) if not position else [],
        }
        function.donates = {1 + i: first + i for i in range(len(self.cached))}
        parts = {
            "ids": made[0],
            "position": made[1] if position else None,
            "caches": dict(zip(self.cached, made[first:])),
        }
        return function, parts


def _table_rows(main: Function) -> Dim:
    """How many different token ids there are."""
    tables = [u.operands[0] for u in main.args[0].users if u.name == "embedding"]
    return tables[0].shape[0] if tables else main.results[0].shape[-1]


def _check_causal(op: Op) -> None:
    place = str(op.location or "")
    if not op.attribute("causal") or op.attribute("offset") != 0:
        raise CaptureError(
            "accel.attention: a token sees tokens after it, or its mask is not known to be causal",
            where=place,
            advice="only causal models generate token by token",
        )


def _has(value: Value, length: sympy.Symbol) -> bool:
    """Whether the value says something about every token."""
    return any(not isinstance(d, int) and length.name in symbol_names(d) for d in value.shape)


def _replaced(dim: Dim, sizes: dict[str, Dim]) -> Dim:
    if isinstance(dim, int):
        return dim
    made = dim.subs({s: sizes[s.name] for s in dim.free_symbols if s.name in sizes})
    return int(made) if made.is_Integer else made


def _prefill(model: _Model) -> Function:
    """@main over the prompt, and writes into the caches; the result is narrowed to one token."""
    function, parts = model.function("prefill", model.length, position=False)
    info = function.symbols[model.length.name]
    info.max = model.capacity if info.max is None else min(info.max, model.capacity)
    b = Builder(function.body, made_by=InsertKvCache.name)
    last = LastToken(model.main, b, model.length, model.sizes, model.length)
    last.made[model.main.args[0], WHOLE] = parts["ids"]
    whole = [last.build(v, WHOLE) for v in model.cached]
    logits = last(model.main.results[0])
    b.location = None
    zero = b.scalar(0, torch.int64)
    written = [
        b.dynamic_update(parts["caches"][value], new, zero, axis=2)
        for value, new in zip(model.cached, whole)
    ]
    b.op("return", [logits, *written])
    return function


def _decode(model: _Model) -> Function:
    """One token at `position`."""
    function, parts = model.function("decode", 1, position=True)
    function.symbols.pop(model.length.name, None)
    b = Builder(function.body, made_by=InsertKvCache.name)
    one = OneToken(model.main, b, model.length, model.sizes, model.capacity)
    one.start(parts["position"], parts["ids"], parts["caches"])
    logits = one(model.main.results[0])
    b.location = None
    b.op("return", [logits, *(one.updated[v] for v in model.cached)])
    return function
