"""What `generate` may be told, by the names of `transformers`, from arguments or a config.

    options = GenerationOptions.of({"max_new_tokens": 20, "do_sample": True}, model_config)

Arguments are checked strictly: an unknown name, a value out of range, or two options of which one
has no effect beside the other is an OptionError. A generation config is a bag of defaults that
somebody saved: options in it that have no effect are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from accel.errors import OptionError
from accel.names import near
from accel.runtime.sampling import Sampling

_TOP_K = 50  # what transformers takes where a config says nothing
_OF_DRAWS = ("temperature", "top_k", "top_p", "min_p", "seed")
# Fields of a generation config that say nothing about which tokens come.
_ABOUT_NO_TOKEN = {
    "bos_token_id", "cache_implementation", "compile_config", "decoder_start_token_id",
    "disable_compile", "generation_kwargs", "is_assistant", "output_attentions",
    "output_hidden_states", "output_logits", "output_scores", "transformers_version", "use_cache",
}  # fmt: skip
# Options that are not supported, with the values that ask for nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "use_cache": True}


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one call.

    Attributes:
        max_new_tokens, max_length: how long a text may get (its prompt included, for `max_length`);
            one of them.
        min_new_tokens: tokens before an end token may come.
        eos_token_id: a token, or several, that ends a text; the text keeps it.
        pad_token_id: fills ended texts; by default the first of `eos_token_id`, else 0.
        stop_strings: a text ends with the token that completes one of these; needs a tokenizer.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed: see
            `accel.runtime.sampling.Sampling`.
        logprobs: also return log probabilities of the tokens, and of so many most probable ones.
        return_dict_in_generate: return a `Generated` instead of a tensor; so does `logprobs`.
        prompt_lookup_num_tokens: speculate with so many tokens that followed the same words
            earlier in the text (`accel.runtime.speculation`).
        max_matching_ngram_size: how many words are looked up at most.
        num_assistant_tokens: speculate with so many tokens of an `assistant_model`.
        prefill_chunk_size: a prompt runs in pieces of so many tokens, with memory for one piece.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    eos_token_id: int | Collection[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | Sequence[int] | None = None
    logprobs: int | None = None
    return_dict_in_generate: bool = False
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_assistant_tokens: int | None = None
    prefill_chunk_size: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], config: Any = None) -> GenerationOptions:
        """Arguments over the fields of a config (of `transformers`, or a mapping)."""
        names = [f.name for f in fields(cls)]
        given = {k: v for k, v in given.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
        if given.get("top_k") == 0:  # none, as in transformers
            given["top_k"] = None
        for name in given:
            if name not in names:
                raise OptionError(f"generate has no option '{name}'", advice=near(name, names))
        made = cls(**{**_of_config(config, given, names), **given})
        made._check()
        return made

    def _check(self) -> None:
        if self.max_new_tokens is not None and self.max_length is not None:
            raise OptionError(
                "max_new_tokens and max_length contradict each other", advice="pass one"
            )
        least = {"min_new_tokens": 0, "logprobs": 0, "prompt_lookup_num_tokens": 1}
        least |= {"max_matching_ngram_size": 1, "num_assistant_tokens": 1, "prefill_chunk_size": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                raise OptionError(f"{name} is {value!r}, not an integer from {low} on")
        if self.max_matching_ngram_size is not None and self.prompt_lookup_num_tokens is None:
            raise OptionError(
                "max_matching_ngram_size has no effect",
                advice="pass prompt_lookup_num_tokens as well",
            )
        if self.prompt_lookup_num_tokens is not None and self.num_assistant_tokens is not None:
            raise OptionError(
                "prompt_lookup_num_tokens and num_assistant_tokens contradict each other",
                advice="tokens are either looked up or made by an assistant model",
            )
        new, least_new = self.max_new_tokens, self.min_new_tokens
        if new is not None and least_new is not None and least_new > new:
            raise OptionError(f"min_new_tokens is {least_new}, and max_new_tokens {new}")

    def sampling(self) -> Sampling:
        """How tokens are chosen. Raises OptionError for values out of range or without effect."""
        return Sampling(
            self.do_sample,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            tuple(self.seed) if isinstance(self.seed, Sequence) else self.seed,
        )

    def stops(self) -> list[int]:
        """Tokens that end a text."""
        given = self.eos_token_id
        stops = [] if given is None else [given] if isinstance(given, int) else list(given)
        for stop in stops:
            if type(stop) is not int or stop < 0:
                raise OptionError(f"eos_token_id is {stop!r}, not a token id")
        return stops

    def strings(self) -> list[str]:
        """Strings that end a text."""
        given = self.stop_strings
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    def new_tokens(self, prompt: int) -> int:
        """How many tokens may follow a prompt of this length."""
        new = self.max_new_tokens
        if self.max_length is not None:
            new = self.max_length - prompt
        if new is None:
            raise OptionError("how long the text may get is not said", advice="pass max_new_tokens")
        if type(new) is not int or new < 0:
            raise OptionError(f"{new} new tokens were asked for")
        return new


def _of_config(config: Any, given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What a generation config adds to the arguments."""
    if config is None:
        return {}
    whole = config if isinstance(config, Mapping) else config.to_diff_dict()
    known = {
        k: v
        for k, v in whole.items()
        if v is not None and k not in _ABOUT_NO_TOKEN and not k.startswith("_")
    }
    found: dict[str, Any] = {}
    for name, value in known.items():
        if name in names:
            found[name] = value
        elif name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise OptionError(
                f"the generation config has {name} = {value!r}, which accel does not support",
                advice="set it to None in the config",
            )
    if "max_new_tokens" in given or "max_new_tokens" in found:
        found.pop("max_length", None)
    if "max_length" in given:
        found.pop("max_new_tokens", None)
    draws = given.get("do_sample", found.get("do_sample", False))
    if not draws:
        for name in _OF_DRAWS:
            found.pop(name, None)
    elif "top_k" not in found and "top_k" not in given:
        found["top_k"] = _TOP_K
    elif found.get("top_k") == 0:
        del found["top_k"]
    return found
