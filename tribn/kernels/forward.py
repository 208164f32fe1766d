"""Forward kernels, each followed by its launcher, and the operators made of them.

Training is one launch, `forward`, where its programs can run at the same time: those that share a
slab of channels wait for each other between the statistics and the normalization, and what they
read stays on the chip meanwhile. Elsewhere it is two: of `stats`, whose last program for some
channels merges what the others have left and moves the running statistics, and of evaluation's
`normalize`. All sums are taken in a fixed order.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tribn.activation import Activation
from tribn.kernels.activation import functions
from tribn.kernels.host import Constants, Launcher, dense, or_in_two_launches, prepare
from tribn.kernels.scratch import scratch
from tribn.kernels.tile import (
    PER_CHANNEL,
    UNSPECIALIZED,
    affine,
    bit_offsets,
    by_column,
    channels,
    columns,
    fold,
    group_barrier,
    is_last,
    load,
    load_or,
    merge_stats,
    merged_by,
    pack,
    pointers,
    reciprocal,
    reciprocal_std,
    reduced,
    store,
    sum_lanes,
    tile_count,
    tiles,
    unmasked,
)
from tribn.launch import Plan
from tribn.reference import accumulator, new_bits, output


@triton.jit
def split_stats(
    first,
    last,
    c,
    c_mask,
    p,
    q,
    x_ptr,
    mask_ptr,
    N,
    S,
    stride_xn,
    stride_xo,
    stride_xi,
    stride_mn,
    stride_ms,
    PRE: tl.constexpr,
    HELD: tl.constexpr,
    EVICTION: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Count, mean and sum of squared deviations of PRE(x) in some tiles, float64, of each channel.

    Sums of x - shift and of its square, the shift being the mean of the first tile, or of the first
    that the mask does not leave out: with k times as many values in the split as in that tile,
    cancellation costs at most a factor k + 1 in the variance's rounding error. Also returns x of
    that tile; with HELD it is the only one.
    """
    start = first
    exists, _ = reduced(start, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    valid = unmasked(exists, mask_ptr, start, S, stride_mn, stride_ms, BLOCK_N, BLOCK_S)
    if mask_ptr is not None:
        while (start + 1 < last) & (tl.sum(valid.to(tl.int32), 0) == 0):
            start += 1
            exists, _ = reduced(start, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
            valid = unmasked(exists, mask_ptr, start, S, stride_mn, stride_ms, BLOCK_N, BLOCK_S)
    exists = c_mask[:, None] & exists[None, :]
    held = load(
        *(x_ptr, start, c, S, exists, stride_xn, stride_xo, stride_xi),
        *(EVICTION, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
    )
    x = held.to(DTYPE)
    if PRE is not None:
        x = PRE(x, p, q)
    share = 1.0 / (COLUMNS * tl.maximum(tl.sum(valid.to(tl.int32), 0), 1)).to(DTYPE)
    UNSPREAD: tl.constexpr = 1 if COLUMNS == 1 else RUN  # every thread uses it anyway
    shift = sum_lanes(tl.where(valid[None, :], x * share, 0.0), DTYPE, COLUMNS, SLAB, UNSPREAD)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    shift_c = by_column(shift, COLUMNS, SLAB, BLOCK_C, UNSPREAD)

    if HELD:
        deviation = tl.where(valid[None, :], x - shift_c[:, None], 0.0)
        total = fold(deviation, VEC, CHANNELS_LAST)
        square = fold(deviation * deviation, VEC, CHANNELS_LAST)
        if mask_ptr is None:
            count = tile_count(first, N, S, BLOCK_N, BLOCK_S)
        else:
            count = valid.to(tl.int32)
    else:
        if mask_ptr is None:
            count = tl.zeros([], tl.int64)
        else:
            count = tl.zeros([BLOCK_N * BLOCK_S], tl.int32)
        total = fold(tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE), VEC, CHANNELS_LAST)
        square = total
        for tile in tl.range(first, last, num_stages=STAGES):
            exists, whole = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
            valid = unmasked(exists, mask_ptr, tile, S, stride_mn, stride_ms, BLOCK_N, BLOCK_S)
            exists = c_mask[:, None] & exists[None, :]
            x = load(
                *(x_ptr, tile, c, S, exists, stride_xn, stride_xo, stride_xi),
                *(EVICTION, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
            ).to(DTYPE)
            if PRE is not None:
                x = PRE(x, p, q)
            deviation = x - shift_c[:, None]
            if mask_ptr is None:
                count += tile_count(tile, N, S, BLOCK_N, BLOCK_S)
                if not whole:
                    deviation = tl.where(valid[None, :], deviation, 0.0)
            else:
                count += valid.to(tl.int32)
                deviation = tl.where(valid[None, :], deviation, 0.0)
            total += fold(deviation, VEC, CHANNELS_LAST)
            square += fold(deviation * deviation, VEC, CHANNELS_LAST)

    if mask_ptr is not None:
        count = tl.sum(count.to(tl.int64), 0)
    n_g = count.to(tl.float64) * COLUMNS
    total_g = sum_lanes(total, tl.float64, COLUMNS, SLAB, RUN)
    offset = total_g * reciprocal(n_g)
    m2 = sum_lanes(square, tl.float64, COLUMNS, SLAB, RUN)
    # Infinity stays, or is NaN like the variance about a mean that is neither.
    m2 = tl.where(m2 < float("inf"), m2 - total_g * offset, m2 + (offset - offset))
    mean = shift.to(tl.float64) + offset
    return tl.zeros(mean.shape, tl.float64) + n_g, mean, tl.where(m2 < 0, 0.0, m2), held


@triton.jit
def store_stats(partials_ptr, at, count, mean, m2, G, C, c_mask):
    """Partial results of G parts, whose rows are C apart."""
    tl.store(partials_ptr + at, mean, c_mask)
    tl.store(partials_ptr + G * C + at, m2, c_mask)
    tl.store(partials_ptr + 2 * G * C + at, count, c_mask)


@triton.jit
def store_and_track(
    count,
    mean,
    var,
    m2,
    momentum,
    correction,
    c,
    c_mask,
    running_mean,
    running_var,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    var_ptr,
    MAY_BE_EMPTY: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Stores the batch's statistics, and moves the running ones towards them."""
    store(mean_ptr + c, mean, c_mask, "")
    store(var_ptr + c, var, c_mask, "")
    if running_mean_ptr is not None:
        moves = c_mask
        if MAY_BE_EMPTY:
            moves = moves & (count > 0)
        if SKIP_NONFINITE:
            finite = (tl.abs(mean) < float("inf")) & (var.to(DTYPE) < float("inf"))
            moves = moves & finite
        moved = running_mean * (1.0 - momentum) + mean * momentum
        store(running_mean_ptr + c, moved, moves, "")
        if MAY_BE_EMPTY:
            moves = moves & (count > correction)
        unbiased = m2 * reciprocal(count - correction)
        moved = running_var * (1.0 - momentum) + unbiased * momentum
        store(running_var_ptr + c, moved, moves, "")


@triton.jit
def load_tracked(num_batches_tracked_ptr):
    """How many batches were tracked before, 0 where that is not counted."""
    if num_batches_tracked_ptr is None:
        return tl.zeros([], tl.int64)
    else:
        return tl.load(num_batches_tracked_ptr).to(tl.int64)


@triton.jit
def count_batch(
    count,
    tracked,
    counters_ptr,
    groups,
    group,
    count_ptr,
    num_batches_tracked_ptr,
    CUMULATIVE: tl.constexpr,
):
    """Counts a batch, unless nothing in it counts, when all groups have read the counter."""
    total = tl.max(count, 0).to(tl.int64)
    last_to_read = group == 0
    if CUMULATIVE:
        tl.debug_barrier()  # all threads have read it
        last_to_read = tl.atomic_add(counters_ptr, 1) == groups - 1
        if last_to_read:
            tl.store(counters_ptr, 0)
    if last_to_read:
        if count_ptr is not None:
            tl.store(count_ptr, total)
        if num_batches_tracked_ptr is not None:
            tl.store(num_batches_tracked_ptr, tracked + (total > 0).to(tl.int64))


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=PER_CHANNEL)
def stats_kernel(
    partials_ptr,  # [3, G, C] float64: means, sums of squared deviations, counts, for G > 1
    counters_ptr,  # [1 + channel blocks] int32: see `forward_kernel`, for G > 1 or CUMULATIVE
    row_ptr,  # [2 + 2 * C] float64: kind, count, means, sums of squared deviations
    running_mean_ptr,  # [C], updated
    running_var_ptr,  # [C], updated
    mean_ptr,  # [C]
    var_ptr,  # [C]
    count_ptr,  # [] int64, with a mask only
    num_batches_tracked_ptr,  # [], incremented unless the mask leaves nothing
    x_ptr,  # [N, C, S]
    mask_ptr,  # [N, S]: 0 where the input does not count
    kind: tl.float64,
    momentum: tl.float64,
    correction: tl.float64,
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
    CUMULATIVE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    PRE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Statistics of PRE(x), as a row, or stored while the running ones move towards them.

    Grid: (channel blocks * G,).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, SLAB).to(tl.int32)
    block, g = pid % blocks, pid // blocks
    c, c_mask = columns(block, C, VEC, CHANNELS_LAST, BLOCK_C, SLAB)
    first, last = tiles(g, N, S, tiles_per_split, BLOCK_N, BLOCK_S)
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    count, mean, m2, _ = split_stats(
        *(first, last, c, c_mask, p, q, x_ptr, mask_ptr, N, S, stride_xn, stride_xo, stride_xi),
        *(stride_mn, stride_ms, PRE, False, "", DTYPE, VEC, CHANNELS_LAST, RUN),
        *(BLOCK_N, BLOCK_C, BLOCK_S, COLUMNS, SLAB, STAGES),
    )
    k, k_mask = channels(c, c_mask, block, C, COLUMNS, SLAB)
    K = C // COLUMNS
    whole = True
    if partials_ptr is not None:
        store_stats(partials_ptr, g.to(tl.int64) * K + k, count, mean, m2, G, K, k_mask)
        whole = is_last(counters_ptr + (1 + block).to(tl.int64), G, g)
        if whole:
            count, mean, m2 = merge_stats(partials_ptr, G, K, k, k_mask, BLOCK_G)
    if whole:
        if row_ptr is not None:
            tl.store(row_ptr + (2 + k), mean, k_mask)
            tl.store(row_ptr + (2 + K + k), m2, k_mask)
            if block == 0:
                head = tl.arange(0, 2).to(tl.int64)
                tl.store(row_ptr + head, tl.where(head == 0, kind, tl.max(count, 0)))
        else:
            tracked = load_tracked(num_batches_tracked_ptr)
            if CUMULATIVE:
                momentum = reciprocal(tracked + 1)
            running_mean = load_or(running_mean_ptr, k, k_mask, 0.0, tl.float64)
            running_var = load_or(running_var_ptr, k, k_mask, 0.0, tl.float64)
            store_and_track(
                *(count, mean, m2 * reciprocal(count), m2, momentum, correction, k, k_mask),
                *(running_mean, running_var, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr),
                *(mask_ptr is not None, SKIP_NONFINITE, DTYPE),
            )
            count_batch(
                *(count, tracked, counters_ptr, blocks, block, count_ptr, num_batches_tracked_ptr),
                CUMULATIVE,
            )


def stats(
    launch: Launcher,
    results: Sequence[Tensor | None],
    x: Tensor,
    mask: Tensor | None,
    numbers: Sequence[float],
    constants: Constants,
) -> None:
    """Writes a row, or the other results; these and the numbers are those of the kernel."""
    plan = launch.plan
    partials = counters = None
    if plan.splits > 1:
        partials = x.new_empty((3, plan.splits, launch.layout.channels), dtype=torch.float64)
    if plan.splits > 1 or dict(constants)["CUMULATIVE"]:
        _, counters = scratch(launch.device, 0, 1 + plan.channel_blocks)
    constants += (("BLOCK_G", plan.block_g(1)),)
    launch(stats_kernel, (partials, counters, *results, x, mask), numbers, (1,), constants)


@triton.jit
def load_inputs(
    x_ptr,
    residual_ptr,
    tile,
    c,
    S,
    exists,
    stride_xn,
    stride_xo,
    stride_xi,
    stride_rn,
    stride_ro,
    stride_ri,
    EVICTION: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A tile of x and of the residual, for which x stands in where there is none."""
    x = load(
        *(x_ptr, tile, c, S, exists, stride_xn, stride_xo, stride_xi),
        *(EVICTION, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
    )
    r = x
    if residual_ptr is not None:
        r = load(
            *(residual_ptr, tile, c, S, exists, stride_rn, stride_ro, stride_ri),
            *(EVICTION, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
        )
    return x, r


@triton.jit
def write(
    x,
    r,
    tile,
    c,
    c_mask,
    mean,
    scale,
    bias,
    p,
    q,
    y_ptr,
    bits_ptr,
    residual_ptr,
    mask_ptr,
    N,
    C,
    S,
    stride_yn,
    stride_yo,
    stride_yi,
    stride_mn,
    stride_ms,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    GRAD: tl.constexpr,
    EVICTION: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SLAB: tl.constexpr,
):
    """Stores y and bits of a tile of x and residual."""
    exists, _ = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    valid = unmasked(exists, mask_ptr, tile, S, stride_mn, stride_ms, BLOCK_N, BLOCK_S)
    mask = c_mask[:, None] & exists[None, :]
    x = x.to(DTYPE)
    if PRE is not None:
        z = affine(PRE(x, p, q), mean, scale, bias)
    else:
        z = affine(x, mean, scale, bias)
    if residual_ptr is not None:
        z += r.to(DTYPE)
    if POST is not None:
        y = POST(z, p, q)
    else:
        y = z
    if mask_ptr is not None:
        y = tl.where(valid[None, :], y, 0.0)
    strides = (stride_yn, stride_yo, stride_yi)
    at = pointers(y_ptr, tile, c, S, *strides, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    tl.store(at, y, mask, eviction_policy=EVICTION)
    if bits_ptr is not None:
        if PRE is not None:
            z = x
        on = GRAD(tl.full(z.shape, 1.0, DTYPE), z, p, q) == 1.0
        on = on & c_mask[:, None] & valid[None, :]
        at, mask = bit_offsets(tile, c, N, C, S, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S, SLAB)
        tl.store(bits_ptr + at, pack(on, CHANNELS_LAST), mask)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=PER_CHANNEL)
def normalize_kernel(
    y_ptr,  # [N, C, S]
    bits_ptr,  # a bit for every element of y: see tile.py
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    x_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S]
    mask_ptr,  # [N, S]: 0 where the input does not count and the output is 0
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
    PRE: tl.constexpr,
    POST: tl.constexpr,
    GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    ALIKE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """y = POST((PRE(x) - mean) / sqrt(var + eps) * weight + bias + residual).

    The bits tell where the activation's gradient GRAD is that of the identity. Programs and tiles
    go in the reverse of `stats_kernel`'s order: what it read last may still be in the cache. If it
    LOOPS a program has more than one tile.
    Grid: (channel blocks * G,).
    """
    if ALIKE:  # their offsets are computed once
        stride_xn, stride_xo, stride_xi = stride_yn, stride_yo, stride_yi
        stride_rn, stride_ro, stride_ri = stride_yn, stride_yo, stride_yi
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(C, SLAB).to(tl.int32)
    block, g = pid % blocks, pid // blocks
    c, c_mask = columns(block, C, VEC, CHANNELS_LAST, BLOCK_C, SLAB)
    k, k_mask = channels(c, c_mask, block, C, COLUMNS, SLAB)
    first, last = tiles(g, N, S, tiles_per_split, BLOCK_N, BLOCK_S)
    if not LOOPS:  # nothing waits for the numbers of the channels first
        exists, _ = reduced(first, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        exists = c_mask[:, None] & exists[None, :]
        x, r = load_inputs(
            *(x_ptr, residual_ptr, first, c, S, exists, stride_xn, stride_xo, stride_xi),
            *(stride_rn, stride_ro, stride_ri, "", VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
        )
    mean = load_or(mean_ptr, k, k_mask, 0.0, DTYPE)
    var = load_or(var_ptr, k, k_mask, 1.0, DTYPE)
    weight = load_or(weight_ptr, k, k_mask, 1.0, DTYPE)
    bias = by_column(load_or(bias_ptr, k, k_mask, 0.0, DTYPE), COLUMNS, SLAB, BLOCK_C, RUN)
    scale = by_column(weight * reciprocal_std(var, eps, DTYPE), COLUMNS, SLAB, BLOCK_C, RUN)
    mean = by_column(mean, COLUMNS, SLAB, BLOCK_C, RUN)
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    if LOOPS:
        for tile in tl.range(last - 1, first - 1, -1, num_stages=STAGES):
            exists, _ = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
            exists = c_mask[:, None] & exists[None, :]
            x, r = load_inputs(
                *(x_ptr, residual_ptr, tile, c, S, exists, stride_xn, stride_xo, stride_xi),
                *(stride_rn, stride_ro, stride_ri, "", VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
            )
            write(
                *(x, r, tile, c, c_mask, mean, scale, bias, p, q, y_ptr, bits_ptr, residual_ptr),
                *(mask_ptr, N, C, S, stride_yn, stride_yo, stride_yi, stride_mn, stride_ms, PRE),
                *(POST, GRAD, "", DTYPE, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S, SLAB),
            )
    else:
        write(
            *(x, r, first, c, c_mask, mean, scale, bias, p, q, y_ptr, bits_ptr, residual_ptr),
            *(mask_ptr, N, C, S, stride_yn, stride_yo, stride_yi, stride_mn, stride_ms, PRE),
            *(POST, GRAD, "", DTYPE, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S, SLAB),
        )


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=PER_CHANNEL)
def forward_kernel(
    y_ptr,  # [N, C, S]
    bits_ptr,  # a bit for every element of y: see tile.py
    running_mean_ptr,  # [C], updated
    running_var_ptr,  # [C], updated
    mean_ptr,  # [C]
    var_ptr,  # [C]
    count_ptr,  # [] int64, with a mask only
    num_batches_tracked_ptr,  # [], incremented unless the mask leaves nothing
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    x_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S]
    mask_ptr,  # [N, S]: 0 where the input does not count and the output is 0
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
    partials_ptr,  # [3, G + 1, C] float64, scratch
    counters_ptr,  # [1 + groups] int32: groups that have begun, and a barrier for each
    CUMULATIVE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MERGERS: tl.constexpr,
    HELD: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    ALIKE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = POST((PRE(x) - mean) / sqrt(var + eps) * weight + bias + residual), and its statistics.

    Groups of G programs take one slab of SLAB columns after another. Each program visits the
    tiles of its split of the slab twice, by the eviction policies FIRST and LAST, the second time
    in reverse; if it is HELD, the one tile stays in registers. Programs wait for those of their
    group; see `launch.Plan.mergers` for MERGERS, which is 0 for G = 1.
    Grid: (groups * G,), all at the same time unless G = 1.
    """
    if ALIKE:  # their offsets are computed once
        stride_xn, stride_xo, stride_xi = stride_yn, stride_yo, stride_yi
        stride_rn, stride_ro, stride_ri = stride_yn, stride_yo, stride_yi
    groups = tl.num_programs(0) // G
    group = tl.program_id(0) // G
    member = tl.program_id(0) % G
    first, last = tiles(member, N, S, tiles_per_split, BLOCK_N, BLOCK_S)
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    if HELD or CUMULATIVE:
        tracked = load_tracked(num_batches_tracked_ptr)
    if CUMULATIVE:
        momentum = reciprocal(tracked + 1)
    K = C // COLUMNS
    for slab in range(group, tl.cdiv(C, SLAB).to(tl.int32), groups):
        c, c_mask = columns(slab, C, VEC, CHANNELS_LAST, BLOCK_C, SLAB)
        k, k_mask = channels(c, c_mask, slab, C, COLUMNS, SLAB)
        if HELD:  # they come while the statistics are taken; a loop needs the registers
            weight = load_or(weight_ptr, k, k_mask, 1.0, DTYPE)
            bias = load_or(bias_ptr, k, k_mask, 0.0, DTYPE)
            running_mean = load_or(running_mean_ptr, k, k_mask, 0.0, tl.float64)
            running_var = load_or(running_var_ptr, k, k_mask, 0.0, tl.float64)
        count, mean, m2, held = split_stats(
            *(first, last, c, c_mask, p, q, x_ptr, mask_ptr, N, S, stride_xn, stride_xo, stride_xi),
            *(stride_mn, stride_ms, PRE, HELD, FIRST, DTYPE, VEC, CHANNELS_LAST, RUN),
            *(BLOCK_N, BLOCK_C, BLOCK_S, COLUMNS, SLAB, STAGES),
        )
        if MERGERS > 0:
            counter_ptr = counters_ptr + (1 + group).to(tl.int64)
            at = member.to(tl.int64) * K + k
            store_stats(partials_ptr, at, count, mean, m2, G, K, k_mask)
            group_barrier(counter_ptr, G, member)
        if HELD:
            r = held
            if residual_ptr is not None:
                there, _ = reduced(first, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
                r = load(
                    *(residual_ptr, first, c, S, c_mask[:, None] & there[None, :], stride_rn),
                    *(stride_ro, stride_ri, LAST, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
                )
        if MERGERS > 1:
            merged_ptr = partials_ptr + 3 * G * K
            if member < MERGERS:
                one, exists = merged_by(member, slab, C, COLUMNS, SLAB)
                merged = merge_stats(partials_ptr, G, K, one, exists, BLOCK_G)
                store_stats(merged_ptr, one, *merged, 1, K, exists)
            group_barrier(counter_ptr, G, member)
            count, mean, m2 = merge_stats(merged_ptr, 1, K, k, k_mask, 1)
        elif MERGERS == 1:
            count, mean, m2 = merge_stats(partials_ptr, G, K, k, k_mask, BLOCK_G)
        var = m2 * reciprocal(count)
        if member == 0:
            if not HELD:
                running_mean = load_or(running_mean_ptr, k, k_mask, 0.0, tl.float64)
                running_var = load_or(running_var_ptr, k, k_mask, 0.0, tl.float64)
            store_and_track(
                *(count, mean, var, m2, momentum, correction, k, k_mask, running_mean),
                *(running_var, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr),
                *(mask_ptr is not None, SKIP_NONFINITE, DTYPE),
            )
            if slab == group:
                if not (HELD or CUMULATIVE):
                    tracked = load_tracked(num_batches_tracked_ptr)
                count_batch(
                    *(count, tracked, counters_ptr, groups, group, count_ptr),
                    *(num_batches_tracked_ptr, CUMULATIVE),
                )
        if not HELD:
            weight = load_or(weight_ptr, k, k_mask, 1.0, DTYPE)
            bias = load_or(bias_ptr, k, k_mask, 0.0, DTYPE)
        bias = by_column(bias, COLUMNS, SLAB, BLOCK_C, RUN)
        scale = by_column(weight * reciprocal_std(var, eps, DTYPE), COLUMNS, SLAB, BLOCK_C, RUN)
        mean = by_column(mean.to(DTYPE), COLUMNS, SLAB, BLOCK_C, RUN)
        if HELD:
            write(
                *(held, r, first, c, c_mask, mean, scale, bias, p, q, y_ptr, bits_ptr),
                *(residual_ptr, mask_ptr, N, C, S, stride_yn, stride_yo, stride_yi, stride_mn),
                *(stride_ms, PRE, POST, GRAD, LAST, DTYPE, VEC, CHANNELS_LAST),
                *(BLOCK_N, BLOCK_C, BLOCK_S, SLAB),
            )
        else:
            for tile in tl.range(last - 1, first - 1, -1, num_stages=STAGES):
                exists, _ = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
                exists = c_mask[:, None] & exists[None, :]
                x, r = load_inputs(
                    *(x_ptr, residual_ptr, tile, c, S, exists, stride_xn, stride_xo, stride_xi),
                    *(stride_rn, stride_ro, stride_ri, LAST, VEC, CHANNELS_LAST),
                    *(BLOCK_N, BLOCK_S),
                )
                write(
                    *(x, r, tile, c, c_mask, mean, scale, bias, p, q, y_ptr, bits_ptr),
                    *(residual_ptr, mask_ptr, N, C, S, stride_yn, stride_yo, stride_yi, stride_mn),
                    *(stride_ms, PRE, POST, GRAD, LAST, DTYPE, VEC, CHANNELS_LAST),
                    *(BLOCK_N, BLOCK_C, BLOCK_S, SLAB),
                )


def batch_stats(
    x: Tensor, mask: Tensor | None, axis: int, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    if not x.numel():
        mean = x.new_zeros(x.shape[axis], dtype=dtype)
        return mean, torch.zeros_like(mean), torch.zeros((), dtype=torch.int64, device=x.device)
    like = torch.empty_like(x, device="meta")
    launch, (x,), mask = prepare(axis, like, x.dtype, (x,), mask, 0, plan=plan)
    row = x.new_empty((2 + 2 * x.shape[axis],), dtype=torch.float64)
    stats(launch, (row, *[None] * 6), x, mask, (0.0,) * 5, _constants(None, 0.0, 0.0, False, False))
    count, (mean, m2) = row[1], row[2:].view(2, -1)
    return mean.to(dtype), (m2 / count.clamp(min=1)).to(dtype), count.to(torch.int64)


@or_in_two_launches
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
    bits = new_bits(y, axis) if save_bits else None
    if not x.numel():
        return y, mean, var, count, bits
    launch, (x, residual), mask = prepare(axis, y, y.dtype, (x, residual), mask, 1, save_bits, plan)
    given = (running_mean, running_var, num_batches_tracked)
    running_mean, running_var, num_batches_tracked = states = dense(*given)
    statistics = (running_mean, running_var, mean, var, count, num_batches_tracked)
    inputs = (*dense(weight, bias), x, residual, mask)
    tracking = (momentum or 0.0, float(correction))
    cumulative = momentum is None and running_mean is not None
    constants = _constants(activation, p, q, act_first, save_bits, cumulative, skip_nonfinite)
    order = (0, 1, 2)
    if launch.plan.tier is not None:
        tensors = (y, bits, *statistics, *inputs)
        launch(forward_kernel, tensors, (*tracking, eps, p, q), order, constants, results=3)
    else:
        stats(launch, (None, *statistics), x, mask, (0.0, *tracking, p, q), constants)
        tensors = (y, bits, mean, var, *inputs)
        launch(normalize_kernel, tensors, (eps, p, q), order, constants)
    for state, written in zip(given, states, strict=True):
        if state is not written:
            state.copy_(written)
    torch.autograd.graph.increment_version([t for t in given if t is not None])
    return y, mean, var, count, bits


@cache
def _constants(
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
    save_bits: bool,
    cumulative: bool = False,
    skip_nonfinite: bool = False,
) -> Constants:
    function, gradient = functions(Activation(activation, p, q))
    return (
        ("CUMULATIVE", cumulative),
        ("SKIP_NONFINITE", skip_nonfinite),
        ("PRE", function if act_first else None),
        ("POST", None if act_first else function),
        ("GRAD", gradient if save_bits else None),
    )


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
    bits = new_bits(y, axis) if save_bits else None
    if x.numel():
        launch, (x, residual), mask = prepare(
            axis, y, y.dtype, (x, residual), mask, None, save_bits, plan
        )
        launch(
            normalize_kernel,
            (y, bits, *dense(mean, var, weight, bias), x, residual, mask),
            (eps, p, q),
            (0, 1, 2),
            _constants(activation, p, q, act_first, save_bits),
        )
    return y, bits
