"""Running statistics of a whole data set."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from tribn.functional import batch_stats, merge_stats
from tribn.nn import Layer

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
    `num_batches_tracked` becomes the number of uses. Frozen layers and those without running
    statistics stay as they are, and so does the mode of every module.

    Args:
        model: is called with each batch.
        loader: batches; of one that is a list or tuple the first element.
        device: where batches are moved to, if given.
        progress: show how far it has come, if the standard error is a terminal.

    Raises:
        ValueError: the loader is empty.

    If it fails, or is interrupted, the running statistics are those from before.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, Layer) and layer.running_mean is not None and not layer.frozen
    ]
    moments: dict[Layer, Moments] = {}
    before = {layer: [b.clone() for b in layer.buffers(recurse=False)] for layer in layers}
    modes = {module: module.training for module in model.modules()}

    def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        assert isinstance(layer, Layer)
        x = args[0] if args else kwargs["input"]
        mask, lengths = kwargs.get("mask"), kwargs.get("lengths")
        x = layer.activation(x) if layer.order == "act_norm" else x
        mean, var, count = batch_stats(
            x, channel_axis=layer.channel_axis, mask=mask, lengths=lengths
        )
        new = mean.double(), var.double(), count
        moments[layer] = merge_stats(*moments[layer], *new) if layer in moments else new

    def restore(layer: Layer) -> None:
        for buffer, old in zip(layer.buffers(recurse=False), before[layer], strict=True):
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
            model(x if device is None else x.to(device))
            batches += 1
        if not batches:
            raise ValueError("loader is empty: there is nothing to take statistics of")
    except BaseException:
        for layer in layers:
            restore(layer)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for layer in layers:
        if layer not in moments:
            restore(layer)
            continue
        mean, var, count = moments[layer]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        counted = count.double()
        unbiased = var * counted / (counted - layer.correction).clamp(min=1)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(unbiased)


def _shown(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches, with their number on a terminal."""
    total = f"/{len(loader)}" if isinstance(loader, Sized) else ""
    shown = sys.stderr.isatty()
    for done, batch in enumerate(loader, start=1):
        yield batch
        if shown:
            print(f"\rupdate_stats: {done}{total} batches", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
