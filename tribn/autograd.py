"""Differentiation: which operator runs forward and backward, and what is kept in between.

Kept for backward: two (C,) statistics, the weight, and the input where a gradient depends on it:
in training that of the input or the weight, in evaluation that of the weight alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tribn import ops, reference

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class BatchNormTrain(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias by the statistics of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        axis: int,
    ) -> Tensor:
        y, mean, var = ops.batch_norm_train(
            x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, axis
        )
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_x else None, mean, var, weight)
        ctx.eps, ctx.axis, ctx.stride = eps, axis, y.stride()
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = _backward(ctx, dy, True, ctx.needs_input_grad[:3])
        return dx, dweight, dbias, None, None, None, None, None, None


class BatchNormEval(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias by given statistics, constants both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        axis: int,
    ) -> Tensor:
        y = ops.batch_norm_eval(x, mean, var, weight, bias, eps, axis)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, mean, var, weight)
        ctx.eps, ctx.axis, ctx.stride = eps, axis, y.stride()
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        dx, dweight, dbias = _backward(ctx, dy, False, (needs[0], *needs[3:5]))
        return dx, None, None, dweight, dbias, None, None


def _backward(ctx: Any, dy: Tensor, training: bool, mask: tuple[bool, bool, bool]) -> Grads:
    x, mean, var, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        dx, dweight, dbias = _differentiable_backward(
            dy, x, mean, var, weight, ctx.eps, training, ctx.axis, mask
        )
        return None if dx is None else _with_stride(dx, ctx.stride), dweight, dbias
    if x is None:  # dx takes its memory format from dy
        dy = _with_stride(dy, ctx.stride)
    grads: Grads = ops.batch_norm_backward(
        dy, x, mean, var, weight, ctx.eps, training, ctx.axis, mask
    )
    return grads


def _with_stride(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    return x if x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)


def _differentiable_backward(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    training: bool,
    axis: int,
    mask: tuple[bool, bool, bool],
) -> Grads:
    """The gradients by operations that can be differentiated again, for double backward."""
    dtype = reference.accumulator(dy.dtype)
    shape = [-1 if d == axis else 1 for d in range(dy.dim())]
    others = [d for d in range(dy.dim()) if d != axis]
    grad = dy.to(dtype)
    dbias = grad.sum(others)
    if x is None:
        scale = (var.to(dtype) + eps).rsqrt()
        xhat = dweight = None
    else:
        centred = x.to(dtype)
        if training and x.numel():
            variance, average = torch.var_mean(centred, others, correction=0)
        else:
            variance, average = var.to(dtype), mean.to(dtype)
        scale = (variance + eps).rsqrt()
        xhat = (centred - average.view(shape)) * scale.view(shape)
        dweight = (grad * xhat).sum(others)
    if weight is not None:
        scale = scale * weight.to(dtype)
    dx = None
    if mask[0]:
        if training:
            assert xhat is not None
            assert dweight is not None
            n = dy.numel() // dy.shape[axis]
            grad = grad - dbias.view(shape) / n - xhat * dweight.view(shape) / n
        dx = (grad * scale.view(shape)).to(dy.dtype)
    return dx, dweight if mask[1] else None, dbias if mask[2] else None
