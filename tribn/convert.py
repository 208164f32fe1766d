"""Changing the batch norm layers of a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from tribn.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, SyncBatchNorm

_OWN: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}

# Batch norm layers that would go on following the batches.
_UNKNOWN = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)


def freeze(model: nn.Module) -> nn.Module:
    """Makes every batch norm layer use its running statistics, also after ``model.train()``.

    torch.nn's BatchNorm1d, 2d, 3d and SyncBatchNorm become tribn's, with the same parameters,
    statistics and hooks; subclasses of them are left alone. A frozen layer runs one kernel in each
    direction and keeps no activation for backward unless its weight requires a gradient. Parameters
    stay as trainable as they were. Checkpoints without `num_batches_tracked`, as torchvision's
    FrozenBatchNorm2d writes them, load into the layers.

    Returns:
        The model, or the layer in its place if the model is a single one of torch.nn's.

    Raises:
        ValueError: a layer has no running statistics, or is one of torch.nn's lazy ones; the model
            is unchanged.
    """
    for name, layer in model.named_modules():
        if type(layer) in _UNKNOWN:
            raise ValueError(
                f"layer {name or 'itself'} is a {type(layer).__name__}, which cannot be frozen: "
                "put one of BatchNorm1d, 2d or 3d in its place first"
            )
        if (isinstance(layer, Layer) or type(layer) in _OWN) and layer.running_mean is None:
            raise ValueError(
                f"layer {name or type(layer).__name__} was made with track_running_stats=False: it "
                "has no running statistics to be frozen with"
            )
    model = _replace(model, _own, {})
    for layer in _layers(model):
        layer.frozen = True
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Makes every layer that `freeze` froze follow ``model.train()`` again; returns the model."""
    for layer in _layers(model):
        layer.frozen = False
    return model


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes the batch norm layers of a model `SyncBatchNorm`.

    tribn's BatchNorm1d, 2d and 3d, and torch.nn's and its SyncBatchNorm, keep parameters,
    statistics, hooks and mode, and tribn's all they do besides; subclasses are left alone.

    Args:
        model: any module; its layers are changed in place.
        process_group: see `SyncBatchNorm`.

    Returns:
        The model, or the layer in its place if the model is a single one of torch.nn's.

    Raises:
        ValueError: a layer is lazy and has seen no input; the model is unchanged.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._LazyNormBase):
            raise ValueError(
                f"layer {name or 'itself'} is a {type(layer).__name__} that has seen no input: "
                "call the model once, so that it knows its channels"
            )

    def synchronize(module: nn.Module) -> nn.Module:
        layer = _own(module)
        if type(layer) in _OWN.values():
            layer.__class__ = SyncBatchNorm
            layer.process_group = process_group
        return layer

    return _replace(model, synchronize, {})


def _layers(model: nn.Module) -> Iterator[Layer]:
    return (layer for layer in model.modules() if isinstance(layer, Layer))


def _replace(
    module: nn.Module,
    change: Callable[[nn.Module], nn.Module],
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    """The module with every one below it changed, one that occurs twice once."""
    if module not in done:
        done[module] = change(module)
        for name, child in module._modules.items():
            if child is not None:
                done[module]._modules[name] = _replace(child, change, done)
    return done[module]


def _own(module: nn.Module) -> nn.Module:
    """tribn's layer in place of one of torch.nn's, sharing all it holds."""
    cls = _OWN.get(type(module))
    if cls is None:
        return module
    layer = cls(1, device="meta")
    # What torch.nn's layer has, its hooks and whatever was set on it, and what it does not have.
    vars(layer).update(vars(module))
    return layer
