"""Speculative decoding: several tokens are proposed cheaply, and the model checks them in one call.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023. A proposer puts
down tokens that may come next; @extend computes the model's logits after each of them at once,
which costs little more than one token, since a small batch reads the weights once. Tokens are
accepted from the front, each with probability min(1, p / q), where p is the model's distribution
(with all limits of sampling) and q the proposer's; the first that is refused is replaced by a draw
from the positive part of p - q. So the text has exactly the model's distribution, and greedy texts
are the model's own, whatever the proposer says; it only decides how fast they come.

Proposers: `PromptLookup` copies what followed the same words earlier in the text (Saxena, 2023);
`Draft` asks a smaller model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.runtime.decoding import Limits, State, TokenLoop
from accel.runtime.sampling import Sampling


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next, and the distributions [k, V] that they were drawn from.

    None: they were not drawn, each was certain.
    """

    tokens: Sequence[int]
    shares: Tensor | None = None


class Proposer(Protocol):
    """Puts down up to `count` tokens that may follow a text, which only ever grows."""

    def propose(self, text: Sequence[int], count: int) -> Proposal: ...


class PromptLookup:
    """What followed the longest of the last words (at most `longest`) where they came last.

    What is copied may run into the end of the text, where it goes on from its own beginning, so
    that a loop is recognized as one.
    """

    def __init__(self, longest: int = 3) -> None:
        self._longest = longest
        # For each number of words: where the text went on after them.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest + 1)]
        self._known = 0

    def propose(self, text: Sequence[int], count: int) -> Proposal:
        for end in range(self._known + 1, len(text)):  # what ends the text has nothing after it
            for size in range(1, min(self._longest, end) + 1):
                self._after[size][tuple(text[end - size : end])] = end
        self._known = max(len(text) - 1, 0)
        for size in range(min(self._longest, len(text)), 0, -1):
            start = self._after[size].get(tuple(text[len(text) - size :]))
            if start is not None:
                period = len(text) - start
                return Proposal([text[start + i % period] for i in range(count)])
        return Proposal([])


class Draft:
    """A smaller model with the same vocabulary, sampled as the large one is."""

    def __init__(
        self, loop: TokenLoop, sampling: Sampling, generator: torch.Generator | None, capacity: int
    ) -> None:
        self._loop, self._sampling, self._generator = loop, sampling, generator
        self._capacity = capacity
        self._state: State | None = None
        self._fed: list[int] = []  # tokens whose keys and values the state holds

    def propose(self, text: Sequence[int], count: int) -> Proposal:
        count = min(count, self._capacity - len(text) + 1)
        if count < 1:
            return Proposal([])
        logits = self._catch_up(text)
        tokens: list[int] = []
        shares: list[Tensor] = []
        while True:
            ids = torch.tensor([[*text, *tokens]], device=self._loop.device)
            scores = self._sampling.scores(logits, ids)
            if self._sampling.do_sample:
                share = scores.softmax(-1)
                shares.append(share[0])
                tokens.append(int(torch.multinomial(share, 1, generator=self._generator)))
            else:
                tokens.append(int(scores.argmax(-1)))
            if len(tokens) == count:
                return Proposal(tokens, torch.stack(shares) if shares else None)
            logits = self._feed(tokens[-1])

    def _catch_up(self, text: Sequence[int]) -> Tensor:
        """The logits after the text; what the state has of another text is written over."""
        common = 0
        while common < min(len(self._fed), len(text) - 1) and self._fed[common] == text[common]:
            common += 1
        del self._fed[common:]
        if not common or self._state is None:
            device = self._loop.device
            self._fed = list(text)
            ids = torch.tensor([self._fed], device=device)
            logits, self._state = self._loop.prefill(ids, self._loop.empty(1))
            return logits
        for token in text[common:]:
            logits = self._feed(token)
        return logits

    def _feed(self, token: int) -> Tensor:
        assert self._state is not None
        device = self._loop.device
        place = torch.tensor(len(self._fed), device=device)
        tokens = torch.tensor([token], device=device)
        logits, self._state = self._loop.decode(tokens, place, self._state)
        self._fed.append(token)
        return logits


class Speculation:
    """Generates one text at a time with a proposer.

    Args:
        loop: of the model; it has @extend for at least `count` + 1 tokens.
        count: tokens that are proposed at a time.
        capacity: positions of the model's cache.

    Attributes:
        statistics: calls of @extend ("rounds"), tokens "proposed" and "accepted", over all texts.
    """

    def __init__(self, loop: TokenLoop, proposer: Proposer, count: int, capacity: int) -> None:
        if loop.most < count + 1:
            raise OptionError(
                f"speculation with {count} tokens needs a model that extends its text by "
                f"{count + 1} tokens at once; this one was compiled for {loop.most}",
                advice=f"compile with extend={count + 1} (--extend {count + 1})",
            )
        if not loop.can_go_back:
            raise OptionError(
                "speculation takes tokens back, which a model with recurrent state cannot do",
                advice="generate without an assistant and without prompt lookup",
            )
        self._loop, self._proposer = loop, proposer
        self._count, self._capacity = count, capacity
        self.statistics = {"rounds": 0, "proposed": 0, "accepted": 0}

    def text(
        self,
        ids: Tensor,
        limits: Limits,
        sampling: Sampling,
        generator: torch.Generator | None,
        put: Callable[[Tensor], bool | None] | None = None,
    ) -> Tensor:
        """What follows a prompt [1, n]: [1, count]. As `TokenLoop.text`."""
        text: list[int] = ids[0].tolist()
        prompt = len(text)
        if not limits.new:
            return ids.new_empty(1, 0)
        with torch.no_grad():
            logits, state = self._loop.prefill(ids, self._loop.empty(1), limits.chunk)
            new = [int(sampling.choose(logits, ids, generator))]
            while not self._add(text, new, prompt, limits, put):
                left = prompt + limits.new - len(text) - 1
                count = min(self._count, left, self._capacity - len(text))
                proposal = self._proposer.propose(text, count) if count > 0 else Proposal([])
                position = torch.tensor(len(text) - 1, device=ids.device)
                given = torch.tensor([[text[-1], *proposal.tokens]], device=ids.device)
                if proposal.tokens:
                    logits, state = self._loop.extend(given, position, state)
                    new = self._accept(logits[0], text, proposal, sampling, generator)
                    self.statistics["rounds"] += 1
                    self.statistics["proposed"] += len(proposal.tokens)
                    self.statistics["accepted"] += len(new) - 1
                else:
                    logits, state = self._loop.decode(given[:, 0], position, state)
                    so_far = _tensor(text, ids.device) if sampling.reads_text else ids
                    new = [int(sampling.choose(logits, so_far, generator))]
        return _tensor(text[prompt:], ids.device)

    def _add(
        self,
        text: list[int],
        new: Sequence[int],
        prompt: int,
        limits: Limits,
        put: Callable[[Tensor], bool | None] | None,
    ) -> bool:
        """Adds tokens to the text, one by one; whether it has ended."""
        for token in new:
            text.append(token)
            ended = put is not None and bool(put(torch.tensor([token])))
            if ended or token in limits.stops or len(text) - prompt == limits.new:
                return True
        return False

    def _accept(
        self,
        logits: Tensor,
        text: Sequence[int],
        proposal: Proposal,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> list[int]:
        """The proposed tokens that are taken, and one more. `logits` [k + 1, V]."""
        if not sampling.do_sample and not sampling.reads_text:
            best = logits.argmax(-1).tolist()
            taken = 0
            while taken < len(proposal.tokens) and proposal.tokens[taken] == best[taken]:
                taken += 1
            return [*proposal.tokens[:taken], best[taken]]
        ids = _tensor([*text, *proposal.tokens], logits.device)
        new: list[int] = []
        for i, token in enumerate(proposal.tokens):
            row = logits[i : i + 1]
            scores = sampling.scores(row, ids[:, : len(text) + i])
            share = None if proposal.shares is None else proposal.shares[i]
            chosen = _checked(scores, token, share, sampling, generator)
            sampling.record(row, torch.tensor([chosen], device=row.device))
            new.append(chosen)
            if chosen != token:
                return new
        new.append(int(sampling.choose(logits[-1:], ids, generator)))
        return new


def _checked(
    scores: Tensor,
    token: int,
    share: Tensor | None,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> int:
    """The token that stands at a place for which `token` was proposed."""
    if not sampling.do_sample:
        return int(scores.argmax(-1))
    wanted = scores.softmax(-1)[0]
    if share is None:  # proposed with certainty
        share = torch.zeros_like(wanted)
        share[token] = 1.0
    chance = torch.rand((), generator=generator, device=wanted.device)
    if bool(chance * share[token] < wanted[token]):
        return token
    return int(torch.multinomial((wanted - share).clamp(min=0.0), 1, generator=generator))


def _tensor(tokens: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64, device=device)
