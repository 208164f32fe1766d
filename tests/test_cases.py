"""The networks' tables: how many layers, how many channels, and the fewest bytes that move."""

import math

import pytest

from perf import cases
from perf.cases import NETS, OPS, SETS, Layer

# Batch norm layers and their channels, counted in the papers' architectures
TOTALS = {
    "resnet50": (53, 26_560),
    "mobilenet_v2": (52, 17_056),
    "efficientnet_b0": (49, 21_008),
    "densenet121": (121, 41_824),
    "unet2d": (18, 4 * (64 + 128 + 256 + 512) + 2 * 1024),
    "unet3d": (18, 4 * (32 + 64 + 128 + 256) + 2 * 320),
    "pointnet": (5, 3 * 64 + 128 + 1024),
}


@pytest.mark.parametrize("name", NETS)
def test_totals(name):
    layers = cases.layers(name)
    channels = sum(layer.shape[1] * layer.count for layer in layers)
    assert (sum(layer.count for layer in layers), channels) == TOTALS[name]
    assert len(layers) == len(dict.fromkeys(layers)), "the same layer twice"


@pytest.mark.parametrize("name", NETS)
def test_batch(name):
    usual, few = cases.layers(name), cases.layers(name, 3)
    assert {layer.shape[0] for layer in usual} == {NETS[name][0]}
    assert {layer.shape[0] for layer in few} == {3}
    assert [layer.shape[1:] for layer in usual] == [layer.shape[1:] for layer in few]


def test_some_layers():
    layers = cases.layers("resnet50", 1)
    assert layers[0] == Layer((1, 64, 112, 112), "relu")
    assert Layer((1, 256, 14, 14), "relu", count=11) in layers
    assert Layer((1, 2048, 7, 7), "relu", residual=True, count=3) in layers
    assert Layer((1, 576, 14, 14), "relu6", count=5) in cases.layers("mobilenet_v2", 1)
    assert Layer((1, 192, 7, 7)) in cases.layers("efficientnet_b0", 1)
    assert Layer((1, 192, 7, 7), residual=True, count=3) in cases.layers("efficientnet_b0", 1)
    assert Layer((1, 992, 7, 7), "relu") in cases.layers("densenet121", 1)


@pytest.mark.parametrize("name", SETS)
def test_sets_can_be_trained_on(name):
    for layer in cases.layers(name):
        assert len(layer.shape) >= 2
        assert math.prod(layer.shape) > layer.shape[1], "one value per channel"


def test_ops():
    assert set(OPS) == {"bn", "bn_relu", "bn_relu6", "bn_silu", "bn_add", "bn_add_relu"}
    assert all(layer.op == op for op, layer in OPS.items())


@pytest.mark.parametrize(
    ("layer", "tensors"),
    [
        (Layer((4, 8, 2)), {"forward": 2, "backward": 3, "both": 5, "eval": 2}),
        (Layer((4, 8, 2), "relu"), {"forward": 2, "backward": 3, "both": 5, "eval": 2}),
        (
            Layer((4, 8, 2), residual=True),
            {"forward": 3, "backward": 3, "both": 6, "eval": 3},
        ),
        (
            Layer((4, 8, 2), "relu", residual=True),
            {"forward": 3 + 1 / 16, "backward": 4 + 1 / 16, "both": 7 + 1 / 8, "eval": 3},
        ),
    ],
    ids=str,
)
def test_minimum_bytes_in_tensors_of_16_bits(layer, tensors):
    size = 2 * layer.elements
    found = {d: layer.minimum_bytes(d, 2) / size for d in cases.DIRECTIONS}
    assert found == pytest.approx(tensors)


def test_minimum_bytes_of_resnet50():
    layers = cases.layers("resnet50")
    moved = sum(layer.count * layer.minimum_bytes("both", 2) for layer in layers)
    size = sum(layer.count * 2 * layer.elements for layer in layers)
    assert moved / size == pytest.approx(6.1, abs=0.05)
