"""Batch norm layers of networks people train, and other shapes worth a measurement.

Sources: the papers' tables, for images of 224x224 pixels where they have a fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("channels-first", "channels-last")
DIRECTIONS = ("forward", "backward", "both", "eval")


@dataclass(frozen=True)
class Layer:
    """A batch norm's input (N, C, *spatial), what follows it, and how often it occurs."""

    shape: tuple[int, ...]
    activation: str | None = None
    residual: bool = False  # something is added between batch norm and activation
    count: int = 1

    @property
    def op(self) -> str:
        """As in "bn", "bn_relu" or "bn_add_relu"."""
        return "_".join(["bn", *["add"] * self.residual, *filter(None, [self.activation])])

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def minimum_bytes(self, direction: str, itemsize: int) -> int:
        """What must move if every tensor is read or written once.

        Forward and eval: input, residual, output. Backward: input, and the gradients of output and
        input. With a residual and then an activation forward keeps a bit per element for backward,
        where the activation was cut off, and the residual has a gradient of its own.
        """
        tensors = 2 + self.residual
        cut = self.residual and self.activation is not None
        counts = {
            "forward": tensors * itemsize + cut / 8,
            "backward": (3 + cut) * itemsize + cut / 8,
            "eval": tensors * itemsize,
        }
        counts["both"] = counts["forward"] + counts["backward"]
        return math.ceil(counts[direction] * self.elements)

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


def _resnet50(batch: int) -> list[Layer]:
    layers = [Layer((batch, 64, 112, 112), "relu")]
    # (C, side, blocks) of a stage; the first block of all but the first works on the larger images
    for stage, (c, side, blocks) in enumerate(
        [(64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)]
    ):
        inner, outer = (batch, c, side, side), (batch, 4 * c, side, side)
        before = int(stage > 0)
        if before:
            layers.append(Layer((batch, c, 2 * side, 2 * side), "relu"))
        layers += [
            Layer(inner, "relu", count=2 * blocks - before),
            Layer(outer, "relu", residual=True, count=blocks),
            Layer(outer),  # of the shortcut
        ]
    return layers


def _inverted_residuals(
    activation: str, stem: tuple[int, int], head: int, blocks: list[tuple[int, int, int, int, int]]
) -> Callable[[int], list[Layer]]:
    """Blocks (expansion, C out, repetitions, side in, side out) between a stem and a head."""

    def layers(batch: int) -> list[Layer]:
        c, side = stem
        rows = [Layer((batch, c, side, side), activation)]
        for expansion, out, repetitions, first, rest in blocks:
            for repetition in range(repetitions):
                side = rest if repetition else first
                if expansion > 1:
                    rows.append(Layer((batch, c * expansion, side, side), activation))
                rows.append(Layer((batch, c * expansion, rest, rest), activation))
                rows.append(Layer((batch, out, rest, rest), residual=repetition > 0))
                c = out
        rows.append(Layer((batch, head, rest, rest), activation))
        return _counted(rows)

    return layers


def _densenet121(batch: int) -> list[Layer]:
    rows, c = [(64, 112)], 64
    for blocks, side in ((6, 56), (12, 28), (24, 14), (16, 7)):
        for _ in range(blocks):
            rows += [(c, side), (128, side)]
            c += 32
        rows.append((c, side))  # of the transition, or the last
        c //= 2
    return _counted([Layer((batch, c, side, side), "relu") for c, side in rows])


def _counted(rows: list[Layer]) -> list[Layer]:
    """Equal layers as one, in the order of their first."""
    return [
        Layer(row.shape, row.activation, row.residual, rows.count(row))
        for row in dict.fromkeys(rows)
    ]


def _pyramid(channels: list[int], side: int, axes: int) -> Callable[[int], list[Layer]]:
    """A U-Net's encoder and decoder: two layers a level in each, one way down at the bottom."""

    def layers(batch: int) -> list[Layer]:
        levels = [(c, side >> level) for level, c in enumerate(channels)]
        counts = [4] * (len(levels) - 1) + [2]
        return [
            Layer((batch, c, *[s] * axes), "relu", count=count)
            for (c, s), count in zip(levels, counts, strict=True)
        ]

    return layers


def _pointnet(batch: int) -> list[Layer]:
    return [
        Layer((batch, 64, 1024), "relu", count=3),
        *[Layer((batch, c, 1024), "relu") for c in (128, 1024)],
    ]


# By name: the usual batch, and the layers at a batch.
NETS: dict[str, tuple[int, Callable[[int], list[Layer]]]] = {
    "resnet50": (128, _resnet50),
    "mobilenet_v2": (
        128,
        _inverted_residuals(
            "relu6",
            (32, 112),
            1280,
            [
                *[(1, 16, 1, 112, 112), (6, 24, 2, 112, 56), (6, 32, 3, 56, 28)],
                *[(6, 64, 4, 28, 14), (6, 96, 3, 14, 14), (6, 160, 3, 14, 7), (6, 320, 1, 7, 7)],
            ],
        ),
    ),
    "efficientnet_b0": (
        128,
        _inverted_residuals(
            "silu",
            (32, 112),
            1280,
            [
                *[(1, 16, 1, 112, 112), (6, 24, 2, 112, 56), (6, 40, 2, 56, 28)],
                *[(6, 80, 3, 28, 14), (6, 112, 3, 14, 14), (6, 192, 4, 14, 7), (6, 320, 1, 7, 7)],
            ],
        ),
    ),
    "densenet121": (128, _densenet121),
    "unet2d": (16, _pyramid([64, 128, 256, 512, 1024], 256, 2)),
    "unet3d": (2, _pyramid([32, 64, 128, 256, 320], 128, 3)),
    "pointnet": (32, _pointnet),
}

# Sets of single shapes
SETS: dict[str, list[Layer]] = {
    "tabular": [
        Layer(shape, "relu")
        for shape in ((1024, 256), (4096, 512), (8192, 1024), (65536, 512), (262144, 128))
    ],
    "hard": [
        *map(
            Layer,
            [
                *[(20, 6, 65536), (8, 3, 1024, 1024), (3000, 1, 9), (2, 2048, 1, 1)],
                *[(64, c, 56, 56) for c in (24, 40, 65, 112)],
                *[(2**21, 1), (2_000_000, 64), (1, 32, 128, 128, 128)],
            ],
        )
    ],
    "small": [
        Layer((n, c, side, side), "relu")
        for n, (c, side) in product((1, 8, 32), ((64, 56), (256, 14), (512, 7)))
    ],
}


# Layers by op, of every kind that occurs above.
OPS = {
    layer.op: layer
    for known in (*(build(usual) for usual, build in NETS.values()), *SETS.values())
    for layer in known
}


def layers(name: str, batch: int | None = None) -> list[Layer]:
    """The layers of a network at a batch, its usual one if None, or of a set."""
    if name in SETS:
        return SETS[name]
    usual, build = NETS[name]
    return build(batch or usual)


def strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Of a dense tensor, in elements."""
    axes = [0, *range(2, len(shape)), 1] if layout == "channels-last" else range(len(shape))
    found, step = [0] * len(shape), 1
    for axis in reversed(axes):
        found[axis] = step
        step *= shape[axis]
    return tuple(found)
