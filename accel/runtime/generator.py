"""Text generation with a compiled model that has @prefill and @decode (`insert_kv_cache`).

    model = accel.load("m.accel")
    ids = model.generate(input_ids, max_new_tokens=64, eos_token_id=2)

A prompt runs through @prefill once, which fills the caches; each further token is one @decode,
which writes its keys and values into them in place (`accel.runtime.decoding`). Caches belong to
the call, so that several threads may generate with one model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from accel.errors import InputError, OptionError
from accel.runtime.decoding import Limits, Run, TokenLoop
from accel.runtime.plan import FunctionPlan
from accel.runtime.sampling import Sampling


class Streamer(Protocol):
    """What `transformers` calls a streamer: gets the prompt, then each token."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class Generator:
    """Generates with two compiled functions.

    Args:
        plan: of @prefill: it says how large ids and caches are.
        prefill, decode: run flat lists of tensors.
        device: where the functions run.
    """

    def __init__(
        self, plan: FunctionPlan, prefill: Run, decode: Run, device: torch.device | None = None
    ) -> None:
        facts = plan.metadata["kv_cache"]
        self.capacity, self.vocabulary = int(facts["capacity"]), int(facts["vocabulary"])
        self.device = device or torch.device("cpu")
        self.loop = TokenLoop(plan, prefill, decode, self.device)
        rows = plan.values[plan.inputs[0]].shape[0]
        self.rows = rows if isinstance(rows, int) else None

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        eos_token_id: int | Collection[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
    ) -> Tensor:
        """Prompts and what follows them: int64 [B, n + new], padded on the right.

        Args:
            input_ids: int64 [B, n]; or prompts of unequal lengths as lists, which come back padded
                on the left.
            attention_mask: [B, n], 0 where a prompt is padded; prompts end in the last column.
            max_new_tokens, max_length: how long a text may get; one of them.
            eos_token_id: a token, or several, that ends a text; the text keeps it.
            pad_token_id: fills ended texts; by default the first of `eos_token_id`, else 0.
            streamer: `put` gets the prompts, then each new token; `end` is called at last.
            others: see `accel.runtime.sampling.Sampling`.

        Rows of equal length run together if the model was compiled for any number of rows, else
        one after the other; each row's text is what it would be alone.

        Raises InputError for empty or too long prompts and ids out of range, OptionError for
        options that contradict each other.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stops = _stops(eos_token_id, self.vocabulary)
        pad = pad_token_id if pad_token_id is not None else next(iter(stops), 0)
        ids, lengths = self._prompts(input_ids, attention_mask, pad)
        new = _new_tokens(max_new_tokens, max_length, ids.shape[1])
        self._check(ids, lengths, new)
        if streamer is not None and ids.shape[0] > 1:
            raise OptionError(f"a streamer follows one text, and {ids.shape[0]} were given")
        if streamer is not None:
            streamer.put(ids.cpu())
        limits = Limits(new, frozenset(stops), pad)
        generator = sampling.generator(self.device)
        made = torch.full((ids.shape[0], new), pad, dtype=ids.dtype, device=self.device)
        longest = 0
        for rows in self._groups(lengths):
            text = ids[rows, ids.shape[1] - lengths[rows[0]] :]
            put = None if streamer is None else streamer.put
            new_tokens = self.loop.text(text, limits, sampling, generator, put)
            count = new_tokens.shape[1]
            made[rows, :count] = new_tokens
            longest = max(longest, count)
        if streamer is not None:
            streamer.end()
        return torch.cat([ids, made[:, :longest]], dim=1)

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows that run together."""
        if self.rows == 1:
            return [[i] for i in range(len(lengths))]
        groups: dict[int, list[int]] = {}
        for i, n in enumerate(lengths):
            groups.setdefault(n, []).append(i)
        if self.rows is not None and any(len(g) != self.rows for g in groups.values()):
            raise InputError(
                f"the model was compiled for {self.rows} prompts of one length at a time",
                advice="compile with batch=0 for any number",
            )
        return list(groups.values())

    def _prompts(self, given: Any, mask: Tensor | None, pad: int) -> tuple[Tensor, list[int]]:
        """Prompts in the last columns of [B, n], and their lengths."""
        if not isinstance(given, Tensor):
            if mask is not None:
                raise OptionError("an attention mask, and prompts that are lists")
            rows = [torch.as_tensor(p, dtype=torch.int64).reshape(-1) for p in given]
            if not rows:
                raise InputError("no prompt was given")
            width = max(r.numel() for r in rows)
            ids = torch.full((len(rows), width), pad, dtype=torch.int64)
            for row, prompt in zip(ids, rows):
                row[width - prompt.numel() :] = prompt
            return ids.to(self.device), [r.numel() for r in rows]
        if given.dim() != 2 or given.dtype not in (torch.int64, torch.int32):
            raise InputError(f"prompts are int64 [B, n]; got {given.dtype} {list(given.shape)}")
        ids = given.to(self.device, torch.int64)
        if mask is None:
            return ids, [ids.shape[1]] * ids.shape[0]
        if mask.shape != ids.shape:
            raise InputError(f"a mask {list(mask.shape)} for prompts {list(ids.shape)}")
        kept = mask.to(torch.bool).cpu()
        lengths = kept.sum(1)
        width = ids.shape[1]
        if not torch.equal(kept, torch.arange(width) >= (width - lengths)[:, None]):
            raise InputError(
                "the attention mask hides tokens inside or after a prompt",
                advice="pad on the left",
            )
        return ids, [int(n) for n in lengths]

    def _check(self, ids: Tensor, lengths: Sequence[int], new: int) -> None:
        if not lengths or min(lengths) == 0:
            raise InputError("a prompt is empty", advice="begin with the model's first token")
        longest = max(lengths)
        if longest > self.capacity:
            raise InputError(
                f"a prompt of {longest} tokens, and the cache has {self.capacity} positions",
                advice="compile with a larger capacity",
            )
        if longest + new - 1 > self.capacity:
            raise InputError(
                f"{longest} tokens and {new} new ones do not fit the cache's {self.capacity} "
                "positions",
                advice=f"ask for {self.capacity - longest + 1} tokens, or compile with a larger "
                "capacity",
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocabulary:
            wrong = low if low < 0 else high
            raise InputError(f"token id {wrong} is outside of the vocabulary of {self.vocabulary}")


def _stops(given: int | Collection[int] | None, vocabulary: int) -> list[int]:
    stops = [] if given is None else [given] if isinstance(given, int) else list(given)
    for stop in stops:
        if type(stop) is not int or stop < 0:
            raise OptionError(f"eos_token_id is {stop!r}, not a token id")
    return stops


def _new_tokens(new: int | None, length: int | None, prompt: int) -> int:
    if new is not None and length is not None:
        raise OptionError("max_new_tokens and max_length contradict each other", advice="pass one")
    if length is not None:
        new = length - prompt
    if new is None:
        raise OptionError("how long the text may get is not said", advice="pass max_new_tokens")
    if type(new) is not int or new < 0:
        raise OptionError(f"{new} new tokens were asked for")
    return new
