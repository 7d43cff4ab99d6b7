"""Text: tokenizers in artifacts, chat templates, streams that hold back what is not certain."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from accel.errors import ArtifactError, InputError, OptionError
from accel.runtime.completion import TextStreamer, tokens_of
from accel.runtime.schema import dump
from accel.runtime.text import SETTINGS_FILE, TOKENIZER_FILE, TextSettings, TextStream, Tokenizer

pytest.importorskip("tokenizers")

LETTERS = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
    "added_tokens": [
        {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ã": 4, "©": 5, "Ġ": 6},
              "merges": [["a", "b"]]},
}  # fmt: skip


def tokenizer(template: str = "") -> Tokenizer:
    settings = TextSettings(eos=[0], template=template, special={"bos_token": "<s>"})
    return Tokenizer(json.dumps(LETTERS).encode(), settings)


class Pieces:
    """Words whose tokens are indices of pieces of bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def test_ids_and_text():
    words = tokenizer()
    assert words.encode("ab b<s>") == [3, 6, 2, 0]
    assert words.decode([3, 6, 2, 0]) == "ab b"
    assert words.decode([4, 5]) == "é"


def test_chat():
    words = tokenizer("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert words.chat([{"role": "user", "content": "ab"}]) == [0, 3]
    assert tokens_of(words, "ab", chat=True) == [0, 3]
    assert tokens_of(words, [{"role": "user", "content": "b"}], chat=False) == [0, 2]
    assert tokens_of(words, [1, 2], chat=False) == [1, 2]
    with pytest.raises(OptionError, match="no chat format"):
        tokenizer().chat([{"role": "user", "content": "ab"}])
    with pytest.raises(InputError, match="role"):
        words.chat([{"content": "ab"}])
    for prompt in ("", [], [1.5], [{"role": "user", "content": "b"}, 3]):
        with pytest.raises(InputError):
            tokens_of(words, prompt, chat=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% if %}",
    ],
)
def test_templates_are_kept_in(template):
    with pytest.raises(InputError):
        tokenizer(template).chat([{"role": "user", "content": "a"}])


def test_damaged_files():
    good = {TOKENIZER_FILE: json.dumps(LETTERS).encode(), SETTINGS_FILE: dump(TextSettings([0]))}
    assert Tokenizer.of_files(good.__getitem__).eos == [0]
    for name, data in [
        (TOKENIZER_FILE, b"{}"),
        (TOKENIZER_FILE, b"\xff\xfe"),
        (SETTINGS_FILE, b"[]"),
        (SETTINGS_FILE, dump(TextSettings([0])).replace(b"[0]", b'["a"]')),
        (SETTINGS_FILE, dump(TextSettings([0])).replace(b"{", b'{"more": 1, ', 1)),
    ]:
        with pytest.raises(ArtifactError):
            Tokenizer.of_files({**good, name: data}.__getitem__)


def test_a_stream_waits_for_whole_characters():
    stream = TextStream(Pieces(b"a", b"\xf0\x9f", b"\x98", b"\x80", b"\xc3"))
    assert [stream.push(i) for i in range(5)] == ["a", "", "", "\U0001f600", ""]
    assert stream.finish() == "\ufffd"  # the rest never came


def test_a_stream_ends_before_a_stop_string():
    stream = TextStream(Pieces(b"one", b" two", b" th", b"ree four"), stops=["three", " threat"])
    assert [stream.push(i) for i in (0, 1, 2)] == ["one", " two", ""]
    assert stream.push(3) == " " and stream.stopped == "three" and stream.text == "one two "
    assert stream.push(0) == "" and stream.finish() == "" and stream.count == 4


def test_a_stream_gives_back_what_was_no_stop_string():
    words = Pieces(b"x", b"-", b"-", b"+")
    stream = TextStream(words, stops=["---"])
    assert [stream.push(i) for i in (0, 1, 2, 3)] == ["x", "", "", "--+"]
    assert stream.push(1) == "" and stream.finish() == "-" and not stream.stopped
    with pytest.raises(OptionError):
        TextStream(words, stops=[""])


def test_streams_give_what_decoding_gives():
    words = tokenizer()
    ids = words.encode("ab baé aab")
    stream = TextStream(words, stops=["zzz"])
    assert "".join(map(stream.push, ids)) + stream.finish() == words.decode(ids)


def test_a_streamer_skips_the_prompt():
    shown: list[str] = []
    streamer = TextStreamer(tokenizer(), shown.append)
    streamer.put(torch.tensor([[1, 2]]))
    for token in (3, 6, 2):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(shown) == "ab b"
