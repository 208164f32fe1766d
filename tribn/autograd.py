"""Differentiation: which operator runs forward and backward, and what is kept in between.

Kept for backward are two (C,) statistics, weight and bias, and of what is as large as the input:

- the input, where the gradient of the weight, or in training that of the input, is wanted;
- for an activation's gradient one bit for each element, if that is all it depends on (relu, relu6,
  leaky_relu) and the input would not tell: there is a residual, or the input is not kept anyway;
- else the input and, unless the activation comes first, the residual;
- with `inplace` memory the output in place of the input, if it can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tribn import distributed, ops
from tribn.activation import Activation
from tribn.distributed import Ranks
from tribn.formula import NAMES, Formula, Tensors, named, pull, push
from tribn.reference import accumulator
from tribn.vmap import Dims, fold, levels, one_by_one, unfold

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
        # float() lets torch.compile take the parameters in here, not in the first call's own graph.
        act = (activation.name, float(activation.p), float(activation.q), act_first)
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
    apply_plain: Callable[..., Tensor]  # `apply` without its look at all arguments, for functorch

    def __init_subclass__(cls) -> None:
        cls.apply_plain = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


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
        repeats: ops.Repeats | None,
    ) -> Tensor:
        from_output = options.inplace and options.keep_x and _can_undo(weight, bias)
        tensors = x, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked
        y, mean, var, count, bits = distributed.batch_norm_train(
            options.ranks, repeats, (*tensors, *options.forward)
        )
        kept = y if from_output else x
        save(
            ctx, options, kept, mean, var, weight, bias, residual, bits, mask, count, y, from_output
        )
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(ctx, dy), *(None,) * 6


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
        repeats: ops.Repeats | None,
    ) -> Tensor:
        tensors = x, mean, var, weight, bias, residual, mask
        y, bits = ops.run(ops.batch_norm_eval, repeats, (*tensors, *options.forward))
        save(ctx, options, x, mean, var, weight, bias, residual, bits, mask, None, y)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(ctx, dy), *(None,) * 5


def save(
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
    from_output: bool = False,
) -> tuple[Tensor | None, ...]:
    """Keeps what `backward` needs; returns what of it are tensors."""
    kept = (
        *(x if options.keep_x else None, mean, var, weight, bias),
        *(residual if options.keep_residual else None, bits, mask, count),
    )
    ctx.save_for_backward(*kept)
    residual_dtype = None if residual is None else residual.dtype
    ctx.facts = options, from_output, x.dtype, residual_dtype, y.stride(), x.stride()
    return kept


def _can_undo(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether xhat = (z - bias) / weight tells xhat to within some 16 roundings of z.

    A rounding of z is one of |xhat| + |bias / weight|. On a GPU this reads a number from the
    device, once a call, which graphs and compilers cannot do: for them the input is kept.
    """
    if weight is None:
        return True
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if weight.is_meta or type(weight) not in (Tensor, torch.nn.Parameter):  # fake ones
        return False
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    size = weight.abs()
    least = size.new_full((), 2.0**-6) if bias is None else bias.abs().clamp(min=2.0**-3) / 8
    return bool((size >= least).all())


def backward(ctx: Any, dy: Tensor) -> Grads:
    options, from_output, dtype, residual_dtype, stride, kept_stride = ctx.facts
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    tensors = ctx.saved_tensors
    x, mask = tensors[0], tensors[-2]
    if x is not None and x.stride() != kept_stride:  # a hook may have copied it
        tensors = (_with_stride(x, stride), *tensors[1:])
    # Nothing happens to the residual's gradient without an activation behind it, or a mask.
    changed = mask is not None or (options.activation.name is not None and not options.act_first)
    wanted = [needs_x, needs_weight, needs_bias, needs_residual and changed]
    if x is None:  # dx takes its memory format from dy
        dy = _with_stride(dy, stride)
    rest = (from_output, dtype, residual_dtype, wanted)
    dx: Tensor | None
    if torch.is_grad_enabled() or transformed():
        args = (dy, *tensors, *options.backward, *rest, stride, options.ranks)
        if twice_forward():
            gradients, inputs = _gradients(args[:10], args[10:])
            found = gradients(inputs)
            dx, dweight, dbias, dresidual = map(found.get, NAMES[:4])
        else:
            dx, dweight, dbias, dresidual = BatchNormBackward.apply(*args)
    else:
        repeats, signature = None, options.signature
        if signature is not None and not torch.compiler.is_compiling():
            given = [t for t in (dy, *tensors) if t is not None]
            if known := signature.recall(given):
                repeats = known[1]
            else:
                signature.remember(given, None)
        dx, dweight, dbias, dresidual = distributed.batch_norm_backward(
            options.ranks, repeats, (dy, *tensors, *options.backward, *rest)
        )
    if needs_residual and not changed:
        dresidual = dy.to(residual_dtype)
    return dx, dweight, dbias, dresidual


def _with_stride(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    return x if x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)


def transformed() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def twice_forward() -> bool:
    """Whether tangents of tangents are wanted, which PyTorch drops where a function has a jvp."""
    return levels("Jvp") > 1


class BatchNormBackward(torch.autograd.Function):
    """The gradients by their operator, and theirs by the formula."""

    @staticmethod
    def forward(*args: Any) -> Grads:
        return distributed.batch_norm_backward(args[-1], None, args[:-2])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Grads) -> None:
        ctx.save_for_backward(*inputs[:10])
        ctx.save_for_forward(*inputs[:10])
        ctx.facts = inputs[10:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = pull(*_gradients(ctx.saved_tensors, ctx.facts), named(*grads))
        x, weight, bias, residual, dy = (found.get(name) for name in NAMES)
        return dy, x, None, None, weight, bias, residual, *(None,) * 16

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        dy, x, _, _, weight, bias, residual, *_ = tangents
        found = push(
            *_gradients(ctx.saved_tensors, ctx.facts), named(x, weight, bias, residual, dy)
        )
        return tuple(found.get(name) for name in NAMES[:4])

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> Any:
        B, axis, bits = info.batch_size, args[12], args[7]
        # Bits lie packed, and the channels share the mask and its count.
        if bits is not None or any(d is not None for d in in_dims[8:10]):
            return one_by_one(BatchNormBackward.apply, B, in_dims, args)
        axes = axis, axis, 0, 0, 0, 0, axis  # of dy, x, mean, var, weight, bias, residual
        folded = [fold(*of, B) for of in zip(args, in_dims, axes, strict=False)]
        results = BatchNormBackward.apply(*folded, *args[len(axes) :])
        out_dims = axis, 0, 0, axis
        return tuple(unfold(*of, B) for of in zip(results, out_dims, strict=True)), out_dims


def _gradients(
    tensors: Sequence[Any], facts: Sequence[Any]
) -> tuple[Callable[[Tensors], Tensors], Tensors]:
    """What `BatchNormBackward` computes, as a function of tensors by name, and these."""
    dy, x, mean, var, weight, bias, residual, bits, mask, count = tensors
    eps, training, axis, *act, act_first, from_output, dtype, residual_dtype, wanted = facts[:-2]
    stride, ranks = facts[-2:]
    if from_output:
        raise RuntimeError(
            "memory is 'inplace', which keeps no input: gradients of gradients need memory='input'"
        )
    formula = Formula(
        *(training, eps, axis, Activation(*act), act_first, mean, var, bits, mask, count),
        *(dy.dtype, stride, ranks),
    )
    wider = accumulator(dy.dtype)
    kinds = list(zip(NAMES, wanted, (dtype, wider, wider, residual_dtype), strict=False))

    def gradients(tensors: Tensors) -> Tensors:
        inputs = {name: t.to(wider) for name, t in tensors.items()}
        dy = inputs.pop("dy")
        for name, w, _ in kinds:  # what was not kept has no influence
            if w or name == "x":
                inputs.setdefault(name, torch.zeros_like(dy))
        found = pull(formula.output, inputs, dy.to(formula.dtype))
        return {name: found[name].to(dtype) for name, w, dtype in kinds if w}

    return gradients, named(x, weight, bias, residual, dy)


def _batch_norm_backward(dy: Tensor, x: Tensor | None, *args: Any) -> Any:
    stride = (dy if x is None else x).stride()
    return BatchNormBackward.apply(dy, x, *args, stride, None)


ops.differentiate(ops.batch_norm_backward, _batch_norm_backward)
