"""Text for language models: what an artifact carries besides the program.

    tokenizer = model.tokenizer            # None if the artifact carries none
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])
    stream = TextStream(tokenizer, stops=["\\n\\n"])
    shown = stream.push(token)             # what this token adds to the text

Two files: `text/tokenizer.json`, in the format of the `tokenizers` library (the extra `text`), and
`text/settings.json` with special tokens and the chat template. A template is a Jinja program from
the model's author: it runs in Jinja's sandbox, which gives it strings and lists and nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from accel.errors import AccelError, ArtifactError, InputError, MissingDependencyError, OptionError
from accel.runtime.schema import decode, parse

TOKENIZER_FILE, SETTINGS_FILE = "text/tokenizer.json", "text/settings.json"
_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


@dataclass
class TextSettings:
    """`text/settings.json`.

    `eos` ends a text: any of these tokens. `special` are the names that templates use for tokens
    ("bos_token" -> "<s>"). An empty `template`: the model has no chat format.
    """

    eos: list[int]
    bos: int | None = None
    pad: int | None = None
    template: str = ""
    special: dict[str, str] = field(default_factory=dict)


class Words(Protocol):
    """What a stream of text needs."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Tokenizer:
    """Text to token ids and back.

    Raises ArtifactError for files that are damaged, and MissingDependencyError without the
    `tokenizers` library.
    """

    def __init__(self, data: bytes, settings: TextSettings) -> None:
        self.settings = settings
        library = _imported("tokenizers", "tokenizers", "text is made of tokens by it")
        try:
            self._tokens = library.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(f"the tokenizer does not load: {error}") from error

    @classmethod
    def of_files(cls, read: Callable[[str], bytes]) -> Tokenizer:
        """From the two files of an artifact."""
        settings = decode(TextSettings, parse(read(SETTINGS_FILE), SETTINGS_FILE), SETTINGS_FILE)
        return cls(read(TOKENIZER_FILE), settings)

    @property
    def eos(self) -> list[int]:
        return list(self.settings.eos)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a text, such as its first token."""
        ids: list[int] = self._tokens.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokens.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat format, and the opening of its answer.

        Raises OptionError if the model has no chat format, InputError where the template refuses
        the messages.
        """
        if not self.settings.template:
            raise OptionError("the model has no chat format", advice="leave out --chat")
        for message in messages:
            if not {"role", "content"} <= set(message):
                raise InputError("a message needs 'role' and 'content'")
        try:
            text: str = self._template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=True,
                **self.settings.special,
            )
        except AccelError:
            raise
        except Exception as error:  # whatever a template does
            raise InputError(f"the chat template fails: {error}") from error
        return self.encode(text, special=False)

    @cached_property
    def _template(self) -> Any:
        sandbox = _imported("jinja2.sandbox", "jinja2", "chat formats are its templates")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self.settings.template)


def _refuse(message: str) -> None:
    raise InputError(f"the chat template refuses the messages: {message}")


def _imported(name: str, package: str, why: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"the package {package} is not installed: {why}",
            advice="pip install 'accel-compiler[text]', or pass token ids",
        ) from error


class TextStream:
    """The text of a growing list of tokens, and whether a stop string has come.

    A token may end inside of a character, and a stop string may begin at the end of what is there:
    both are held back until it is clear.

    Attributes:
        text: what was given out so far; it ends before a stop string.
        stopped: the stop string that ended it, or "".
    """

    def __init__(self, words: Words, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise OptionError("a stop string is empty")
        self._words, self._stops = words, list(stops)
        self._tokens: list[int] = []
        # Only tokens from `start` are decoded again; those before `read` have been given out.
        self._start = self._read = 0
        self._held = ""
        self.text, self.stopped = "", ""

    @property
    def count(self) -> int:
        """Tokens so far, that which completed a stop string included."""
        return len(self._tokens)

    def push(self, token: int) -> str:
        """What becomes certain with this token; "" after a stop string."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before = self._words.decode(self._tokens[self._start : self._read])
        after = self._words.decode(self._tokens[self._start :])
        if after.endswith(_UNFINISHED) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        self._held += after[len(before) :]
        return self._give(self._certain())

    def finish(self) -> str:
        """The rest, at the end of the text."""
        if self.stopped:
            return ""
        before = self._words.decode(self._tokens[self._start : self._read])
        self._held += self._words.decode(self._tokens[self._start :])[len(before) :]
        self._start = self._read = len(self._tokens)
        self._certain()
        return self._give(len(self._held))

    def _certain(self) -> int:
        """How many of the held characters no stop string can claim any more."""
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            self._held = self._held[:at]
            return at
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return len(self._held) - longest

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given
