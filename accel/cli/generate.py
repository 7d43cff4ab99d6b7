"""`accel generate`: text from an artifact of a language model (`accel compile --generate N`)."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import accel
from accel.cli.calls import Trust
from accel.cli.output import Json, emit, emit_text, progress, tell
from accel.compiler.text import text_files
from accel.errors import OptionError
from accel.frontends.checkpoints import PACKAGED, find_checkpoint, load_tokenizer
from accel.runtime.completion import Completion, complete_each, room
from accel.runtime.model import CompiledModel
from accel.runtime.text import Tokenizer

app = typer.Typer()


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="An .accel file of a language model.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Text to go on from. Repeatable: a text for each."),
    ] = None,
    ids: Annotated[str | None, typer.Option("--ids", help='Token ids: "1,4093,198".')] = None,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="A package, GGUF file or folder with another one.")
    ] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat format.")] = False,
    new: Annotated[
        int | None, typer.Option("--new", help="How many tokens at most; default: 128 if they fit.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Ends the text. Repeatable.")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens.")] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    min_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the draws: one, or one for each prompt.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log probabilities, and the N likeliest tokens.")
    ] = None,
    lookup: Annotated[
        int | None, typer.Option(help="Speculate with N tokens from earlier in the text.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Run the prompt N tokens at a time.")] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Generate text with an artifact of a language model."""
    prompts = list(prompt or [])
    if bool(prompts) == (ids is not None):
        raise OptionError("give one of --prompt and --ids")
    if logprobs is not None and not as_json:
        raise OptionError("--logprobs needs --json")
    with progress("loading", as_json):
        model = accel.load(artifact, trust=trust)
        model.prepare()
        words = _tokenizer(tokenizer) if tokenizer else model.tokenizer
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": None if not seed else seed[0] if len(seed) == 1 else seed,
        "logprobs": logprobs,
        "prompt_lookup_num_tokens": lookup,
        "prefill_chunk_size": chunk,
        "stop_strings": stop,
    }
    given = {k: v for k, v in options.items() if v is not None}
    if ids is not None and words is None:
        _print_ids(model, _numbers(ids), given, as_json)
        return
    shown = stream and not as_json
    given["tokenizer"], given["stream"] = words, _show if shown else None
    start: list[Any] = prompts or [_numbers(ids or "")[0].tolist()]
    made = complete_each(model, start, chat=chat, **given)
    if as_json:
        emit([asdict(done) for done in made] if len(prompts) > 1 else asdict(made[0]), as_json)
    else:
        for i, done in enumerate(made):
            if i:
                emit_text("")
            if len(made) > 1:
                tell(f"{i + 1}: {prompts[i]}", as_json)
            emit_text("" if shown else done.text)
    _summary(made, as_json)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _summary(made: list[Completion], as_json: bool) -> None:
    count, seconds = sum(len(done.tokens) for done in made), made[0].seconds
    rate = count / seconds if seconds else 0.0
    line = f"{count} tokens, {rate:.1f} a second, prompt included"
    facts = made[0].statistics
    if facts:
        line += f"; {facts['accepted']} of {facts['proposed']} proposals taken"
    tell(line, as_json)


def _print_ids(model: CompiledModel, ids: Tensor, options: dict[str, Any], as_json: bool) -> None:
    """Numbers in, numbers out: for a model without a tokenizer."""
    options = {**room(model, ids.shape[1], options), **options}
    made = model.generate(ids, **options | {"return_dict_in_generate": True})
    tokens = made.sequences[0, ids.shape[1] :].tolist()
    logprobs = None if made.logprobs is None else made.logprobs[0].tolist()
    emit({"tokens": tokens, "logprobs": logprobs}, as_json, ",".join(map(str, tokens)))


def _tokenizer(spec: str) -> Tokenizer:
    found = load_tokenizer(find_checkpoint(spec) if spec in PACKAGED else spec)
    return Tokenizer.of_files(text_files(found).__getitem__)


def _numbers(text: str) -> Tensor:
    try:
        return torch.tensor(
            [[int(part) for part in text.split(",") if part.strip()]], dtype=torch.int64
        )
    except ValueError:
        raise OptionError(f"--ids '{text}' are no numbers between commas") from None
