"""Forward kernels, each followed by its launcher, and the operators made of them.

Training runs `stats`, which leaves one partial result for each split of the reduction, and then
`normalize`, whose programs merge the partials for themselves; where they are many, `combine` merges
them once in between. No program waits for another, and all sums are taken in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tribn.kernels.host import Launcher, dense, lay_out
from tribn.kernels.tile import (
    UNSPECIALIZED,
    load_or,
    merge_stats,
    offsets,
    program,
    reciprocal,
    reciprocal_std,
    reduced,
    store,
)
from tribn.launch import COMBINE_C, MERGE, Plan
from tribn.reference import accumulator


@triton.jit(do_not_specialize=UNSPECIALIZED)
def stats_kernel(
    partials_ptr,  # [3, G, C] float64: means, sums of squared deviations, counts
    num_batches_tracked_ptr,  # [], incremented
    x_ptr,  # [N, C, S]
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    G,
    tiles_per_split,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean, sum of squared deviations and count of each split. Grid: (channel blocks * G,).

    Sums of x - shift and of its square, the shift being the mean of the split's first tile: with
    k tiles in a split, cancellation costs at most a factor k + 1 in the variance's rounding error.
    """
    pid = tl.program_id(0)
    c, c_mask, g, first, last = program(
        pid, N, C, S, tiles_per_split, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S
    )
    n, s, valid = reduced(first, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
    x = tl.load(x_ptr + at, c_mask[:, None] & valid[None, :], other=0.0).to(DTYPE)
    shift = tl.sum(x, 1) / tl.sum(valid.to(tl.int32), 0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    count = tl.zeros([BLOCK_N * BLOCK_S], tl.int32)
    total = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    square = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    for tile in range(first, last):
        n, s, valid = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
        mask = c_mask[:, None] & valid[None, :]
        x = tl.load(x_ptr + at, mask, other=0.0).to(DTYPE)
        deviation = tl.where(mask, x - shift[:, None], 0.0)
        count += valid.to(tl.int32)
        total += deviation
        square += deviation * deviation

    n_g = tl.sum(count.to(tl.int64), 0).to(tl.float64)
    total_g = tl.sum(total, 1).to(tl.float64)
    offset = total_g * reciprocal(n_g)
    m2 = tl.sum(square, 1).to(tl.float64) - total_g * offset
    at = g * C + c
    tl.store(partials_ptr + at, shift.to(tl.float64) + offset, c_mask)
    tl.store(partials_ptr + G * C + at, tl.where(m2 < 0, 0.0, m2), c_mask)  # NaN stays
    tl.store(partials_ptr + 2 * G * C + at, tl.zeros([BLOCK_C], tl.float64) + n_g, c_mask)
    if num_batches_tracked_ptr is not None:
        if pid == 0:
            tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)


def stats(launch: Launcher, x: Tensor, num_batches_tracked: Tensor | None) -> Tensor:
    """Partial statistics [3, G, C] of the splits of x, merged to G = 1 where they are many."""
    C, G = launch.layout.C, launch.plan.splits
    partials = x.new_empty((3, G, C), dtype=torch.float64)
    launch(stats_kernel, partials, num_batches_tracked, x, tensors=1)
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
    running_mean_ptr,  # [C], updated
    running_var_ptr,  # [C], updated
    mean_ptr,  # [C], written if there are partials, else read
    var_ptr,  # [C], likewise
    partials_ptr,  # [3, parts, C] float64: means, sums of squared deviations, counts
    num_batches_tracked_ptr,  # []
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    x_ptr,  # [N, C, S]
    parts: tl.int64,
    momentum: tl.float64,
    eps: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_yn: tl.int64,
    stride_yo: tl.int64,
    stride_yi,
    G,
    tiles_per_split,
    CUMULATIVE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y = (x - mean) / sqrt(var + eps) * weight + bias. Grid: (channel blocks * G,).

    With partials the statistics are theirs, and the programs of the first split store them and
    move the running ones. Programs and tiles go in the reverse of `stats_kernel`'s order: what it
    read last may still be in the cache.
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
                moved = mean * momentum
                running = load_or(running_mean_ptr, c, c_mask, 0.0, BLOCK_C, tl.float64)
                store(running_mean_ptr, c, running - running * momentum + moved, c_mask)
                moved = m2 * reciprocal(count - 1) * momentum
                running = load_or(running_var_ptr, c, c_mask, 0.0, BLOCK_C, tl.float64)
                store(running_var_ptr, c, running - running * momentum + moved, c_mask)
    else:
        mean = load_or(mean_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
        var = load_or(var_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
    mean = mean.to(DTYPE)
    weight = load_or(weight_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
    bias = load_or(bias_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
    scale = weight * reciprocal_std(var, eps, DTYPE)
    for tile in range(last - 1, first - 1, -1):
        n, s, valid = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        mask = c_mask[:, None] & valid[None, :]
        at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask, other=0.0).to(DTYPE)
        y = (x - mean[:, None]) * scale[:, None] + bias[:, None]
        at = offsets(n, c, s, stride_yn, stride_yo, stride_yi, VEC, CHANNELS_LAST)
        tl.store(y_ptr + at, y, mask)


def normalize(
    launch: Launcher,
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    partials: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    momentum: float | None,
    eps: float,
) -> None:
    """Writes y; with partials also mean, var and, if given, the running statistics."""
    parts = 1 if partials is None else partials.shape[1]
    launch(
        normalize_kernel,
        *(y, running_mean, running_var, mean, var, partials, num_batches_tracked, weight, bias, x),
        *(parts, momentum or 0.0, eps),
        tensors=2,
        CUMULATIVE=momentum is None,
        BLOCK_G=1 if parts == 1 else MERGE,
    )


def batch_stats(x: Tensor, axis: int, plan: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    if not x.numel():
        mean, var = torch.zeros(2, x.shape[axis], dtype=dtype, device=x.device)
        return mean, var, torch.zeros((), dtype=torch.int64, device=x.device)
    layout, (x,) = lay_out(axis, x, out=False)
    merged = combine(stats(Launcher.of(layout, x, plan), x, None))
    mean, m2, count = merged[:, 0]
    return mean.to(dtype), (m2 / count).to(dtype), count[0].to(torch.int64)


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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    allocate = x.new_empty if x.numel() else x.new_zeros
    mean, var = (allocate((x.shape[axis],), dtype=accumulator(x.dtype)) for _ in range(2))
    if not x.numel():
        return torch.empty_like(x), mean, var
    layout, (x, y) = lay_out(axis, x, out=True)
    launch = Launcher.of(layout, x, plan)
    given = (running_mean, running_var, num_batches_tracked)
    running_mean, running_var, num_batches_tracked = states = dense(*given)
    partials = stats(launch, x, num_batches_tracked)
    normalize(
        launch,
        *(y, running_mean, running_var, mean, var, partials, num_batches_tracked),
        *(*dense(weight, bias), x, momentum, eps),
    )
    for state, written in zip(given, states, strict=True):
        if state is not written:
            state.copy_(written)
        elif state is not None:
            torch.autograd.graph.increment_version(state)
    return y, mean, var


def batch_norm_eval(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    plan: Plan | None = None,
) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    layout, (x, y) = lay_out(axis, x, out=True)
    mean, var, weight, bias = dense(mean, var, weight, bias)
    launch = Launcher.of(layout, x, plan)
    normalize(launch, y, None, None, mean, var, None, None, weight, bias, x, 0.0, eps)
    return y
