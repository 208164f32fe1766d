"""Models that nobody wrote for tribn train alike when they are converted: `make test-zoo`.

They are built from their configurations with random weights, with inputs as small as they take.
Numbers of values per channel are kept above a few: where two are normalized nothing but rounding
is left of the gradients.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import of_no_kernel
from torch import nn
from training import assert_train_alike

of_no_kernel()

import tribn


def module(name: str):
    """A module of a library, or a skip that says which one is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, of what else is not installed
        try:
            return pytest.importorskip(name, reason="pip install -e '.[zoo]'")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
        # torchvision for CUDA does not load its operators into a torch without: no model has them.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(library)
        return importlib.import_module(name)


LIBRARIES = []  # whose definitions end with them


def torchvision(name, **options):
    return lambda: module("torchvision.models").get_model(name, weights=None, **options)


def timm(name, **options):
    return lambda: module("timm").create_model(name, pretrained=False, num_classes=10, **options)


def pytorchcv(name, **options):
    return lambda: module("pytorchcv.model_provider").get_model(name, num_classes=10, **options)


def transformers(config, model, **options):
    def build():
        library = module("transformers")
        module("torchvision")  # which transformers imports if it is there
        return getattr(library, model)(getattr(library, config)(**options))

    return build


def monai(name, **options):
    return lambda: getattr(module("monai.networks.nets"), name)(**options)


def segmentation(name, encoder):
    def build():
        module("torchvision")
        library = module("segmentation_models_pytorch")
        return getattr(library, name)(encoder, encoder_weights=None, classes=3)

    return build


class GraphNetwork(nn.Module):
    """Two convolutions over a ring of nodes, each with torch_geometric's batch norm."""

    def __init__(self, library):
        super().__init__()
        self.conv1, self.conv2 = library.GCNConv(3, 8), library.GCNConv(8, 8)
        self.norm1, self.norm2 = library.BatchNorm(8), library.BatchNorm(8)

    def forward(self, x, edges):
        x = self.norm1(self.conv1(x, edges)).relu()
        return self.norm2(self.conv2(x, edges)) + x


def torch_geometric():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it uses torch.jit
        return GraphNetwork(module("torch_geometric.nn"))


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def images(batch=4, size=64):
    return (randn(batch, 3, size, size),)


RING = torch.stack([torch.arange(20), (torch.arange(20) + 1) % 20])


class Row(NamedTuple):
    """A network, and what becomes of its layers; those not fused or left are replaced."""

    build: Callable[[], nn.Module]
    inputs: tuple[torch.Tensor, ...]
    layers: int
    fused: int
    left: int = 0


# Three of them counted by hand:
# - resnet18 has one layer in the stem and two in each of eight blocks, all followed by relu, the
#   second by a sum before; and three in shortcuts, which are what is added.
# - mobilenet_v2 has relu6 after the stem, the last layer, each of the 17 in the middle of a block
#   and 16 that expand; ten of the 17 that end a block are added to its input, and seven are not.
# - transformers' resnet has relu after the stem and after three in each of five blocks, the last of
#   them with a sum; three of the blocks change size and have a layer in their shortcut.
ZOO = {
    "torchvision resnet18": Row(torchvision("resnet18"), images(8), 20, 17),
    "torchvision mobilenet_v2": Row(torchvision("mobilenet_v2"), images(), 52, 45),
    "torchvision mobilenet_v3_small": Row(torchvision("mobilenet_v3_small"), images(), 34, 29),
    "torchvision densenet": Row(
        lambda: module("torchvision.models").DenseNet(8, (2, 3), 16), images(), 13, 13
    ),
    "torchvision googlenet": Row(torchvision("googlenet", init_weights=False), images(), 59, 59),
    "torchvision shufflenet": Row(torchvision("shufflenet_v2_x0_5"), images(8), 56, 37),
    "torchvision efficientnet_b0": Row(torchvision("efficientnet_b0"), images(), 49, 33),
    "torchvision regnet": Row(torchvision("regnet_y_400mf"), images(), 53, 49),
    "torchvision mnasnet": Row(torchvision("mnasnet0_5"), images(8), 52, 45),
    "pytorchcv resnet": Row(pytorchcv("resnet20_cifar10"), images(4, 32), 21, 19),
    "pytorchcv preresnet": Row(pytorchcv("preresnet20_cifar10"), images(4, 32), 19, 19),
    "pytorchcv seresnet": Row(pytorchcv("seresnet20_cifar10"), images(4, 32), 21, 10),
    "pytorchcv densenet": Row(pytorchcv("densenet40_k12_cifar10"), images(4, 32), 39, 39),
    "pytorchcv diaresnet": Row(pytorchcv("diaresnet20_cifar10"), images(4, 32), 21, 10),
    "pytorchcv shakeshake": Row(
        pytorchcv("shakeshakeresnet20_2x16d_cifar10"), images(4, 32), 39, 19
    ),
    "timm resnet": Row(timm("resnet10t"), images(8), 14, 11),
    "timm efficientnet": Row(timm("test_efficientnet"), images(8), 13, 9),
    "timm byobnet": Row(timm("test_byobnet"), images(8), 14, 10),
    "timm mobilenetv3": Row(timm("mobilenetv3_small_050"), images(8), 34, 30),
    "timm regnet": Row(timm("regnetx_002"), images(8), 44, 40),
    "timm dla": Row(timm("dla46_c"), images(8), 48, 45),
    "timm ghostnet": Row(timm("ghostnet_050"), images(8), 80, 34),
    "timm repvgg": Row(timm("repvgg_a0"), images(4), 61, 22),
    "timm densenet": Row(timm("densenet121", block_config=(2, 3), growth_rate=8), images(), 13, 13),
    "timm hrnet": Row(timm("hrnet_w18_small"), images(), 91, 64),
    "transformers resnet": Row(
        transformers(
            "ResNetConfig",
            "ResNetForImageClassification",
            embedding_size=16,
            hidden_sizes=[16, 32, 64, 64],
            depths=[1, 2, 1, 1],
        ),
        images(8),
        19,
        16,
    ),
    "transformers regnet": Row(
        transformers(
            "RegNetConfig",
            "RegNetForImageClassification",
            embedding_size=16,
            hidden_sizes=[16, 32, 64, 64],
            depths=[1, 2, 1, 1],
            groups_width=16,
        ),
        images(8),
        20,
        16,
    ),
    "transformers mobilenet_v1": Row(
        transformers("MobileNetV1Config", "MobileNetV1ForImageClassification", tf_padding=False),
        images(8),
        27,
        27,
    ),
    "transformers mobilenet_v2": Row(
        transformers("MobileNetV2Config", "MobileNetV2ForImageClassification", tf_padding=False),
        images(8),
        52,
        45,
    ),
    "transformers mobilevit": Row(
        transformers("MobileViTConfig", "MobileViTModel"), images(4), 32, 2
    ),
    "monai resnet": Row(
        monai(
            "ResNet",
            block="basic",
            layers=[1, 1, 1, 1],
            block_inplanes=[8, 16, 16, 16],
            spatial_dims=3,
            n_input_channels=1,
            num_classes=2,
        ),
        (randn(4, 1, 24, 24, 24),),
        12,
        9,
    ),
    "monai segresnet": Row(
        monai("SegResNet", spatial_dims=2, init_filters=8, norm="batch"),
        (randn(2, 1, 32, 32),),
        25,
        25,
    ),
    "monai unet": Row(
        monai(
            "UNet",
            spatial_dims=3,
            in_channels=1,
            out_channels=2,
            channels=(4, 8, 16),
            strides=(2, 2),
            num_res_units=2,
            norm="batch",
        ),
        (randn(2, 1, 16, 16, 16),),
        9,
        0,
    ),
    "monai dynunet": Row(
        monai(
            "DynUNet",
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            norm_name="batch",
            kernel_size=[3] * 3,
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            res_block=True,
        ),
        (randn(2, 1, 32, 32),),
        13,
        10,
    ),
    "torch_geometric": Row(torch_geometric, (randn(20, 3), RING), 2, 2),
    "segmentation unet": Row(
        segmentation("Unet", "timm-mobilenetv3_small_minimal_100"), images(2), 44, 39
    ),
    "segmentation fpn": Row(segmentation("FPN", "mobilenet_v2"), images(2), 52, 45),
}


@pytest.mark.filterwarnings("ignore")  # the networks' own
@pytest.mark.parametrize("name", ZOO)
def test_trains_alike(name):
    row = ZOO[name]
    torch.manual_seed(0)
    model = row.build()
    converted, report = tribn.convert(copy.deepcopy(model).double(), report=True)
    print(report)
    assert (len(report.rows), report.counts["fused"], report.counts["left"]) == row[2:]
    assert_train_alike(converted, model, row.inputs)


LAYERS = {
    "torchvision's frozen": (lambda: module("torchvision.ops").FrozenBatchNorm2d(3), True, ""),
    "timm's frozen with relu": (
        lambda: module("timm.layers").FrozenBatchNormAct2d(3),
        True,
        "relu",
    ),
    "timm's with relu": (lambda: module("timm.layers").BatchNormAct2d(3), False, "relu"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_back(name):
    build, frozen, into = LAYERS[name]
    layer = build()
    for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        tensor.data.copy_(randn(3).exp())
    plain, cls, keys = copy.deepcopy(layer), type(layer), list(layer.state_dict())
    converted, report = tribn.convert(layer, report=True)
    assert isinstance(converted, tribn.BatchNorm2d)
    assert (converted.frozen, report.rows[0].into) == (frozen, into)
    assert list(converted.state_dict()) == keys
    x = randn(4, 3, 5, 5)
    torch.testing.assert_close(converted(x), plain(x))
    assert type(tribn.revert(converted)) is cls
    torch.testing.assert_close(converted(x), plain(x))
