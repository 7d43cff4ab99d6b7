"""Language models as plain forwards: ids -> logits, and nothing else.

Models take and return more than that: masks, positions, a loss, an output object. `plain_forward`
gives a module from ids [B, S] to logits (an encoder-decoder: from source ids and ids), whose other
inputs say that every token counts and that positions go up from 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import CaptureError
from accel.frontends.checkpoints import LanguageModel

# Arguments that follow from the ids, if a forward wants them.
_MASK, _POSITIONS = "attention_mask", "position_ids"
# How an encoder-decoder's second argument begins: the text that is made.
_TEXT = ("decoder", "tgt", "trg", "target")


def plain_forward(model: Any) -> nn.Module:
    """A forward from ids to logits, without a cache.

    Raises CaptureError for a model in training mode, and for a forward that wants anything else.
    """
    if isinstance(model, nn.Module) and model.training:
        raise CaptureError(
            "the model is in training mode: dropout would be random",
            advice="call model.eval() first",
        )
    if isinstance(model, nn.Module) and hasattr(model, "generation_config"):
        if getattr(model.config, "is_encoder_decoder", False):
            return EncoderDecoder(model).eval()
        return LanguageModel(model).eval()
    names = _more_arguments(model)
    if names and names[0].startswith(_TEXT):
        return SourceAndText(model, names[1:]).eval()
    return Logits(model, names).eval()


def masked_forward(plain: nn.Module) -> nn.Module | None:
    """The same forward of a model of `transformers`, with masks that hide nothing; None if it takes
    none. Some models look for padding themselves where they are given no mask."""
    if not isinstance(plain, (EncoderDecoder, LanguageModel)):
        return None
    known = inspect.signature(plain.model.forward).parameters
    names = [n for n in (_MASK, f"decoder_{_MASK}") if n in known]
    return Masked(plain.model, names).eval() if names else None


def _more_arguments(model: Any) -> list[str]:
    """What a forward wants besides its first argument, by name."""
    forward = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # written in another language
        return []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    more = [p.name for p in parameters[1:] if p.default is p.empty and p.kind in plain]
    text = len(more) > 0 and more[0].startswith(_TEXT)
    unknown = [n for n in more[1 if text else 0 :] if n not in (_MASK, _POSITIONS)]
    if unknown:
        raise CaptureError(
            "a generator is derived from a forward over token ids alone; this one also wants "
            f"{', '.join(unknown)}",
            advice="wrap the model in a forward(input_ids) that returns logits, without a cache",
        )
    return more


def _filled(names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Arguments that follow from the ids."""
    made = {}
    for name in names:
        if name == _MASK:
            made[name] = torch.ones_like(ids)
        else:
            made[name] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return made


class EncoderDecoder(nn.Module):
    """input_ids [B, T], decoder_input_ids [B, S] -> logits [B, S, V]; without its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        out = self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False)
        logits: Tensor = out.logits
        return logits


class Masked(nn.Module):
    """Either kind of model of `transformers`, given masks of ones."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        given = {"input_ids": input_ids}
        if decoder_input_ids is not None:
            given["decoder_input_ids"] = decoder_input_ids
        for name in self.names:
            ids = given.get(name.replace(_MASK, "input_ids"))
            if ids is not None:
                given[name] = torch.ones_like(ids)
        logits: Tensor = self.model(**given, use_cache=False).logits
        return logits


class Logits(nn.Module):
    """ids [B, S] -> the logits of a model that returns them alone or among other things."""

    def __init__(self, model: Any, names: list[str] | None = None) -> None:
        super().__init__()
        self.model, self.names = model, names or []

    def forward(self, input_ids: Tensor) -> Tensor:
        return _logits_of(self.model(input_ids, **_filled(self.names, input_ids)))


class SourceAndText(nn.Module):
    """source ids [B, T], ids [B, S] -> logits; an encoder-decoder of anybody's."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        more = _filled(self.names, input_ids)
        return _logits_of(self.model(input_ids, decoder_input_ids, **more))


def _logits_of(out: Any) -> Tensor:
    """The logits of what a forward returns: alone, first of a tuple, or by name. What stands beside
    them may be a tensor or a number, such as a loss; anything else is taken for a cache."""
    logits, others = out, []
    if isinstance(out, Mapping):
        named = dict(out)
    elif is_dataclass(out):
        named = {f.name: getattr(out, f.name) for f in fields(out)}
    else:
        named = {}
    if named:
        logits = named.pop("logits", None)
        others = list(named.values())
    elif isinstance(out, (tuple, list)) and out:
        logits, *others = out
    elif not isinstance(out, Tensor):
        logits = getattr(out, "logits", None)
    plain = all(x is None or isinstance(x, (Tensor, int, float)) for x in others)
    if not isinstance(logits, Tensor) or not plain:
        raise TypeError(
            f"the forward returns a {type(out).__name__}, and a generator is derived from the "
            "logits alone, without a cache"
        )
    return logits
