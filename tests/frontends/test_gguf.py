"""GGUF files: read as transformers reads them, and refused where they are damaged."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accel.errors import InputError
from accel.frontends.checkpoints import has_tokenizer, load_checkpoint, load_tokenizer
from accel.frontends.gguf import decode_tensor, read_gguf
from accel.frontends.gguf_config import read_config

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from tests.frontends import gguf_files  # noqa: E402
from tests.frontends.gguf_files import write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weights_are_those_of_transformers(tmp_path, encoding):
    path = write_gguf(tmp_path / "m.gguf", encoding)
    kinds = {t.encoding for t in read_gguf(path).tensors.values()}
    assert encoding in kinds
    model = load_checkpoint(path).model
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    expected = wanted.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("encoding", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_encodings_of_256_values(tmp_path, encoding):
    """The package writes none of these: the blocks are random bytes with harmless scales."""
    kind = gguf.GGMLQuantizationType[encoding]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (8, size), np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "k.gguf"), "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "k.gguf").tensors["w"]
    assert (found.encoding, found.shape) == (encoding, (8, block))
    values = decode_tensor(found, (tmp_path / "k.gguf").read_bytes())
    assert torch.equal(values, torch.from_numpy(gguf.quants.dequantize(raw, kind)))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2", "starcoder2"])
@pytest.mark.parametrize("says_vocabulary", [True, False])
def test_configurations_are_those_of_transformers(tmp_path, architecture, says_vocabulary):
    path = write_gguf(
        tmp_path / "m.gguf", architecture=architecture, says_vocabulary=says_vocabulary
    )
    config = read_config(read_gguf(path))
    wanted = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert config.vocab_size == gguf_files.VOCABULARY
    assert config.to_dict() == wanted.to_dict()
    assert config.name_or_path == wanted.name_or_path


def test_frequencies_are_divided(tmp_path):
    """Llama 3 stores a factor for each rotary frequency."""
    factors = np.linspace(1, 8, gguf_files.WIDTH // gguf_files.HEADS // 2, dtype=np.float32)
    added = {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "m.gguf", change=lambda tensors: tensors.update(added))
    scaled = load_checkpoint(path).model.model.rotary_emb.inv_freq
    usual = load_checkpoint(write_gguf(tmp_path / "u.gguf")).model.model.rotary_emb.inv_freq
    torch.testing.assert_close(scaled, usual / torch.from_numpy(factors))


def test_tokenizer(plain):
    assert has_tokenizer(plain)
    tokenizer = load_tokenizer(plain)
    assert tokenizer.decode(tokenizer("the sea")["input_ids"]) == "the sea"
    assert tokenizer.chat_template == gguf_files.TEMPLATE


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _put(name, *shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop("blk.1.attn_k.weight"), "'blk.1.attn_k.weight' is missing"),
        (_drop("output_norm.weight"), "'output_norm.weight' is missing"),
        (_put("blk.0.surprise.weight", 4), "'blk.0.surprise.weight' [4] belongs to no part"),
        (_put("blk.0.attn_q.weight", 64, 32), "'blk.0.attn_q.weight' is [64, 32] where [64, 64]"),
        (_put("blk.0.ffn_up.weight", 64, 512), "'blk.0.ffn_up.weight' is [64, 512]"),
        (_put("rope_freqs.weight", 5), "'rope_freqs.weight' has 5 values for 8 frequencies"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, said):
    path = write_gguf(tmp_path / "m.gguf", change=change)
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    assert said in caught.value.what and str(path) in caught.value.where


def test_other_architectures(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "sparrow")
    writer.add_tensor("w", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="transformers can build"):
        load_checkpoint(tmp_path / "m.gguf")
    path = write_gguf(tmp_path / "many.gguf", metadata={"llama.expert_count": 1 << 31})
    with pytest.raises(InputError, match="expert_count"):
        load_checkpoint(path)


def _header(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str, dims: list[int], code: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return _text(name) + sizes + struct.pack("<IQ", code, offset)


PAD = b"\0" * 256
ARRAY = struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "less than a header"),
        (b"GGML" + PAD, "no GGUF file"),
        (_header(1) + PAD, "version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + PAD, "big-endian"),
        (_header(3, 1 << 60) + PAD, "do not fit"),
        (_header(3, 0, 1 << 60) + PAD, "do not fit"),
        (_header(3, 0, 1) + struct.pack("<Q", 1 << 62) + PAD, "it ends at byte"),
        (_header(3, 0, 1) + _text("k") + struct.pack("<I", 99) + PAD, "type 99"),
        (_header(3, 0, 1) + _text("k") + struct.pack("<IIQ", 9, 5, 1 << 61) + PAD, "entries"),
        (_header(3, 0, 1) + _text("k") + struct.pack("<IIQ", 9, 8, 1 << 61) + PAD, "entries"),
        (_header(3, 0, 1) + _text("k") + ARRAY + struct.pack("<IQ", 9, 1) * 6, "arrays"),
        (_header(3, 0, 2) + (_text("k") + struct.pack("<IB", 0, 1)) * 2 + PAD, "given twice"),
        (_header(3, 1) + _tensor("w", [1 << 40, 1 << 40]) + PAD, "and the file has"),
        (_header(3, 1) + _tensor("w", [4] * 9) + PAD, "9 dimensions"),
        (_header(3, 1) + _tensor("w", [0, 4]) + PAD, "is [4, 0]"),
        (_header(3, 1) + _tensor("w", [16], code=3) + PAD, "blocks of 32"),
        (_header(3, 1) + _tensor("w", [4], code=4) + PAD, "encoding 4, which does not exist"),
        (_header(3, 1) + _tensor("w", [4], offset=7) + PAD, "and the file has"),
        (_header(3, 2) + _tensor("w", [4]) * 2 + PAD, "is there twice"),
        (_header(3, 2) + _tensor("w", [16]) + _tensor("v", [16], offset=32) + PAD, "overlap"),
    ],
)
def test_damaged_headers(tmp_path, data, said):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert said in str(caught.value), caught.value


def test_truncated_anywhere(plain, tmp_path):
    data = plain.read_bytes()
    short = tmp_path / "short.gguf"
    for size in random.Random(0).sample(range(len(data)), 60):
        short.write_bytes(data[:size])
        with pytest.raises(InputError):
            read_gguf(short)


def test_flipped_bytes_of_the_header(plain, tmp_path):
    """Each either reads as something else or is refused; nothing but InputError comes out."""
    data = bytearray(plain.read_bytes())
    end = min(t.offset for t in read_gguf(plain).tensors.values())
    chance, outcomes = random.Random(0), set()
    broken = tmp_path / "broken.gguf"
    for _ in range(400):
        place = chance.randrange(end)
        kept, data[place] = data[place], chance.randrange(256)
        broken.write_bytes(data)
        data[place] = kept
        outcomes.add(_outcome(broken))
    assert outcomes == {"read", "refused"}


def _outcome(path: Path) -> Any:
    try:
        read_gguf(path)
    except InputError:
        return "refused"
    return "read"


def test_safetensors_folders(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(7)[None]
    assert torch.equal(load_checkpoint(tmp_path)(ids), model(ids).logits)
    assert not has_tokenizer(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    changes = {
        "missing": {k: v for k, v in good.items() if k != name},
        "superfluous": {**good, "model.layers.0.extra": torch.ones(3)},
        name: {**good, name: torch.ones(3, 3)},
    }
    for said, tensors in changes.items():
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=said):
            load_checkpoint(tmp_path)
    for dtype, kind in ((torch.int64, "I64"), (torch.bool, "BOOL"), (torch.complex64, "C64")):
        tensors = {**good, "lm_head.weight": good["lm_head.weight"].to(dtype)}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"'lm_head\.weight' is {kind}"):
            load_checkpoint(tmp_path)
    save_file({k: v.half() for k, v in good.items()}, file, metadata={"format": "pt"})
    torch.testing.assert_close(load_checkpoint(tmp_path)(ids), model(ids).logits, atol=1e-3, rtol=0)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: "{",
        lambda facts: json.dumps({**facts, "hidden_size": -3}),
        lambda facts: json.dumps({**facts, "architectures": ["NoSuchModel"]}),
    ],
)
def test_damaged_configurations(tmp_path, change):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(InputError, match=r"config\.json"):
        load_checkpoint(tmp_path)
