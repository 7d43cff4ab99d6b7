"""The token loop: a prompt through @prefill, then one @decode a token.

    loop = TokenLoop(plan, prefill, decode, device)
    for tokens in loop.tokens(ids, limits, sampling, chance):  # a column [B] at a time
        ...

Texts of unequal length run together where @decode takes a position for each row: each length's
prompts run through @prefill by themselves, and their state is put beside the others'.

What the functions keep between tokens is a list of tensors, the *state*, made from the plan's
description of the arguments and handed from call to call. The loop does not look into it, so that
a cache may be contiguous, a ring, paged or quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.runtime.plan import FunctionPlan, SizeExpr, dtype_of
from accel.runtime.sampling import Chance, Sampling

Run = Callable[[Sequence[Tensor]], list[Tensor]]
State = list[Tensor]


@dataclass(frozen=True)
class Limits:
    """When a text ends: after `new` tokens, or after one of `stops` (which it keeps).

    `chunk`: a prompt runs in pieces of so many tokens; 0: in one.
    """

    new: int
    stops: frozenset[int]
    pad: int
    chunk: int = 0


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state: its first size is the number of rows where that is a symbol."""

    dtype: torch.dtype
    shape: tuple[SizeExpr, ...]

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """Zeros: nothing is read before it is written."""
        sizes = [d if isinstance(d, int) else rows for d in self.shape]
        return torch.zeros(sizes, dtype=self.dtype, device=device)


class TokenLoop:
    """Runs two compiled functions, token after token.

    Args:
        plan: of @prefill (ids, state... -> logits, state...): it says how large the state is.
        prefill: ids [B, n], state -> logits [B, 1, V], state.
        decode: ids [B, 1], position [] or [B], state -> logits [B, 1, V], state. Both may write
            over the state that they are given.
        device: where the functions run.
        extend: ids [B, k], position [], state -> logits [B, k, V], state: up to `most` tokens.

    Attributes:
        each: whether @decode takes a position for each row, so that texts may be of any lengths.
    """

    def __init__(
        self,
        plan: FunctionPlan,
        prefill: Run,
        decode: Run,
        device: torch.device,
        extend: Run | None = None,
    ) -> None:
        specs = [plan.values[v] for v in plan.inputs]
        # What a token leaves is handed on as it is: a CompiledFunction need not look at it again.
        self._prefill, self._decode, self.device = prefill, getattr(decode, "again", decode), device
        self._extend = extend
        facts = plan.metadata["kv_cache"]
        self.most = int(facts.get("extend", 0)) if extend is not None else 0
        self.each = bool(facts.get("unequal", False))
        self._axes = [int(item.get("rows", 0)) for item in facts.get("state", [])]
        rows = specs[0].shape[0]
        self.rows = rows if isinstance(rows, int) else None  # of every call, if that is fixed
        # A token that attention reads is written over; what a recurrence has summed up is not.
        self.can_go_back = all(item["kind"] == "tokens" for item in facts.get("state", []))
        self._dtype = dtype_of(specs[0].dtype)
        length = specs[0].shape[1]
        self.least = plan.symbols[length][0] if isinstance(length, str) else 1  # of @prefill
        # What an encoder made of the source text, between the ids and the state.
        first = 1 + int(facts.get("fixed", 0))
        self.fixed: tuple[Tensor, ...] = ()
        self._state = [StateTensor(dtype_of(s.dtype), tuple(s.shape)) for s in specs[first:]]

    def given(self, fixed: Sequence[Tensor]) -> TokenLoop:
        """The loop over texts that read these tensors, which no token changes."""
        loop = copy.copy(self)
        loop.fixed = tuple(fixed)
        return loop

    def empty(self, rows: int) -> State:
        """The state before the first token of `rows` texts."""
        return [part.empty(rows, self.device) for part in self._state]

    def prefill(self, ids: Tensor, state: State, chunk: int = 0) -> tuple[Tensor, State]:
        """Runs prompts [B, n]: the last token's logits [B, V] and the state after them.

        Prompts that are longer than `chunk` run in pieces: memory for one piece.
        """
        if ids.shape[1] < self.least:
            return self._one_by_one(ids, state)
        # The first piece too: a state that is not written token by token begins there.
        first = ids[:, : max(chunk, self.least)] if chunk else ids
        logits, *state = self._prefill([first.to(self._dtype), *self.fixed, *state])
        for start in range(first.shape[1], ids.shape[1], chunk or 1):
            position = torch.tensor(start, device=self.device)
            logits, state = self.extend(ids[:, start : start + chunk], position, state)
        return logits[:, -1], state

    def _one_by_one(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """As `prefill`, of prompts that are too short for it."""
        for place in range(ids.shape[1]):
            position = torch.tensor(place, device=self.device)
            logits, state = self.decode(ids[:, place], position, state)
        return logits, state

    def extend(self, ids: Tensor, position: Tensor, state: State) -> tuple[Tensor, State]:
        """Runs tokens [B, k] from `position` on: the logits [B, k, V] of each, the state."""
        extend = self.extension(ids)
        logits, *state = extend([ids.to(self._dtype), position, *self.fixed, *state])
        return logits, state

    def extension(self, ids: Tensor) -> Run:
        """@extend. Raises OptionError if it does not take so many tokens."""
        if self._extend is None or ids.shape[1] > self.most:
            raise OptionError(
                f"{ids.shape[1]} tokens at once, and the model was compiled for {self.most}",
                advice=f"compile with extend={ids.shape[1]} (--extend {ids.shape[1]})",
            )
        return self._extend

    def begin(self, ids: Tensor, lengths: Sequence[int], chunk: int = 0) -> tuple[Tensor, State]:
        """Runs prompts of unequal length, the last `lengths` columns of ids [B, n]: as `prefill`.

        Those of one length run together, so no token is computed that is not there.
        """
        if len(set(lengths)) == 1:
            return self.prefill(ids[:, -lengths[0] :], self.empty(len(lengths)), chunk)
        state, made = self.empty(len(lengths)), []
        for count in sorted(set(lengths)):
            rows = [row for row, n in enumerate(lengths) if n == count]
            # Where the number of rows is fixed, the last one fills up the rest.
            given = rows + rows[-1:] * ((self.rows or len(rows)) - len(rows))
            logits, part = self.prefill(ids[given, -count:], self.empty(len(given)), chunk)
            place = torch.tensor(rows, device=self.device)
            for whole, new, axis in zip(state, part, self._axes):
                _bytes(whole).index_copy_(axis, place, _bytes(new.narrow(axis, 0, len(rows))))
            made.append((place, logits[: len(rows)]))
        return gathered(made, len(lengths)), state

    def missing(self, texts: int) -> int:
        """How many copies of the last text a caller adds, where the number of rows is fixed."""
        return (self.rows or texts) - texts

    def ended(self, state: State, running: Sequence[bool]) -> None:
        """Told which texts go on: what the others keep may be let go."""

    def decode(self, tokens: Tensor, position: Tensor, state: State) -> tuple[Tensor, State]:
        """Runs one token a row, [B]: its logits [B, V], the state.

        `position` is int64 [], or [B] where the loop has one for `each` row.
        """
        ids = tokens[:, None].to(self._dtype)
        if self.each and not position.dim():
            position = position.expand(len(tokens)).contiguous()
        logits, *state = self._decode([ids, position, *self.fixed, *state])
        return logits[:, -1], state

    def text(
        self,
        ids: Tensor,
        limits: Limits,
        sampling: Sampling,
        chance: Chance,
        put: Callable[[Tensor], bool | None] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """What follows prompts [B, n]: [B, count]. Of unequal `lengths`, each has the last columns.

        `put` gets each column [B] of new tokens, on the CPU, as soon as it is known, and returns
        True where no more is wanted (stop strings).
        """
        columns = []
        for tokens in self.tokens(ids, limits, sampling, chance, lengths):
            columns.append(tokens)
            if put is not None and put(tokens.cpu()):
                break
        if not columns:
            return torch.empty(ids.shape[0], 0, dtype=ids.dtype, device=self.device)
        return torch.stack(columns, 1)

    def tokens(
        self,
        ids: Tensor,
        limits: Limits,
        sampling: Sampling,
        chance: Chance,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens of prompts [B, n], a column [B] at a time. Arguments as for `text`."""
        if not limits.new:
            return
        counts = list(lengths or [ids.shape[1]] * ids.shape[0])
        equal = len(set(counts)) == 1
        ids = ids[:, -max(counts) :]
        running = torch.ones(ids.shape[0], dtype=torch.bool, device=self.device)
        stops = torch.tensor(sorted(limits.stops), device=self.device)
        position = torch.tensor(counts if self.each else counts[0], device=self.device)
        with torch.no_grad():
            logits, state = self.begin(ids, counts, limits.chunk)
            for step in range(limits.new):
                texts = None if equal else [n + step for n in counts]
                tokens = sampling.choose(logits, ids, chance, texts)
                if limits.stops:
                    tokens = torch.where(running, tokens, limits.pad)
                yield tokens
                if limits.stops:
                    running &= ~torch.isin(tokens, stops)
                    left = running.tolist()
                    if not any(left):
                        return
                    self.ended(state, left)
                if step + 1 == limits.new:
                    return
                if sampling.reads_text:
                    ids = torch.cat([ids, tokens[:, None]], dim=1)
                logits, state = self.decode(tokens, position, state)
                position += 1


def _bytes(x: Tensor) -> Tensor:
    """As integers what torch does not index, which is float8."""
    return x.view(torch.uint8) if x.itemsize == 1 else x


def gathered(parts: Sequence[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """Logits [rows, V] from (which rows, their logits)."""
    whole = parts[0][1].new_empty(rows, parts[0][1].shape[1])
    for place, logits in parts:
        whole[place] = logits
    return whole
