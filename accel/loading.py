"""`accel.load` runs an artifact; `accel.generate` makes text with one, or with a model.

The compiler is only imported to rebuild code that is not trusted, and to compile a model.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from accel.runtime.artifact import Artifact
from accel.runtime.completion import Prompt, complete, complete_each
from accel.runtime.loader import Rebuilt
from accel.runtime.loader import load as _load
from accel.runtime.model import CompiledModel


def load(
    path: str | os.PathLike[str], trust: bool = False, *, rebuild: bool = True
) -> CompiledModel:
    """Loads an artifact; the result is called as the model was.

    Native code runs only if a key that you trust signed it (your own counts), or with `trust`.
    Otherwise it is compiled again from the IR in the artifact, and the log says so; with
    `rebuild=False`, or where the code generator is not installed, that is an error.

    Raises ArtifactError for a damaged or foreign file, TrustError for untrusted native code.
    """
    return _load(path, trust, rebuild=_rebuild if rebuild else None)


def generate(
    model: Any,
    prompt: Prompt | list[str],
    *,
    chat: bool = False,
    tokenizer: Any = None,
    stream: Callable[[str], Any] | None = None,
    **options: Any,
) -> str | list[str]:
    """The text that follows a prompt.

    Args:
        model: an artifact's path, a loaded or compiled model that generates, or a causal model of
            `transformers`, which is compiled first (compile it once yourself for several calls).
        prompt: text, or the messages of a conversation; a list of texts, of any lengths, gives a
            list. They run together if the model was compiled for that (`batch`).
        chat: prompts are messages of the user's, in the model's chat format.
        tokenizer: of `transformers`, for a model that is compiled here and has none.
        stream: gets each piece of text as soon as it is certain: `stream=sys.stdout.write`.
        options: what `transformers` takes: max_new_tokens, do_sample, temperature, stop_strings...

    Raises what `load`, `compile_generator` and `CompiledModel.generate` raise.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load(model)
    texts: list[Any] | None = None
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        texts = prompt
    if not isinstance(model, CompiledModel):
        compiler = importlib.import_module("accel.compiler.language")
        model = compiler.compile_generator(
            model,
            capacity=compiler.default_capacity(model),
            batch=1 if texts is None or len(texts) == 1 else 0,
            extend=compiler.extension(options),
            tokenizer=tokenizer,
        )
    if texts is not None:
        made = complete_each(model, texts, chat=chat, stream=stream, **options)
        return [done.text for done in made]
    one: Any = prompt
    return complete(model, one, chat=chat, stream=stream, **options).text


def _rebuild(artifact: Artifact) -> Rebuilt:
    made: Rebuilt = importlib.import_module("accel.compiler.rebuild").rebuild(artifact)
    return made
