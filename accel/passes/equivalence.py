"""Decode equivalence: @prefill of n + 1 tokens is @prefill of n, then @decode of one.

Checked with the interpreter, every float in float64, for several numbers of tokens and rows, up to
the last position of the cache and around the end of every ring: logits, and the state as far as it
is written; so is @extend, where there is one. Where @main is
there, the last token's logits are also @main's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import ContractError
from accel.ir.interpret import interpret
from accel.ir.module import Function, Module, Value
from accel.ir.types import value_dtype
from accel.passes.contracts import EXACT_TOLERANCE, exact_tolerance

TOLERANCE = EXACT_TOLERANCE


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
            for error, where in _compare(module, ids, first, generator):
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
    for item, argument in _state(module):
        if item.get("ring"):
            slots = int(argument.shape[item["axis"]])
            lengths |= {n for n in (slots - 1, slots + 1) if 0 < n < capacity}
    return sorted(lengths)


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
    empty = empty_state(module, batch)
    _, *state = _run(module, "prefill", [ids[:, :first], *fixed, *empty])
    told = f"after a prompt of {first}, {batch} rows"
    if "extend" in module.functions:
        yield from _compare_extend(module, ids, first, fixed, state, told)
    for n in range(first, total):
        place = torch.tensor(n)
        logits, *state = _run(module, "decode", [ids[:, n : n + 1], place, *fixed, *state])
        wanted, *filled = _run(module, "prefill", [ids[:, : n + 1], *fixed, *empty])
        where = f"@decode at position {n} {told}"
        yield _error(wanted, logits), f"the logits of {where}"
        yield from _compare_state(module, filled, state, n + 1, where)
        if "main" in module.functions and n > 1 and batch > 1:
            whole = _run(module, "main", [*others, ids[:, : n + 1]])[0]
            yield _error(whole[:, -1:], logits), f"against @main, the logits of {where}"


def _compare_extend(
    module: Module,
    ids: Tensor,
    first: int,
    fixed: Sequence[Tensor],
    state: Sequence[Tensor],
    told: str,
) -> Iterator[tuple[float, str]]:
    """Several tokens at once, against prefills of every length."""
    rest = ids[:, first : first + int(module.metadata["kv_cache"]["extend"])]
    inputs = [rest, torch.tensor(first), *fixed, *state]
    logits, *extended = _run(module, "extend", inputs)
    empty = empty_state(module, ids.shape[0])
    for i in range(rest.shape[1]):
        tokens = ids[:, : first + i + 1]
        wanted, *filled = _run(module, "prefill", [tokens, *fixed, *empty])
        where = f"@extend at position {first + i} {told}"
        yield _error(wanted, logits[:, i : i + 1]), f"the logits of {where}"
    yield from _compare_state(module, filled, extended, first + rest.shape[1], where)


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


def empty_state(module: Module, batch: int) -> list[Tensor]:
    """A state as @prefill takes it. What is never written must never be read: it is NaN."""
    made = []
    for _, argument in _state(module):
        shape = [batch if not isinstance(d, int) else d for d in argument.shape]
        value: float = float("nan") if argument.dtype.is_floating_point else 77
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
