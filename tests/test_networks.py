"""The networks of perf: as published, and with the batch norms that perf's table lists."""

from collections import Counter

import pytest
import torch
from cases import of_no_kernel
from torch.nn import functional as F

of_no_kernel()
pytest.importorskip("rich")

import tribn
from perf.cases import SETS, Layer, layers
from perf.networks import NETWORKS, composed, norm_of
from perf.step import SIZES

LIBRARIES = pytest.mark.parametrize("library", [torch.nn, tribn], ids=lambda m: m.__name__)


def on_meta(name):
    network = NETWORKS[name]
    with torch.device("meta"):
        return network.build(norm_of(torch.nn, network.axes))


def seen_by_batch_norm(name):
    """The layers that a batch of the size people train runs through, and the output's shape."""
    rows = Counter()

    def record(module, arguments):
        x, *residual = arguments
        layer = Layer(tuple(x.shape), module.activation, any(r is not None for r in residual))
        rows[layer] += 1

    model = on_meta(name)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(record)
    inputs = torch.empty(NETWORKS[name].shape(*SIZES[name]["cuda"]), device="meta")
    return rows, model(inputs).shape


def listed(name):
    counts = Counter()
    for layer in layers(name):
        counts[Layer(layer.shape, layer.activation, layer.residual)] += layer.count
    return counts


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872)]
)
def test_parameters_as_published(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "unet3d"])
def test_batch_norms_are_those_of_the_table(name):
    rows, _ = seen_by_batch_norm(name)
    assert rows == listed(name)


def test_mlp_has_layers_of_the_tabular_set():
    rows, _ = seen_by_batch_norm("mlp")
    assert set(rows) <= set(SETS["tabular"])
    assert sum(rows.values()) == 4


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet50", (128, 1000)),
        ("mobilenet_v2", (128, 1000)),
        ("unet3d", (2, 4, 128, 128, 128)),
        ("mlp", (4096, 10)),
    ],
)
def test_output_has_a_score_for_every_class(name, shape):
    assert seen_by_batch_norm(name)[1] == shape


@LIBRARIES
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("added", [False, True])
def test_layer_is_batch_norm_then_sum_then_activation(library, activation, added):
    torch.manual_seed(0)
    x, residual = 5 * torch.randn(2, 6, 3, 4, 4, dtype=torch.float64).add(1)
    layer = norm_of(library, axes=2)(3, activation).double()
    functions = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6}
    z = F.batch_norm(x, None, None, training=True) * 7
    torch.nn.init.constant_(layer.weight, 7)
    expected = functions[activation](z + residual if added else z)
    torch.testing.assert_close(layer(x, residual) if added else layer(x), expected)


@LIBRARIES
@pytest.mark.parametrize(
    ("axes", "name"), [(0, "BatchNorm1d"), (2, "BatchNorm2d"), (3, "BatchNorm3d")]
)
def test_layers_are_the_librarys_for_so_many_axes(library, axes, name):
    assert isinstance(norm_of(library, axes)(3, None), getattr(library, name))


def test_state_dict_is_one_of_batch_norm():
    layer = composed(torch.nn.BatchNorm2d)(3, "relu")
    assert layer.state_dict().keys() == torch.nn.BatchNorm2d(3).state_dict().keys()
