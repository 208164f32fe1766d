"""Networks people train, of torch.nn alone, with the batch norm passed in.

`norm(channels, activation)` makes a layer, and `layer(x)` or `layer(x, residual)` is
act(batch_norm(x) + residual): `norm_of` makes it of a library's batch norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribn

Norm = Callable[[int, str | None], nn.Module]


def composed(batch_norm: Any) -> Norm:
    """Layers of the class `batch_norm`, then a sum and an activation of PyTorch's, in place."""

    class BatchNormAct(batch_norm):
        def __init__(self, channels: int, activation: str | None) -> None:
            super().__init__(channels)
            self.activation = activation

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            if residual is not None:
                y += residual
            return y if self.activation is None else getattr(F, self.activation)(y, inplace=True)

    return BatchNormAct


def norm_of(library: ModuleType, axes: int) -> Norm:
    """Layers of torch.nn, or fused ones of tribn, for tensors with so many axes of space."""
    cls = getattr(library, f"BatchNorm{axes or 1}d")
    if library is tribn:
        return lambda channels, activation: cls(channels, activation=activation)
    return composed(cls)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


class Bottleneck(nn.Module):
    """ResNet's block, with the stride in the 3x3 convolution."""

    def __init__(self, norm: Norm, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(conv(inputs, width, 1), norm(width, "relu")),
            *(conv(width, width, 3, stride), norm(width, "relu")),
            conv(width, outputs, 1),
        )
        self.norm = norm(outputs, "relu")
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.extend([conv(inputs, outputs, 1, stride), norm(outputs, None)])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x), self.shortcut(x))


def resnet50(norm: Norm) -> nn.Sequential:
    """He et al., "Deep Residual Learning for Image Recognition", 2015."""
    layers = [conv(3, 64, 7, 2), norm(64, "relu"), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for stride in [first] + [1] * (blocks - 1):
            layers.append(Bottleneck(norm, inputs, width, stride))
            inputs = 4 * width
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)
    return nn.Sequential(*layers, *head)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter each channel by itself, project, add the input."""

    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.body = nn.Sequential()
        if expansion > 1:
            self.body.extend([conv(inputs, width, 1), norm(width, "relu6")])
        self.body.extend([conv(width, width, 3, stride, groups=width), norm(width, "relu6")])
        self.body.append(conv(width, outputs, 1))
        self.norm = norm(outputs, None)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x), x if self.adds else None)


def mobilenet_v2(norm: Norm) -> nn.Sequential:
    """Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018."""
    layers = [conv(3, 32, 3, 2), norm(32, "relu6")]
    inputs = 32
    for expansion, outputs, blocks, first in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for stride in [first] + [1] * (blocks - 1):
            layers.append(InvertedResidual(norm, inputs, outputs, stride, expansion))
            inputs = outputs
    layers += [conv(inputs, 1280, 1), norm(1280, "relu6"), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


def twice(norm: Norm, inputs: int, outputs: int) -> nn.Sequential:
    """Two 3-D convolutions, batch norm and ReLU after each."""
    layers = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv3d(channels, outputs, 3, padding=1, bias=False))
        layers.append(norm(outputs, "relu"))
    return nn.Sequential(*layers)


class Level(nn.Module):
    """A level of a 3-D U-Net around all those below it, at half the resolution each."""

    def __init__(self, norm: Norm, inputs: int, width: int, *below: int) -> None:
        super().__init__()
        self.encode = twice(norm, inputs, width)
        self.below = None
        if below:
            up = nn.ConvTranspose3d(below[0], width, 2, stride=2)
            self.below = nn.Sequential(nn.MaxPool3d(2), Level(norm, width, *below), up)
            self.decode = twice(norm, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        return x if self.below is None else self.decode(torch.cat([x, self.below(x)], 1))


def unet3d(norm: Norm) -> nn.Sequential:
    """Çiçek et al., "3D U-Net", 2016, with the widths of nnU-Net; a class for every voxel."""
    return nn.Sequential(Level(norm, 4, 32, 64, 128, 256, 320), nn.Conv3d(32, 4, 1))


def mlp(norm: Norm) -> nn.Sequential:
    """Four hidden layers over the features of a table."""
    layers = []
    for inputs, outputs in pairwise([128, 512, 512, 512, 512]):
        layers += [nn.Linear(inputs, outputs, bias=False), norm(outputs, "relu")]
    return nn.Sequential(*layers, nn.Linear(512, 10))


@dataclass(frozen=True)
class Network:
    """A network, and what a batch of its inputs looks like."""

    build: Callable[[Norm], nn.Module]
    channels: int  # or features
    axes: int  # of space: 2 for an image
    inputs: str  # what they are called

    def shape(self, batch: int, size: int) -> tuple[int, ...]:
        return (batch, self.channels, *[size] * self.axes)


NETWORKS = {
    "resnet50": Network(resnet50, 3, 2, "images"),
    "mobilenet_v2": Network(mobilenet_v2, 3, 2, "images"),
    "unet3d": Network(unet3d, 4, 3, "volumes"),
    "mlp": Network(mlp, 128, 0, "rows"),
}
