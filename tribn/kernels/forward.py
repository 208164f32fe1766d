"""Forward kernels, each followed by its launcher, and the operators made of them.

Training runs `stats`, which leaves one partial result for each split of the reduction, and then
`normalize`, whose programs merge the partials for themselves; where they are many, `combine` merges
them once in between. No program waits for another, and all sums are taken in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tribn.activation import Activation
from tribn.kernels.activation import functions
from tribn.kernels.host import Launcher, dense, lay_out, prepare
from tribn.kernels.tile import (
    UNSPECIALIZED,
    affine,
    bit_offsets,
    load_or,
    merge_stats,
    offsets,
    pack,
    program,
    reciprocal,
    reciprocal_std,
    reduced,
    store,
    tile_count,
    unmasked,
)
from tribn.launch import COMBINE_C, MERGE, Plan
from tribn.reference import accumulator, new_bits, output


@triton.jit(do_not_specialize=UNSPECIALIZED)
def stats_kernel(
    partials_ptr,  # [3, G, C] float64: means, sums of squared deviations, counts
    num_batches_tracked_ptr,  # [], incremented
    x_ptr,  # [N, C, S]
    mask_ptr,  # [N, S]: 0 where the input does not count
    p: tl.float64,
    q: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_mn,
    stride_ms,
    G,
    tiles_per_split,
    PRE: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean, sum of squared deviations and count of PRE(x) in each split.

    Sums of x - shift and of its square, the shift being the mean of the split's first tile, or of
    the first that the mask does not leave out: with k times as many values in the split as in that
    tile, cancellation costs at most a factor k + 1 in the variance's rounding error.
    Grid: (channel blocks * G,).
    """
    pid = tl.program_id(0)
    c, c_mask, g, first, last = program(
        pid, N, C, S, tiles_per_split, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S
    )
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    n, s, exists = reduced(first, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    valid = unmasked(exists, mask_ptr, n, s, stride_mn, stride_ms)
    if mask_ptr is not None:
        while (first + 1 < last) & (tl.sum(valid.to(tl.int32), 0) == 0):
            first += 1
            n, s, exists = reduced(first, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
            valid = unmasked(exists, mask_ptr, n, s, stride_mn, stride_ms)
    at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
    x = tl.load(x_ptr + at, c_mask[:, None] & exists[None, :], other=0.0).to(DTYPE)
    if PRE is not None:
        x = PRE(x, p, q)
    share = 1.0 / tl.maximum(tl.sum(valid.to(tl.int32), 0), 1).to(DTYPE)
    shift = tl.sum(tl.where(valid[None, :], x * share, 0.0), 1)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    if mask_ptr is None:
        count = tl.zeros([], tl.int64)
    else:
        count = tl.zeros([BLOCK_N * BLOCK_S], tl.int32)
    total = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    square = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    for tile in range(first, last):
        n, s, exists = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        valid = unmasked(exists, mask_ptr, n, s, stride_mn, stride_ms)
        at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
        x = tl.load(x_ptr + at, c_mask[:, None] & exists[None, :], other=0.0).to(DTYPE)
        if PRE is not None:
            x = PRE(x, p, q)
        deviation = tl.where(valid[None, :], x - shift[:, None], 0.0)
        if mask_ptr is None:
            count += tile_count(tile, N, S, BLOCK_N, BLOCK_S)
        else:
            count += valid.to(tl.int32)
        total += deviation
        square += deviation * deviation

    if mask_ptr is not None:
        count = tl.sum(count.to(tl.int64), 0)
    n_g = count.to(tl.float64)
    total_g = tl.sum(total, 1).to(tl.float64)
    offset = total_g * reciprocal(n_g)
    m2 = tl.sum(square, 1).to(tl.float64)
    m2 = tl.where(m2 < float("inf"), m2 - total_g * offset, m2)  # infinity stays, and NaN
    at = g * C + c
    tl.store(partials_ptr + at, shift.to(tl.float64) + offset, c_mask)
    tl.store(partials_ptr + G * C + at, tl.where(m2 < 0, 0.0, m2), c_mask)
    tl.store(partials_ptr + 2 * G * C + at, tl.zeros([BLOCK_C], tl.float64) + n_g, c_mask)
    if num_batches_tracked_ptr is not None:
        if pid == 0:
            tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)


def stats(
    launch: Launcher,
    x: Tensor,
    num_batches_tracked: Tensor | None,
    mask: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Partial statistics [3, G, C] of activation(x), merged to G = 1 where the splits are many."""
    C, G = launch.layout.C, launch.plan.splits
    partials = x.new_empty((3, G, C), dtype=torch.float64)
    launch(
        stats_kernel,
        *(partials, num_batches_tracked, x, mask, activation.p, activation.q),
        tensors=(1,),
        PRE=functions(activation)[0],
    )
    return combine(partials) if launch.plan.combine else partials


@triton.jit(do_not_specialize=UNSPECIALIZED)
def combine_kernel(
    merged_ptr,  # [3, 1, C] float64
    partials_ptr,  # [3, G, C] float64: means, sums of squared deviations, counts
    C: tl.int64,
    G: tl.int64,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the statistics of G parts. Grid: (channel blocks,)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    count, mean, m2 = merge_stats(partials_ptr, G, C, c, mask, BLOCK_G, BLOCK_C)
    tl.store(merged_ptr + c, mean, mask)
    tl.store(merged_ptr + C + c, m2, mask)
    tl.store(merged_ptr + 2 * C + c, count, mask)


def combine(partials: Tensor) -> Tensor:
    """Partial statistics [3, G, C] merged into [3, 1, C]."""
    _, G, C = partials.shape
    merged = partials.new_empty((3, 1, C))
    grid = (triton.cdiv(C, COMBINE_C),)
    with torch.cuda.device_of(partials):
        combine_kernel[grid](merged, partials, C, G, BLOCK_G=MERGE, BLOCK_C=COMBINE_C)
    return merged


@triton.jit(do_not_specialize=UNSPECIALIZED)
def normalize_kernel(
    y_ptr,  # [N, C, S]
    bits_ptr,  # a bit for every element of y: see tile.py
    running_mean_ptr,  # [C], updated
    running_var_ptr,  # [C], updated
    mean_ptr,  # [C], written if there are partials, else read
    var_ptr,  # [C], likewise
    count_ptr,  # [] int64, written if there are a mask and partials
    num_batches_tracked_ptr,  # [], taken back if the mask leaves nothing
    partials_ptr,  # [3, parts, C] float64: means, sums of squared deviations, counts
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    x_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S]
    mask_ptr,  # [N, S]: 0 where the input does not count and the output is 0
    parts: tl.int64,
    momentum: tl.float64,
    correction: tl.float64,
    eps: tl.float64,
    p: tl.float64,
    q: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_yn: tl.int64,
    stride_yo: tl.int64,
    stride_yi,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_rn: tl.int64,
    stride_ro: tl.int64,
    stride_ri,
    stride_mn,
    stride_ms,
    G,
    tiles_per_split,
    CUMULATIVE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y = POST((PRE(x) - mean) / sqrt(var + eps) * weight + bias + residual).

    With partials the statistics are theirs, and the programs of the first split store them and
    move the running ones. The bits tell where the activation's gradient GRAD is that of the
    identity. Programs and tiles go in the reverse of `stats_kernel`'s order: what it read last may
    still be in the cache. Grid: (channel blocks * G,).
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c, c_mask, g, first, last = program(
        pid, N, C, S, tiles_per_split, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S
    )
    if partials_ptr is not None:
        count, mean, m2 = merge_stats(partials_ptr, parts, C, c, c_mask, BLOCK_G, BLOCK_C)
        var = m2 * reciprocal(count)
        if g == 0:
            store(mean_ptr, c, mean, c_mask)
            store(var_ptr, c, var, c_mask)
            if running_mean_ptr is not None:
                if CUMULATIVE:
                    momentum = reciprocal(tl.load(num_batches_tracked_ptr))
                moves = c_mask
                if mask_ptr is not None:
                    moves = moves & (count > 0)
                if SKIP_NONFINITE:
                    finite = (tl.abs(mean) < float("inf")) & (var.to(DTYPE) < float("inf"))
                    moves = moves & finite
                running = load_or(running_mean_ptr, c, moves, 0.0, BLOCK_C, tl.float64)
                store(running_mean_ptr, c, running * (1.0 - momentum) + mean * momentum, moves)
                if mask_ptr is not None:
                    moves = moves & (count > correction)
                unbiased = m2 * reciprocal(count - correction)
                running = load_or(running_var_ptr, c, moves, 0.0, BLOCK_C, tl.float64)
                store(running_var_ptr, c, running * (1.0 - momentum) + unbiased * momentum, moves)
            if count_ptr is not None:
                if pid == 0:
                    total = tl.max(count, 0).to(tl.int64)
                    tl.store(count_ptr, total)
                    if num_batches_tracked_ptr is not None:
                        if total == 0:
                            counted = tl.load(num_batches_tracked_ptr)
                            tl.store(num_batches_tracked_ptr, counted - 1)
    else:
        mean = load_or(mean_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
        var = load_or(var_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
    mean = mean.to(DTYPE)
    weight = load_or(weight_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
    bias = load_or(bias_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
    scale = weight * reciprocal_std(var, eps, DTYPE)
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    for tile in range(last - 1, first - 1, -1):
        n, s, exists = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        valid = unmasked(exists, mask_ptr, n, s, stride_mn, stride_ms)
        mask = c_mask[:, None] & exists[None, :]
        at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask, other=0.0).to(DTYPE)
        if PRE is not None:
            z = affine(PRE(x, p, q), mean, scale, bias)
        else:
            z = affine(x, mean, scale, bias)
        if residual_ptr is not None:
            at = offsets(n, c, s, stride_rn, stride_ro, stride_ri, VEC, CHANNELS_LAST)
            z += tl.load(residual_ptr + at, mask, other=0.0).to(DTYPE)
        if POST is not None:
            y = POST(z, p, q)
        else:
            y = z
        if mask_ptr is not None:
            y = tl.where(valid[None, :], y, 0.0)
        at = offsets(n, c, s, stride_yn, stride_yo, stride_yi, VEC, CHANNELS_LAST)
        tl.store(y_ptr + at, y, mask)
        if bits_ptr is not None:
            if PRE is not None:
                z = x
            on = GRAD(tl.full(z.shape, 1.0, DTYPE), z, p, q) == 1.0
            on = on & c_mask[:, None] & valid[None, :]
            at, mask = bit_offsets(tile, c, N, C, S, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S)
            tl.store(bits_ptr + at, pack(on, CHANNELS_LAST), mask)


def normalize(
    launch: Launcher,
    y: Tensor,
    bits: Tensor | None,
    *tensors: Tensor | None,
    momentum: float | None,
    correction: int,
    eps: float,
    skip_nonfinite: bool,
    activation: Activation,
    act_first: bool,
) -> None:
    """Writes y and bits; with partials also mean, var, count and, if given, running statistics.

    `tensors` are those of the kernel from running_mean to mask.
    """
    partials = tensors[6]
    parts = 1 if partials is None else partials.shape[1]
    function, gradient = functions(activation)
    launch(
        normalize_kernel,
        *(y, bits, *tensors),
        *(parts, momentum or 0.0, float(correction), eps, activation.p, activation.q),
        tensors=(0, 1, 2),
        CUMULATIVE=momentum is None,
        SKIP_NONFINITE=skip_nonfinite,
        PRE=function if act_first else None,
        POST=None if act_first else function,
        GRAD=None if bits is None else gradient,
        BLOCK_G=1 if parts == 1 else MERGE,
    )


def batch_stats(
    x: Tensor, mask: Tensor | None, axis: int, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    if not x.numel():
        mean = x.new_zeros(x.shape[axis], dtype=dtype)
        return mean, torch.zeros_like(mean), torch.zeros((), dtype=torch.int64, device=x.device)
    layout, (x,), mask = lay_out(axis, torch.empty_like(x, device="meta"), (x,), mask)
    launch = Launcher.of(layout, x, plan)
    merged = combine(stats(launch, x, None, mask, Activation()))
    mean, m2, count = merged[:, 0]
    return mean.to(dtype), (m2 / count.clamp(min=1)).to(dtype), count[0].to(torch.int64)


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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    y = output(x, residual)
    allocate = x.new_empty if x.numel() else x.new_zeros
    mean, var = (allocate((x.shape[axis],), dtype=accumulator(y.dtype)) for _ in range(2))
    count = None if mask is None else allocate((), dtype=torch.int64)
    if not x.numel():
        return y, mean, var, count, new_bits(y, axis) if save_bits else None
    launch, (x, residual), mask, bits = prepare(axis, y, (x, residual), mask, save_bits, plan)
    act = Activation(activation, p, q)
    given = (running_mean, running_var, num_batches_tracked)
    running_mean, running_var, num_batches_tracked = states = dense(*given)
    partials = stats(launch, x, num_batches_tracked, mask, act if act_first else Activation())
    normalize(
        *(launch, y, bits, running_mean, running_var, mean, var, count, num_batches_tracked),
        *(partials, *dense(weight, bias), x, residual, mask),
        momentum=momentum,
        correction=correction,
        eps=eps,
        skip_nonfinite=skip_nonfinite,
        activation=act,
        act_first=act_first,
    )
    for state, written in zip(given, states, strict=True):
        if state is not written:
            state.copy_(written)
        elif state is not None:
            torch.autograd.graph.increment_version(state)
    return y, mean, var, count, bits


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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    y = output(x, residual)
    if not x.numel():
        return y, new_bits(y, axis) if save_bits else None
    launch, (x, residual), mask, bits = prepare(axis, y, (x, residual), mask, save_bits, plan)
    normalize(
        *(launch, y, bits, None, None, *dense(mean, var), None, None, None, *dense(weight, bias)),
        *(x, residual, mask),
        momentum=0.0,
        correction=0,
        eps=eps,
        skip_nonfinite=False,
        activation=Activation(activation, p, q),
        act_first=act_first,
    )
    return y, bits
