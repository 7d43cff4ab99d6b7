"""From text to text: a prompt through the tokenizer, `generate`, and back.

    done = complete(model, "The sea is", max_new_tokens=40, stream=sys.stdout.write)
    done.text, done.ended

The model brings its tokenizer along (`accel.runtime.text`), or one is passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from accel.errors import InputError, OptionError
from accel.runtime.generator import Generated
from accel.runtime.model import CompiledModel
from accel.runtime.text import TextStream, Tokenizer, Words

_TOKENS = 128
Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages | Sequence[int]


@dataclass
class Completion:
    """A text that followed a prompt.

    Attributes:
        text: without special tokens; it ends before a stop string.
        tokens: the new token ids, all of them; `prompt` those before.
        ended: by a "token" that ends texts, by a stop "string", or at the "length" allowed.
        seconds: for prompt and text together, of all texts that were made in one call.
        logprobs: a number per token, if asked for; `top` the most probable tokens of each step with
            theirs.
        statistics: of speculation.
    """

    text: str
    prompt: list[int]
    tokens: list[int]
    ended: Literal["token", "string", "length"]
    seconds: float
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    statistics: dict[str, int] = field(default_factory=dict)


class TextStreamer:
    """Hands out a text as it grows: a streamer for `generate`."""

    def __init__(
        self, words: Words, write: Callable[[str], Any], stops: Sequence[str] = ()
    ) -> None:
        self._stream, self._write = TextStream(words, stops), write
        self._at_prompt = True

    def put(self, value: Tensor) -> None:
        if self._at_prompt:
            self._at_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._give(self._stream.push(token))

    def end(self) -> None:
        self._give(self._stream.finish())

    def _give(self, text: str) -> None:
        if text:
            self._write(text)


def complete(
    model: CompiledModel,
    prompt: Prompt,
    *,
    chat: bool = False,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[str], Any] | None = None,
    **options: Any,
) -> Completion:
    """What follows a prompt.

    Args:
        model: compiled to generate.
        prompt: text, messages of a conversation (role and content), or token ids.
        chat: a text is a message of the user's, in the model's chat format. Messages always are.
        tokenizer: instead of the one that the model carries.
        stream: gets each piece of text as soon as it is certain.
        options: as for `Generator.generate`; texts end at the tokenizer's end tokens unless
            `eos_token_id` says otherwise, and after 128 tokens, or where the cache is full, if
            nothing says how long they may get.

    Raises OptionError without a tokenizer, InputError for prompts that are empty or too long, and
    what `generate` raises.
    """
    made = complete_each(model, [prompt], chat=chat, tokenizer=tokenizer, stream=stream, **options)
    return made[0]


def complete_each(
    model: CompiledModel,
    prompts: Sequence[Prompt],
    *,
    chat: bool = False,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[str], Any] | None = None,
    **options: Any,
) -> list[Completion]:
    """What follows each of several prompts, of any lengths, in one call of `generate`.

    Arguments as for `complete`; `seconds` and `statistics` are the call's, and a stream follows one
    prompt.
    """
    _ = model.generator  # an error if it has none
    words = tokenizer or model.tokenizer
    if words is None:
        raise OptionError(
            "the model carries no tokenizer, so it takes and gives token ids",
            advice="compile it from a checkpoint that has one, pass tokenizer=, or call "
            "model.generate with ids",
        )
    ids = [tokens_of(words, prompt, chat) for prompt in prompts]
    if not ids:
        raise InputError("no prompt was given")
    longest = max(map(len, ids))
    options = {**room(model, longest, options), **options}
    stops = options.get("stop_strings") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    config = options.get("generation_config")
    known = config.get if isinstance(config, Mapping) else lambda n: getattr(config, n, None)
    if known("eos_token_id") is None:
        options.setdefault("eos_token_id", words.eos)
    ends = options.get("eos_token_id", known("eos_token_id"))
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    streamer = TextStreamer(words, stream, stops) if stream is not None else None
    start = time.perf_counter()
    options |= {"return_dict_in_generate": True, "streamer": streamer, "tokenizer": words}
    made: Generated = model.generate(ids, **options)
    seconds = time.perf_counter() - start
    found = []
    for row, prompt in enumerate(ids):
        tokens = made.sequences[row, longest : longest + made.lengths[row]].tolist()
        text = TextStream(words, stops)
        for token in tokens:
            text.push(token)
        text.finish()
        done = Completion(text.text, prompt, tokens, "length", seconds, statistics=made.statistics)
        if text.stopped:
            done.ended = "string"
        elif tokens and tokens[-1] in ends:
            done.ended = "token"
        _add_logprobs(done, made, row)
        found.append(done)
    return found


def room(model: CompiledModel, prompt: int, options: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens may follow where `options` do not say it."""
    config = options.get("generation_config")
    for name in ("max_new_tokens", "max_length"):
        if options.get(name) is not None or getattr(config, name, None) is not None:
            return {}
    return {"max_new_tokens": max(min(_TOKENS, model.generator.capacity - prompt + 1), 0)}


def tokens_of(words: Tokenizer, prompt: Prompt, chat: bool) -> list[int]:
    """A prompt's token ids. Raises InputError for an empty one."""
    if not prompt:
        raise InputError("the prompt is empty", advice="write something to go on from")
    if isinstance(prompt, str):
        if chat:
            return words.chat([{"role": "user", "content": prompt}])
        return words.encode(prompt)
    messages = [m for m in prompt if isinstance(m, Mapping)]
    if not messages:
        if not all(type(token) is int for token in prompt):
            raise InputError("a prompt is text, messages, or token ids")
        return [token for token in prompt if isinstance(token, int)]
    if len(messages) != len(prompt):
        raise InputError("a prompt is text, messages, or token ids, not a mixture")
    return words.chat(messages)


def _add_logprobs(done: Completion, made: Generated, row: int) -> None:
    if made.logprobs is None or made.top_ids is None or made.top_logprobs is None:
        return
    count = len(done.tokens)
    done.logprobs = made.logprobs[row, :count].tolist()
    steps = zip(made.top_ids[row, :count].tolist(), made.top_logprobs[row, :count].tolist())
    done.top = [list(zip(ids, logs)) for ids, logs in steps]
