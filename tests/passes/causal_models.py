"""Tiny random causal language models of many families, as plain forwards over token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import Dim

from accel.frontends.checkpoints import LanguageModel
from accel.frontends.export import capture
from accel.ir import Module
from accel.passes.manager import run_pipeline
from accel.passes.pipelines import CLEAN_PIPELINE

VOCABULARY = 128
WINDOW = 8
LARGEST = 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LARGEST,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_LOCAL = {**_GROUPED, "sliding_window": WINDOW}
_IDS = {k: _SIZES[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_implementation": "grouped_mm",
}

# family -> (name of the configuration, its arguments); Gemma-2 and BLOOM have eager attention only.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", _LOCAL),
    "gemma2": ("Gemma2Config", {**_LOCAL, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_LOCAL,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": ("GPT2Config", {**_IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": ("BloomConfig", {**_IDS, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", _SIZES),
    "stablelm": ("StableLmConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "mixtral": (
        "MixtralConfig",
        {
            **_GROUPED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "batched_mm",
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_LOCAL,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "batched_mm",
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "mixtral_grouped": ("MixtralConfig", {**_GROUPED, **_EXPERTS}),
}
_STATES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 4,
    "num_hidden_layers": 2,
    "time_step_rank": 4,
}
# Models whose state is no keys and values; they count to the length of their text.
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {**_IDS, **_STATES}),
    "falcon_mamba": ("FalconMambaConfig", {**_IDS, **_STATES}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **_IDS,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "lru_width": 32,
            "attention_window_size": WINDOW,
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {
            **_IDS,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        },
    ),
}
# Encoder-decoders.
TRANSLATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": LARGEST,
            "forced_eos_token_id": None,
        },
    ),
}
EAGER_ONLY = ("gemma2", "bloom", "gpt_oss", *RECURRENT)


def tiny(family: str, attention: str = "sdpa") -> Any:
    """A model of `transformers` with random weights."""
    import transformers

    name, arguments = (FAMILIES | RECURRENT | TRANSLATORS)[family]
    config = getattr(transformers, name)(**arguments)
    attention = "eager" if family in EAGER_ONLY else attention
    torch.manual_seed(0)
    kind = "AutoModelForSeq2SeqLM" if family in TRANSLATORS else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_config(config, attn_implementation=attention)
    return model.eval()


def captured(model: nn.Module, *, symbolic_batch: bool = True) -> Module:
    """The plain forward, after the exact clean-up."""
    plain = LanguageModel(model) if hasattr(model, "generation_config") else model
    length = Dim("length", min=2, max=LARGEST)
    sizes = {0: Dim("batch", min=2, max=8), 1: length} if symbolic_batch else {1: length}
    ids = torch.zeros(2 if symbolic_batch else 1, 12, dtype=torch.int64)
    module = capture(plain, (ids,), dynamic_shapes=(sizes,))
    run_pipeline(module, list(CLEAN_PIPELINE))
    return module
