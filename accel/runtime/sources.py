"""What an encoder-decoder reads: source texts, encoded once a call, and the text it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import InputError, OptionError
from accel.runtime.prompts import Prompts, in_parts


@dataclass
class Sources:
    """Source texts: one row of ids a text, of any lengths."""

    rows: list[Tensor]

    @classmethod
    def of(cls, given: Any, mask: Tensor | None, vocabulary: int, device: torch.device) -> Sources:
        """From a tensor [B, n], padded on either side where `mask` is 0, or lists of ids.

        Raises InputError for empty texts, ids out of range and masks that hide tokens inside.
        """
        prompts = Prompts.of(given, None if isinstance(given, Tensor) else mask, 0, device)
        rows = [prompts.row(i, n) for i, n in enumerate(prompts.lengths)]
        if isinstance(given, Tensor) and mask is not None:
            if mask.shape != given.shape:
                raise InputError(f"a mask {list(mask.shape)} for texts {list(given.shape)}")
            rows = [_kept(row, keep.to(device)) for row, keep in zip(rows, mask)]
        for row in rows:
            if not row.numel():
                raise InputError("a source text is empty")
            low, high = (int(x) for x in torch.aminmax(row))
            if low < 0 or high >= vocabulary:
                wrong = low if low < 0 else high
                raise InputError(f"token id {wrong} is outside of the vocabulary of {vocabulary}")
        return cls(rows)

    def start(self, given: Any, token: int | None) -> Any:
        """The prompts of the texts that are made: `decoder_input_ids`, or a first token each."""
        if given is not None:
            if len(given) != len(self.rows):
                raise InputError(f"{len(given)} beginnings for {len(self.rows)} source texts")
            return given
        if token is None:
            raise OptionError(
                "how the text begins is not said", advice="pass decoder_start_token_id"
            )
        return torch.full((len(self.rows), 1), token, dtype=torch.int64)

    def split(self, groups: Sequence[list[int]], rows: int | None) -> list[list[int]]:
        """The groups of rows that run together, apart by the length of their sources."""
        made: list[list[int]] = []
        for group in groups:
            lengths: dict[int, list[int]] = {}
            for row in group:
                lengths.setdefault(self.rows[row].numel(), []).append(row)
            made += in_parts(lengths.values(), rows)
        return made

    def together(self, rows: Sequence[int]) -> Tensor:
        """Ids [B, n] of rows of one length."""
        return torch.stack([self.rows[row] for row in rows])


def _kept(row: Tensor, mask: Tensor) -> Tensor:
    keep = mask.to(torch.bool)
    found = row[keep]
    places = keep.nonzero().flatten()
    if found.numel() and int(places[-1] - places[0]) + 1 != found.numel():
        raise InputError("the attention mask hides tokens inside a source text")
    return found
