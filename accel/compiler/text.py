"""The tokenizer of a checkpoint as files that an artifact carries (`accel.runtime.text`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel.errors import InputError
from accel.runtime.schema import dump
from accel.runtime.text import SETTINGS_FILE, TOKENIZER_FILE, TextSettings


def text_files(tokenizer: Any, model: Any = None) -> Mapping[str, bytes]:
    """`text/tokenizer.json` and `text/settings.json` of a tokenizer of `transformers`.

    Args:
        tokenizer: one that the `tokenizers` library runs.
        model: whose generation config may name more tokens that end a text.

    Raises InputError for tokenizers that are written in Python.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} cannot be carried in an artifact: it is not run by the "
            "tokenizers library",
            advice="convert it to a tokenizer.json, or leave it out and generate from token ids",
        )
    template = tokenizer.chat_template or ""
    if isinstance(template, Mapping):
        template = template.get("default", "")
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    settings = TextSettings(
        eos=_ends(tokenizer, model),
        bos=tokenizer.bos_token_id,
        pad=tokenizer.pad_token_id,
        template=template,
        special=special,
    )
    return {TOKENIZER_FILE: backend.to_str().encode(), SETTINGS_FILE: dump(settings)}


def _ends(tokenizer: Any, model: Any) -> list[int]:
    """Tokens that end a text: the generation config's, then the tokenizer's."""
    found: list[int] = []
    inner = getattr(model, "model", None)  # a frontend's wrapper
    config = getattr(model, "generation_config", getattr(inner, "generation_config", None))
    for value in (getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        found += [value] if isinstance(value, int) else list(value or ())
    return list(dict.fromkeys(int(v) for v in found))
