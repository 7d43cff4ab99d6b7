"""What `benchmarks.gpu` times: models in 16 bits, the arguments of one call, a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.training import GPT2, Shape
from benchmarks.vision import MobileNetV3Large

LARGEST_ERROR = 3e-2  # of the largest output, against float32: half precision over 12 layers
LARGEST_BFLOAT16_ERROR = 8e-2  # three bits fewer, over 16 layers


@dataclass
class Workload:
    """A model in 16 bits, the arguments of one call, and the largest error that is no failure.

    With `trains` a call is a step: forward, backward, AdamW.
    """

    model: nn.Module
    kwargs: dict[str, Tensor]
    bound: float = LARGEST_ERROR
    trains: bool = False


def bert(batch: int) -> Workload:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig()).half().eval()
    return Workload(model, {"input_ids": torch.randint(0, 30000, (batch, 128))})


def vit(batch: int) -> Workload:
    """All 197 tokens are results, and the first one's projection."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig()).half().eval()
    return Workload(model, {"pixel_values": torch.randn(batch, 3, 224, 224).half()})


def vit_classifier(batch: int) -> Workload:
    """The scores of 1000 classes, as from torchvision's `vit_b_16`."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000)).half().eval()
    return Workload(model, {"pixel_values": torch.randn(batch, 3, 224, 224).half()})


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them: a fresh one's bias is 0, and would be folded away."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0.0, 0.1)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def resnet(batch: int) -> Workload:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    model = with_statistics(ResNetModel(ResNetConfig())).half().eval()
    return Workload(model, {"pixel_values": torch.randn(batch, 3, 224, 224).half()})


def mobilenet(batch: int) -> Workload:
    torch.manual_seed(0)
    model = with_statistics(MobileNetV3Large()).half().eval()
    return Workload(model, {"pixel_values": torch.randn(batch, 3, 224, 224).half()})


def llama_step(batch: int) -> Workload:
    """Llama-3.2-1B's shape, one token without a cache: the linears of a decode step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, use_cache=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    inputs = {"input_ids": torch.randint(0, 128256, (batch, 1))}
    return Workload(model.cpu(), inputs, bound=LARGEST_BFLOAT16_ERROR)


def gpt2_training(batch: int, length: int = 1024) -> Workload:
    """A step on random tokens; the error is that of the gradients, all together."""
    torch.manual_seed(0)
    shape = Shape()
    with torch.device("cuda"):
        model = GPT2(shape).bfloat16()
    tokens = torch.randint(0, shape.vocabulary, (batch, length + 1))
    inputs = {"ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    return Workload(model.cpu(), inputs, trains=True)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "bert_b1": lambda: bert(1),
    "bert_b32": lambda: bert(32),
    "vit_b1": lambda: vit(1),
    "vit_b64": lambda: vit(64),
    "vit_classifier_b1": lambda: vit_classifier(1),
    "vit_classifier_b64": lambda: vit_classifier(64),
    "llama1b_step_b1": lambda: llama_step(1),
    "resnet50_b1": lambda: resnet(1),
    "resnet50_b64": lambda: resnet(64),
    "mobilenetv3_b64": lambda: mobilenet(64),
    "gpt2_train_b8": lambda: gpt2_training(8),
}
