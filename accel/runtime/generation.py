"""Greedy text generation with a model that takes whole sequences.

Every new token runs the model on all tokens so far; keeping keys and values between calls is for
models that are compiled with a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from accel.errors import InputError


def generate(
    run: Callable[[Tensor], Any],
    input_ids: Tensor,
    max_new_tokens: int,
    eos: int | Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """The most probable next token, again and again.

    Args:
        run: takes ids [1, n] (int64) and returns logits [1, n, vocabulary], or something with
            `logits`. Only the last position is read, so [1, 1, vocabulary] does too.
        input_ids: the prompt, int64 [1, n].
        eos: ends the text; the token itself is the last one returned.
        on_token: called with each new token as soon as it is known.

    Returns int64 [1, n + new]. Raises InputError for a prompt of another shape or dtype.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.dtype != torch.int64:
        raise InputError(f"a prompt is int64 [1, n]; got {input_ids.dtype} {list(input_ids.shape)}")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}")
    ends = {eos} if isinstance(eos, int) else set(eos)
    length = input_ids.shape[1]
    ids = torch.empty(1, length + max_new_tokens, dtype=torch.int64)
    ids[:, :length] = input_ids
    with torch.no_grad():
        for position in range(length, length + max_new_tokens):
            result = run(ids[:, :position])
            logits = result if isinstance(result, Tensor) else result.logits
            token = int(logits[0, -1].argmax())
            ids[0, position] = token
            length = position + 1
            if on_token is not None:
                on_token(token)
            if token in ends:
                break
    return ids[:, :length].clone()
