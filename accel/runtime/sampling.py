"""Choosing the next token from logits: greedily, or by chance under limits.

The order is that of `transformers`: repetition penalty, least length, the caller's own processors;
temperature, top-k, top-p, min-p; then the most probable token, or one drawn. With a seed the draws
are those of `torch.multinomial` after `torch.manual_seed(seed)`; with a seed for each row, each
row's are what they would be if it were alone. `Recording` also keeps the log probabilities of what
it chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.errors import OptionError

# Text so far [B, n] and scores [B, V] to scores: what `transformers` calls a logits processor.
Processor = Callable[[Tensor, Tensor], Tensor]
# Where draws come from: one source for all rows, one for each, or torch's own.
Chance = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises OptionError for values out of range or without effect.

    Attributes:
        do_sample: draw tokens; else the most probable one is taken.
        temperature: divides the logits; below 1 sharpens, above 1 flattens.
        top_k: only the k most probable tokens (Fan et al., 2018).
        top_p: only the fewest tokens whose probabilities sum to p (Holtzman et al., 2020).
        min_p: only tokens at least p times as probable as the best (Nguyen et al., 2024).
        repetition_penalty: divides positive and multiplies negative logits of tokens that the text
            has (Keskar et al., 2019); 1 is none.
        seed: of the draws, or one for each row; None draws from torch's global generator.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, math.inf, open_low=True)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise OptionError(f"top_k is {self.top_k!r}, not a positive integer")
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        for seed in () if self.seed is None else seeds:
            if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
                raise OptionError(f"seed is {seed!r}, not a 64-bit integer")
        if self.do_sample:
            return
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            value = getattr(self, name)
            if value is not None and not (name in ("temperature", "top_p") and value == 1.0):
                raise OptionError(
                    f"{name} = {value} has no effect: do_sample is False, so the most probable "
                    "token is taken",
                    advice=f"pass do_sample=True, or leave {name} out",
                )

    def chance(self, device: torch.device, row: int | None = None) -> torch.Generator | None:
        """The source of chance for a batch, or for one `row` of it that has a seed of its own."""
        seed = self.seed
        if isinstance(seed, tuple):
            assert row is not None
            seed = seed[row]
        return None if seed is None else torch.Generator(device).manual_seed(seed)

    @property
    def reads_text(self) -> bool:
        """Whether the choice depends on the tokens before."""
        return self.repetition_penalty not in (None, 1.0)

    @property
    def recordable(self) -> bool:
        """Whether `choose` is a fixed sequence of tensor operations, such as a graph records."""
        return True

    def scores(self, logits: Tensor, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits [B, V] after all limits, float32; tokens that are out are minus infinity.

        `ids` [B, n] are the texts so far; where `lengths` are given, their last so many columns.
        """
        if lengths is None:
            return self._scores(logits, ids, 0)
        if not self.reads_text:
            return self._scores(logits, ids, 0)
        rows = enumerate(lengths)
        texts = [self._scores(logits[i : i + 1], ids[i : i + 1, -n:], i) for i, n in rows]
        return torch.cat(texts)

    def _scores(self, logits: Tensor, ids: Tensor, row: int) -> Tensor:
        """The scores of rows with texts of one length, of which `row` is the first."""
        scores = logits.float()
        if self.repetition_penalty not in (None, 1.0):
            found = scores.gather(1, ids)
            penalty = float(self.repetition_penalty or 1.0)
            found = torch.where(found < 0, found * penalty, found / penalty)
            scores = scores.scatter(1, ids, found)
        return self.limited(scores) if self.do_sample else scores

    def limited(self, scores: Tensor) -> Tensor:
        """Scores [B, V] after temperature, top-k, top-p and min-p."""
        if self.temperature not in (None, 1.0):
            scores = scores / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1.0:
            scores = _top_p(scores, self.top_p)
        if self.min_p is not None:
            shares = scores.softmax(-1)
            least = shares.amax(-1, keepdim=True) * self.min_p
            scores = scores.masked_fill(shares < least, -math.inf)
        return scores

    def record(self, logits: Tensor, tokens: Tensor) -> None:
        """Told of tokens [B] that were chosen from logits [B, V] without `choose`."""

    def choose(
        self, logits: Tensor, ids: Tensor, chance: Chance, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """The next token of each row: int64 [B]. `ids`, `lengths` as for `scores`."""
        if not self.do_sample and not self.reads_text:
            return logits.argmax(-1)
        scores = self.scores(logits, ids, lengths)
        return draw(scores.softmax(-1), chance) if self.do_sample else scores.argmax(-1)


@dataclass
class Choice:
    """One step of all rows: log probabilities, and the `top` most probable tokens with theirs."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class Recording(Sampling):
    """Sampling that also keeps log probabilities, and applies more than the usual limits.

    Attributes:
        least: tokens before one of `stops` may come.
        processors: applied after penalties and before temperature.
        prompts: how long the rows' prompts are; where all are alike, the first says it.
        top: how many most probable tokens a step keeps with their log probabilities; None records
            nothing. Log probabilities are the model's own: of its logits before any limit.
        choices: what was recorded, a step at a time.
    """

    least: int = 0
    stops: tuple[int, ...] = ()
    processors: tuple[Processor, ...] = ()
    top: int | None = None
    prompts: tuple[int, ...] = (0,)
    choices: list[Choice] = field(default_factory=list)

    @property
    def reads_text(self) -> bool:
        return True

    @property
    def recordable(self) -> bool:
        return False

    def _scores(self, logits: Tensor, ids: Tensor, row: int) -> Tensor:
        plain = Sampling(repetition_penalty=self.repetition_penalty)
        scores = plain.scores(logits, ids)
        if self.stops and ids.shape[1] < self.prompts[row] + self.least:
            scores = scores.index_fill(1, torch.tensor(self.stops, device=ids.device), -math.inf)
        for process in self.processors:
            scores = process(ids, scores)
        return self.limited(scores) if self.do_sample else scores

    def choose(
        self, logits: Tensor, ids: Tensor, chance: Chance, lengths: Sequence[int] | None = None
    ) -> Tensor:
        scores = self.scores(logits, ids, lengths)
        tokens = draw(scores.softmax(-1), chance) if self.do_sample else scores.argmax(-1)
        self.record(logits, tokens)
        return tokens

    def record(self, logits: Tensor, tokens: Tensor) -> None:
        """Keeps what `tokens` [B] were chosen from."""
        if self.top is None:
            return
        logs = logits.float().log_softmax(-1)
        best = logs.topk(min(self.top, logs.shape[1]), dim=-1)
        own = logs.gather(1, tokens[:, None])[:, 0]
        self.choices.append(Choice(own, best.indices, best.values))


def draw(shares: Tensor, chance: Chance) -> Tensor:
    """A token of each row, int64 [B], with these probabilities [B, V]."""
    if chance is None or isinstance(chance, torch.Generator):
        return torch.multinomial(shares, 1, generator=chance)[:, 0]
    rows = [torch.multinomial(row, 1, generator=own) for row, own in zip(shares, chance)]
    return torch.cat(rows)


def _top_p(scores: Tensor, limit: float) -> Tensor:
    """Keeps the fewest tokens whose probabilities reach the limit; always at least one."""
    ascending, order = scores.sort(descending=False)
    below = ascending.softmax(-1).cumsum(-1) <= 1 - limit
    below[:, -1] = False
    return scores.masked_fill(below.scatter(1, order, below), -math.inf)


def _within(
    name: str, value: float | None, low: float, high: float, *, open_low: bool = False
) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low) or value == math.inf:
        bracket = "(" if open_low else "["
        end = ")" if high == math.inf else "]"
        raise OptionError(f"{name} is {value!r}; it lies in {bracket}{low:g}, {high:g}{end}")
