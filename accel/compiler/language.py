"""Causal language models as generators: `compile_generator` for this process, `package_generator`
for a file.

    fast = accel.compile_generator(model, capacity=1024)
    ids = fast.generate(input_ids, max_new_tokens=64, eos_token_id=2)

The model is a plain forward over token ids; `insert_kv_cache` gives it its cache, and @prefill and
@decode are compiled together and read one copy of the weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from accel.compiler import gpu
from accel.compiler.assemble import to_contents, to_model
from accel.compiler.capture_text import capture_text, plain_forward
from accel.compiler.choice import add_choices
from accel.compiler.options import Options
from accel.compiler.pipeline import Program, compile_module
from accel.compiler.targets import Target, get_target
from accel.compiler.text import text_files
from accel.errors import CaptureError, OptionError
from accel.ir.module import Module
from accel.passes.base import Context, Pass
from accel.passes.cache_kinds import cache_passes
from accel.passes.insert_kv_cache import InsertKvCache
from accel.passes.manager import PassManager
from accel.passes.page_cache import PageCache
from accel.passes.pipelines import CLEAN_PIPELINE
from accel.passes.registry import load_passes
from accel.runtime.artifact import GENERATE, GoldenCase, write_artifact
from accel.runtime.generator import ASSISTANT_TOKENS
from accel.runtime.golden import golden_case
from accel.runtime.memory import collection_paused
from accel.runtime.model import CompiledModel

_LARGEST_DEFAULT = 2048
_GOLDEN_TOKENS = 12
_GOLDEN_LOGITS = 4


def default_capacity(model: Any) -> int:
    """The longest text that the model's configuration allows, at most 2048 tokens."""
    config = getattr(model, "config", None) or getattr(
        getattr(model, "model", None), "config", None
    )
    sizes = (getattr(config, n, None) for n in ("max_position_embeddings", "n_positions"))
    known = [n for n in sizes if isinstance(n, int) and n > 1]
    return min([*known, _LARGEST_DEFAULT])


def extension(options: Mapping[str, Any]) -> int:
    """How many tokens at once a call of `generate` with these options needs."""
    proposed = options.get("prompt_lookup_num_tokens") or options.get("num_assistant_tokens")
    if proposed is None and options.get("assistant_model") is not None:
        proposed = ASSISTANT_TOKENS
    chunk = options.get("prefill_chunk_size") or 0
    return max(proposed + 1 if isinstance(proposed, int) else 0, chunk)


def compile_generator(
    model: nn.Module | Callable[..., Any],
    *,
    capacity: int = 1024,
    batch: int = 1,
    extend: int = 0,
    cache: str = "",
    target: str | Target = "cpu",
    options: Options | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> CompiledModel:
    """Compiles a causal language model to generate text.

    Args:
        model: a causal model of `transformers`, or any module or callable from ids [B, S] int64 to
            logits [B, S, V].
        capacity: tokens that a text may have, prompt included.
        batch: texts that run together, of equal or unequal length; 0 for any number.
        extend: also compile @extend, which runs up to so many tokens at once: speculation with n
            tokens needs n + 1, and prompts may then run in pieces.
        cache: what keys and values are kept as: a list of "int8", "fp8", "int4", "paged"
            ("int8,paged"), or "sinks" or "h2o", or of passes with their options
            ("quantize_cache{format=int4,group=16}", "page_cache{page=32,pages=100}"): see
            `accel.passes.cache_kinds`.
        target, options: as for `accel.compile`; techniques in `options.passes` apply to both
            functions.
        tokenizer: of `transformers`; carried along, so that the model takes and gives text.

    Raises CaptureError for a model whose tokens look at each other other than by causal attention,
    with the op and the line, and what `accel.compile` raises.
    """
    files = text_files(tokenizer, model) if tokenizer is not None else {}
    return to_model(_compile(model, capacity, batch, extend, cache, target, options), files)


def package_generator(
    model: nn.Module | Callable[..., Any],
    *,
    path: str | os.PathLike[str],
    capacity: int = 1024,
    batch: int = 1,
    extend: int = 0,
    cache: str = "",
    target: str | Target = "cpu",
    options: Options | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> CompiledModel:
    """Like `compile_generator`, into an artifact at `path`: `accel.load(path).generate(...)`.

    The artifact carries the tokenizer, and a text with its logits that `accel verify` replays.
    """
    files = text_files(tokenizer, model) if tokenizer is not None else {}
    program = _compile(model, capacity, batch, extend, cache, target, options)
    made = to_model(program, files)
    replayed = Options.of(options).golden and made.generator.encode is None
    golden = [_golden(model, made)] if replayed else []
    write_artifact(path, to_contents(program, golden, files))
    return made


def _golden(model: Any, made: CompiledModel) -> GoldenCase:
    """Logits of the last tokens of a random text: by the program, where its device is here."""
    generator = made.generator
    length = min(_GOLDEN_TOKENS, generator.capacity)
    count = min(_GOLDEN_LOGITS, length)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(0, generator.vocabulary, (1, length), generator=chance)
    if generator.device.type == "cpu" or torch.cuda.is_available():
        logits = generator.logits(ids, count)
    else:
        with torch.no_grad():
            logits = plain_forward(model)(ids)[0, -count:].cpu()
    return golden_case(GENERATE, [ids], [logits])


def _compile(
    model: Any,
    capacity: int,
    batch: int,
    extend: int,
    cache: str,
    target: str | Target,
    options: Options | Mapping[str, Any] | None,
) -> Program:
    chosen, place = Options.of(options), get_target(target)
    start = time.perf_counter()
    with collection_paused(), gpu.processes(place, chosen) as pool:
        module = derive_generator(
            model, capacity, batch, extend=extend, cache=cache, validate=chosen.validate
        )
        seconds = time.perf_counter() - start
        if place.kind == "cuda":
            add_choices(module, capacity)
        program = compile_module(module, place, chosen, pool=pool)
    program.seconds = {"capture": seconds, **program.seconds}
    return program


def derive_generator(
    model: Any,
    capacity: int,
    batch: int = 1,
    *,
    extend: int = 0,
    cache: str = "",
    validate: bool = False,
) -> Module:
    """The module with @prefill, @decode and @extend, before the compiler's own passes."""
    if capacity < 2 or batch < 0 or extend < 0:
        raise OptionError(
            f"a cache of {capacity} positions for {batch} texts, extended by {extend} tokens"
        )
    if not callable(model):
        raise CaptureError(
            f"a model is a torch.nn.Module or a function, not a {type(model).__name__}"
        )
    load_passes()
    module = capture_text(model, capacity, batch)
    insert = InsertKvCache(capacity=capacity, batch=batch, extend=min(extend, capacity))
    before, after = cache_passes(cache)
    paged = any(isinstance(p, PageCache) for p in after)
    insert.rings, insert.unequal = not paged, batch != 1
    passes: list[str | Pass] = [*CLEAN_PIPELINE, *before, insert, *after]
    PassManager(passes, Context(), validate=validate).run(module)
    del module.functions["main"]
    first = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if isinstance(first, int) and "encode" in module.functions:
        module.metadata["kv_cache"]["decoder_start_token_id"] = first
    return module
