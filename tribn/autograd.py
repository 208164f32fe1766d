"""Differentiation: which operator runs forward and backward, and what is kept in between.

Kept for backward are two (C,) statistics, weight and bias, and of what is as large as the input:

- the input, where the gradient of the weight, or in training that of the input, is wanted;
- for an activation's gradient one bit for each element, if that is all it depends on (relu, relu6,
  leaky_relu) and the input would not tell: there is a residual, or the input is not kept anyway;
- else the input and, unless the activation comes first, the residual;
- with `inplace` memory the output in place of the input, if it can be undone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tribn import ops
from tribn.activation import Activation
from tribn.reference import accumulator, unpack

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """What both modes take besides tensors."""

    eps: float
    axis: int
    activation: Activation
    act_first: bool
    inplace: bool
    grad: bool  # whether a backward may follow

    @property
    def act(self) -> tuple[str | None, float, float, bool]:
        return *self.activation, self.act_first


class BatchNormTrain(torch.autograd.Function):
    """Normalization by the statistics of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        correction: int,
        skip_nonfinite: bool,
        options: Options,
    ) -> Tensor:
        keep = _Keep.of(ctx.needs_input_grad[:4], True, residual, options)
        keep = keep._replace(output=keep.x and options.inplace and _can_undo(weight, bias))
        y, mean, var, count, bits = ops.batch_norm_train(
            *(x, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked),
            *(momentum, correction, skip_nonfinite, options.eps, options.axis),
            *(*options.act, keep.bits),
        )
        keep.save(ctx, x, weight, bias, residual, mask, y, mean, var, count, bits, options)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy, True, ctx.needs_input_grad[:4]), *(None,) * 8


class BatchNormEval(torch.autograd.Function):
    """Normalization by given statistics, which are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        var: Tensor,
        options: Options,
    ) -> Tensor:
        keep = _Keep.of(ctx.needs_input_grad[:4], False, residual, options)
        y, bits = ops.batch_norm_eval(
            *(x, mean, var, weight, bias, residual, mask, options.eps, options.axis),
            *(*options.act, keep.bits),
        )
        keep.save(ctx, x, weight, bias, residual, mask, y, mean, var, None, bits, options)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy, False, ctx.needs_input_grad[:4]), *(None,) * 4


class _Keep(NamedTuple):
    """What of the large tensors backward needs."""

    x: bool
    residual: bool
    bits: bool
    output: bool = False  # in place of x

    @classmethod
    def of(
        cls, needs: tuple[bool, ...], training: bool, residual: Tensor | None, options: Options
    ) -> _Keep:
        if not options.grad:  # which needs_input_grad does not tell
            return cls(False, False, False)
        needs_x, needs_weight, *_ = needs
        x = needs_weight or (training and needs_x)
        activation, act_first = options.activation, options.act_first
        if activation.name is None or not (needs_x if act_first else any(needs)):
            return cls(x, False, False)
        residual_tells = residual is not None and not act_first
        if activation.one_bit and (residual_tells or not x):
            return cls(x, False, True)
        return cls(True, residual_tells, False)

    def save(
        self,
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        y: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor | None,
        bits: Tensor | None,
        options: Options,
    ) -> None:
        kept = y if self.output else x
        ctx.save_for_backward(
            *(kept if self.x else None, mean, var, weight, bias),
            *(residual if self.residual else None, bits, mask, count),
        )
        ctx.options, ctx.stride, ctx.dtype = options, y.stride(), x.dtype
        ctx.kept_stride = kept.stride()
        ctx.from_output = self.output
        ctx.residual_dtype = None if residual is None else residual.dtype


def _can_undo(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether xhat = (z - bias) / weight tells xhat to within some 16 roundings of z.

    A rounding of z is one of |xhat| + |bias / weight|. On a GPU this reads a number from the
    device, once a call, which graphs and compilers cannot do: for them the input is kept.
    """
    if weight is None:
        return True
    if torch.compiler.is_compiling():
        return False
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    size = weight.abs()
    least = size.new_full((), 2.0**-6) if bias is None else bias.abs().clamp(min=2.0**-3) / 8
    return bool((size >= least).all())


def _backward(ctx: Any, dy: Tensor, training: bool, needs: tuple[bool, ...]) -> Grads:
    options: Options = ctx.options
    x, *others = ctx.saved_tensors
    if x is not None and x.stride() != ctx.kept_stride:  # a hook may have copied it
        x = _with_stride(x, ctx.stride)
    tensors, mask = (x, *others), others[-2]
    # Nothing happens to the residual's gradient without an activation behind it, or a mask.
    changed = mask is not None or (options.activation.name and not options.act_first)
    wanted = [*needs[:3], bool(needs[3] and changed)]
    if torch.is_grad_enabled():
        if ctx.from_output:
            raise RuntimeError(
                "memory is 'inplace', which keeps no input: gradients of gradients need "
                "memory='input'"
            )
        dx, dweight, dbias, dresidual = _differentiable_backward(
            dy, *tensors, training=training, options=options, stride=ctx.stride, wanted=wanted
        )
        if dx is not None:
            dx = _with_stride(dx.to(ctx.dtype), ctx.stride)
        if dresidual is not None:
            dresidual = dresidual.to(ctx.residual_dtype)
    else:
        if x is None:  # dx takes its memory format from dy
            dy = _with_stride(dy, ctx.stride)
        dx, dweight, dbias, dresidual = ops.batch_norm_backward(
            *(dy, *tensors, options.eps, training, options.axis, *options.act),
            *(ctx.from_output, ctx.dtype, ctx.residual_dtype, wanted),
        )
    if needs[3] and not changed:
        dresidual = dy.to(ctx.residual_dtype)
    return dx, dweight, dbias, dresidual


def _with_stride(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    return x if x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)


def _differentiable_backward(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mask: Tensor | None,
    count: Tensor | None,
    *,
    training: bool,
    options: Options,
    stride: tuple[int, ...],
    wanted: list[bool],
) -> Grads:
    """The gradients by operations that can be differentiated again, for double backward."""
    eps, axis, activation, act_first, *_ = options
    dtype = accumulator(dy.dtype)
    shape = [-1 if d == axis else 1 for d in range(dy.dim())]
    others = [d for d in range(dy.dim()) if d != axis]
    padding = None if mask is None else ~mask.unsqueeze(axis)
    n = max(dy.numel() // max(dy.shape[axis], 1), 1) if count is None else count.clamp(min=1)

    def inside(t: Tensor) -> Tensor:
        return t if padding is None else t.masked_fill(padding, 0)

    def per_channel(t: Tensor) -> Tensor:
        return t.to(dtype).view(shape)

    g = inside(dy.to(dtype))
    scale = (var.to(dtype) + eps).rsqrt()
    xhat = source = None
    if bits is not None:
        like = torch.empty_strided(dy.shape, stride, dtype=dtype, device=dy.device)
        source = unpack(bits, like, axis)
    if x is not None:
        a = inside(x.to(dtype))
        if act_first:
            source = a if source is None else source
            a = inside(activation(a))
        average = mean.to(dtype)
        if training:
            average = a.sum(others) / n
            deviation = inside(a - per_channel(average))
            scale = (deviation.square().sum(others) / n + eps).rsqrt()
        xhat = inside(a - per_channel(average)) * per_channel(scale)
        if activation.name and source is None:
            source = xhat if weight is None else xhat * per_channel(weight)
            source = source if bias is None else source + per_channel(bias)
            source = source if residual is None else source + inside(residual.to(dtype))
    if source is not None and not act_first:
        g = inside(activation.backward(g, source))
    dbias = g.sum(others)
    dweight = None if xhat is None else (g * xhat).sum(others)
    dx = g
    if wanted[0]:
        if training:
            assert xhat is not None
            assert dweight is not None
            dx = dx - per_channel(dbias / n) - xhat * per_channel(dweight / n)
        dx = dx * per_channel(scale if weight is None else scale * weight.to(dtype))
        if source is not None and act_first:
            dx = activation.backward(dx, source)
        dx = inside(dx)
    grads = (dx, dweight, dbias, g)
    return tuple(t if w else None for t, w in zip(grads, wanted, strict=True))  # type: ignore[return-value]
