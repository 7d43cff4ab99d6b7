"""Small GGUF files: a random Llama with a byte-level tokenizer of 261 tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 256
CHARACTERS = 256
SPECIAL = ("<unk>", "<s>", "</s>", "<|end|>")
MERGED = ("th",)
VOCABULARY = CHARACTERS + len(SPECIAL) + len(MERGED)
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"

Change = Callable[[dict[str, np.ndarray]], None]


def byte_letters() -> list[str]:
    """The letters that stand for bytes in GPT-2's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = dict(zip(plain, map(chr, plain)))
    fresh = (chr(256 + i) for i in range(CHARACTERS))
    return [table[b] if b in table else next(fresh) for b in range(CHARACTERS)]


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors of the model by their names in a file, float32."""
    chance = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return (chance.standard_normal(shape) * 0.2).astype(np.float32)

    kv = WIDTH * KV_HEADS // HEADS
    made = {"token_embd.weight": random(VOCABULARY, WIDTH), "output_norm.weight": 1 + random(WIDTH)}
    for i in range(LAYERS):
        shapes = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }
        made |= {f"blk.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        made |= {f"blk.{i}.{n}.weight": 1 + random(WIDTH) for n in ("attn_norm", "ffn_norm")}
    return made


def write_gguf(
    path: Path,
    encoding: str = "F32",
    *,
    change: Change | None = None,
    metadata: dict[str, Any] | None = None,
    architecture: str = "llama",
    says_vocabulary: bool = True,
) -> Path:
    """Writes a model; matrices whose rows fit blocks are stored in `encoding`.

    `change` may add, drop and replace tensors, `metadata` sets integers.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if says_vocabulary:
        writer.add_vocab_size(VOCABULARY)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    _add_tokenizer(writer)
    content = tensors()
    if change is not None:
        change(content)
    kind = gguf.GGMLQuantizationType[encoding]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    for name, values in content.items():
        fits = values.ndim == 2 and values.shape[1] % block == 0
        if encoding != "F32" and fits:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *byte_letters(), *MERGED])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * len(SPECIAL) + [normal] * (CHARACTERS + 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
