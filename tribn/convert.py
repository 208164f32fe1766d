"""Changing the batch norm layers of a model in place.

A module becomes another by its `__class__` and stays the object it was, so that whatever refers to
it goes on: parents, optimizers, hooks, lists of layers.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import nn

from tribn.activation import of_module
from tribn.distributed import check_group
from tribn.functional import check_bool, check_model
from tribn.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Layer,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
    watched,
)

Model = TypeVar("Model", bound=nn.Module)

_OWN: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_THEIRS = {own: cls for cls, own in _OWN.items()}

# By name, because their libraries need not be installed, and then tried: timm's layers, which end
# with a module `act`, and torchvision's, detectron2's and timm's, whose tensors are buffers.
_NAMED: dict[str, type[Layer]] = {
    "BatchNormAct2d": BatchNorm2d,
    "BatchNormAct3d": BatchNorm3d,
    "FrozenBatchNorm2d": BatchNorm2d,
    "FrozenBatchNormAct2d": BatchNorm2d,
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")

# Batch norm layers that would go on following the batches.
_UNKNOWN = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)


class Row(NamedTuple):
    """What has become of a layer."""

    name: str
    what: str  # "fused", "replaced" or "left"
    into: str  # what a fused one computes besides
    why: str  # one is not fused


class Report:
    """What `convert` did, layer by layer; `print` shows it as a table.

    Attributes:
        rows: (name, what, into, why) of each layer, in the order of ``model.named_modules()``.
            `what` is "fused", "replaced" or "left".
        counts: how many there are of each.
    """

    def __init__(self, rows: list[Row]) -> None:
        """Takes the rows, and counts them."""
        self.rows = rows
        self.counts = Counter(row.what for row in rows)

    def __str__(self) -> str:
        numbers = ", ".join(f"{self.counts[what]} {what}" for what in ("fused", "replaced", "left"))
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"  {row.name:{width}}  {row.what:8}  {row.into or row.why}".rstrip()
            for row in self.rows
        ]
        return "\n".join([f"{len(self.rows)} batch norms: {numbers}", *lines])


@overload
def convert(model: Model, *, fuse: bool = True, report: Literal[False] = False) -> Model: ...
@overload
def convert(model: Model, *, fuse: bool = True, report: Literal[True]) -> tuple[Model, Report]: ...
def convert(
    model: Model, *, fuse: bool = True, report: bool = False
) -> Model | tuple[Model, Report]:
    """Makes the batch norm layers of a model tribn's, and fuses them with what follows each.

    Replaced are torch.nn's BatchNorm1d, 2d, 3d, their lazy ones and SyncBatchNorm, timm's
    BatchNormAct2d with an activation that tribn has, and FrozenBatchNorm2d as torchvision and timm
    have it, which stays frozen; these two by name, if a copy computes the same on the CPU. They
    stay the objects they are, with parameters, state_dict, hooks and modes. Subclasses are left.

    Fused are a batch norm, an addition and an activation of tribn's, or two of these in this order,
    if forward shows that nothing else uses what is between, wherever they are called: neighbours in
    a Sequential, modules, functions, methods, operators, in place or not; and across modules, if
    one ends with the batch norm. Forwards run on stand-ins for their inputs, by torch.fx, one
    module at a time; one that does more than a graph tells is left as it is. No other thread may
    run modules meanwhile.

    The modules stay. A module whose forward was rewritten is of
    a subclass with the same name, whose forward passes the activation and the residual to the batch
    norm. It computes one after another when a hook would see the difference, when shapes or dtypes
    of a sum differ, and when what is fused was replaced. So layers and activations may be shared.

    Args:
        model: any module; its layers are changed in place.
        fuse: False only replaces layers.
        report: also return what was done, layer by layer.

    Returns:
        The model; with ``report=True`` the model and a `Report`.

    Raises:
        TypeError: `model` is not a module, `fuse` or `report` not True or False.
    """
    from tribn.fuse import Fusion, unfuse  # takes half as long to import as all the rest

    check_model(model)
    check_bool("fuse", fuse)
    check_bool("report", report)
    unfuse(model)
    why = {layer: _problem(layer) for layer in model.modules() if _is_batch_norm(layer)}
    for layer, problem in why.items():
        if not problem:
            _own(layer)
    fusion = Fusion(model) if fuse else None
    if not report:
        return model
    rows = []
    for name, layer in model.named_modules():
        if layer in why:
            into = list(fusion.fused.get(layer, ())) if fusion else []
            if isinstance(layer, Layer) and layer.activation.name and not why[layer]:  # timm's
                into.append(str(layer.activation))
            what = "fused" if into else "left" if why[layer] else "replaced"
            reason = why[layer]
            if fusion and not reason and not into:
                reason = fusion.why.get(layer, "no call of it was found")
            rows.append(Row(name or "model", what, "; ".join(into), "" if into else reason))
    return model, Report(rows)


def revert(model: Model) -> Model:
    """Undoes `convert`: gives the layers and modules of a model the classes they had.

    Layers that were made as tribn's become torch.nn's if these can do the same.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a layer does what torch.nn's cannot; the model is unchanged.
    """
    from tribn.fuse import unfuse

    check_model(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Layer):
            _check_revert(name or "itself", layer)
    unfuse(model)
    for layer in list(_layers(model)):
        cls, settings, added = _origin(layer)
        for setting in (*settings, *added, "_tribn_origin"):
            vars(layer).pop(setting, None)
        if added:
            del layer._buffers["num_batches_tracked"]
        group = vars(layer).pop("process_group", None)
        group = vars(layer).pop("_tribn_group", group)
        if cls is nn.SyncBatchNorm:
            layer.process_group = group
        layer.__class__ = cls  # type: ignore[assignment]
    return model


def freeze(model: Model) -> Model:
    """Makes every batch norm layer use its running statistics, also after ``model.train()``.

    torch.nn's BatchNorm1d, 2d, 3d and SyncBatchNorm become tribn's, with the same parameters,
    statistics and hooks; subclasses of them are left alone. A frozen layer runs one kernel in each
    direction and keeps no activation for backward unless its weight requires a gradient. Parameters
    stay as trainable as they were. Checkpoints without `num_batches_tracked`, as torchvision's
    FrozenBatchNorm2d writes them, load into the layers.

    Returns:
        The model.

    Raises:
        ValueError: a layer has no running statistics, a forward of its own, or is one of torch.nn's
            lazy ones; the model is unchanged.
        TypeError: `model` is not a module.
    """
    check_model(model)
    for name, layer in model.named_modules():
        if type(layer) in _UNKNOWN:
            raise ValueError(
                f"layer {name or 'itself'} is a {type(layer).__name__}, which cannot be frozen: "
                "put one of BatchNorm1d, 2d or 3d in its place first"
            )
        if type(layer) in _OWN and "forward" in vars(layer):
            raise ValueError(
                f"layer {name or 'itself'} has a forward that was put in its place, and would "
                "not be frozen: delete it first"
            )
        if (isinstance(layer, Layer) or type(layer) in _OWN) and layer.running_mean is None:
            raise ValueError(
                f"layer {name or type(layer).__name__} was made with track_running_stats=False: it "
                "has no running statistics to be frozen with"
            )
    for layer in model.modules():
        if type(layer) in _OWN:
            _own(layer)
    for layer in _layers(model):
        layer.frozen = True
    return model


def unfreeze(model: Model) -> Model:
    """Makes every layer that `freeze` froze follow ``model.train()`` again; returns the model.

    Raises:
        TypeError: `model` is not a module.
    """
    check_model(model)
    for layer in _layers(model):
        layer.frozen = False
    return model


def convert_sync_batchnorm(model: Model, process_group: Any = None) -> Model:
    """Makes the batch norm layers of a model `SyncBatchNorm`.

    tribn's BatchNorm1d, 2d and 3d, and torch.nn's and its SyncBatchNorm, keep parameters,
    statistics, hooks and mode, and tribn's all they do besides; subclasses are left alone.

    Args:
        model: any module; its layers are changed in place.
        process_group: see `SyncBatchNorm`.

    Returns:
        The model.

    Raises:
        ValueError: a layer is lazy and has seen no input; the model is unchanged.
        TypeError: `model` is not a module, or `process_group` is no process group.
    """
    check_model(model)
    check_group(process_group)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._LazyNormBase):
            raise ValueError(
                f"layer {name or 'itself'} is a {type(layer).__name__} that has seen no input: "
                "call the model once, so that it knows its channels"
            )
    for layer in list(model.modules()):
        if type(layer) in _OWN:
            _own(layer)
        if isinstance(layer, Layer) and type(layer) in _OWN.values():
            vars(layer).setdefault("_tribn_origin", _origin(layer))
            if isinstance(layer, SyncBatchNorm):
                vars(layer).setdefault("_tribn_group", layer.process_group)
            layer.__class__ = SyncBatchNorm
            layer.process_group = process_group
    return model


def _layers(model: nn.Module) -> Iterator[Layer]:
    return (layer for layer in model.modules() if isinstance(layer, Layer))


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module).__name__ in _NAMED


def _problem(layer: nn.Module) -> str:
    """Why a batch norm layer cannot become tribn's, or is."""
    cls = type(layer)
    if isinstance(layer, Layer):
        return "tribn's already"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if cls in _OWN:
        try:
            BatchNorm1d(1, layer.eps, layer.momentum, False, False)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            return str(error)
        for name in _TENSORS if cls not in _UNKNOWN else ():
            tensor: Any = getattr(layer, name)
            if tensor is not None and tensor.shape != (layer.num_features,):
                return f"num_features is {layer.num_features}, but {name} has {tensor.numel()}"
        counter: Any = layer.num_batches_tracked
        if layer.running_mean is not None:
            if counter is None and layer.momentum is None:
                return "momentum is None without num_batches_tracked"
            if counter is not None and (counter.dtype, counter.dim()) != (torch.int64, 0):
                return f"num_batches_tracked is no int64 scalar: {counter.dtype}, {counter.shape}"
        return ""
    if cls.__name__ not in _NAMED:
        return f"a subclass, {cls.__name__}"
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm) and not (
        hasattr(layer, "eps") and layer._buffers.keys() >= set(_TENSORS)
    ):
        return f"a {cls.__name__} without the buffers {', '.join(_TENSORS)} or without eps"
    if "Act" in cls.__name__:
        drop, act = (layer._modules.get(name) for name in ("drop", "act"))
        if type(drop) is not nn.Identity or watched(drop):
            return f"drops values by {drop}"
        if act is None or watched(act) or (type(act) is not nn.Identity and not of_module(act)):
            return f"its activation is {act}"
    return "" if _does_the_same(layer) else f"computes something else than another {cls.__name__}"


def _does_the_same(layer: nn.Module) -> bool:
    """Whether tribn's layer would compute what one that is known by its name does, by trying."""
    try:
        theirs = copy.deepcopy(layer).to_empty(device="cpu").double()
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            if tensor.is_floating_point():
                values = torch.linspace(0.5, 1.5, tensor.numel(), device="cpu")
                tensor.data = values.to(tensor).view_as(tensor)
            else:
                tensor.zero_()
        ours = copy.deepcopy(theirs)
        _own(ours)
        channels = len(theirs.running_mean)  # type: ignore[arg-type]
        axes = (2, channels, 3) + (1,) * (2 if isinstance(ours, BatchNorm3d) else 1)
        x = torch.linspace(-2, 3, math.prod(axes), dtype=torch.double, device="cpu").view(axes)
        for training in (True, False):
            y, expected = (type(m).forward(m.train(training), x) for m in (ours, theirs))
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    except Exception:  # it takes other inputs, or something else
        return False
    return True


def _settings(layer: nn.Module) -> dict[str, Any]:
    """What tribn's layer has besides, to compute the same."""
    act = layer._modules.get("act") if "Act" in type(layer).__name__ else None
    ours = BatchNorm1d(1, affine=False, track_running_stats=False, activation=act)
    ours.frozen = not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    theirs = vars(nn.BatchNorm1d(1, affine=False, track_running_stats=False))
    return {name: value for name, value in vars(ours).items() if name not in theirs}


def _own(layer: nn.Module) -> None:
    """Makes one of the layers without a problem tribn's."""
    cls, settings = type(layer), _settings(layer)
    if cls not in _OWN:
        added = {}
        if settings["frozen"]:
            # Neither does it count batches, nor do its checkpoints.
            layer._buffers["num_batches_tracked"] = None
            added = {"momentum": 0.1, "affine": True, "track_running_stats": False}
            added["num_features"] = len(layer.weight)  # type: ignore[arg-type]
            added = {name: value for name, value in added.items() if name not in vars(layer)}
        vars(layer).update(added, _tribn_origin=(cls, settings, tuple(added)))
    layer.__class__ = _OWN.get(cls) or _NAMED[cls.__name__]
    vars(layer).update(settings)


def _origin(layer: Layer) -> tuple[type[nn.Module], dict[str, Any], tuple[str, ...]]:
    """The class that a layer had or may get, what it has besides to be the same, what was added."""
    plain = (
        _THEIRS.get(type(layer), type(layer)),
        _settings(nn.BatchNorm1d(1, affine=False, track_running_stats=False)),
        (),
    )
    return vars(layer).get("_tribn_origin", plain)  # type: ignore[no-any-return]


def _check_revert(name: str, layer: Layer) -> None:
    cls, settings, _ = _origin(layer)
    if issubclass(cls, Layer):
        raise ValueError(
            f"layer {name} is a {cls.__name__}, which torch.nn does not have: put one of its "
            "layers in its place first"
        )
    for setting, value in settings.items():
        given = getattr(layer, setting)
        if given != value and setting not in ("memory", "stats_dtype"):
            change = f"tribn.{'unfreeze' if given else 'freeze'}(model)"
            raise ValueError(
                f"layer {name} has {setting}={given}: {cls.__name__} computes what tribn's does "
                f"with {setting}={value}; {change if setting == 'frozen' else 'change it'} first"
            )
