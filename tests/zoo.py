"""Tiny random models of the architectures in `transformers`, built offline from configurations.

Each row of `ZOO` names one architecture and knows how to build a small random instance
(`build() -> Module` in evaluation mode) and inputs for it (`make_inputs(batch, length) -> kwargs`).
Weights come from a fixed seed. Every model runs in well under a second, so the whole zoo can be
swept by `benchmarks/coverage.py`, and a sample of it by the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

Inputs = dict[str, torch.Tensor]

VOCAB = 96
"""Vocabulary of every language model here."""


@dataclass(frozen=True)
class Row:
    """One architecture: its family, how to build it, and how to make its inputs."""

    name: str
    family: (
        str  # decoder | moe | encoder | encoder-decoder | vision | multimodal | audio | state-space
    )
    config: str
    model: str
    options: dict[str, Any]
    inputs: Callable[[int, int], Inputs]

    def build(self, seed: int = 0) -> torch.nn.Module:
        """The model, float32, in evaluation mode; the same weights for the same seed."""
        config = getattr(transformers, self.config)(**self.options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, self.model)(config).eval()

    def make_inputs(self, batch: int = 2, length: int = 12, seed: int = 1) -> Inputs:
        """Keyword arguments for a call: `length` is tokens, and is ignored by vision rows."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(batch, length)


def tokens(batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(5, VOCAB, (batch, length))}


def masked_tokens(batch: int, length: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1 and length > 3:
        mask[-1, -3:] = 0
    return {"input_ids": torch.randint(5, VOCAB, (batch, length)), "attention_mask": mask}


def source_and_target(batch: int, length: int) -> Inputs:
    return {
        "input_ids": torch.randint(5, VOCAB, (batch, length)),
        "decoder_input_ids": torch.randint(5, VOCAB, (batch, max(2, length // 2))),
    }


def image(size: int) -> Callable[[int, int], Inputs]:
    def make(batch: int, length: int) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, size, size)}

    return make


def waveform(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, 400 + 40 * length)}


def image_and_text(size: int, **extra: int) -> Callable[[int, int], Inputs]:
    def make(batch: int, length: int) -> Inputs:
        length = min(length, 16)
        ids = torch.randint(5, VOCAB - 1, (batch, length))
        ids[:, -1] = VOCAB - 1
        return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, size, size)}

    return make


def whisper_inputs(batch: int, length: int) -> Inputs:
    return {
        "input_features": torch.randn(batch, 16, 40),
        "decoder_input_ids": torch.randint(5, VOCAB, (batch, min(length, 16))),
    }


def ast_inputs(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, 32, 16)}


def speech_features(batch: int, length: int) -> Inputs:
    return {
        "input_features": torch.randn(batch, 24, 16),
        "decoder_input_ids": torch.randint(5, VOCAB, (batch, min(length, 16))),
    }


# Options shared by the models that use Llama's names for their sizes.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
VIT_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
WAV_LIKE: dict[str, Any] = {
    **{k: v for k, v in SMALL.items() if k != "max_position_embeddings"},
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
CLIP_TEXT = {**SMALL, "projection_dim": 16}
CLIP_VISION = {**VIT_LIKE, "projection_dim": 16}


def _decoders() -> list[Row]:
    def row(name: str, config: str, model: str, options: dict[str, Any]) -> Row:
        return Row(name, "decoder", config, model, options, tokens)

    return [
        row("llama", "LlamaConfig", "LlamaForCausalLM", GROUPED),
        row("mistral", "MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 8}),
        row("qwen2", "Qwen2Config", "Qwen2ForCausalLM", GROUPED),
        row("qwen3", "Qwen3Config", "Qwen3ForCausalLM", HEADED),
        row("gemma", "GemmaConfig", "GemmaForCausalLM", HEADED),
        row("gemma2", "Gemma2Config", "Gemma2ForCausalLM", {**HEADED, "sliding_window": 8}),
        row(
            "gemma3",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            {**HEADED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        row("phi", "PhiConfig", "PhiForCausalLM", SMALL),
        row("phi3", "Phi3Config", "Phi3ForCausalLM", GROUPED),
        row("stablelm", "StableLmConfig", "StableLmForCausalLM", GROUPED),
        row("olmo", "OlmoConfig", "OlmoForCausalLM", GROUPED),
        row("olmo2", "Olmo2Config", "Olmo2ForCausalLM", GROUPED),
        row("cohere", "CohereConfig", "CohereForCausalLM", GROUPED),
        row("granite", "GraniteConfig", "GraniteForCausalLM", GROUPED),
        row("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", GROUPED),
        row("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", GROUPED),
        row("helium", "HeliumConfig", "HeliumForCausalLM", HEADED),
        row("gpt2", "GPT2Config", "GPT2LMHeadModel", GPT2_LIKE),
        row(
            "gpt_bigcode",
            "GPTBigCodeConfig",
            "GPTBigCodeForCausalLM",
            GPT2_LIKE,
        ),
        row(
            "gpt_neo",
            "GPTNeoConfig",
            "GPTNeoForCausalLM",
            {
                **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
                "num_heads": 4,
                "num_layers": 2,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 8,
            },
        ),
        row("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
        row("gptj", "GPTJConfig", "GPTJForCausalLM", {**GPT2_LIKE, "rotary_dim": 4}),
        row("codegen", "CodeGenConfig", "CodeGenForCausalLM", {**GPT2_LIKE, "rotary_dim": 4}),
        row(
            "opt",
            "OPTConfig",
            "OPTForCausalLM",
            {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        ),
        row(
            "bloom",
            "BloomConfig",
            "BloomForCausalLM",
            {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        ),
        row("falcon", "FalconConfig", "FalconForCausalLM", {**SMALL, "multi_query": True}),
        row(
            "mpt",
            "MptConfig",
            "MptForCausalLM",
            {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        ),
        row(
            "xglm",
            "XGLMConfig",
            "XGLMForCausalLM",
            {
                "vocab_size": VOCAB,
                "d_model": 32,
                "ffn_dim": 48,
                "num_layers": 2,
                "attention_heads": 4,
                "max_position_embeddings": 64,
            },
        ),
    ]


def _mixtures() -> list[Row]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

    def row(name: str, config: str, model: str, options: dict[str, Any]) -> Row:
        return Row(name, "moe", config, model, options, tokens)

    return [
        row(
            "mixtral",
            "MixtralConfig",
            "MixtralForCausalLM",
            {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        row(
            "qwen2_moe",
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            {**GROUPED, **experts, "shared_expert_intermediate_size": 16},
        ),
        row("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**HEADED, **experts}),
        row(
            "gpt_oss",
            "GptOssConfig",
            "GptOssForCausalLM",
            {
                **HEADED,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        row(
            "olmoe",
            "OlmoeConfig",
            "OlmoeForCausalLM",
            {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
        ),
        row(
            "granitemoe",
            "GraniteMoeConfig",
            "GraniteMoeForCausalLM",
            {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
    ]


def _encoders() -> list[Row]:
    def row(name: str, config: str, model: str, options: dict[str, Any]) -> Row:
        return Row(name, "encoder", config, model, options, masked_tokens)

    distil = {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    deberta = {
        **SMALL,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    }
    return [
        row("bert", "BertConfig", "BertModel", SMALL),
        row("roberta", "RobertaConfig", "RobertaForMaskedLM", SMALL),
        row("camembert", "CamembertConfig", "CamembertModel", SMALL),
        row("distilbert", "DistilBertConfig", "DistilBertForSequenceClassification", distil),
        row("albert", "AlbertConfig", "AlbertModel", {**SMALL, "embedding_size": 16}),
        row("electra", "ElectraConfig", "ElectraForMaskedLM", {**SMALL, "embedding_size": 16}),
        row("deberta_v2", "DebertaV2Config", "DebertaV2Model", deberta),
        row("mpnet", "MPNetConfig", "MPNetModel", SMALL),
        row("xlm_roberta", "XLMRobertaConfig", "XLMRobertaModel", SMALL),
        row("convbert", "ConvBertConfig", "ConvBertModel", {**SMALL, "embedding_size": 32}),
        row(
            "squeezebert", "SqueezeBertConfig", "SqueezeBertModel", {**SMALL, "embedding_size": 32}
        ),
        row(
            "mobilebert",
            "MobileBertConfig",
            "MobileBertModel",
            {**SMALL, "embedding_size": 32, "intra_bottleneck_size": 16},
        ),
        row("fnet", "FNetConfig", "FNetModel", {**SMALL, "tpu_short_seq_length": 12}),
        row(
            "modernbert",
            "ModernBertConfig",
            "ModernBertModel",
            {**SMALL, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        ),
        row(
            "xlnet",
            "XLNetConfig",
            "XLNetModel",
            {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        ),
    ]


def _encoder_decoders() -> list[Row]:
    def row(name: str, config: str, model: str, options: dict[str, Any]) -> Row:
        return Row(name, "encoder-decoder", config, model, options, source_and_target)

    t5 = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    return [
        row("t5", "T5Config", "T5ForConditionalGeneration", t5),
        row("mt5", "MT5Config", "MT5ForConditionalGeneration", t5),
        row("bart", "BartConfig", "BartForConditionalGeneration", BART_LIKE),
        row("mbart", "MBartConfig", "MBartForConditionalGeneration", BART_LIKE),
        row("pegasus", "PegasusConfig", "PegasusForConditionalGeneration", BART_LIKE),
        row("marian", "MarianConfig", "MarianMTModel", BART_LIKE),
        row("m2m_100", "M2M100Config", "M2M100ForConditionalGeneration", BART_LIKE),
    ]


def _vision() -> list[Row]:
    def row(name: str, config: str, model: str, options: dict[str, Any], size: int = 32) -> Row:
        return Row(name, "vision", config, model, options, image(size))

    stages: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
    swin = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return [
        row("vit", "ViTConfig", "ViTForImageClassification", VIT_LIKE),
        row("deit", "DeiTConfig", "DeiTModel", VIT_LIKE),
        row("beit", "BeitConfig", "BeitModel", {**VIT_LIKE, "use_relative_position_bias": True}),
        row("dinov2", "Dinov2Config", "Dinov2Model", {**VIT_LIKE, "mlp_ratio": 2}),
        row("swin", "SwinConfig", "SwinForImageClassification", swin),
        row("swinv2", "Swinv2Config", "Swinv2Model", swin),
        row("convnext", "ConvNextConfig", "ConvNextForImageClassification", stages),
        row("convnextv2", "ConvNextV2Config", "ConvNextV2Model", stages),
        row(
            "resnet",
            "ResNetConfig",
            "ResNetForImageClassification",
            {**stages, "embedding_size": 8, "layer_type": "bottleneck"},
        ),
        row(
            "regnet",
            "RegNetConfig",
            "RegNetModel",
            {**stages, "embedding_size": 8, "groups_width": 4},
        ),
        row(
            "segformer",
            "SegformerConfig",
            "SegformerForSemanticSegmentation",
            {
                **stages,
                "num_attention_heads": [1, 2, 2, 4],
                "sr_ratios": [4, 2, 2, 1],
                "decoder_hidden_size": 16,
            },
        ),
        row(
            "mobilevit",
            "MobileViTConfig",
            "MobileViTModel",
            {
                "image_size": 32,
                "hidden_sizes": [16, 24, 32],
                "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
                "num_attention_heads": 4,
                "initializer_range": 0.3,  # with 0.02 the outputs are all 0
            },
        ),
        row(
            "mobilenet_v2",
            "MobileNetV2Config",
            "MobileNetV2Model",
            # 0.02 gives outputs of 1e-26, 0.6 a model that amplifies rounding to 100 %
            {"depth_multiplier": 0.25, "initializer_range": 0.25},
        ),
        row(
            "efficientnet",
            "EfficientNetConfig",
            "EfficientNetModel",
            {
                "image_size": 32,
                "width_coefficient": 0.25,
                "depth_coefficient": 0.2,
                "hidden_dim": 320,
                "initializer_range": 0.6,  # with 0.02 the outputs are all 0
            },
        ),
        row("poolformer", "PoolFormerConfig", "PoolFormerModel", {**stages}),
        row(
            "pvt_v2",
            "PvtV2Config",
            "PvtV2Model",
            {
                **stages,
                "num_attention_heads": [1, 2, 2, 4],
                "sr_ratios": [4, 2, 2, 1],
                "image_size": 32,
            },
        ),
    ]


def _multimodal() -> list[Row]:
    def row(name: str, config: str, model: str, options: dict[str, Any]) -> Row:
        return Row(name, "multimodal", config, model, options, image_and_text(32))

    return [
        row(
            "clip",
            "CLIPConfig",
            "CLIPModel",
            {
                "text_config": {**CLIP_TEXT, "eos_token_id": VOCAB - 1},
                "vision_config": CLIP_VISION,
                "projection_dim": 16,
            },
        ),
        row(
            "siglip",
            "SiglipConfig",
            "SiglipModel",
            {"text_config": {**SMALL, "projection_size": 32}, "vision_config": VIT_LIKE},
        ),
        row(
            "blip",
            "BlipConfig",
            "BlipModel",
            {
                "text_config": {**SMALL, "encoder_hidden_size": 32},
                "vision_config": VIT_LIKE,
                "projection_dim": 16,
                "image_text_hidden_size": 16,
            },
        ),
    ]


def _audio() -> list[Row]:
    whisper = {
        **{k: v for k, v in BART_LIKE.items() if k != "max_position_embeddings"},
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 32,
    }
    speech = {
        **{k: v for k, v in BART_LIKE.items() if k != "max_position_embeddings"},
        "input_feat_per_channel": 16,
        "max_source_positions": 32,
        "max_target_positions": 32,
        "conv_channels": 16,
    }
    audio_vit = {
        **VIT_LIKE,
        "num_mel_bins": 16,
        "max_length": 32,
        "frequency_stride": 4,
        "time_stride": 4,
    }
    return [
        Row("wav2vec2", "audio", "Wav2Vec2Config", "Wav2Vec2Model", WAV_LIKE, waveform),
        Row("hubert", "audio", "HubertConfig", "HubertModel", WAV_LIKE, waveform),
        Row("wavlm", "audio", "WavLMConfig", "WavLMModel", WAV_LIKE, waveform),
        Row(
            "whisper",
            "audio",
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            whisper,
            whisper_inputs,
        ),
        Row(
            "speech_to_text",
            "audio",
            "Speech2TextConfig",
            "Speech2TextForConditionalGeneration",
            speech,
            speech_features,
        ),
        Row("ast", "audio", "ASTConfig", "ASTForAudioClassification", audio_vit, ast_inputs),
    ]


def _state_space() -> list[Row]:
    mamba = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "pad_token_id": 0,
    }
    mamba2 = {**mamba, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
    rwkv = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "context_length": 64,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
    }
    falcon = {**mamba}
    return [
        Row("mamba", "state-space", "MambaConfig", "MambaForCausalLM", mamba, tokens),
        Row("mamba2", "state-space", "Mamba2Config", "Mamba2ForCausalLM", mamba2, tokens),
        Row(
            "falcon_mamba",
            "state-space",
            "FalconMambaConfig",
            "FalconMambaForCausalLM",
            falcon,
            tokens,
        ),
        Row("rwkv", "state-space", "RwkvConfig", "RwkvForCausalLM", rwkv, tokens),
        Row(
            "recurrent_gemma",
            "state-space",
            "RecurrentGemmaConfig",
            "RecurrentGemmaForCausalLM",
            {
                **HEADED,
                "lru_width": 32,
                "attention_window_size": 8,
                "block_types": ["recurrent", "attention"],
            },
            tokens,
        ),
    ]


ZOO: tuple[Row, ...] = tuple(
    _decoders()
    + _mixtures()
    + _encoders()
    + _encoder_decoders()
    + _vision()
    + _multimodal()
    + _audio()
    + _state_space()
)


def find(name: str) -> Row:
    """The row called `name`."""
    for row in ZOO:
        if row.name == name:
            return row
    raise KeyError(f"no model {name!r} in the zoo; there are {', '.join(r.name for r in ZOO)}")
