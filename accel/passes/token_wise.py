"""Facts about an op and the sequence axis, found by evaluating the op's definition on small data.

`is_token_wise(op)`: the result at token t follows from the operands at token t alone.
`is_prefix_stable(value)`: what no token has a say in (positions, masks, tables) and what a longer
text would only make longer: its first n entries are those of a text of n tokens.

A definition's `evaluate` is what the op means, so no list of ops has to be kept. The data are
random: an op that mixes tokens is found unless it does so for no input that is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from accel.errors import AccelError
from accel.ir.interpret import interpret
from accel.ir.module import Function, Op, SymbolInfo, Value, clone_op
from accel.ir.op import OpDefinition, Trait, definition
from accel.ir.storage import WeightStore
from accel.ir.types import Dim, TensorType, simplify_dim, symbol_names, value_dtype

_TOKENS = 3
_LONGER, _MORE = 7, 4  # tokens of texts whose later ones must not matter, and of longer ones
_BATCH = 2
_DRAWS = 4  # where masks and indices, 0 or 1, may hide for one draw that tokens mix
_MOST_ELEMENTS = 1 << 26
_MOST_ELEMENTS_TRIED = 1 << 22  # of an op that may be in a program many times


def is_token_wise(op: Op, length: sympy.Symbol) -> bool:
    """Whether narrowing all operands to one token narrows all results."""
    if op.regions or op.definition.evaluate is None or op.has(Trait.RANDOM):
        return False
    types = tuple(v.type for v in op.operands)
    results = tuple(r.type for r in op.results)
    attributes = tuple(op.attributes.items())
    return _token_wise(op.definition, types, results, attributes, op.segments, length)


@lru_cache(4096)
def _token_wise(
    meaning: OpDefinition,
    types: tuple[TensorType, ...],
    results: tuple[TensorType, ...],
    attributes: tuple[tuple[str, Any], ...],
    segments: tuple[int, ...] | None,
    length: sympy.Symbol,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    operands = [_random(t, length, generator) for t in types]

    def run(values: Sequence[Tensor], tokens: int) -> list[Tensor]:
        given = {name: _sized(v, length, tokens) for name, v in attributes}
        arguments = meaning.group_operands(values, segments)
        assert meaning.evaluate is not None
        made = meaning.evaluate(*arguments, **meaning.complete_attributes(given))
        return [made] if isinstance(made, Tensor) else list(made)

    try:
        everything = run(operands, _TOKENS)
        for token in (_TOKENS - 1, 0):
            one = run([_at(x, t, length, token) for x, t in zip(operands, types)], 1)
            for type_, whole, part in zip(results, everything, one):
                wanted = _at(whole, type_, length, token)
                if wanted.shape != part.shape or not _close(wanted, part):
                    return False
    except (RuntimeError, IndexError, ValueError, TypeError, AccelError):
        return False  # sizes that do not fit: the op does not take one token
    return True


def is_token_wise_in(
    op: Op, axes: frozenset[int], needs: Sequence[frozenset[int]], length: sympy.Symbol
) -> bool:
    """Whether narrowing each operand on its axes of `needs` narrows every result on `axes`."""
    if op.regions or op.definition.evaluate is None or op.has(Trait.RANDOM):
        return False
    types = tuple(v.type for v in op.operands)
    attributes = tuple(op.attributes.items())
    return _token_wise_in(
        op.definition,
        types,
        tuple(r.type for r in op.results),
        attributes,
        op.segments,
        length,
        axes,
        tuple(needs),
    )


def is_index_wise(op: Op, axis: int, needs: Sequence[int | None]) -> bool:
    """Whether a range of the result along `axis` follows from that range of each operand along its
    axis of `needs` (None: from all of it). Sizes other than the axis's are the op's own."""
    if op.regions or op.definition.evaluate is None or op.has(Trait.RANDOM):
        return False
    index = sympy.Symbol("index", integer=True, positive=True)

    def along(type_: TensorType, own: int | None) -> TensorType:
        shape = [index if i == own else d for i, d in enumerate(type_.shape)]
        return TensorType(tuple(shape), type_.dtype)

    types = tuple(along(v.type, n) for v, n in zip(op.operands, needs))
    if sum(_elements(t, index) for t in types) > _MOST_ELEMENTS_TRIED:
        return False
    return _token_wise_in(
        op.definition,
        types,
        (along(op.result.type, axis),),
        tuple(op.attributes.items()),
        op.segments,
        index,
        frozenset((axis,)),
        tuple(frozenset(() if n is None else (n,)) for n in needs),
    )


@lru_cache(4096)
def _token_wise_in(
    meaning: OpDefinition,
    types: tuple[TensorType, ...],
    results: tuple[TensorType, ...],
    attributes: tuple[tuple[str, Any], ...],
    segments: tuple[int, ...] | None,
    length: sympy.Symbol,
    axes: frozenset[int],
    needs: tuple[frozenset[int], ...],
) -> bool:
    generator = torch.Generator().manual_seed(0)
    complete = meaning.complete_attributes(
        {name: _sized(v, length, _TOKENS) for name, v in attributes}
    )

    def run(values: Sequence[Tensor]) -> list[Tensor]:
        assert meaning.evaluate is not None
        made = meaning.evaluate(*meaning.group_operands(values, segments), **complete)
        return [made] if isinstance(made, Tensor) else list(made)

    def agrees() -> bool:
        operands = [_random(t, length, generator) for t in types]
        everything = run(operands)
        for token in (_TOKENS - 1, 0):
            given = [_at(x, t, length, token, n) for x, t, n in zip(operands, types, needs)]
            for type_, whole, made in zip(results, everything, run(given)):
                wanted = _at(whole, type_, length, token, axes)
                if wanted.shape != made.shape or not _close(wanted, made):
                    return False
        return True

    floating = all(value_dtype(t.dtype).is_floating_point for t in types)
    try:
        return all(agrees() for _ in range(1 if floating else _DRAWS))
    except (RuntimeError, IndexError, ValueError, TypeError, AccelError):
        return False  # sizes that do not fit


def what_follows_wrongly(
    ops: Sequence[Op],
    inputs: Sequence[Value],
    result: Value,
    length: sympy.Symbol,
    weights: WeightStore,
) -> str:
    """What else than inputs at a token and before it `result` at the token depends on; "" if
    nothing.

    Constants among the ops are what they are: masks that are stored may be among them.
    """
    generator = torch.Generator().manual_seed(0)
    with _probe(ops, inputs, result) as function:
        given = [_random(v.type, length, generator, _LONGER) for v in inputs]

        def differs(other: Sequence[Tensor], tokens: int, place: int) -> bool:
            made = interpret(function, other, weights)[0]
            old = _at(first, result.type, length, place, None, _LONGER)
            return not _close(old, _at(made, result.type, length, place, None, tokens))

        try:
            first = interpret(function, given, weights)[0]
            if bool(first.isnan().all()):
                return "is no number for any input that was tried"
            for token in (_LONGER - 2, _LONGER // 2, 0):
                changed = [
                    _changed(x, v.type, length, token, generator) for x, v in zip(given, inputs)
                ]
                if any(differs(changed, _LONGER, place) for place in range(token + 1)):
                    return "mixes tokens: one sees those after it"
            longer = [_extended(x, v.type, length, generator) for x, v in zip(given, inputs)]
            if any(differs(longer, _LONGER + _MORE, place) for place in range(_LONGER)):
                return "depends on the length of the text"
        except (RuntimeError, IndexError, ValueError, TypeError, AccelError) as error:
            return f"mixes tokens in a way that cannot be tried: {error}"
    return ""


def _extended(
    x: Tensor, type_: TensorType, length: sympy.Symbol, generator: torch.Generator
) -> Tensor:
    """The data of a longer text that begins like this one."""
    made = _random(type_, length, generator, _LONGER + _MORE)
    for axis, dim in enumerate(type_.shape):
        if not isinstance(dim, int) and length in dim.free_symbols:
            inner = dim / length
            outer = _BATCH ** len(inner.free_symbols) if isinstance(inner, sympy.Expr) else 1
            parts = [
                t.unflatten(axis, (outer, n, t.shape[axis] // (outer * n)))
                for t, n in ((x, _LONGER), (made, _LONGER + _MORE))
            ]
            joined = torch.cat([parts[0], parts[1].narrow(axis + 1, _LONGER, _MORE)], axis + 1)
            return joined.flatten(axis, axis + 2)
    return x


def _changed(
    x: Tensor, type_: TensorType, length: sympy.Symbol, token: int, generator: torch.Generator
) -> Tensor:
    """Other data at the tokens after `token`, along the first sequence axis."""
    other = _random(type_, length, generator, _LONGER)
    for axis, dim in enumerate(type_.shape):
        if not isinstance(dim, int) and length in dim.free_symbols:
            places = torch.arange(x.shape[axis])
            after = places * _LONGER // x.shape[axis] if dim == length else places % _LONGER
            keep = (after <= token).reshape(-1, *[1] * (x.dim() - axis - 1))
            return torch.where(keep, x, other)
    return x


@contextmanager
def _probe(ops: Sequence[Op], inputs: Sequence[Value], result: Value) -> Iterator[Function]:
    """A function of these ops, for as long as it is looked at."""
    function = Function("probe", [v.type for v in inputs])
    names = {
        s.name
        for v in (*inputs, *(r for op in ops for r in op.results))
        for d in v.shape
        if not isinstance(d, int)
        for s in d.free_symbols
    }
    function.symbols = {name: SymbolInfo(1) for name in names}
    mapping = dict(zip(inputs, function.args))
    for op in ops:
        function.body.append(clone_op(op, mapping))
    function.body.append(Op(definition("return"), [mapping[result]], {}, ()))
    try:
        yield function
    finally:
        function.body.clear()


def are_token_wise(
    ops: Sequence[Op], inputs: Sequence[Value], result: Value, length: sympy.Symbol
) -> bool:
    """Whether ops, in order, narrow together: `result` at a token follows from inputs at it."""
    if any(op.regions or op.has(Trait.RANDOM) for op in ops):
        return False
    if sum(_elements(v.type, length) for v in inputs) > _MOST_ELEMENTS:
        return False
    generator = torch.Generator().manual_seed(0)
    given = [_random(v.type, length, generator) for v in inputs]
    with _probe(ops, inputs, result) as function:
        try:
            everything = interpret(function, given, WeightStore())[0]
            for token in (_TOKENS - 1, 0):
                part = [_at(x, v.type, length, token) for x, v in zip(given, inputs)]
                one = interpret(function, part, WeightStore())[0]
                wanted = _at(everything, result.type, length, token)
                if wanted.shape != one.shape or not _close(wanted, one):
                    return False
            return True
        except (RuntimeError, IndexError, ValueError, TypeError, AccelError):
            return False  # sizes that do not fit: the ops do not take one token


def _elements(type_: TensorType, length: sympy.Symbol) -> int:
    count = 1
    for dim in type_.shape:
        count *= _number(dim, length, _TOKENS)
    return count


def is_prefix_stable(value: Value, main: Function, length: sympy.Symbol) -> bool:
    """Whether texts of 5 and of 8 tokens agree on the first 5, along every sequence axis.

    The value must not depend on tokens, nor on weights that need reading (those are the same).
    """
    ops = _made_from(value)
    if not any(_mentions(op, length) for op in ops):
        return True
    function = Function("probe", [a.type for a in main.args])
    function.symbols = dict(main.symbols)
    mapping = dict(zip(main.args, function.args))
    constants: list[Value] = []
    for op in main.ops:
        if op not in ops:
            continue
        if op.name == "constant":
            mapping[op.result] = function.body.add_arg(op.result.type)
            constants.append(op.result)
        else:
            function.body.append(clone_op(op, mapping))
    function.body.append(Op(definition("return"), [mapping[value]], {}, ()))
    generator = torch.Generator().manual_seed(0)
    weights = [_random(c.type, length, generator) for c in constants]
    found = []
    for tokens in (5, 8):
        ids = [_zeros(a.type, length, tokens) for a in main.args]
        found.append(interpret(function, [*ids, *weights], WeightStore())[0])
    short, long = found
    for axis, (dim, size) in enumerate(zip(value.shape, short.shape)):
        if not isinstance(dim, int) and length.name in symbol_names(dim):
            long = long.narrow(axis, 0, size)
    function.body.clear()
    return short.shape == long.shape and _close(short, long)


def _made_from(value: Value) -> set[Op]:
    found: set[Op] = set()
    pending = [value]
    while pending:
        op = pending.pop().op
        if op is not None and op not in found:
            found.add(op)
            pending.extend(op.operands)
    return found


def _mentions(op: Op, length: sympy.Symbol) -> bool:
    def inside(value: Any) -> bool:
        if isinstance(value, tuple):
            return any(inside(v) for v in value)
        return isinstance(value, sympy.Expr) and length in value.free_symbols

    return any(inside(v) for v in op.attributes.values())


def _sized(value: Any, length: sympy.Symbol, tokens: int) -> Any:
    """An attribute for a small program."""
    if isinstance(value, tuple):
        return tuple(_sized(v, length, tokens) for v in value)
    return _number(value, length, tokens) if isinstance(value, sympy.Expr) else value


def _number(dim: Dim, length: sympy.Symbol, tokens: int) -> int:
    if isinstance(dim, int):
        return dim
    known = {s: tokens if s == length else _BATCH for s in dim.free_symbols}
    return int(simplify_dim(dim.subs(known)))


def _zeros(type_: TensorType, length: sympy.Symbol, tokens: int) -> Tensor:
    return torch.zeros([_number(d, length, tokens) for d in type_.shape], dtype=type_.dtype)


def _random(
    type_: TensorType, length: sympy.Symbol, generator: torch.Generator, tokens: int = _TOKENS
) -> Tensor:
    """Small data of a type; integers are 0 or 1, which most ops take as indices."""
    shape = [_number(d, length, tokens) for d in type_.shape]
    dtype = value_dtype(type_.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _at(
    x: Tensor,
    type_: TensorType,
    length: sympy.Symbol,
    token: int,
    axes: frozenset[int] | None = None,
    tokens: int = _TOKENS,
) -> Tensor:
    """One token of every sequence axis, or of these; batch and length may be one axis."""
    for axis, dim in enumerate(type_.shape):
        if isinstance(dim, int) or length not in dim.free_symbols:
            continue
        if axes is not None and axis not in axes:
            continue
        others = [s for s in dim.free_symbols if s != length]
        outer = _BATCH ** len(others)
        split = x.unflatten(axis, (outer, tokens, x.shape[axis] // (outer * tokens)))
        x = split.narrow(axis + 1, token, 1).flatten(axis, axis + 2)
    return x


def _close(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
    return torch.equal(a, b)
