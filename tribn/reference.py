"""Batch normalization in plain PyTorch: the specification of the kernels, and what CPU tensors run.

Every operator of `tribn.ops` has its function here, with the same arguments: `axis` is the channel
axis, C its size, statistics are `accumulator(x.dtype)` tensors of shape (C,), outputs have the
input's dtype and memory format. PyTorch's fused CPU operators do the work where they compute the
same thing. Their reductions do so for a (batch, C, length) tensor that is contiguous and not of
half precision; on others they add up long sums in float32, so those are converted first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_stats(x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count per channel; zeros for an empty batch."""
    if x.numel():
        rows = _rows(x, axis, _batch_first(x, axis))
        mean, var = torch.batch_norm_update_stats(rows, None, None, 0.0)
    else:
        mean, var = torch.zeros(2, x.shape[axis], dtype=accumulator(x.dtype), device=x.device)
    return mean, var, torch.tensor(_count(x, axis), device=x.device)


def batch_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    axis: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes by the batch's statistics and updates the running ones, unless it is empty.

    With `momentum` None the running statistics are the average over `num_batches_tracked` batches.
    """
    mean, var, _ = batch_stats(x, axis)
    if x.numel():
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            factor: float | Tensor
            if momentum is None:
                assert num_batches_tracked is not None
                factor = num_batches_tracked.to(mean.dtype).reciprocal()
            else:
                factor = momentum
            count = _count(x, axis)
            unbiased = var * (count / (count - 1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                running.copy_(running.to(new.dtype) * (1 - factor) + new * factor)
    return batch_norm_eval(x, mean, var, weight, bias, eps, axis), mean, var


def batch_norm_eval(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias"""
    if not x.numel():
        return torch.empty_like(x)
    weight, bias, mean, var = _cast(x, weight, bias, mean, var)
    y = aten.native_batch_norm(x.movedim(axis, 1), weight, bias, mean, var, False, 0.0, eps)[0]
    return _laid_out_as(x, y.movedim(1, axis))


def batch_norm_backward(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    training: bool,
    axis: int,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, those that `mask` asks for.

    Training with xhat = (x - mean) * rstd, sums over the batch and its n values per channel:
    dx = weight * rstd * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n), dweight = sum(dy * xhat),
    dbias = sum(dy). Otherwise the statistics are constants and dx = weight * rstd * dy. `x` may be
    None where nothing depends on it: dweight is not asked for, nor is dx in training.
    """
    like = dy if x is None else x
    weight, mean, var = _cast(like, weight, mean, var)
    if not like.numel():
        dweight, dbias = (torch.zeros_like(mean) if wanted else None for wanted in mask[1:])
        return torch.empty_like(like) if mask[0] else None, dweight, dbias
    rstd = (var + eps).rsqrt()
    if x is None:
        scale = rstd if weight is None else weight * rstd
        shape = [-1 if d == axis else 1 for d in range(dy.dim())]
        others = [d for d in range(dy.dim()) if d != axis]
        dx = torch.empty_like(dy).copy_(dy * scale.view(shape)) if mask[0] else None
        return dx, None, dy.sum(others, dtype=mean.dtype) if mask[2] else None
    batch_first = _batch_first(x, axis)
    dx, dweight, dbias = aten.native_batch_norm_backward(
        _rows(dy, axis, batch_first),
        _rows(x, axis, batch_first),
        *(weight, mean, var, mean, rstd, training, eps, mask),
    )
    if mask[0]:
        front = 1 if batch_first else 0
        dx = _laid_out_as(x, dx.reshape(x.movedim(axis, front).shape).movedim(front, axis))
    return dx, dweight, dbias


def _count(x: Tensor, axis: int) -> int:
    """Values per channel."""
    return x.numel() // x.shape[axis] if x.numel() else 0


def _cast(x: Tensor, *statistics: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(accumulator(x.dtype)) for t in statistics]


def _batch_first(x: Tensor, axis: int) -> bool:
    """Whether x is a contiguous (batch, C, length) tensor as it stands."""
    return x.dim() > 2 and x.movedim(axis, 1).is_contiguous()


def _rows(x: Tensor, axis: int, batch_first: bool) -> Tensor:
    """x as a contiguous (batch, C, length) tensor in the accumulator's dtype."""
    x = x.to(accumulator(x.dtype))
    if batch_first:
        return x.movedim(axis, 1).flatten(2).contiguous()
    return x.movedim(axis, 0).flatten(1).contiguous().unsqueeze(0)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y in the dtype and memory format of x, copied only if it has to be."""
    out_stride = torch.empty_like(x, device="meta").stride()
    if y.dtype == x.dtype and y.stride() == out_stride:
        return y
    return torch.empty_like(x).copy_(y)
