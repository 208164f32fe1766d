"""Batch normalization in plain PyTorch: the specification of the kernels, and what CPU tensors run.

Every operator of `tribn.ops` has its function here, with the same arguments: `axis` is the channel
axis, C its size, statistics are `accumulator(x.dtype)` tensors of shape (C,), outputs have the
input's dtype and memory format. PyTorch's fused CPU operators do the work where they compute the
same thing. Their reductions do so for a contiguous (batch, C, length) tensor with more than one
element in length and not of half precision. On others they add up long sums in float32: those are
converted first, to a layout and a dtype that are slower and exact.
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
        statistics = torch.batch_norm_update_stats(rows, None, None, 0.0)
        mean, var = _cast(accumulator(x.dtype), *statistics)
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
    weight, bias, mean, var = _cast(accumulator(x.dtype), weight, bias, mean, var)
    moved = x if axis == 1 else x.movedim(axis, 1)
    y: Tensor = aten.native_batch_norm(moved, weight, bias, mean, var, False, 0.0, eps)[0]
    if axis == 1 and y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x).copy_(y.movedim(1, axis))


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
    dtype = accumulator(like.dtype)
    if not like.numel():
        zeros = torch.zeros_like(mean, dtype=dtype)
        dweight, dbias = (zeros.clone() if wanted else None for wanted in mask[1:])
        return torch.empty_like(like) if mask[0] else None, dweight, dbias
    if x is None:
        weight, var = _cast(dtype, weight, var)
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else weight * scale
        shape = [-1 if d == axis else 1 for d in range(dy.dim())]
        others = [d for d in range(dy.dim()) if d != axis]
        dx = torch.empty_like(dy).copy_(dy * scale.view(shape)) if mask[0] else None
        return dx, None, dy.sum(others, dtype=dtype) if mask[2] else None
    batch_first = _batch_first(x, axis)
    rows, dy_rows = (_rows(t, axis, batch_first) for t in (x, dy))
    weight, mean, var = _cast(rows.dtype, weight, mean, var)
    dx, dweight, dbias = aten.native_batch_norm_backward(
        *(dy_rows, rows, weight, mean, var, mean, (var + eps).rsqrt(), training, eps, mask)
    )
    if mask[0] and batch_first:
        dx = aten._unsafe_view(dx.to(x.dtype), x.shape)
    elif mask[0]:
        dx = torch.empty_like(x).copy_(dx.view(x.movedim(axis, 0).shape).movedim(0, axis))
    return dx, *_cast(dtype, dweight, dbias)


def _count(x: Tensor, axis: int) -> int:
    """Values per channel."""
    return x.numel() // x.shape[axis] if x.numel() else 0


def _cast(dtype: torch.dtype, *statistics: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in statistics]


def _batch_first(x: Tensor, axis: int) -> bool:
    """Whether x is a contiguous (batch, C, length) tensor as it stands, with some length."""
    return axis == 1 and x.is_contiguous() and x.shape[:2].numel() < x.numel()


def _rows(x: Tensor, axis: int, batch_first: bool) -> Tensor:
    """x as a contiguous (batch, C, length) tensor, of batch 1 and float64 unless `batch_first`."""
    if batch_first:
        return x.to(accumulator(x.dtype)).contiguous().flatten(2)
    return x.double().movedim(axis, 0).flatten(1).contiguous().unsqueeze(0)
