"""Prompts of a call of `generate`, checked: one tensor with the prompts in its last columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import InputError, OptionError

_PROMPTS = "pass a tensor of ids with a row for each prompt, or lists: [[1, 2, 3]] is one prompt"


@dataclass
class Prompts:
    """`ids` int64 [B, n]; row b's prompt is its last `lengths[b]` columns."""

    ids: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, given: Any, mask: Tensor | None, pad: int, device: torch.device) -> Prompts:
        """From a tensor [B, n] (with a mask where it is padded on the left), or lists of ids.

        Raises InputError for anything else, and OptionError for lists with a mask.
        """
        if not isinstance(given, Tensor):
            if mask is not None:
                raise OptionError("an attention mask, and prompts that are lists")
            return cls._of_lists(given, pad, device)
        if given.dim() != 2 or given.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"prompts are int64 [B, n]; got {given.dtype} {list(given.shape)}", advice=_PROMPTS
            )
        ids = given.to(device, torch.int64)
        if mask is None:
            return cls(ids, [ids.shape[1]] * ids.shape[0])
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
        return cls(ids, [int(n) for n in lengths])

    @classmethod
    def _of_lists(cls, given: Any, pad: int, device: torch.device) -> Prompts:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise InputError(
                f"prompts are a {type(given).__name__}, not token ids", advice=_PROMPTS
            )
        rows = [_row(p) for p in given]
        if not rows:
            raise InputError("no prompt was given")
        width = max(r.numel() for r in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        for row, prompt in zip(ids, rows):
            row[width - prompt.numel() :] = prompt
        return cls(ids.to(device), [r.numel() for r in rows])

    def check(self, new: int, capacity: int, vocabulary: int) -> None:
        """Raises InputError for empty and too long prompts and ids out of range."""
        if not self.lengths or min(self.lengths) == 0:
            raise InputError("a prompt is empty", advice="begin with the model's first token")
        longest = max(self.lengths)
        if longest > capacity:
            raise InputError(
                f"a prompt of {longest} tokens, and the cache has {capacity} positions",
                advice="compile with a larger capacity",
            )
        if longest + new - 1 > capacity:
            raise InputError(
                f"{longest} tokens and {new} new ones do not fit the cache's {capacity} positions",
                advice=f"ask for {capacity - longest + 1} tokens, or compile with a larger "
                "capacity",
            )
        for i, length in enumerate(self.lengths):
            low, high = torch.aminmax(self.row(i, length))
            if int(low) < 0 or int(high) >= vocabulary:
                wrong = int(low) if int(low) < 0 else int(high)
                raise InputError(f"token id {wrong} is outside of the vocabulary of {vocabulary}")

    def row(self, index: int, length: int) -> Tensor:
        """The last `length` ids of a row."""
        return self.ids[index, self.ids.shape[1] - length :]

    def groups(self, rows: int | None, unequal: bool = False) -> list[list[int]]:
        """Rows that run together, at most `rows`; of one length unless they may be `unequal`."""
        groups: dict[int, list[int]] = {}
        for i, n in enumerate(self.lengths):
            groups.setdefault(0 if unequal else n, []).append(i)
        return in_parts(groups.values(), rows)


def in_parts(groups: Iterable[list[int]], most: int | None) -> list[list[int]]:
    """The groups, and those of more than `most` rows in several parts."""
    return [
        group[start : start + (most or len(group))]
        for group in groups
        for start in range(0, len(group), most or len(group))
    ]


def _row(prompt: Any) -> Tensor:
    try:
        row = torch.as_tensor(prompt)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"a prompt is no list of token ids: {error}") from error
    if row.numel() and (row.dim() != 1 or row.dtype not in (torch.int64, torch.int32)):
        raise InputError(
            f"a prompt is a list of token ids; got {row.dtype} {list(row.shape)}", advice=_PROMPTS
        )
    return row.reshape(-1).to(torch.int64)
