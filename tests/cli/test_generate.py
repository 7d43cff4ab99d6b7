"""From a GGUF file to text: compile --generate, verify, generate, in a folder of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from accel import generate as generate_text
from accel import load
from accel.cli import main
from tests.cli.support import Run

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("tvm")

from tests.frontends.gguf_files import write_gguf

PROMPT = "the sea"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a GGUF file, its artifact, and a cache (and signing key) of its own."""
    folder = tmp_path_factory.mktemp("generate")
    write_gguf(folder / "tiny.gguf", "Q4_1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_CACHE_DIR", str(folder / "cache"))
        with pytest.raises(SystemExit) as stopped:
            sizes = ["--generate", "64", "--extend", "6"]
            main(["compile", f"{folder}/tiny.gguf", *sizes, "-o", f"{folder}/m.accel"])
        assert stopped.value.code == 0
        yield folder


@pytest.fixture
def at_home(home: Path, accel: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`accel` with the cache of `home`."""
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(home / "cache"))
    return accel


def test_text_is_that_of_transformers(home, at_home):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        home, gguf_file="tiny.gguf", dtype=torch.float32, local_files_only=True
    )
    words = AutoTokenizer.from_pretrained(home, gguf_file="tiny.gguf", local_files_only=True)
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2)
    tokens = wanted[0, ids.shape[1] :].tolist()
    made = at_home("generate", home / "m.accel", "--prompt", PROMPT, "--new", 24, "--json")
    assert made.code == 0 and made.json["tokens"] == tokens
    assert made.json["text"] == words.decode(tokens, skip_special_tokens=True)
    lookup = at_home(
        "generate", home / "m.accel", "--prompt", PROMPT, "--new", 24, "--json", "--lookup", 4,
        "--chunk", 3,
    )  # fmt: skip
    assert lookup.json["tokens"] == tokens and lookup.json["statistics"]["rounds"] > 0
    python = generate_text(home / "m.accel", PROMPT, max_new_tokens=24)
    assert python == made.json["text"]
    assert generate_text(load(home / "m.accel"), [PROMPT, "b"], max_new_tokens=24)[0] == python
    pieces: list[str] = []
    generate_text(home / "m.accel", PROMPT, max_new_tokens=24, stream=pieces.append)
    assert "".join(pieces) == python and len(pieces) > 1


def test_printing_streaming_and_stopping(home, at_home):
    plain = at_home("generate", home / "m.accel", "--prompt", PROMPT, "--new", 20)
    streamed = at_home("generate", home / "m.accel", "--prompt", PROMPT, "--new", 20, "--stream")
    assert plain.code == streamed.code == 0
    assert plain.out == streamed.out and plain.out.strip()
    whole = at_home("generate", home / "m.accel", "--prompt", PROMPT, "--new", 20, "--json").json
    stop = whole["text"][5:7]
    cut = at_home(
        "generate", home / "m.accel", "--prompt", PROMPT, "--new", 20, "--stop", stop, "--json"
    ).json
    assert cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["ended"] == "string"
    chat = at_home("generate", home / "m.accel", "--prompt", "a", "--chat", "--new", 3, "--json")
    assert chat.json["prompt"][0] == 1  # the template's first token


def test_sampling_and_log_probabilities(home, at_home):
    options = ["--new", 12, "--json", "--sample", "--temperature", 0.8, "--top-k", 20, "--seed", 5]
    a, b = (at_home("generate", home / "m.accel", "--prompt", "x", *options) for _ in range(2))
    assert a.json["tokens"] == b.json["tokens"]
    made = at_home("generate", home / "m.accel", "--ids", "70,71", "--logprobs", 2, "--json").json
    assert len(made["logprobs"]) == len(made["tokens"]) == len(made["top"])
    assert all(top[0][0] == token for top, token in zip(made["top"], made["tokens"]))


def test_verify_replays_a_text(home, at_home):
    found = at_home("verify", home / "m.accel", "--json")
    assert found.code == 0 and found.json["ok"]
    assert [d["function"] for d in found.json["deviations"]] == ["generate"]


def test_a_new_process_needs_neither_checkpoint_nor_transformers(home, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(home / "cache"))
    code = (
        "import sys, accel\n"
        f"print(repr(accel.generate({str(home / 'm.accel')!r}, {PROMPT!r}, max_new_tokens=5)))\n"
        "print(sorted({'transformers', 'gguf', 'tvm', 'accel.compiler'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["[]"], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "one of --prompt and --ids"),
        (("--prompt", "a", "--ids", "1"), 2, "one of --prompt and --ids"),
        (("--prompt", ""), 3, "empty"),
        (("--ids", ""), 3, "empty"),
        (("--ids", "1,x"), 2, "no numbers"),
        (("--ids", "5000"), 3, "vocabulary of 261"),
        (("--prompt", "a" * 80), 3, "64 positions"),
        (("--prompt", "a", "--new", "90"), 3, "do not fit"),
        (("--prompt", "a", "--temperature", "0.5"), 2, "no effect"),
        (("--prompt", "a", "--top-p", "2", "--sample"), 2, "top_p"),
        (("--prompt", "a", "--lookup", "6"), 2, "extend=7"),
        (("--prompt", "a" * 30, "--chunk", "9"), 2, "extend=9"),
        (("--prompt", "a", "--logprobs", "2"), 2, "--json"),
        (("--prompt", "a", "--tokenizer", "no/such"), 3, "no file or folder 'no/such'"),
    ],
)
def test_bad_calls(home, at_home, arguments, code, said):
    done = at_home("generate", home / "m.accel", *arguments)
    assert done.code == code and said in done.err


def test_damaged_checkpoints_leave_nothing_behind(home, at_home, tmp_path):
    data = (home / "tiny.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[: len(data) // 2])
    done = at_home("compile", tmp_path / "short.gguf", "--generate", 64, "-o", tmp_path / "s.accel")
    assert done.code == 3 and "damaged" in done.err
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".accel"] == []
    done = at_home("compile", home / "tiny.gguf", "--extend", 4, "-o", tmp_path / "s.accel")
    assert done.code == 2 and "--extend" in done.err


def test_a_model_without_a_tokenizer(home, at_home, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "folder")
    path = tmp_path / "n.accel"
    assert at_home("compile", tmp_path / "folder", "--generate", 16, "-o", path).code == 0
    made = at_home("generate", path, "--ids", "3,4", "--new", 4)
    assert made.code == 0 and len(made.out.split(",")) == 4
    said = at_home("generate", path, "--prompt", "hello")
    assert said.code == 2 and "carries no tokenizer" in said.err
    other = at_home("generate", path, "--prompt", "a", "--tokenizer", home / "tiny.gguf")
    assert other.code == 3 and "vocabulary of 64" in other.err
