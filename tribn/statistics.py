"""Running statistics of a whole data set, and of a step in several parts."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tribn import ops
from tribn.activation import Activation, parse
from tribn.distributed import Ranks, gather, is_dtensor, meet
from tribn.functional import batch_stats, check_model, computing_again, mask_of, merge_stats
from tribn.nn import Layer, ranks_of
from tribn.reference import DONE, accumulator, check_same, kind
from tribn.vmap import levels

WIDTH = 30  # of the progress bar

Moments = tuple[Tensor, Tensor, Tensor]  # mean (C,), biased variance (C,), count


@torch.no_grad()
def update_stats(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
    *,
    progress: bool = True,
) -> None:
    """Sets the running statistics of a model's tribn layers to those of a whole data set.

    One pass over the data in training mode, in which every layer normalizes by the batch's
    statistics. Its running mean and variance become exactly those of all values it has seen, each
    counting the same however large its batch, in every use of a layer that is used more than once,
    and masks respected; `torch.optim.swa_utils.update_bn` averages over batches instead.
    `num_batches_tracked` becomes the number of uses. The values of all ranks of a `SyncBatchNorm`
    count, where each rank gives its share of the data, all in as many batches, which may be empty.
    Frozen layers and those without running statistics stay as they are, and so does the mode of
    every module.

    Args:
        model: is called with each batch.
        loader: batches; of one that is a list or tuple the first element.
        device: where batches are moved to, if given.
        progress: show a bar of how far it has come, if the standard error is a terminal.

    Raises:
        ValueError: the loader is empty, or there is no layer to set.
        ValueError, RuntimeError: ranks of a `SyncBatchNorm` differ, as in its calls, or in how many
            batches they have.
        TypeError: `model` is no module, or a layer was given a DTensor.

    If it fails, or is interrupted, the running statistics are those from before. Compiled models
    run uncompiled; torch.nn's layers move as in training.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without a tribn layer that has running statistics "
            "and is not frozen: put one in, or unfreeze the model"
        )
    moments: dict[Layer, Moments] = {}
    norms = []
    for name, norm in model.named_modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            if any(map(is_lazy, norm.buffers(recurse=False))):
                raise ValueError(
                    f"layer {name or 'itself'} is lazy: call the model once, to tell its channels"
                )
            norms.append(norm)
    before = {norm: [b.clone() for b in norm.buffers(recurse=False)] for norm in norms}
    modes = {module: module.training for module in model.modules()}

    def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        assert isinstance(layer, Layer)
        x = args[0] if args else kwargs["input"]
        mask, lengths = kwargs.get("mask"), kwargs.get("lengths")
        x = _activation(layer, kwargs)(x) if layer.order == "act_norm" else x
        new = mean, var, count = batch_stats(
            x.double(), channel_axis=layer.channel_axis, mask=mask, lengths=lengths
        )
        if layer.nonfinite == "skip":
            finite = mean.isfinite() & var.isfinite()
            new = mean.where(finite, 0), var.where(finite, 0), count * finite
        moments[layer] = merge_stats(*moments[layer], *new) if layer in moments else new

    def restore(norm: nn.modules.batchnorm._NormBase) -> None:
        for buffer, old in zip(norm.buffers(recurse=False), before[norm], strict=True):
            buffer.copy_(old)

    hooks = [layer.register_forward_hook(observe, with_kwargs=True) for layer in layers]
    batches = 0
    try:
        model.train()
        for layer in layers:
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.zero_()
        for batch in _shown(loader) if progress else loader:
            x = batch[0] if isinstance(batch, list | tuple) else batch
            with torch.compiler.set_stance("force_eager"):  # compiled code calls no new hooks
                model(x if device is None else x.to(device))
            batches += 1
        if not batches:
            raise ValueError("loader is empty: it must give at least one batch")
        _wait_for_all_ranks(layers)  # to have no more batches
        seen = [layer for layer in layers if layer in moments]
        found = {layer: _of_all_ranks(layer, *moments[layer]) for layer in seen}
        _wait_for_all_ranks(layers)  # before anything moves
    except BaseException:
        for norm in norms:
            restore(norm)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for layer in layers:
        if layer not in found:
            restore(layer)
            continue
        mean, var, count = found[layer]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        counted = count.double()
        unbiased = var * counted / (counted - layer.correction).clamp(min=1)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(unbiased)


def _wait_for_all_ranks(layers: Sequence[Layer]) -> None:
    """Raises unless all ranks of all groups that this one belongs to are done in time."""
    groups: dict[Ranks, Layer] = {}
    for layer in layers:
        group = layer._group()
        member = group is not None and torch.distributed.get_rank(group) >= 0
        if member and (ranks := Ranks.of(group)) is not None:
            groups[ranks] = layer
    for ranks, layer in groups.items():
        assert layer.running_mean is not None
        meet(layer.running_mean, ranks.group, DONE)


def _of_all_ranks(layer: Layer, mean: Tensor, var: Tensor, count: Tensor) -> Moments:
    if (ranks := ranks_of(layer)) is None:
        return mean, var, count
    number = kind(mean.dtype, len(mean), "a data set")
    of = torch.stack((mean, var, count.to(mean).expand_as(mean)))
    rows = gather(torch.cat((of.new_full((1,), number), of.flatten())), ranks, number)
    check_same(rows[:, 0].long().tolist())
    parts = [(m, v, n.long()) for m, v, n in rows[:, 1:].unflatten(1, of.shape)]
    return reduce(lambda total, part: merge_stats(*total, *part), parts)


@contextmanager
def accumulate_stats(model: nn.Module) -> Iterator[None]:
    """Counts all batches of a step with accumulated gradients as one in the running statistics.

        with tribn.accumulate_stats(model):
            for x, target in micro_batches:
                loss(model(x), target).backward()
        optimizer.step()

    Meanwhile tribn's layers in training leave their running statistics and counters alone. At the
    end those of every layer that was used move once, by its momentum, towards the statistics of all
    values it has seen, each counting the same, masks respected, and on all ranks of a
    `SyncBatchNorm`: what the layer would do in one call with all these batches together.

    It cannot make outputs and gradients those of one batch: what a later micro-batch adds to mean
    and variance is not known when an earlier one is normalized, and each is normalized by its own
    statistics. So behind another batch norm a layer has seen other values than in one call.

    Every input is read once more, and ranks wait for each other at the end. Compiled models run
    uncompiled. If the body raises, nothing moves.

    Args:
        model: any module; frozen layers and those without running statistics stay as they are.

    Raises:
        TypeError: `model` is no module; a layer was given a DTensor, or torch.func.vmap calls it.
        ValueError, RuntimeError: ranks of a `SyncBatchNorm` differ, as in its calls, or in which
            layers they have used; nothing moves on any, if these are of one group.
    """
    layers = [layer for layer in _layers(model) if layer.track_running_stats]
    rows: dict[Layer, list[Tensor]] = {}

    @torch.no_grad()
    def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        assert isinstance(layer, Layer)
        if not layer.training or layer.frozen or computing_again():
            return
        x, mask = args[0] if args else kwargs["input"], kwargs.get("mask")
        if is_dtensor(x):
            raise TypeError("accumulate_stats has met a DTensor: give the layers local tensors")
        if levels("Vmap"):
            raise TypeError(
                "accumulate_stats has met torch.func.vmap, whose batches it cannot keep apart: "
                "leave it out, or call the model on one after another"
            )
        axis = layer.channel_axis % x.dim()
        if (lengths := kwargs.get("lengths")) is not None:
            mask = mask_of(lengths, x, axis)
        activation, act_first = _activation(layer, kwargs), layer.order == "act_norm"
        row = ops.sync_stats(x, mask, accumulator(x.dtype), axis, *activation, act_first)
        rows.setdefault(layer, []).append(row)

    hooks = [layer.register_forward_hook(observe, with_kwargs=True) for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        with torch.compiler.set_stance("force_eager"):  # compiled code calls no new hooks
            yield
    finally:
        for hook, layer in zip(hooks, layers, strict=True):
            hook.remove()
            layer.track_running_stats = True
    with torch.no_grad():
        used = [layer for layer in layers if layer in rows and not layer.frozen]
        found = {layer: _rows_of_all_ranks(layer, torch.stack(rows[layer])) for layer in used}
        _wait_for_all_ranks(layers)
        for layer in used:
            ops.sync_combine(
                *(found[layer], layer.running_mean, layer.running_var, layer.num_batches_tracked),
                *(layer.momentum, layer.correction, layer.nonfinite == "skip", torch.float64),
            )


def _rows_of_all_ranks(layer: Layer, rows: Tensor) -> Tensor:
    """The rows of a layer's calls, or one of each rank; all ranks have the same, or it raises."""
    rows[:, 0] = rows[0, 0]  # calls may differ in dtype
    if (ranks := ranks_of(layer)) is None:
        return rows

    def combine(rows: Tensor) -> Moments:
        return ops.sync_combine(  # type: ignore[no-any-return]
            *(rows, None, None, None, 0.0, layer.correction, False, torch.float64)
        )

    mean, var, count = combine(rows)
    number = kind(mean.dtype, len(mean), "accumulated batches")
    row = torch.cat((mean.new_full((1,), number), count.double().view(1), mean, var * count))
    rows = gather(row, ranks, number)
    combine(rows)
    return rows


def _layers(model: nn.Module) -> list[Layer]:
    """Those with running statistics that are not frozen."""
    check_model(model)
    of = (layer for layer in model.modules() if isinstance(layer, Layer))
    return [layer for layer in of if layer.running_mean is not None and not layer.frozen]


def _activation(layer: Layer, kwargs: dict[str, Any]) -> Activation:
    """That of a call."""
    given = kwargs.get("activation")
    return layer.activation if given is None else parse(given)


def _shown(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches, with a bar of those that are done, if the standard error is a terminal."""
    if not sys.stderr.isatty():
        yield from loader
        return
    total = length_hint(loader)  # 0 if it is not known

    def show(done: int) -> None:
        bar = "#" * min(WIDTH * done // total, WIDTH) if total else ""
        of = f" [{bar:<{WIDTH}}] {done}/{total}" if total else f" {done}"
        print(f"\rupdate_stats{of} batches", end="", file=sys.stderr, flush=True)

    try:
        show(0)
        for done, batch in enumerate(loader, start=1):
            yield batch
            show(done)
    finally:
        print(file=sys.stderr)
