"""Batch normalization as functions: signatures, validation and the policy of running statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from tribn import ops
from tribn.autograd import BatchNormEval, BatchNormTrain

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
) -> Tensor:
    """Batch normalization: (input - mean) / sqrt(var + eps) * weight + bias per channel.

    In training, mean and (biased) variance are the batch's, over every axis but the channel's, and
    the running statistics, if given, move towards them:
    ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance. An empty
    batch leaves them alone. Otherwise mean and variance are the running ones.

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

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: a shape, device or number does not fit, or training has one value per channel.
        TypeError: an argument has a dtype that cannot be served.

    Reference: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift", 2015.
    """
    y: Tensor
    axis = check_input(input, channel_axis, training)
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
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "running_mean and running_var are None: evaluation needs both; "
                "use training=True to normalize by the batch's statistics"
            )
        if not eps >= 0:
            raise ValueError(f"eps is {eps}: it must not be negative")
        y = BatchNormEval.apply(input, running_mean, running_var, weight, bias, eps, axis)
        return y
    if not eps > 0:
        raise ValueError(f"eps is {eps}: training needs a positive one")
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum is None: averaging over all batches needs num_batches_tracked")
    if num_batches_tracked is not None:
        _check_counter(num_batches_tracked, input)
    statistics = (running_mean, running_var, num_batches_tracked)
    y = BatchNormTrain.apply(input, weight, bias, *statistics, momentum, eps, axis)
    return y


def batch_stats(input: Tensor, *, channel_axis: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count per channel: the reduction of batch normalization alone.

    Args:
        input: tensor of two or more axes, float16, bfloat16, float32 or float64, any strides. C is
            the size of its channel axis.
        channel_axis: the axis of the channels; -1 for (N, L, C).

    Returns:
        mean (C,) and var (C,), float64 for float64 input and else float32, not differentiable, and
        count, an int64 scalar: the values per channel. All zero for an empty input.

    Raises:
        ValueError, TypeError: as `batch_norm`.
    """
    axis = check_input(input, channel_axis)
    mean, var, count = ops.batch_stats(input.detach(), axis)
    return mean, var, count


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: it must be a tensor")


def check_input(input: Tensor, channel_axis: int, training: bool = False) -> int:
    """The channel axis counted from the front, of an input that can be served."""
    check_tensor("input", input)
    if input.layout != torch.strided:
        raise TypeError(f"input is {input.layout}: it must be dense; convert it with to_dense()")
    if input.dtype not in _DTYPES:
        raise TypeError(
            f"input is {input.dtype}: it must be float16, bfloat16, float32 or float64; "
            "convert it with input.float()"
        )
    rank = input.dim()
    if rank < 2:
        raise ValueError(
            f"input has shape {tuple(input.shape)}: it needs a channel axis and at least one more"
        )
    if not isinstance(channel_axis, int):
        raise TypeError(f"channel_axis is {channel_axis!r}: it must be an int")
    if not -rank <= channel_axis < rank:
        raise ValueError(f"channel_axis is {channel_axis}: input has {rank} axes")
    axis = channel_axis % rank
    if training and input.numel() == input.shape[axis] > 0:
        raise ValueError(
            f"input of shape {tuple(input.shape)} has one value per channel: its variance is zero; "
            "training needs at least two"
        )
    return axis


def _check_channels(name: str, tensor: Tensor, input: Tensor, axis: int) -> None:
    check_tensor(name, tensor)
    C = input.shape[axis]
    if tensor.dim() != 1 or tensor.shape[0] != C:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: input of shape {tuple(input.shape)} has "
            f"{C} channels in axis {axis}, so it must be ({C},)"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}: it must have a floating dtype")
    _check_device(name, tensor, input)


def _check_counter(counter: Tensor, input: Tensor) -> None:
    check_tensor("num_batches_tracked", counter)
    if counter.dtype != torch.int64:
        raise TypeError(f"num_batches_tracked is {counter.dtype}: it must be int64")
    if counter.numel() != 1:
        raise ValueError(
            f"num_batches_tracked has shape {tuple(counter.shape)}: it must be a scalar"
        )
    _check_device("num_batches_tracked", counter, input)


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(
            f"{name} is on {tensor.device} and input on {input.device}: move one to the other"
        )
