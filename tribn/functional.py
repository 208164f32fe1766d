"""Batch normalization as functions: signatures, validation and the policy of running statistics."""

import math
from collections.abc import Callable
from numbers import Real
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tribn import export, ops, transforms
from tribn.activation import Activation, parse
from tribn.autograd import BatchNormEval, BatchNormTrain, Options, transformed
from tribn.distributed import Ranks, is_dtensor
from tribn.export import exporting
from tribn.reference import DTYPES

__all__ = ["batch_norm", "batch_stats"]

_STATES = ("running_mean", "running_var", "num_batches_tracked")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    num_batches_tracked: Tensor | None = None,
    activation: str | torch.nn.Module | Activation | None = None,
    order: str = "norm_act",
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    nonfinite: str = "propagate",
    correction: int = 1,
    memory: str = "input",
    process_group: Any = None,
) -> Tensor:
    """Batch normalization, and what is around it, in the same pass over memory.

    ``order="norm_act"``: act((input - mean) / sqrt(var + eps) * weight + bias + residual).
    ``order="act_norm"``: (act(input) - mean) / sqrt(var + eps) * weight + bias + residual.

    In training, mean and (biased) variance are the batch's, over every axis but the channel's, and
    the running statistics, if given, move towards them:
    ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance. An empty
    batch leaves them alone. Otherwise mean and variance are the running ones. While activation
    checkpointing computes a batch again, in backward, the running statistics stay as they are.

    Args:
        input: tensor of two or more axes, float16, bfloat16, float32 or float64, any strides. C is
            the size of its channel axis.
        running_mean, running_var: (C,), both or neither; updated in place in training.
        weight, bias: (C,), or None for 1 and 0. Any floating dtype, like the running statistics.
        training: normalize by the batch's statistics.
        momentum: weight of the new batch in the running statistics. None averages over all
            batches and needs `num_batches_tracked`.
        eps: added to the variance; positive in training.
        channel_axis: the axis of the channels; -1 for (N, L, C).
        num_batches_tracked: int64 scalar, incremented in place in training.
        activation: "relu", "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "mish",
            "sigmoid", "tanh", "softplus", "hardswish" or "hardsigmoid" with torch's defaults, or
            torch.nn's module for one of them with its parameters.
        order: "norm_act" or "act_norm".
        residual: tensor of the input's shape, any strides, in one of its dtypes or integer or bool.
        mask: bool tensor of the input's shape without the channel axis, True where the input
            counts. Elsewhere it may hold anything, and output and gradients are zero.
        lengths: integer tensor (N,), for input with one axis besides batch and channel: the mask
            whose row n is True in its first lengths[n] elements.
        nonfinite: "propagate" or "skip": a channel whose batch statistics are infinite or NaN
            leaves its running statistics alone. `num_batches_tracked` counts the batch all the
            same, and with it the average of `momentum=None`.
        correction: 1 for the unbiased variance in running_var, 0 for the biased one.
        memory: what training keeps for backward: "input", or with "inplace" the output, which the
            next layer often keeps anyway. Backward undoes the activation, which must be
            "leaky_relu" or "elu" with a parameter of 0.001 or more or None, and weight and bias;
            without residual and in order "norm_act". While a channel has
            |weight| < max(|bias|, 1/8) / 8, so that they cannot be undone accurately, the input is
            kept after all: the host looks at them in every call. Where elu saturates, values are
            taken for the least in its range (float32 -16.6, float16 -7.6, bfloat16 -5.5): in half
            precision outliers below that make the gradient of the input wrong. No double backward.
        process_group: a torch.distributed.ProcessGroup, all of whose processes make this call: in
            training their batches, however large, are one. See `tribn.SyncBatchNorm`.

    Returns:
        A tensor of the input's shape and memory format, in the dtype of input + residual.

    Raises:
        ValueError: a shape, device or number does not fit, or training has one value per channel.
        TypeError: an argument has a dtype that cannot be served.

    Reference: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift", 2015.
    """
    tensors = (
        *(input, residual, mask, lengths, weight, bias),
        *(running_mean, running_var, num_batches_tracked),
    )
    numbers = (
        *(training, momentum, eps, channel_axis, parse(activation)),
        *(order, nonfinite, correction, memory),
    )
    return normalize(tensors, numbers, process_group)


def normalize(
    tensors: tuple[Any, ...], numbers: tuple[Any, ...], process_group: Any = None, layer: Any = None
) -> Tensor:
    """`batch_norm` with its arguments in the order of `_checked`; a layer has checks of its own."""
    input, residual, mask, lengths, weight, bias, *_ = tensors
    training = numbers[0]
    state = tensors[6:] if training else tensors[6:8]  # evaluation counts nothing
    ranks = Ranks.of(process_group) if training and process_group is not None else None
    numbers = (*numbers, torch.is_grad_enabled(), ranks)
    transform = transformed()
    repeats = None
    if transform or torch.compiler.is_compiling():
        options = _checked(layer, None, *tensors, *numbers)
    else:
        options, repeats = _recall(layer, tensors, numbers)
    if lengths is not None:
        mask = mask_of(lengths, input, options.axis)
    if residual is not None and residual.dtype not in DTYPES:
        residual = residual.to(input.dtype)
    if residual is input:  # torch.compile takes no tensor twice
        residual = input.view_as(input)
    if training and computing_again():  # which is no repeat of a call that has moved it
        state, repeats = (None,) * 3, None
    inputs = (input, weight, bias, residual, mask, *state)
    y: Tensor
    if transform:
        y, *_ = transforms.batch_norm(options, *inputs)
    elif repeats is None and exporting():
        y = export.batch_norm(options, *inputs)
    else:
        function = BatchNormTrain if training else BatchNormEval
        apply = function.apply if repeats is None else function.apply_plain
        y = apply(*inputs, options, repeats)
    return y


def batch_stats(
    input: Tensor,
    *,
    channel_axis: int = 1,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count per channel: the reduction of batch normalization alone.

    Args:
        input: tensor of two or more axes, float16, bfloat16, float32 or float64, any strides. C is
            the size of its channel axis.
        channel_axis: the axis of the channels; -1 for (N, L, C).
        mask, lengths: what counts, as in `batch_norm`.

    Returns:
        mean (C,) and var (C,), float64 for float64 input and else float32, not differentiable, and
        count, an int64 scalar: the values per channel. All zero for an empty input.

    Raises:
        ValueError, TypeError: as `batch_norm`.
    """
    axis = check_input(input, channel_axis)
    _check_local("input", input)
    _check_mask(mask, lengths, input, axis)
    if lengths is not None:
        mask = mask_of(lengths, input, axis)
    mean, var, count = ops.batch_stats(input, mask, axis)
    return mean, var, count


def merge_stats(
    mean: Tensor, var: Tensor, count: Tensor, new_mean: Tensor, new_var: Tensor, new_count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics, as `batch_stats` gives them, of two sets together.

    Reference: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance: Analysis and
    Recommendations", 1983.
    """
    total = count + new_count
    share = new_count.to(mean.dtype) / total.clamp(min=1)
    delta = new_mean - mean
    merged = var * (1 - share) + new_var * share + delta**2 * share * (1 - share)
    return mean + delta * share, merged, total


class _Call(NamedTuple):
    """What a call was like."""

    types: list[type]  # of its tensors
    numbers: tuple[Any, ...]
    given: Callable[[tuple[Any, ...]], tuple[Tensor, ...]]  # those that are not None
    forward: ops.Signature  # of its tensors, which options go along with
    backward: ops.Signature  # of those of its backward

    def like(self, types: list[type], numbers: tuple[Any, ...]) -> bool:
        same = all(map(is_, numbers, self.numbers))
        if not same:  # 1 is not True
            same = numbers == self.numbers and [*map(type, numbers)] == [*map(type, self.numbers)]
        return same and types == self.types


_calls: dict[Any, _Call] = {}  # the last one of each layer with input of a shape
MOST_CALLS = 4096  # to keep


def _recall(
    layer: Any, tensors: tuple[Any, ...], numbers: tuple[Any, ...]
) -> tuple[Options, ops.Repeats | None]:
    """The options, checked unless all is as in a call before; then what there is to repeat."""
    types = [*map(type, tensors)]
    # All that matters of what an id may mean by now is compared.
    owner = id(tensors[6]) if layer is None else (id(layer), type(layer), layer.num_features)
    key: Any = None
    call: _Call | None = None
    try:
        key = owner, tensors[0].shape, numbers[0]
        call = _calls.get(key)
        if call is not None and not call.like(types, numbers):
            call = None
    except (AttributeError, RuntimeError, TypeError, ValueError):
        key = None  # no dense tensor, or a number that is none
    if call is not None and (found := call.forward.recall(call.given(tensors))):
        return found
    if call is None:
        places = [place for place, t in enumerate(tensors) if t is not None]
        given = itemgetter(*places) if len(places) > 1 else itemgetter(slice(1))
        call = _Call(types, numbers, given, ops.Signature(), ops.Signature())
    options = _checked(layer, call.backward, *tensors, *numbers)
    call.forward.remember(call.given(tensors), options)
    if key is not None:
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        _calls[key] = call
    return options, None


def _checked(
    layer: Any,
    signature: ops.Signature | None,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    channel_axis: int,
    activation: Activation,
    order: str,
    nonfinite: str,
    correction: int,
    memory: str,
    grad: bool,
    ranks: Ranks | None,
) -> Options:
    if layer is not None:
        layer._check_input(input)
    axis = check_input(input, channel_axis, training and ranks is None)
    _check_local("input", input)
    if (running_mean is None) != (running_var is None):
        given, missing = "running_mean", "running_var"
        if running_mean is None:
            given, missing = missing, given
        raise ValueError(f"{given} is given without {missing}: give both or neither")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is not None:
            _check_channels(name, tensor, input, axis)
    check_options(order, nonfinite, correction)
    if residual is not None:
        _check_residual(residual, input)
    _check_mask(mask, lengths, input, axis)
    check_memory(memory, activation, order, residual is not None)
    check_bool("training", training)
    check_number("eps", eps)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "running_mean and running_var are None: evaluation needs both; "
                "use training=True to normalize by the batch's statistics"
            )
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps is {eps}: it must not be negative or infinite")
        for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
            if grad and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient: in evaluation it is a constant; detach it"
                )
    else:
        check_eps(eps)
        if momentum is not None:
            check_number("momentum", momentum)
            if not -math.inf < momentum < math.inf:
                raise ValueError(
                    f"momentum is {momentum}: it must be finite, or None for an average"
                )
        elif running_mean is not None and num_batches_tracked is None:
            raise ValueError(
                "momentum is None: averaging over all batches needs num_batches_tracked"
            )
        if num_batches_tracked is not None:
            _check_counter(num_batches_tracked, input)
        statistics = (running_mean, running_var, num_batches_tracked)
        for name, state in zip(_STATES, statistics, strict=True):
            if state is not None:
                _check_state(name, state)
        if running_mean is not None and running_mean is running_var:
            raise ValueError("running_mean and running_var are one tensor: they must be two")
    return Options.of(
        (input, weight, bias, residual),
        (momentum, correction, nonfinite == "skip") if training else None,
        *(eps, axis, activation, order == "act_norm", memory == "inplace", grad, ranks, signature),
    )


def computing_again() -> bool:
    """Whether this runs inside a backward pass, where checkpointing repeats a forward."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def check_memory(memory: str, activation: Activation, order: str, residual: bool = False) -> None:
    if memory not in ("input", "inplace"):
        raise ValueError(f"memory is {memory!r}: it must be 'input' or 'inplace'")
    if memory == "inplace" and (not activation.invertible or order != "norm_act" or residual):
        raise ValueError(
            f"memory is 'inplace' with activation {activation}, order {order!r} and "
            f"{'a' if residual else 'no'} residual: backward can undo leaky_relu and elu with a "
            "parameter of 0.001 or more, or no activation, in order 'norm_act' and without residual"
        )


def check_options(order: str, nonfinite: str, correction: int) -> None:
    if order not in ("norm_act", "act_norm"):
        raise ValueError(f"order is {order!r}: it must be 'norm_act' or 'act_norm'")
    if nonfinite not in ("propagate", "skip"):
        raise ValueError(f"nonfinite is {nonfinite!r}: it must be 'propagate' or 'skip'")
    if type(correction) is not int or correction not in (0, 1):
        raise ValueError(f"correction is {correction!r}: it must be 0 or 1")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}: it must be a number")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: it must be True or False")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not torch.finfo(torch.float32).tiny <= eps < math.inf:
        raise ValueError(
            f"eps is {eps}: it must be positive and finite, in float32 too: 1.2e-38 or more"
        )


def check_model(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")


def check_tensor(name: str, value: object) -> None:
    """That something is a tensor whose elements lie in memory by strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: it must be a tensor")
    if isinstance(value, torch.masked.MaskedTensor):
        raise TypeError(f"{name} is a MaskedTensor: give {name}.get_data(), and its mask as mask=")
    if value.is_nested:
        raise TypeError(f"{name} is nested: it must be dense; pad it and give a mask")
    if value.layout != torch.strided:
        raise TypeError(f"{name} is {value.layout}: it must be dense; convert it with to_dense()")


def _check_local(name: str, tensor: Tensor) -> None:
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} is a DTensor: functions take local tensors, {name}.to_local(); layers take "
            "DTensors, if input is one"
        )


def check_dtype(name: str, dtype: object, remedy: str = "") -> None:
    if dtype not in DTYPES:
        raise TypeError(
            f"{name} is {dtype}: it must be float16, bfloat16, float32 or float64{remedy}"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor.dtype, f"; convert it with {name}.float()")


def check_input(input: Tensor, channel_axis: int, training: bool = False) -> int:
    """The channel axis counted from the front, of an input that can be served."""
    check_tensor("input", input)
    check_floating("input", input)
    rank = input.dim()
    if rank < 2:
        raise ValueError(
            f"input has shape {tuple(input.shape)}: it needs a channel axis and at least one more"
        )
    if not isinstance(channel_axis, int) or isinstance(channel_axis, bool):
        raise TypeError(f"channel_axis is {channel_axis!r}: it must be an int")
    if not -rank <= channel_axis < rank:
        raise ValueError(
            f"channel_axis is {channel_axis}: it must be in [{-rank}, {rank - 1}], since input has "
            f"{rank} axes"
        )
    axis = channel_axis % rank
    if training and input.numel() == input.shape[axis] > 0:
        raise ValueError(
            f"input of shape {tuple(input.shape)} has one value per channel: its variance is zero; "
            "training needs at least two"
        )
    return axis


def _check_residual(residual: Tensor, input: Tensor) -> None:
    check_tensor("residual", residual)
    if residual.shape != input.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} and input {tuple(input.shape)}: they must "
            "be equal; expand the residual if it is to be broadcast"
        )
    _check_device("residual", residual, input)
    if residual.dtype not in DTYPES and (residual.is_floating_point() or residual.is_complex()):
        raise TypeError(
            f"residual is {residual.dtype}: it must be float16, bfloat16, float32, float64, bool "
            "or an integer; convert it with residual.to(input.dtype)"
        )


def _check_mask(mask: Tensor | None, lengths: Tensor | None, input: Tensor, axis: int) -> None:
    shape = [size for d, size in enumerate(input.shape) if d != axis]
    if lengths is not None:
        check_tensor("lengths", lengths)
        if mask is not None:
            raise ValueError("mask and lengths are given: give one of them")
        if len(shape) != 2 or lengths.shape != (shape[0],):
            raise ValueError(
                f"lengths has shape {tuple(lengths.shape)} and input {tuple(input.shape)}: lengths "
                "must be (N,) for an input of N rows of one length; give a mask for others"
            )
        if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(
                f"lengths is {lengths.dtype}: it must be an integer; convert it with lengths.long()"
            )
        _check_device("lengths", lengths, input)
    elif mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is {mask.dtype}: it must be bool; convert it with mask.bool()")
        if list(mask.shape) != shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}: for an input of shape {tuple(input.shape)} "
                f"with channels in axis {axis} it must be {tuple(shape)}"
            )
        _check_device("mask", mask, input)


def mask_of(lengths: Tensor, input: Tensor, axis: int) -> Tensor:
    """The mask that `lengths` mean."""
    length = input.shape[1 if axis == 2 else 2]
    return torch.arange(length, device=input.device) < lengths.unsqueeze(1)


def _check_channels(name: str, tensor: Tensor, input: Tensor, axis: int) -> None:
    check_tensor(name, tensor)
    C = input.shape[axis]
    if tensor.dim() != 1 or tensor.shape[0] != C:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: input of shape {tuple(input.shape)} has "
            f"{C} channels in axis {axis}, so it must be ({C},)"
        )
    check_floating(name, tensor)
    _check_device(name, tensor, input)


def _check_counter(counter: Tensor, input: Tensor) -> None:
    check_tensor("num_batches_tracked", counter)
    if counter.dtype != torch.int64:
        raise TypeError(
            f"num_batches_tracked is {counter.dtype}: it must be int64; start with torch.tensor(0)"
        )
    if counter.dim():
        raise ValueError(
            f"num_batches_tracked has shape {tuple(counter.shape)}: it must be a scalar"
        )
    _check_device("num_batches_tracked", counter, input)


def _check_state(name: str, state: Tensor) -> None:
    """That a running statistic can be updated in place."""
    if state.requires_grad:
        raise ValueError(f"{name} requires a gradient: training changes it in place; detach it")
    if state.dim() and state.stride(0) == 0 and state.shape[0] > 1:
        raise ValueError(f"{name} is expanded: training changes it in place; clone it")
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    if state.is_inference():
        raise ValueError(f"{name} is an inference tensor: training changes it in place; clone it")


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    _check_local(name, tensor)
    if tensor.device != input.device:
        raise ValueError(
            f"{name} is on {tensor.device} and input on {input.device}: move one to the other"
        )
