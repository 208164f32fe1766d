"""Differentiation: which operator runs forward and backward, and what is kept in between.

Kept for backward are two (C,) statistics, weight and bias, and of what is as large as the input:

- the input, where the gradient of the weight, or in training that of the input, is wanted;
- for an activation's gradient one bit for each element, if that is all it depends on (relu, relu6,
  leaky_relu) and the input would not tell: there is a residual, or the input is not kept anyway;
- else the input and, unless the activation comes first, the residual;
- with `inplace` memory the output in place of the input, if it can be undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tribn import distributed, ops
from tribn.activation import Activation
from tribn.distributed import Ranks
from tribn.reference import accumulator, unpack

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """What goes with the tensors of a call, and what of the large ones backward needs."""

    training: bool
    eps: float
    axis: int
    activation: Activation
    act_first: bool
    inplace: bool
    keep_x: bool
    keep_residual: bool
    forward: tuple[Any, ...]  # what the forward operator takes behind its tensors
    backward: tuple[Any, ...]  # and that of backward, but for what it takes last
    ranks: Ranks | None  # whose batches are one
    signature: ops.Signature | None  # of backward's tensors; None where nothing may be remembered

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor | None],  # input, weight, bias and residual
        training: tuple[float | None, int, bool] | None,  # momentum, correction, skip_nonfinite
        eps: float,
        axis: int,
        activation: Activation,
        act_first: bool,
        inplace: bool,
        grad: bool,  # whether a backward may follow
        ranks: Ranks | None,
        signature: ops.Signature | None,
    ) -> Options:
        needs = [grad and t is not None and t.requires_grad for t in tensors]
        x, residual, bits = _keep(
            needs, training is not None, tensors[-1] is not None, activation, act_first
        )
        act = (*activation, act_first)
        return cls(
            *(training is not None, eps, axis, activation, act_first, inplace, x, residual),
            (*(training or ()), eps, axis, *act, bits),
            (eps, training is not None, axis, *act),
            *(ranks, signature),
        )


def _keep(
    needs: Sequence[bool], training: bool, residual: bool, activation: Activation, act_first: bool
) -> tuple[bool, bool, bool]:
    """Whether x, the residual and bits are kept, given what gradients are needed."""
    needs_x, needs_weight, *_ = needs
    x = needs_weight or (training and needs_x)
    if activation.name is None or not (needs_x if act_first else any(needs)):
        return x, False, False
    residual_tells = residual and not act_first
    if activation.one_bit and (residual_tells or not x):
        return x, False, True
    return True, residual_tells, False


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        if args[-1]:  # Function.apply looks at every argument, for functorch: not at plain ones.
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        return super().apply(*args)


class BatchNormTrain(_Function):
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
        options: Options,
        plain: bool,
    ) -> Tensor:
        from_output = options.inplace and options.keep_x and _can_undo(weight, bias)
        args: tuple[Any, ...] = (x, weight, bias, residual, mask)
        args += (running_mean, running_var, num_batches_tracked, *options.forward)
        if options.ranks is None:
            results = ops.run(ops.batch_norm_train, plain, *args)
        else:
            results = distributed.batch_norm_train(options.ranks, plain, *args)
        y, mean, var, count, bits = results
        kept = y if from_output else x
        _save(
            ctx, options, kept, mean, var, weight, bias, residual, bits, mask, count, y, from_output
        )
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy), *(None,) * 6


class BatchNormEval(_Function):
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
        plain: bool,
    ) -> Tensor:
        y, bits = ops.run(
            *(ops.batch_norm_eval, plain, x, mean, var, weight, bias, residual, mask),
            *options.forward,
        )
        _save(ctx, options, x, mean, var, weight, bias, residual, bits, mask, None, y, False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy), *(None,) * 5


def _save(
    ctx: Any,
    options: Options,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mask: Tensor | None,
    count: Tensor | None,
    y: Tensor,
    from_output: bool,
) -> None:
    ctx.save_for_backward(
        *(x if options.keep_x else None, mean, var, weight, bias),
        *(residual if options.keep_residual else None, bits, mask, count),
    )
    residual_dtype = None if residual is None else residual.dtype
    ctx.facts = options, from_output, x.dtype, residual_dtype, y.stride(), x.stride()


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


def _backward(ctx: Any, dy: Tensor) -> Grads:
    options, from_output, dtype, residual_dtype, stride, kept_stride = ctx.facts
    needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    tensors = ctx.saved_tensors
    x, mask = tensors[0], tensors[-2]
    if x is not None and x.stride() != kept_stride:  # a hook may have copied it
        tensors = (_with_stride(x, stride), *tensors[1:])
    # Nothing happens to the residual's gradient without an activation behind it, or a mask.
    changed = mask is not None or (options.activation.name is not None and not options.act_first)
    wanted = [needs_x, needs_weight, needs_bias, needs_residual and changed]
    if torch.is_grad_enabled():
        if from_output:
            raise RuntimeError(
                "memory is 'inplace', which keeps no input: gradients of gradients need "
                "memory='input'"
            )
        dx, dweight, dbias, dresidual = _differentiable_backward(
            dy, *tensors, options=options, stride=stride, wanted=wanted
        )
        if dx is not None:
            dx = _with_stride(dx.to(dtype), stride)
        if dresidual is not None:
            dresidual = dresidual.to(residual_dtype)
    else:
        if x is None:  # dx takes its memory format from dy
            dy = _with_stride(dy, stride)
        plain = _plain(options.signature, [t for t in (dy, *tensors) if t is not None])
        args = (dy, *tensors, *options.backward, from_output, dtype, residual_dtype, wanted)
        if options.ranks is None:
            grads = ops.run(ops.batch_norm_backward, plain, *args)
        else:
            grads = distributed.batch_norm_backward(options.ranks, plain, *args)
        dx, dweight, dbias, dresidual = grads
    if needs_residual and not changed:
        dresidual = dy.to(residual_dtype)
    return dx, dweight, dbias, dresidual


def _plain(signature: ops.Signature | None, tensors: list[Tensor]) -> bool:
    if signature is None or torch.compiler.is_compiling():
        return False
    if signature.recall(tensors):
        return True
    signature.remember(tensors, True)
    return False


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
    options: Options,
    stride: tuple[int, ...],
    wanted: list[bool],
) -> Grads:
    """The gradients by operations that can be differentiated again, for double backward."""
    training, eps, axis, activation, act_first, *_ = options
    all_sum = partial(distributed.all_sum, ranks=options.ranks)
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
            average = all_sum(a.sum(others)) / n
            deviation = inside(a - per_channel(average))
            scale = (all_sum(deviation.square().sum(others)) / n + eps).rsqrt()
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
            dx = dx - per_channel(all_sum(dbias) / n) - xhat * per_channel(all_sum(dweight) / n)
        dx = dx * per_channel(scale if weight is None else scale * weight.to(dtype))
        if source is not None and act_first:
            dx = activation.backward(dx, source)
        dx = inside(dx)
    grads = (dx, dweight, dbias, g)
    return tuple(t if w else None for t, w in zip(grads, wanted, strict=True))  # type: ignore[return-value]
