"""Batch norm under torch.func's transforms and in forward mode.

There functions have to return what they keep, which takes longer: elsewhere those of
`tribn.autograd` serve. But operators that are called without either, as in exported graphs, have
their gradients by these too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tribn import distributed, ops
from tribn.activation import Activation
from tribn.autograd import Options, backward, save, twice_forward
from tribn.formula import Formula, named, push
from tribn.vmap import Dims, fold, one_by_one, unfold


def batch_norm(options: Options, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The output, and what else its function returns."""
    # Which gradients are wanted a tensor may not tell here, and bits are not batched.
    options = options._replace(
        inplace=False, keep_x=True, keep_residual=True, forward=(*options.forward[:-1], False)
    )
    function = BatchNormTrain if options.training else BatchNormEval
    outputs: tuple[Any, ...] = function.apply(*tensors, options)
    if twice_forward():
        x, weight, bias, residual, mask, *statistics = tensors
        y, mean, var, count = outputs if options.training else (*outputs, *statistics, None)
        formula = _formula(options, mean, var, None, mask, count, y.dtype, y.stride())
        outputs = formula.output(named(x, weight, bias, residual)), *outputs[1:]
    return outputs


class BatchNormTrain(torch.autograd.Function):
    """Normalization by the statistics of the batch."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        *tensors, options = args
        y, mean, var, count, _ = distributed.batch_norm_train(
            options.ranks, None, (*tensors, *options.forward)
        )
        return y, mean, var, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, residual, mask, *_, options = inputs
        y, mean, var, count = output
        ctx.mark_non_differentiable(*(t for t in (mean, var, count) if t is not None))
        kept = save(ctx, options, x, mean, var, weight, bias, residual, None, mask, count, y)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *backward(ctx, dy), *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        return _jvp(ctx, tangents), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> Any:
        *tensors, counter, options = args
        B, axis, momentum = info.batch_size, options.axis, options.forward[0]
        running = list(zip(tensors, in_dims, strict=False))[5:7]
        # Batches that share their statistics change them in turn, as in a loop.
        shared = any(t is not None and d is None for t, d in (*running, (counter, in_dims[7])))
        if shared or in_dims[4] is not None or (counter is not None and momentum is None):
            return one_by_one(BatchNormTrain.apply, B, in_dims, args)
        axes = axis, 0, 0, axis, None, 0, 0
        folded = [fold(*of, B) for of in zip(tensors, in_dims, axes, strict=False)]
        counted = None if counter is None else counter.new_zeros(())
        y, mean, var, count = BatchNormTrain.apply(*folded, counted, options)
        for (t, d), new in zip(running, folded[5:], strict=True):
            if t is not None:
                t.movedim(d, 0).copy_(unfold(new, 0, B))
        if counter is not None:
            counter += counted
        return (unfold(y, axis, B), *(unfold(t, 0, B) for t in (mean, var)), count), (
            axis,
            0,
            0,
            None,
        )


class BatchNormEval(torch.autograd.Function):
    """Normalization by given statistics, which are constants."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor]:
        x, weight, bias, residual, mask, mean, var, options = args
        y, _ = ops.batch_norm_eval(x, mean, var, weight, bias, residual, mask, *options.forward)
        return (y,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        x, weight, bias, residual, mask, mean, var, options = inputs
        kept = save(ctx, options, x, mean, var, weight, bias, residual, None, mask, None, *output)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(ctx, dy), *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor]:
        return (_jvp(ctx, tangents),)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> Any:
        B, axis = info.batch_size, args[-1].axis
        if in_dims[4] is not None:
            return one_by_one(BatchNormEval.apply, B, in_dims, args)
        axes = axis, 0, 0, axis, None, 0, 0
        folded = [fold(*of, B) for of in zip(args, in_dims, axes, strict=False)]
        (y,) = BatchNormEval.apply(*folded, args[-1])
        return (unfold(y, axis, B),), (axis,)


def _jvp(ctx: Any, tangents: tuple[Any, ...]) -> Tensor:
    """The tangent of the output, given those of x, weight, bias, residual and what has none."""
    x, mean, var, weight, bias, residual, bits, mask, count = ctx.saved_tensors
    options, _, dtype, residual_dtype, stride, _ = ctx.facts
    if residual is not None:
        dtype = torch.promote_types(dtype, residual_dtype)
    formula = _formula(options, mean, var, bits, mask, count, dtype, stride)
    inputs = named(x, weight, bias, residual)
    return push(formula.output, inputs, named(*tangents[:4]))  # type: ignore[no-any-return]


def _formula(options: Options, *of: Any) -> Formula:
    return Formula(
        *(options.training, options.eps, options.axis, options.activation, options.act_first),
        *(*of, options.ranks),
    )


def _options(tensors: Sequence[Tensor | None], training: Any, numbers: Sequence[Any]) -> Options:
    """Those of an operator's call, whose last arguments are the numbers."""
    eps, axis, *activation, act_first, _ = numbers
    of = Activation(*activation), act_first
    return Options.of(
        *(tensors, training, eps, axis, *of), inplace=False, grad=True, ranks=None, signature=None
    )


def _batch_norm_train(*args: Any) -> tuple[Tensor | None, ...]:
    options = _options(args[:4], args[8:11], args[11:])
    return *batch_norm(options, *args[:8]), None


def _batch_norm_eval(x: Tensor, mean: Tensor, var: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    options = _options((x, *args[:3]), None, args[4:])
    return *batch_norm(options, x, *args[:4], mean, var), None


ops.differentiate(ops.batch_norm_train, _batch_norm_train)
ops.differentiate(ops.batch_norm_eval, _batch_norm_eval)
