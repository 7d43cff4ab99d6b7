"""Decode equivalence: @prefill of n + 1 tokens is @prefill of n, then @decode of one.

Checked with the interpreter, every float in float64, for several numbers of tokens and rows, up to
the last position of the cache: logits, and the caches as far as they are written. Where @main is
there, the last token's logits are also @main's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from accel.errors import ContractError
from accel.ir.interpret import interpret
from accel.ir.module import Function, Module
from accel.ir.types import value_dtype

TOLERANCE = 1e-9


def check_decode(
    module: Module,
    *,
    steps: int = 3,
    prompts: Sequence[int] = (1, 2, 5),
    batches: Sequence[int] = (1, 3),
    seed: int = 0,
) -> float:
    """The largest relative error of any step. Raises ContractError past 1e-9, naming the place.

    Prompts are `prompts` tokens long, and such that the last step fills the cache.
    """
    facts = module.metadata["kv_cache"]
    capacity, vocabulary = int(facts["capacity"]), int(facts["vocabulary"])
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for batch in _batches(module.functions["prefill"], batches):
        for first in _prompts(prompts, capacity, steps):
            count = min(first + steps, capacity)
            ids = torch.randint(0, vocabulary, (batch, count), generator=generator)
            for error, where in _compare(module, ids, first):
                worst = max(worst, error)
                if not error <= TOLERANCE:
                    raise ContractError(
                        f"pass 'insert_kv_cache' promises decode equivalence, but {where} differs "
                        f"by {error:.3g} (relative, float64; allowed: {TOLERANCE:g})",
                        where=where,
                        advice="a position, a mask or a cache is off: compare @decode with @main",
                    )
    return worst


def _batches(prefill: Function, wanted: Sequence[int]) -> Sequence[int]:
    size = prefill.args[0].shape[0]
    return (size,) if isinstance(size, int) else wanted


def _prompts(wanted: Sequence[int], capacity: int, steps: int) -> list[int]:
    ends = [n for n in wanted if n < capacity]
    return sorted({*ends, max(capacity - steps, 1)})


def _compare(module: Module, ids: Tensor, first: int) -> Iterator[tuple[float, str]]:
    """Errors of single decodes after a prompt of `first`, against prefills of every length."""
    batch = ids.shape[0]
    _, *caches = _run(module, "prefill", [ids[:, :first], *empty_caches(module, batch)])
    for n in range(first, ids.shape[1]):
        place = torch.tensor(n)
        logits, *caches = _run(module, "decode", [ids[:, n : n + 1], place, *caches])
        fresh = [ids[:, : n + 1], *empty_caches(module, batch)]
        wanted, *filled = _run(module, "prefill", fresh)
        where = f"@decode at position {n} after a prompt of {first}, {batch} rows"
        yield _error(wanted, logits), f"the logits of {where}"
        for i, (old, new) in enumerate(zip(filled, caches)):
            yield _error(old[:, :, : n + 1], new[:, :, : n + 1]), f"cache {i} of {where}"
        if "main" in module.functions and n > 1 and batch > 1:
            whole = _run(module, "main", [ids[:, : n + 1]])[0]
            yield _error(whole[:, -1:], logits), f"against @main, the logits of {where}"


def empty_caches(module: Module, batch: int) -> list[Tensor]:
    """Caches as @prefill takes them. What is never written must never be read: it is NaN."""
    made = []
    for argument in module.functions["prefill"].args[1:]:
        shape = [batch if not isinstance(d, int) else d for d in argument.shape]
        made.append(torch.full(shape, float("nan"), dtype=value_dtype(argument.dtype)))
    return made


def _run(module: Module, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    return interpret(module.functions[name], inputs, module.weights, oracle=True)


def _error(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    scale = max(float(wanted.abs().max()), 1e-6)
    difference = float((wanted - got).abs().max()) / scale
    return difference if difference == difference else float("inf")
