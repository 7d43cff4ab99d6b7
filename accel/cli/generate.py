"""`accel generate`: text from an artifact of a language model (`accel compile --generate N`)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import accel
from accel.cli.calls import Trust
from accel.cli.output import Json, emit, emit_text, progress
from accel.errors import OptionError
from accel.frontends.checkpoints import PACKAGED, find_checkpoint, load_tokenizer

app = typer.Typer()


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="An .accel file with @prefill and @decode.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text; needs --tokenizer.")] = "",
    ids: Annotated[str, typer.Option("--ids", help='Token ids instead: "1,4093,198".')] = "",
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="A package, GGUF file or checkpoint folder.")
    ] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat format.")] = False,
    new: Annotated[int, typer.Option("--new", help="How many tokens at most.")] = 128,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens.")] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    min_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Generate text with an artifact of a language model."""
    if bool(prompt) == bool(ids):
        raise OptionError("give one of --prompt and --ids")
    if prompt and not tokenizer:
        raise OptionError("--prompt needs --tokenizer", advice=f"one of {', '.join(PACKAGED)}")
    words = _tokenizer(tokenizer) if tokenizer else None
    given = _numbers(ids) if ids else _encoded(words, prompt, chat)
    with progress("loading", as_json):
        model = accel.load(artifact, trust=trust)
        model.prepare()
    printer = _Printer(words) if stream and not as_json else None
    start = time.perf_counter()
    made = model.generate(
        given,
        max_new_tokens=new,
        eos_token_id=getattr(words, "eos_token_id", None),
        do_sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        streamer=printer,
    )
    seconds = time.perf_counter() - start
    tokens: list[int] = made[0, given.shape[1] :].tolist()
    text = words.decode(tokens, skip_special_tokens=True) if words is not None else ""
    data = {"tokens": tokens, "text": text, "seconds": seconds}
    if as_json:
        emit(data, as_json)
    elif printer is None:
        emit_text(text or json.dumps(tokens))
    rate = len(tokens) / seconds if seconds else 0.0
    print(f"{len(tokens)} tokens, {rate:.1f} a second, prompt included", file=sys.stderr)


class _Printer:
    """Prints what each token adds to the text."""

    def __init__(self, words: Any) -> None:
        self.words, self.shown = words, ""
        self.tokens: list[int] = []
        self.first = True

    def put(self, value: Tensor) -> None:
        if self.first:  # the prompt
            self.first = False
            return
        self.tokens += value.reshape(-1).tolist()
        if self.words is None:
            sys.stdout.write(f"{self.tokens[-1]} ")
        else:
            text = self.words.decode(self.tokens, skip_special_tokens=True)
            if text.endswith("\ufffd"):  # the middle of a character
                return
            sys.stdout.write(text[len(self.shown) :])
            self.shown = text
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write("\n")


def _tokenizer(spec: str) -> Any:
    return load_tokenizer(find_checkpoint(spec) if spec in PACKAGED else spec)


def _encoded(words: Any, prompt: str, chat: bool) -> Tensor:
    if not chat:
        found = words(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        found = words.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids: Tensor = found["input_ids"]
    return ids


def _numbers(text: str) -> Tensor:
    try:
        return torch.tensor([[int(part) for part in text.split(",")]])
    except ValueError:
        raise OptionError(f"--ids '{text}' are no numbers between commas") from None
