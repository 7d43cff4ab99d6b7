"""MobileNetV3-Large (Howard et al., 2019), as the GPU benchmarks run it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# kernel, expansion, outputs, squeeze-excite, hardswish, stride
_BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


def _eighths(value: float) -> int:
    """The nearest multiple of 8, at most a tenth below."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, and an activation or none."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = None,
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]
        if activation is not None:
            layers.append(activation())
        super().__init__(*layers)


class SqueezeExcite(nn.Module):
    """Scales channels by what their means say (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = _eighths(channels / 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.narrow, self.widen = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.relu(self.narrow(self.pool(x)))
        return x * nn.functional.hardsigmoid(self.widen(scale))


class Inverted(nn.Module):
    """Expand, depthwise, squeeze-excite, project."""

    def __init__(
        self, inputs: int, kernel: int, wide: int, outputs: int, se: bool, hs: bool, stride: int
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if hs else nn.ReLU
        layers: list[nn.Module] = []
        if wide != inputs:
            layers.append(ConvNorm(inputs, wide, activation=activation))
        layers.append(ConvNorm(wide, wide, kernel, stride, wide, activation))
        if se:
            layers.append(SqueezeExcite(wide))
        layers.append(ConvNorm(wide, outputs))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV3Large(nn.Module):
    """pixel_values [B, 3, 224, 224] -> logits [B, 1000]. Weights are random."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNorm(3, 16, 3, 2, activation=nn.Hardswish)]
        inputs = 16
        for kernel, wide, outputs, se, hs, stride in _BLOCKS:
            layers.append(Inverted(inputs, kernel, wide, outputs, se, hs, stride))
            inputs = outputs
        layers.append(ConvNorm(inputs, 960, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, 1000)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.pool(self.features(pixel_values)).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits
