"""A loop over the tokens (`accel.scan`): its body's operators of PyTorch, token after token.

Options: `carries`, `axes`, `stacks` as in `accel.scan`; `symbols`, for each size that the body
names the operand and axis which have it; `body`:

    steps     [operator, args, kwargs, results]: templates as in an ATen step, where operand i is
              the i-th value: first the body's arguments, then the results of the steps before
    results   the numbers of the values that the body yields
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError, InputError
from accel.runtime.aten import ArgumentReader, check_untrusted, resolve
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.plan import evaluate_size

# What one step of the body does with the values so far.
Run = Callable[[list[Any]], None]


class Scan:
    """Operands: first carries, what the loop reads a token at a time, what stays."""

    name = "scan"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        body, carries = options.get("body"), options.get("carries")
        axes, stacks = _numbers(options.get("axes")), _numbers(options.get("stacks"))
        if not isinstance(body, dict):
            raise ArtifactError("scan takes a body")
        if type(carries) is not int or not 0 <= carries <= len(operands) - len(axes) or not axes:
            raise ArtifactError(f"scan: {carries} carries of {len(operands)} operands")
        if any(o is None for o in operands):
            raise ArtifactError("scan: an operand is absent")
        steps, results = body.get("steps"), _numbers(body.get("results"))
        if not isinstance(steps, list):
            raise ArtifactError("scan: a body has steps")
        values = len(operands)
        for step in steps:
            if not isinstance(step, list) or len(step) != 4 or not isinstance(step[0], str):
                raise ArtifactError(f"scan: a step is {str(step)[:80]}")
            check_untrusted(step[0])
            if type(step[3]) is not int or not 0 < step[3] < 100:
                raise ArtifactError(f"scan: '{step[0]}' has {step[3]} results")
            values += step[3]
        if len(results) != carries + len(stacks) or not all(0 <= r < values for r in results):
            raise ArtifactError(f"scan: results {results} of {values} values")
        symbols = options.get("symbols")
        if not isinstance(symbols, dict):
            raise ArtifactError("scan: malformed symbols")
        symbols = {str(n): _numbers(place) for n, place in symbols.items()}
        fixed = [o.weight if o is not None else None for o in operands]
        return _Call(carries, axes, stacks, steps, results, symbols, fixed)


def _numbers(given: Any) -> list[int]:
    if not isinstance(given, (list, tuple)) or not all(type(n) is int for n in given):
        raise ArtifactError(f"scan: {str(given)[:80]} where numbers belong")
    return list(given)


@dataclass
class _Call:
    carries: int
    axes: list[int]
    stacks: list[int]
    steps: list[Any]
    results: list[int]
    symbols: Mapping[str, list[int]]
    fixed: list[Tensor | None]

    def __post_init__(self) -> None:
        self._made: dict[tuple[Any, ...], list[Run]] = {}

    def __call__(self, *given: Tensor) -> list[Tensor]:
        left = iter(given)
        operands = [next(left) if w is None else w for w in self.fixed]
        count, parts = self.carries, self.carries + len(self.axes)
        carries, rest = operands[:count], operands[parts:]
        whole = list(zip(operands[count:parts], self.axes))
        tokens = {x.shape[axis] for x, axis in whole}
        if len(tokens) != 1 or 0 in tokens:
            raise InputError(f"a loop over {sorted(tokens)} tokens")
        runs = self._runs(operands)
        stacked: list[list[Tensor]] = [[] for _ in self.stacks]
        for token in range(tokens.pop()):
            values = [*carries, *(x.narrow(axis, token, 1) for x, axis in whole), *rest]
            for run in runs:
                run(values)
            made = [values[r] for r in self.results]
            carries = made[:count]
            for pieces, piece in zip(stacked, made[count:]):
                pieces.append(piece)
        # A carry may be a view of an operand.
        return [
            *(c.clone() for c in carries),
            *(torch.cat(pieces, axis) for pieces, axis in zip(stacked, self.stacks)),
        ]

    def _runs(self, operands: Sequence[Tensor]) -> list[Run]:
        """The body for these sizes."""
        try:
            sizes = {n: operands[i].shape[axis] for n, (i, axis) in self.symbols.items()}
        except (IndexError, ValueError) as error:
            raise ArtifactError(f"scan: {error}") from error
        device = operands[0].device
        key = (device, *sizes.values())
        if key not in self._made:
            reader = ArgumentReader(lambda i: (False, i), lambda e: evaluate_size(e, sizes), device)
            self._made[key] = [_run(reader, *step) for step in self.steps]
        return self._made[key]


def _run(
    reader: ArgumentReader, name: str, args: list[Any], kwargs: dict[str, Any], results: int
) -> Run:
    operator = resolve(name)
    given = [reader.read(t) for t in args]
    named = {key: reader.read(t) for key, t in kwargs.items()}
    several = results != 1 or len(operator._schema.returns) != 1

    def run(values: list[Any]) -> None:
        positional = [v if fixed else v(values) for fixed, v in given]
        options = {key: v if fixed else v(values) for key, (fixed, v) in named.items()}
        made = operator(*positional, **options)
        if several:
            values.extend(made)
        else:
            values.append(made)

    return run
