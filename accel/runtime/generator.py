"""Text generation with a compiled model that has @prefill and @decode (`insert_kv_cache`).

    model = accel.load("m.accel")
    ids = model.generate(input_ids, max_new_tokens=64, eos_token_id=2)

A prompt runs through @prefill once, which fills the caches; each further token is one @decode,
which writes its keys and values into them in place (`accel.runtime.decoding`). Caches belong to
the call, so that several threads may generate with one model. Speculation, which lets one call of
the model check several tokens, is in `accel.runtime.speculation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.runtime.cuda import require_device
from accel.runtime.decoding import Limits, Run, TokenLoop
from accel.runtime.device_loop import DeviceLoop
from accel.runtime.executor import CompiledFunction
from accel.runtime.generation_options import GenerationOptions
from accel.runtime.pages import PagedLoop
from accel.runtime.plan import FunctionPlan
from accel.runtime.prompts import Prompts
from accel.runtime.sampling import Chance, Choice, Processor, Recording, Sampling
from accel.runtime.sources import Sources
from accel.runtime.speculation import Draft, PromptLookup, Proposer, Speculation
from accel.runtime.text import TextStream, Words

ASSISTANT_TOKENS = 4
_LONGEST_MATCH = 3


class Streamer(Protocol):
    """What `transformers` calls a streamer: gets the prompt, then each token."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass
class Generated:
    """What a call made, and how.

    Attributes:
        sequences: int64 [B, n + new]: prompts, what follows, padding.
        lengths: new tokens of each row.
        logprobs: log probabilities of the new tokens, float32 [B, new], 0 where padded; if asked
            for. So are `top_ids` and `top_logprobs`: the most probable tokens, [B, new, k].
        statistics: of speculation: how many tokens were proposed, and how many accepted.
    """

    sequences: Tensor
    lengths: list[int]
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    statistics: dict[str, int] = field(default_factory=dict)


@dataclass
class _Row:
    """What a group of rows made: tokens [B, count], and for each step what they came from."""

    tokens: Tensor
    lengths: list[int]
    choices: list[Choice]


class Generator:
    """Generates with two compiled functions, or three.

    Args:
        plan: of @prefill: it says how large ids and caches are.
        prefill, decode: run flat lists of tensors.
        device: where the functions run.
        extend: runs several tokens at once; speculation and prefills in pieces need it.
        encode: of an encoder-decoder: makes of source ids what the other functions read.
        advances: greedy choices on a GPU, by the number of stop tokens that they know.
    """

    def __init__(
        self,
        plan: FunctionPlan,
        prefill: Run,
        decode: Run,
        device: torch.device | None = None,
        extend: Run | None = None,
        encode: Run | None = None,
        advances: Mapping[int, CompiledFunction] | None = None,
    ) -> None:
        facts = plan.metadata["kv_cache"]
        self.encode = encode
        self.start_token: int | None = facts.get("decoder_start_token_id")
        self.capacity, self.vocabulary = int(facts["capacity"]), int(facts["vocabulary"])
        self.device = device or torch.device("cpu")
        if "paged" in facts:
            self.loop: TokenLoop = PagedLoop(plan, prefill, decode, self.device, extend)
        elif self.device.type == "cuda" and encode is None and isinstance(decode, CompiledFunction):
            self.loop = DeviceLoop(plan, prefill, decode, self.device, extend, advances)
        else:
            self.loop = TokenLoop(plan, prefill, decode, self.device, extend)
        rows = plan.values[plan.inputs[0]].shape[0]
        self.rows = rows if isinstance(rows, int) else None

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        streamer: Streamer | None = None,
        tokenizer: Words | None = None,
        logits_processor: Sequence[Processor] = (),
        assistant_model: Any = None,
        decoder_input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        decoder_start_token_id: int | None = None,
        **options: Any,
    ) -> Tensor | Generated:
        """Prompts and what follows them: int64 [B, n + new], padded on the right.

        Args:
            input_ids: int64 [B, n]; or prompts of unequal lengths as lists, which come back padded
                on the left.
            attention_mask: [B, n], 0 where a prompt is padded; prompts end in the last column.
            generation_config: of `transformers`, or a mapping: what `options` leave open.
            streamer: `put` gets the prompts, then each new token; `end` is called at last.
            tokenizer: needed for `stop_strings`.
            logits_processor: functions of ids [B, n] and scores [B, V] to scores.
            assistant_model: a compiled model with the same vocabulary that proposes tokens.
            decoder_input_ids, decoder_start_token_id: of an encoder-decoder, whose `input_ids` are
                source texts: how the texts begin that it makes; by default with the model's own
                first token.
            options: see `accel.runtime.generation_options.GenerationOptions`.

        Rows run together, as many as the model was compiled for (`batch`), whatever their lengths;
        of one length where it has an encoder, or no form for that (`unequal` in its facts). Each
        row's text is what it would be alone; where texts are drawn, with a `seed` for each row.

        Raises InputError for empty or too long prompts and ids out of range, OptionError for
        options that contradict each other.
        """
        require_device(self.device)
        chosen = GenerationOptions.of(options, generation_config)
        assistant = getattr(assistant_model, "generator", assistant_model)
        if assistant is not None and not isinstance(assistant, Generator):
            raise OptionError(
                f"assistant_model is a {type(assistant).__name__}, not a compiled model",
                advice="compile it with accel.compile_generator",
            )
        stops = chosen.stops()
        pad = chosen.pad_token_id if chosen.pad_token_id is not None else next(iter(stops), 0)
        sources = None
        if self.encode is not None:
            sources = Sources.of(input_ids, attention_mask, self.vocabulary, self.device)
            first = self.start_token if decoder_start_token_id is None else decoder_start_token_id
            input_ids, attention_mask = sources.start(decoder_input_ids, first), None
        elif decoder_input_ids is not None or decoder_start_token_id is not None:
            raise OptionError("the model has no encoder, so its text begins with input_ids")
        prompts = Prompts.of(input_ids, attention_mask, pad, self.device)
        new = chosen.new_tokens(prompts.ids.shape[1])
        prompts.check(new, self.capacity, self.vocabulary)
        if streamer is not None and len(prompts.lengths) > 1:
            raise OptionError(f"a streamer follows one text, and {len(prompts.lengths)} were given")
        call = _Call(
            self,
            chosen,
            Limits(new, frozenset(stops), pad, chosen.prefill_chunk_size or 0),
            assistant=assistant,
            tokenizer=tokenizer,
            processors=tuple(logits_processor),
            sources=sources,
            count=len(prompts.lengths),
        )
        if streamer is not None:
            streamer.put(prompts.ids.cpu())
        rows = self.rows if not call.speculates else 1
        groups = prompts.groups(rows, self.loop.each and sources is None)
        if sources is not None:
            groups = sources.split(groups, rows)
        made = [call.run(prompts, group, streamer) for group in groups]
        if streamer is not None:
            streamer.end()
        result = call.result(prompts, groups, made)
        return result if chosen.return_dict_in_generate or call.records else result.sequences

    def logits(self, ids: Tensor, count: int) -> Tensor:
        """Logits [count, V] of the last `count` tokens of a text [1, n], on the CPU.

        The text before them runs through @prefill, they through @decode one after the other.
        """
        with torch.no_grad():
            ids = ids.to(self.device).expand(self.rows or 1, -1)
            first = ids.shape[1] - count + 1
            logits, state = self.loop.prefill(ids[:, :first], self.loop.empty(len(ids)))
            rows = [logits[:1].cpu()]
            for at in range(first, ids.shape[1]):
                position = torch.tensor(at, device=self.device)
                logits, state = self.loop.decode(ids[:, at], position, state)
                rows.append(logits[:1].cpu())
        return torch.cat(rows)


def _only(chance: Chance) -> torch.Generator | None:
    """The source of chance of one row."""
    return chance if chance is None or isinstance(chance, torch.Generator) else chance[0]


class _Call:
    """One call of `generate`: how its tokens are chosen and when its texts end."""

    def __init__(
        self,
        generator: Generator,
        options: GenerationOptions,
        limits: Limits,
        *,
        assistant: Generator | None,
        tokenizer: Words | None,
        processors: tuple[Processor, ...],
        sources: Sources | None = None,
        count: int = 1,
    ) -> None:
        self.sources = sources
        self.generator, self.options, self.limits = generator, options, limits
        self.words, self.strings = tokenizer, options.strings()
        if self.strings and tokenizer is None:
            raise OptionError(
                "stop_strings need a tokenizer", advice="pass tokenizer=, or eos_token_id instead"
            )
        self.processors, self.assistant = processors, assistant
        self.statistics: dict[str, int] = {}
        if options.num_assistant_tokens is not None and assistant is None:
            raise OptionError(
                "num_assistant_tokens has no effect", advice="pass assistant_model as well"
            )
        if assistant is not None and options.prompt_lookup_num_tokens is not None:
            raise OptionError("tokens are either looked up or made by an assistant model")
        if assistant is not None and assistant.vocabulary != generator.vocabulary:
            raise OptionError(
                f"the assistant knows {assistant.vocabulary} tokens, the model "
                f"{generator.vocabulary}"
            )
        self.plain = options.sampling()
        self.records = options.logprobs is not None
        self.random: torch.Generator | list[torch.Generator] | None
        if isinstance(self.plain.seed, tuple):
            if len(self.plain.seed) != count:
                raise OptionError(
                    f"{len(self.plain.seed)} seeds for {count} prompts",
                    advice="pass one seed, or one for each prompt",
                )
            made = (self.plain.chance(generator.device, row) for row in range(count))
            self.random = [own for own in made if own is not None]
        else:
            self.random = self.plain.chance(generator.device)

    @property
    def speculates(self) -> bool:
        """Whether texts run one at a time: each accepts another number of tokens."""
        return self.assistant is not None or self.options.prompt_lookup_num_tokens is not None

    def chance(self, rows: Sequence[int], more: int) -> Chance:
        """Where the draws of these rows come from, and of so many that nobody reads."""
        if not isinstance(self.random, list):
            return self.random
        unread = [torch.Generator(self.generator.device) for _ in range(more)]
        return [*(self.random[row] for row in rows), *unread]

    def sampling(self, prompts: Sequence[int]) -> Sampling:
        """How the tokens after prompts of these lengths are chosen."""
        least = self.options.min_new_tokens or 0
        if not (self.records or self.processors or least):
            return self.plain
        return Recording(
            **vars(self.plain),
            least=least,
            stops=tuple(sorted(self.limits.stops)),
            processors=self.processors,
            top=self.options.logprobs,
            prompts=tuple(prompts),
        )

    def run(self, prompts: Prompts, rows: list[int], streamer: Streamer | None) -> _Row:
        """The texts of rows that run together."""
        count = len(rows)
        if not self.speculates:  # where more rows run than there are, the last one fills them
            rows = rows + rows[-1:] * self.generator.loop.missing(count)
        lengths = [prompts.lengths[row] for row in rows]
        text = prompts.ids[rows, prompts.ids.shape[1] - max(lengths) :]
        sampling = self.sampling(lengths)
        streams = []
        if self.words is not None and self.strings:
            streams = [TextStream(self.words, self.strings) for _ in range(count)]
        put = self._put(streamer, streams, count)
        model = self.generator.loop
        if self.sources is not None and self.generator.encode is not None:
            with torch.no_grad():
                model = model.given(self.generator.encode([self.sources.together(rows)]))
        chance = self.chance(rows[:count], len(rows) - count)
        loop = self._speculation(sampling, model, _only(chance)) if self.speculates else None
        if loop is not None:
            tokens = loop.text(text, self.limits, sampling, _only(chance), put)
            for name, number in loop.statistics.items():
                self.statistics[name] = self.statistics.get(name, 0) + number
        else:
            tokens = model.text(text, self.limits, sampling, chance, put, lengths)[:count]
        lengths = [self._length(row) for row in tokens]
        for i, stream in enumerate(streams):
            lengths[i] = min(lengths[i], stream.count)
            tokens[i, lengths[i] :] = self.limits.pad
        return _Row(tokens, lengths, sampling.choices if isinstance(sampling, Recording) else [])

    def _speculation(
        self, sampling: Sampling, loop: TokenLoop, chance: torch.Generator | None
    ) -> Speculation:
        """What proposes tokens for one text."""
        options, model = self.options, self.generator
        if model.rows not in (None, 1):
            raise OptionError(
                f"the model runs {model.rows} texts at a time, and speculation one",
                advice="compile with batch=1, or batch=0 for any number",
            )
        proposer: Proposer
        if self.assistant is not None:
            count = options.num_assistant_tokens or ASSISTANT_TOKENS
            draft = self.assistant
            proposer = Draft(draft.loop, self.plain, chance, draft.capacity)
        else:
            assert options.prompt_lookup_num_tokens is not None
            count = options.prompt_lookup_num_tokens
            proposer = PromptLookup(options.max_matching_ngram_size or _LONGEST_MATCH)
        return Speculation(loop, proposer, count, model.capacity)

    def _put(
        self, streamer: Streamer | None, streams: list[TextStream], count: int
    ) -> Callable[[Tensor], bool] | None:
        """Gets each column of tokens; says whether every text has had one of its stop strings."""
        if streamer is None and not streams:
            return None
        stops = self.limits.stops
        ended = [False] * len(streams)

        def put(column: Tensor) -> bool:
            column = column[:count]
            if streamer is not None:
                streamer.put(column)
            for i, (token, stream) in enumerate(zip(column.tolist(), streams)):
                if not ended[i]:
                    stream.push(token)
                    ended[i] = bool(stream.stopped) or token in stops
            return bool(streams) and all(ended)

        return put

    def result(self, prompts: Prompts, groups: list[list[int]], made: list[_Row]) -> Generated:
        """All rows side by side."""
        pad, longest = self.limits.pad, max(m.tokens.shape[1] for m in made)
        count = len(prompts.lengths)
        new = torch.full((count, longest), pad, dtype=torch.int64, device=prompts.ids.device)
        for rows, part in zip(groups, made):
            new[rows, : part.tokens.shape[1]] = part.tokens
        lengths = [0] * count
        for rows, part in zip(groups, made):
            for row, length in zip(rows, part.lengths):
                lengths[row] = length
        whole = torch.cat([prompts.ids, new], dim=1)
        result = Generated(whole, lengths, statistics=self.statistics)
        if self.records:
            self._add_logprobs(result, groups, made, longest)
        return result

    def _add_logprobs(
        self, result: Generated, groups: list[list[int]], made: list[_Row], longest: int
    ) -> None:
        top = min(self.options.logprobs or 0, self.generator.vocabulary)
        rows = len(result.lengths)
        logprobs = torch.zeros(rows, longest)
        top_ids = torch.zeros(rows, longest, top, dtype=torch.int64)
        top_logprobs = torch.zeros(rows, longest, top)
        for members, part in zip(groups, made):
            for step, choice in enumerate(part.choices):
                for i, row in enumerate(members):
                    if step < part.lengths[i]:
                        logprobs[row, step] = choice.logprobs[i]
                        top_ids[row, step] = choice.top_ids[i]
                        top_logprobs[row, step] = choice.top_logprobs[i]
        result.logprobs, result.top_ids, result.top_logprobs = logprobs, top_ids, top_logprobs

    def _length(self, tokens: Tensor) -> int:
        """New tokens of a row without its padding."""
        for i, token in enumerate(tokens.tolist()):
            if token in self.limits.stops:
                return i + 1
        return tokens.shape[0]
