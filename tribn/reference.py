"""Batch normalization in plain PyTorch: the specification of the kernels, and what CPU tensors run.

Every operator of `tribn.ops` has its function here, with the same arguments: `axis` is the channel
axis, C its size, statistics are `accumulator(y.dtype)` tensors of shape (C,), outputs have the
input's memory format. PyTorch's fused CPU operators do the work where they compute the same thing.
Their reductions do so for a contiguous (batch, C, length) tensor with more than one element in
length and not of half precision; elsewhere they lose accuracy in long sums. Tensors whose channels
are neighbours are reduced by plain sums over (n, C), and what is left by PyTorch's operators again,
converted to a layout and a dtype that are slower and exact.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from tribn.activation import Activation
from tribn.launch import Layout, bits_shape, runs

aten = torch.ops.aten
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that are normalized


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output(x: Tensor, residual: Tensor | None) -> Tensor:
    """An output like x, of the dtype that adding the residual gives."""
    if residual is None:
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))


def new_bits(y: Tensor, axis: int) -> Tensor:
    """Room for a bit for every element of y, which is dense; see `tribn.launch.bits_shape`."""
    return y.new_empty(bits_shape(y.shape, y.stride(), axis), dtype=torch.uint8)


def batch_stats(x: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count per channel, where the mask is true; zeros for nothing."""
    if mask is not None:
        x, axis = _compact(x, mask, axis), 1
    pixels = _pixels(x, axis)
    if x.numel() and pixels is not None:
        # About the mean, or where its sum overflows about any finite number: what the shift is off
        # by comes out as the offset.
        mean = pixels.mean(0)
        shift = torch.where(mean.isfinite(), mean, pixels[0].nan_to_num(0, 0, 0))
        deviation = pixels - shift
        offset = deviation.mean(0)
        mean, var = shift + offset, (deviation.square_().mean(0) - offset.square()).clamp(min=0)
    elif x.numel():
        rows = _rows(x, axis, _batch_first(x, axis))
        statistics = torch.batch_norm_update_stats(rows, None, None, 0.0)
        mean, var = _cast(accumulator(x.dtype), *statistics)
    else:
        mean = x.new_zeros(x.shape[axis], dtype=accumulator(x.dtype))
        var = torch.zeros_like(mean)
    return mean, var, torch.tensor(_count(x, axis), device=x.device)


def batch_norm_train(
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
    eps: float,
    axis: int,
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Normalizes by the batch's statistics and updates the running ones, unless it is empty.

    They move by `momentum`, or, if it is None, to the average over `num_batches_tracked` batches;
    the variance only if there are more than `correction` values. With `skip_nonfinite` a channel
    whose batch statistics are not finite leaves them alone. Returns y, mean, var, with a mask the
    number of values that count, and the bits of `batch_norm_eval`.
    """
    dtype = accumulator(
        torch.promote_types(x.dtype, x.dtype if residual is None else residual.dtype)
    )
    a = Activation(activation, p, q)(x.to(dtype)) if act_first else x
    mean, var, count = batch_stats(a, mask, axis)
    running = (running_mean, running_var, num_batches_tracked)
    _track(mean, var, int(count), *running, momentum, correction, skip_nonfinite)
    mean, var = _cast(dtype, mean, var)
    y, bits = batch_norm_eval(
        *(x, mean, var, weight, bias, residual, mask, eps, axis),
        *(activation, p, q, act_first, save_bits),
    )
    return y, mean, var, None if mask is None else count, bits


def _track(
    mean: Tensor,
    var: Tensor,
    n: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    correction: int,
    skip_nonfinite: bool,
) -> None:
    """Moves the running statistics towards those of n values; see `batch_norm_train`."""
    if not n:
        return
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or running_var is None:
        return
    factor: float | Tensor
    if momentum is None:
        assert num_batches_tracked is not None
        factor = num_batches_tracked.to(mean.dtype).reciprocal()
    else:
        factor = momentum
    moves = torch.ones_like(mean, dtype=torch.bool)
    if skip_nonfinite:
        moves = mean.isfinite() & var.isfinite()
    updates = [(running_mean, mean)]
    if n > correction:
        updates.append((running_var, var * (n / (n - correction))))
    for running, new in updates:
        moved = running.to(new.dtype) * (1 - factor) + new * factor
        running.copy_(torch.where(moves, moved, running) if skip_nonfinite else moved)


def batch_norm_eval(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    axis: int,
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
    save_bits: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), 0 where the mask is false.

    With `act_first`, (act(x) - mean) / sqrt(var + eps) * weight + bias + residual. The bits tell
    for which elements, where the mask is true, the activation's gradient is that of the identity.
    """
    if x.numel() and activation is None and residual is None and mask is None:
        z = _normalize(x, mean, var, weight, bias, eps, axis)
        stride = torch.empty_like(x, device="meta").stride()  # without its memory
        if z.dtype != x.dtype or z.stride() != stride:
            z = torch.empty_like(x).copy_(z)
        return z, None
    y = output(x, residual)
    if not x.numel():
        return y, new_bits(y, axis) if save_bits else None
    act = Activation(activation, p, q)
    x = x.to(accumulator(y.dtype))
    z = _normalize(act(x) if act_first else x, mean, var, weight, bias, eps, axis)
    if residual is not None:
        z = z + residual
    bits = None
    if save_bits:
        on = act.backward(torch.ones_like(z), x if act_first else z) == 1
        bits = pack(on if mask is None else on & mask.unsqueeze(axis), y, axis, mask is not None)
    z = z if act_first else act(z)
    if mask is not None:
        z = z.masked_fill(~mask.unsqueeze(axis), 0)
    return y.copy_(z), bits


def batch_norm_backward(
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
    eps: float,
    training: bool,
    axis: int,
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
    from_output: bool,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight, bias and residual, those that are wanted.

    Training with g = act'(z) * dy, xhat = (x - mean) * rstd, sums over the batch and its n values
    per channel: dx = weight * rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n),
    dweight = sum(g * xhat), dbias = sum(g), dresidual = g. Otherwise the statistics are constants
    and dx = weight * rstd * g. With `act_first` g = dy, act(x) takes the place of x, and dx is
    multiplied by act'(x). `x` may be None where nothing depends on it: dweight is not wanted, nor
    is dx in training, and the activation's gradient is known from `bits`. With `from_output` it is
    y, whence act'(z) and xhat = (z - bias) / weight are computed. `dtype` is that of dx.
    """
    like = torch.empty_like(dy if x is None else x, dtype=dy.dtype)
    act = Activation(activation, p, q)
    g, source, a, mean = _upstream(
        *(dy, x, mean, var, weight, bias, residual, bits, mask is not None, eps, axis),
        *(act, act_first, from_output),
    )
    if mask is None:
        dx, dweight, dbias = _backward(g, a, mean, var, weight, eps, training, axis, wanted[:3])
    else:
        g = g.masked_fill(~mask.unsqueeze(axis), 0)
        rows = (_compact(g, mask, axis), None if a is None else _compact(a, mask, axis))
        dx, dweight, dbias = _backward(*rows, mean, var, weight, eps, training, 1, wanted[:3])
        if dx is not None:
            dx_rows, dx = dx, torch.zeros_like(like, dtype=dx.dtype)
            dx.movedim(axis, -1)[mask] = dx_rows
    if dx is not None:
        if act_first and activation is not None and source is not None:
            dx = act.backward(dx.to(accumulator(dy.dtype)), source)
            dx = dx if mask is None else dx.masked_fill(~mask.unsqueeze(axis), 0)
        if dx.dtype != dtype or dx.stride() != like.stride():
            dx = torch.empty_like(like, dtype=dtype).copy_(dx)
    dresidual = torch.empty_like(like, dtype=residual_dtype).copy_(g) if wanted[3] else None
    return dx, dweight, dbias, dresidual


def _upstream(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    masked: bool,
    eps: float,
    axis: int,
    act: Activation,
    act_first: bool,
    from_output: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """act'(z) * dy, what act was applied to, and what was normalized with its mean.

    See `batch_norm_backward`. From the output comes x - mean, which is normalized as x is.
    """
    exact = accumulator(dy.dtype)
    if x is not None and exact == torch.float64:
        x = x.double()  # a residual may have made dy wider than x
    g, source, a = dy, None, x
    if from_output and x is not None and x.numel():
        g, source = dy.to(exact), act.inverse(x.to(exact), torch.finfo(x.dtype).eps / 2)
        g = act.backward(g, source)
        shape = [-1 if d == axis else 1 for d in range(dy.dim())]
        rstd = (var + eps).rsqrt()
        scale = rstd if weight is None else rstd * weight.to(exact)
        a = source if bias is None else source - bias.to(exact).view(shape)
        a, mean = a / scale.view(shape), torch.zeros_like(mean)
    elif act.name is not None:
        g = dy.to(exact)
        if bits is not None:
            like = torch.empty_like(dy if x is None else x, dtype=dy.dtype)
            source = unpack(bits, like, axis, masked)
        elif act_first and x is not None:
            source = x.to(exact)
        elif x is not None and x.numel():
            source = _normalize(x.to(exact), mean, var, weight, bias, eps, axis)
            source = source if residual is None else source + residual
        if source is not None and not act_first:
            g = act.backward(g, source)
    if act_first and x is not None:
        a = act(x.to(exact))
    return g, source, a, mean


# Synchronized training: the same stages, between which what the ranks have is gathered. A rank's
# row of float64 numbers begins with its kind, by which ranks that differ are found out. In forward
# there follow count, C means and C sums of squared deviations, in backward C and C sums.


def sync_stats(
    x: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    axis: int,
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
) -> Tensor:
    """This rank's row of statistics of x, or with `act_first` of act(x), [2 + 2 * C] float64.

    `dtype` is that of the arithmetic.
    """
    a = Activation(activation, p, q)(x.to(dtype)) if act_first else x
    mean, var, count = batch_stats(a.double(), mask, axis)
    head = torch.stack((torch.tensor(kind(x.dtype, len(mean)), device=x.device), count))
    return torch.cat((head.double(), mean, var * count))


def sync_combine(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    correction: int,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of all ranks' rows [W, 2 + 2 * C], by Chan's formula.

    The running statistics move as in `batch_norm_train`. Raises ValueError, before they do, if the
    ranks differ in C or dtype.
    """
    kinds, counts = rows[:, :2].long().unbind(1)
    check_same(kinds.tolist())
    means, m2s = rows[:, 2:].unflatten(1, (2, -1)).unbind(1)
    count, n = counts.sum(), counts.unsqueeze(1)
    mean = (n * means).sum(0) / count.clamp(min=1)
    m2 = (m2s + n * (means - mean).square()).sum(0)
    var = m2 / count.clamp(min=1)
    running = (running_mean, running_var, num_batches_tracked)
    _track(mean, var, int(count), *running, momentum, correction, skip_nonfinite)
    return mean.to(dtype), var.to(dtype), count


def sync_backward_reduce(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mask: Tensor | None,
    eps: float,
    axis: int,
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
    from_output: bool,
    residual_dtype: torch.dtype | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """This rank's row of sums of g and g * (x - mean), [1 + 2 * C]; dweight, dbias and dresidual.

    As in `batch_norm_backward`; without x the second sum is 0.
    """
    act = Activation(activation, p, q)
    g, _, a, mean = _upstream(
        *(dy, x, mean, var, weight, bias, residual, bits, mask is not None, eps, axis),
        *(act, act_first, from_output),
    )
    g = _inside(g, mask, axis)
    dresidual = None
    if wanted[2]:
        dresidual = torch.empty_like(dy if x is None else x, dtype=residual_dtype).copy_(g)
    if mask is not None:
        g, a, axis = _compact(g, mask, axis), None if a is None else _compact(a, mask, axis), 1
    # As in evaluation, where they are all that there is to sum up.
    _, dweight, dbias = _backward(g, a, mean, var, weight, eps, False, axis, [False, True, True])
    assert dbias is not None
    row = torch.zeros(1 + 2 * len(mean), dtype=torch.float64, device=dy.device)
    row[0] = kind(dy.dtype, len(mean), "backward")
    sums = row[1:].view(2, -1)
    sums[0] = dbias
    if dweight is not None:
        sums[1] = dweight * (var + eps).double().sqrt()
    dweight, dbias = (t if w else None for t, w in zip((dweight, dbias), wanted, strict=False))
    return row, dweight, dbias, dresidual


def sync_sum(rows: Tensor) -> Tensor:
    """The sum of all ranks' rows [W, n], and what they are of in front of it.

    Raises ValueError if they are not of one kind.
    """
    check_same(rows[:, 0].long().tolist())
    return torch.cat((rows[0, :1], rows[:, 1:].sum(0)))


def sync_backward_dx(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mask: Tensor | None,
    count: Tensor,
    sums: Tensor,
    eps: float,
    axis: int,
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
    from_output: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of x by the sums [1 + 2 * C] and the count of all ranks."""
    act = Activation(activation, p, q)
    g, source, a, mean = _upstream(
        *(dy, x, mean, var, weight, bias, residual, bits, mask is not None, eps, axis),
        *(act, act_first, from_output),
    )
    assert a is not None
    shape = [-1 if d == axis else 1 for d in range(dy.dim())]
    offset, slope = (sums[1:] / count.clamp(min=1)).view(2, -1)
    offset, slope = (t.to(mean.dtype).view(shape) for t in (offset, slope / (var + eps)))
    weight, var = _cast(mean.dtype, weight, var)
    # In one piece of memory: new ones are slow.
    dx = (a.to(mean.dtype) - mean.view(shape)).mul_(-slope).add_(g).sub_(offset)
    dx.mul_(_scale(var, weight, eps).view(shape))
    if act_first and source is not None:
        dx = act.backward(dx, source)
    return torch.empty_like(x, dtype=dtype).copy_(_inside(dx, mask, axis))


def _inside(t: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """t, and 0 where the mask is false."""
    return t if mask is None else t.masked_fill(~mask.unsqueeze(axis), 0)


# What a rank's row is of: forward, the default, or one of these
STAGES = ("forward", "backward", "the gradient of backward", "accumulated batches", "a data set")


def kind(dtype: torch.dtype, channels: int, stage: str = "forward") -> int:
    """A number for what all ranks must have in common."""
    return (channels * len(DTYPES) + DTYPES.index(dtype)) * len(STAGES) + STAGES.index(stage)


DONE = -1  # the kind of a rank that has no more batches


def describe(kind: int) -> str:
    if kind == DONE:
        return "its last batch done"
    number, stage = divmod(kind, len(STAGES))
    channels, dtype = divmod(number, len(DTYPES))
    return f"{channels} channels of {DTYPES[dtype]}" + f" in {STAGES[stage]}" * (stage > 0)


def check_same(kinds: list[int]) -> None:
    """That all ranks have the same, by what each of them has."""
    if len(set(kinds)) == 1:
        return
    ranks = defaultdict(list)
    for rank, kind in enumerate(kinds):
        ranks[kind].append(str(rank))
    found = "; ".join(f"{describe(kind)} on rank {', '.join(of)}" for kind, of in ranks.items())
    raise ValueError(
        f"the ranks of a synchronized batch norm's process group differ: {found}. All must call "
        "the same layers in the same order, with inputs of one dtype"
    )


def _normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias in the dtype of arithmetic.

    PyTorch's operator multiplies before it subtracts, which cancels where the mean is more than
    twice the standard deviation: there it is given x - mean.
    """
    weight, bias, mean, var = _cast(accumulator(x.dtype), weight, bias, mean, var)
    x = x.to(mean.dtype)
    pixels = _pixels(x, axis)
    if pixels is not None:
        scale = _scale(var, weight, eps)
        z = torch.empty_like(x)
        rows = z.movedim(axis, -1).view(pixels.shape)
        torch.sub(pixels, mean, out=rows).mul_(scale)
        if bias is not None:
            rows += bias
        return z
    moved = x if axis == 1 else x.movedim(axis, 1)
    if (mean.square() > 4 * (var + eps)).any():
        moved = moved - mean.view(-1, *(1,) * (moved.dim() - 2))
        mean = torch.zeros_like(mean)
    y: Tensor = aten.native_batch_norm(moved, weight, bias, mean, var, False, 0.0, eps)[0]
    return y if axis == 1 else y.movedim(1, axis)


def _scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    rstd = (var + eps).rsqrt()
    return rstd if weight is None else rstd * weight


def _backward(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    training: bool,
    axis: int,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the normalization alone."""
    like = dy if x is None else x
    dtype = accumulator(like.dtype)
    if not like.numel():
        zeros = torch.zeros_like(mean, dtype=dtype)
        dweight, dbias = (zeros.clone() if w else None for w in wanted[1:])
        return torch.empty_like(like) if wanted[0] else None, dweight, dbias
    if x is None:
        weight, var = _cast(dtype, weight, var)
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else weight * scale
        shape = [-1 if d == axis else 1 for d in range(dy.dim())]
        others = [d for d in range(dy.dim()) if d != axis]
        dx = dy * scale.view(shape) if wanted[0] else None
        return dx, None, dy.sum(others, dtype=dtype) if wanted[2] else None
    pixels = _pixels(x, axis)
    if pixels is not None:
        g = dy.movedim(axis, -1).reshape(pixels.shape).to(dtype)
        weight, mean, var = _cast(dtype, weight, mean, var)
        deviation, scale = pixels - mean, _scale(var, weight, eps)
        sum_g, sum_g_x = g.sum(0), (g * deviation).sum(0)
        dx = torch.empty_like(x) if wanted[0] else None
        if dx is not None:
            if training:
                slope = sum_g_x / ((var + eps) * len(g))
                g = torch.addcmul(g - sum_g / len(g), deviation, slope, value=-1)
            dx.movedim(axis, -1).view(pixels.shape).copy_(g * scale)
        dweight = sum_g_x * (var + eps).rsqrt() if wanted[1] else None
        return dx, dweight, sum_g if wanted[2] else None
    batch_first = _batch_first(x, axis)
    rows, dy_rows = (_rows(t, axis, batch_first) for t in (x, dy))
    weight, mean, var = _cast(rows.dtype, weight, mean, var)
    dx, dweight, dbias = aten.native_batch_norm_backward(
        *(dy_rows, rows, weight, mean, var, mean, (var + eps).rsqrt(), training, eps, wanted)
    )
    if wanted[0] and batch_first:
        dx = aten._unsafe_view(dx.to(x.dtype), x.shape)
    elif wanted[0]:
        dx = torch.empty_like(x).copy_(dx.view(x.movedim(axis, 0).shape).movedim(0, axis))
    return dx, *_cast(dtype, dweight, dbias)


def _compact(x: Tensor, mask: Tensor, axis: int) -> Tensor:
    """What the mask counts in, as (n, C)."""
    return x.movedim(axis, -1)[mask]


def pack(on: Tensor, y: Tensor, axis: int, masked: bool) -> Tensor:
    """Truth values as bits, in the order of y's elements in memory."""
    layout, order = _runs(y, axis, masked)
    values = torch.empty_like(y, dtype=torch.bool).copy_(on)
    values = values.as_strided((layout.N, layout.C, layout.S), layout.strides[0]).permute(order)
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=y.device)
    packed: Tensor = (values * weights).sum(-1, dtype=torch.uint8)
    bits = new_bits(y, axis).zero_()
    bits.view(-1)[: packed.numel()] = packed.flatten()
    return bits


def unpack(bits: Tensor, y: Tensor, axis: int, masked: bool) -> Tensor:
    """1 for every bit that is set and else -1, like y."""
    layout, order = _runs(y, axis, masked)
    shape = (layout.N, layout.C, layout.S)
    *rows, run = (shape[d] for d in order)
    used = bits.flatten()[: rows[0] * rows[1] * -(-run // 8)].view(*rows, -(-run // 8), 1)
    on = used >> torch.arange(8, dtype=torch.uint8, device=y.device) & 1
    values = on.flatten(-2)[..., :run]
    signs = torch.empty_like(y, dtype=accumulator(y.dtype))
    signs.as_strided(shape, layout.strides[0]).copy_(values.permute(order)).mul_(2).sub_(1)
    return signs


def _runs(y: Tensor, axis: int, masked: bool) -> tuple[Layout, list[int]]:
    """y, which is dense, seen as (N, C, S), and the order in which its neighbours are last."""
    layout = runs(y.shape, y.stride(), axis, masked)
    return layout, [0, 2, 1] if layout.channels_last else [0, 1, 2]


def _count(x: Tensor, axis: int) -> int:
    """Values per channel."""
    return x.numel() // x.shape[axis] if x.numel() else 0


def _cast(dtype: torch.dtype, *statistics: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in statistics]


def _pixels(x: Tensor, axis: int) -> Tensor | None:
    """x as (n, C) in the dtype of arithmetic, if its channels are neighbours in memory."""
    moved = x.movedim(axis, -1)
    if not moved.is_contiguous() or _batch_first(x, axis):
        return None
    return moved.flatten(0, -2).to(accumulator(x.dtype))


def _batch_first(x: Tensor, axis: int) -> bool:
    """Whether x is a contiguous (batch, C, length) tensor as it stands, with some length."""
    return axis == 1 and x.is_contiguous() and x.shape[:2].numel() < x.numel()


def _rows(x: Tensor, axis: int, batch_first: bool) -> Tensor:
    """x as a contiguous (batch, C, length) tensor, of batch 1 and float64 unless `batch_first`."""
    if batch_first:
        return x.to(accumulator(x.dtype)).contiguous().flatten(2)
    return x.double().movedim(axis, 0).flatten(1).contiguous().unsqueeze(0)
