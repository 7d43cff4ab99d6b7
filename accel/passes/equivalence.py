"""Decode equivalence: @prefill of n + 1 tokens is @prefill of n, then @decode of one.

Checked with the interpreter, every float in float64, for several numbers of tokens and rows, up to
the last position of the cache and around the end of every ring: logits, and the state as far as it
is written; so is @extend, where there is one. Where @main is there, the last token's logits are
also @main's. Pages of a paged cache (`accel.passes.page_cache`) lie in another order for every run,
with pages that belong to nobody among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from accel.errors import ContractError
from accel.ir.interpret import interpret
from accel.ir.module import Function, Module, Value
from accel.ir.types import value_dtype
from accel.passes.contracts import EXACT_TOLERANCE, exact_tolerance

TOLERANCE = EXACT_TOLERANCE
_SPARE_PAGES = 2


def check_decode(
    module: Module,
    *,
    steps: int = 3,
    prompts: Sequence[int] = (1, 2, 5),
    batches: Sequence[int] = (1, 3),
    seed: int = 0,
) -> float:
    """The largest relative error of any step. Raises ContractError past what an exact pass may
    change (1e-9), naming the place.

    Prompts are `prompts` tokens long, and such that the last step fills the cache.
    """
    facts = module.metadata["kv_cache"]
    capacity, vocabulary = int(facts["capacity"]), int(facts["vocabulary"])
    generator = torch.Generator().manual_seed(seed)
    # Where torch has no float64 version of an operator, float32 is what there is to compare.
    allowed = max(exact_tolerance(f) for f in module.functions.values())
    worst = 0.0
    for batch in _batches(module.functions["prefill"], batches):
        for first in _prompts(module, prompts, capacity, steps):
            count = min(first + steps, capacity)
            ids = torch.randint(0, vocabulary, (batch, count), generator=generator)
            errors = [_compare(module, ids, first, generator)]
            if batch > 1 and module.metadata["kv_cache"].get("unequal"):
                errors.append(_compare_unequal(module, ids, first, generator))
            for error, where in chain(*errors):
                worst = max(worst, error)
                if not error <= allowed:
                    raise ContractError(
                        f"pass 'insert_kv_cache' promises decode equivalence, but {where} differs "
                        f"by {error:.3g} (relative, float64; allowed: {allowed:g})",
                        where=where,
                        advice="a position, a mask or a cache is off: compare @decode with @main",
                    )
    return worst


def _batches(prefill: Function, wanted: Sequence[int]) -> Sequence[int]:
    size = prefill.args[0].shape[0]
    return (size,) if isinstance(size, int) else wanted


def _prompts(module: Module, wanted: Sequence[int], capacity: int, steps: int) -> list[int]:
    """Lengths of prompts: the caller's, those that end a cache, and those that fill a ring."""
    lengths = {n for n in wanted if n < capacity} | {max(capacity - steps, 1)}
    lengths = {max(n, _least(module)) for n in lengths}
    for item, argument in _state(module):
        if item.get("ring"):
            slots = int(argument.shape[item["axis"]])
            lengths |= {n for n in (slots - 1, slots + 1) if 0 < n < capacity}
    return sorted(lengths)


def _least(module: Module) -> int:
    """The shortest prompt of @prefill."""
    prefill = module.functions["prefill"]
    length = prefill.args[0].shape[1]
    return 1 if isinstance(length, int) else prefill.symbols[str(length)].min


def _state(module: Module) -> list[tuple[dict[str, Any], Value]]:
    """The items of the state and their arguments of @prefill."""
    items = module.metadata["kv_cache"]["state"]
    arguments = module.functions["prefill"].args
    return list(zip(items, arguments[len(arguments) - len(items) :]))


def _compare(
    module: Module, ids: Tensor, first: int, generator: torch.Generator
) -> Iterator[tuple[float, str]]:
    """Errors of single decodes after a prompt of `first`, against prefills of every length."""
    batch, total = ids.shape
    others = _other_inputs(module, batch, generator)
    fixed = _run(module, "encode", others) if "encode" in module.functions else []
    text = _Text(module, batch, fixed, generator)
    state = text.empty
    _, *state = text.run("prefill", ids[:, :first], [], state)
    told = f"after a prompt of {first}, {batch} rows"
    if "extend" in module.functions:
        yield from _compare_extend(text, ids, first, state, generator, told)
    for n in range(first, total):
        place = _position(module, [n] * batch)
        logits, *state = text.run("decode", ids[:, n : n + 1], [place], state)
        whole = _Text(module, batch, fixed, generator)
        wanted, *filled = whole.run("prefill", ids[:, : n + 1], [], whole.empty)
        where = f"@decode at position {n} {told}"
        yield _error(wanted, logits), f"the logits of {where}"
        yield from _compare_state(module, whole.tokens(filled), text.tokens(state), n + 1, where)
        if "main" in module.functions and n > 1 and batch > 1:
            plain = _run(module, "main", [*others, ids[:, : n + 1]])[0]
            yield _error(plain[:, -1:], logits), f"against @main, the logits of {where}"


def _compare_unequal(
    module: Module, ids: Tensor, first: int, generator: torch.Generator
) -> Iterator[tuple[float, str]]:
    """Rows of unequal length in one batch: each is what @prefill says of its own tokens."""
    batch, total = ids.shape
    others = _other_inputs(module, batch, generator)
    fixed = _run(module, "encode", others) if "encode" in module.functions else []
    filled: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def after(tokens: int) -> tuple[Tensor, list[Tensor]]:
        """@prefill of so many tokens of every row: logits, and the state in the tokens' order."""
        if tokens not in filled:
            whole = _Text(module, batch, fixed, generator)
            logits, *state = whole.run("prefill", ids[:, :tokens], [], whole.empty)
            filled[tokens] = logits, whole.tokens(state)
        return filled[tokens]

    least = _least(module)
    lengths = [max(first - row * max(first // 2, 1), least) for row in range(batch)]
    axes = [int(item["rows"]) for item, _ in _state(module)]
    text = _Text(module, batch, fixed, generator)
    if text.table:
        state = text.prefills(ids, lengths)
    else:
        rows = list(enumerate(lengths))
        state = [
            torch.cat([after(n)[1][i].narrow(axis, row, 1) for row, n in rows], axis)
            for i, axis in enumerate(axes)
        ]
    for step in range(total - first):
        place = [n + step for n in lengths]
        tokens = torch.stack([ids[row, n : n + 1] for row, n in enumerate(place)])
        logits, *state = text.run("decode", tokens, [_position(module, place)], state)
        for row, n in enumerate(place):
            where = f"@decode of row {row} at position {n} beside rows at {place}"
            wanted, right = after(n + 1)
            yield _error(wanted[row], logits[row]), f"the logits of {where}"
            kept = [x.narrow(a, row, 1) for x, a in zip(right, axes)]
            made = [x.narrow(a, row, 1) for x, a in zip(text.tokens(state), axes)]
            yield from _compare_state(module, kept, made, n + 1, where)


def _position(module: Module, places: Sequence[int]) -> Tensor:
    """The position as @decode takes it: one, or one for each row."""
    each = module.functions["decode"].args[1].shape
    return torch.tensor(list(places) if each else places[0])


def _compare_extend(
    text: _Text,
    ids: Tensor,
    first: int,
    state: Sequence[Tensor],
    generator: torch.Generator,
    told: str,
) -> Iterator[tuple[float, str]]:
    """Several tokens at once, against prefills of every length."""
    module = text.module
    rest = ids[:, first : first + int(module.metadata["kv_cache"]["extend"])]
    logits, *extended = text.run("extend", rest, [torch.tensor(first)], state)
    for i in range(rest.shape[1]):
        whole = _Text(module, ids.shape[0], text.fixed, generator)
        tokens = ids[:, : first + i + 1]
        wanted, *filled = whole.run("prefill", tokens, [], whole.empty)
        where = f"@extend at position {first + i} {told}"
        yield _error(wanted, logits[:, i : i + 1]), f"the logits of {where}"
    end = first + rest.shape[1]
    yield from _compare_state(module, whole.tokens(filled), text.tokens(extended), end, where)


class _Text:
    """Texts that run together: the arguments of theirs that no token changes, and their pages."""

    def __init__(
        self, module: Module, batch: int, fixed: Sequence[Tensor], generator: torch.Generator
    ) -> None:
        self.module, self.fixed = module, fixed
        facts = module.metadata["kv_cache"]
        self.table: list[Tensor] = []
        pages = 0
        if "paged" in facts:
            each = int(facts["capacity"]) // int(facts["paged"]["page"])
            pages = 2 * batch * each + _SPARE_PAGES
            order = torch.randperm(pages, generator=generator)[: 2 * batch * each].int()
            own, self.nobody = order.reshape(2, batch, each)
            self.table = [own]
        self.empty = empty_state(module, batch, pages)

    def run(
        self, name: str, ids: Tensor, position: Sequence[Tensor], state: Sequence[Tensor]
    ) -> list[Tensor]:
        return _run(self.module, name, [ids, *position, *self.fixed, *self.table, *state])

    def prefills(self, ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Pools after prompts of unequal length, those of one length at a time.

        Meanwhile the other rows write to pages of nobody.
        """
        state, own = self.empty, self.table[0]
        for count in sorted(set(lengths)):
            given = torch.tensor([n == count for n in lengths])
            table = torch.where(given[:, None], own, self.nobody)
            _, *state = _run(self.module, "prefill", [ids[:, :count], *self.fixed, table, *state])
        return state

    def tokens(self, state: Sequence[Tensor]) -> list[Tensor]:
        """The state with every text's tokens in order."""
        if not self.table:
            return list(state)
        return [x[self.table[0].long()].transpose(1, 2).flatten(2, 3) for x in state]


def _compare_state(
    module: Module, wanted: Sequence[Tensor], got: Sequence[Tensor], tokens: int, where: str
) -> Iterator[tuple[float, str]]:
    """The state after `tokens` tokens, as far as it is written."""
    for (item, _), old, new in zip(_state(module), wanted, got):
        if item["kind"] == "tokens":
            written = min(tokens, old.shape[item["axis"]])
            old, new = (x.narrow(item["axis"], 0, written) for x in (old, new))
        yield _error(old, new), f"{item['name']} after {where}"


def _other_inputs(module: Module, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Inputs of @encode: ids of a few tokens."""
    if "encode" not in module.functions:
        return []
    high = int(module.metadata["kv_cache"]["vocabulary"])
    made = []
    for argument in module.functions["encode"].args:
        shape = [batch, *(d if isinstance(d, int) else 7 for d in argument.shape[1:])]
        made.append(torch.randint(0, high, shape, generator=generator, dtype=argument.dtype))
    return made


def empty_state(module: Module, batch: int, pages: int = 0) -> list[Tensor]:
    """A state as @prefill takes it. What is never written must never be read: it is NaN.

    Of `finite` items it is read and must count for nothing: it is a number.
    """
    made = []
    for item, argument in _state(module):
        shape = [(pages or batch) if not isinstance(d, int) else d for d in argument.shape]
        value: float = float("nan") if argument.dtype.is_floating_point else 77
        if item.get("finite"):
            value = 1
        made.append(torch.full(shape, value, dtype=value_dtype(argument.dtype)))
    return made


def _run(module: Module, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    return interpret(module.functions[name], inputs, module.weights, oracle=True)


def _error(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    wanted, got = wanted.double(), got.double()
    scale = max(float(wanted.abs().max()), 1e-6)
    difference = float((wanted - got).abs().max()) / scale
    return difference if difference == difference else float("inf")
