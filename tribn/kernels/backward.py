"""Backward kernels, each followed by its launcher, and the operator made of them.

Training is one launch, `backward`, where its programs can run at the same time, as in forward.
Elsewhere it is two: of `backward_reduce`, whose last program for some channels merges what the
others have left, and `backward_dx`. What needs no sums is written by the first as well.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tribn.activation import Activation
from tribn.kernels.activation import functions, inverse
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
    merge_sums,
    merged_by,
    pointers,
    reciprocal,
    reciprocal_std,
    reduced,
    store,
    sum_lanes,
    tiles,
    unmasked,
    unpack,
)
from tribn.launch import Plan
from tribn.reference import accumulator


@triton.jit
def constants(
    k,
    k_mask,
    eps,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RUN: tl.constexpr,
):
    """1 / std of each channel, and mean, scale and bias of each column."""
    mean = load_or(mean_ptr, k, k_mask, 0.0, DTYPE)
    var = load_or(var_ptr, k, k_mask, 1.0, DTYPE)
    weight = load_or(weight_ptr, k, k_mask, 1.0, DTYPE)
    bias = load_or(bias_ptr, k, k_mask, 0.0, DTYPE)
    rstd = reciprocal_std(var, eps, DTYPE)
    scale = by_column(weight * rstd, COLUMNS, SLAB, BLOCK_C, RUN)
    mean = by_column(mean, COLUMNS, SLAB, BLOCK_C, RUN)
    return rstd, mean, scale, by_column(bias, COLUMNS, SLAB, BLOCK_C, RUN)


@triton.jit
def load_inputs(
    tile,
    c,
    c_mask,
    dy_ptr,
    x_ptr,
    residual_ptr,
    bits_ptr,
    N,
    C,
    S,
    stride_dyn,
    stride_dyo,
    stride_dyi,
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
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SLAB: tl.constexpr,
):
    """A tile of dy, x and of bits or residual; dy stands in for what there is not."""
    exists, _ = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    exists = c_mask[:, None] & exists[None, :]
    dy = load(
        *(dy_ptr, tile, c, S, exists, stride_dyn, stride_dyo, stride_dyi),
        *(EVICTION, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
    )
    x = dy
    more = dy
    if x_ptr is not None:
        x = load(
            *(x_ptr, tile, c, S, exists, stride_xn, stride_xo, stride_xi),
            *(EVICTION, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
        )
    if bits_ptr is not None:
        at, whole = bit_offsets(tile, c, N, C, S, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S, SLAB)
        more = tl.load(bits_ptr + at, whole, other=0)
    elif residual_ptr is not None:
        more = load(
            *(residual_ptr, tile, c, S, exists, stride_rn, stride_ro, stride_ri),
            *(EVICTION, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
        )
    return dy, x, more


@triton.jit
def upstream(
    dy,
    x,
    more,
    valid,
    mean,
    scale,
    bias,
    p,
    q,
    x_ptr,
    residual_ptr,
    bits_ptr,
    mask_ptr,
    PRE: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
    SMOOTH: tl.constexpr,
    DTYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """GRAD(dy), PRE(x) - mean and what the activation was applied to, of a tile.

    Bits stand for the latter where there are any, as 1 and -1; else it is computed from x as
    forward did. With INVERSE x is forward's output, and both come from that. Where there is no x or
    no activation, dy stands in for it. SMOOTH functions of 0 and infinity may be NaN, and what they
    would be applied to may overflow where nothing exists: there it is 0.
    """
    g = dy.to(DTYPE)
    source = g
    deviation = g
    if x_ptr is not None:
        source = x.to(DTYPE)
        if INVERSE is not None:
            source = INVERSE(source, p, q)
            deviation = (source - bias[:, None]) / scale[:, None]
        elif PRE is not None:
            deviation = PRE(source, p, q) - mean[:, None]
        else:
            deviation = source - mean[:, None]
    if bits_ptr is not None:
        source = unpack(more, CHANNELS_LAST, DTYPE)
    elif GRAD is not None and INVERSE is None:
        source = affine(source, mean, scale, bias)
        if residual_ptr is not None:
            source += more.to(DTYPE)
    if GRAD is not None:
        g = GRAD(g, source, p, q)
    if SMOOTH or mask_ptr is not None:
        g = tl.where(valid, g, 0.0)
    return g, deviation, source


@triton.jit
def terms(
    dy,
    x,
    more,
    tile,
    mean,
    scale,
    bias,
    p,
    q,
    x_ptr,
    residual_ptr,
    bits_ptr,
    mask_ptr,
    N,
    S,
    stride_mn,
    stride_ms,
    PRE: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
    SMOOTH: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums of g and of g * (PRE(x) - mean) over a few elements each of a tile."""
    exists, _ = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    valid = unmasked(exists, mask_ptr, tile, S, stride_mn, stride_ms, BLOCK_N, BLOCK_S)[None, :]
    g, deviation, _ = upstream(
        *(dy, x, more, valid, mean, scale, bias, p, q, x_ptr, residual_ptr, bits_ptr, mask_ptr),
        *(PRE, GRAD, INVERSE, SMOOTH, DTYPE, CHANNELS_LAST),
    )
    g_x = g * deviation
    if mask_ptr is not None:
        g_x = tl.where(valid, g_x, 0.0)
    return fold(g, VEC, CHANNELS_LAST), fold(g_x, VEC, CHANNELS_LAST)


@triton.jit
def store_sums(partials_ptr, at, sum_g, sum_g_x, G, C, c_mask):
    """Partial results of G parts, whose rows are C apart."""
    tl.store(partials_ptr + at, sum_g, c_mask)
    tl.store(partials_ptr + G * C + at, sum_g_x, c_mask)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=PER_CHANNEL)
def backward_reduce_kernel(
    partials_ptr,  # [2, G, C] float64: sums of g and of g * (PRE(x) - mean), for G > 1
    counters_ptr,  # [1 + channel blocks] int32: see `forward_kernel`, for G > 1
    sums_ptr,  # [1 + 2 * C] float64: kind, sums of all splits
    dx_ptr,  # [N, C, S], in evaluation only
    dresidual_ptr,  # [N, C, S]
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    x_ptr,  # [N, C, S], y with INVERSE
    dy_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S]
    bits_ptr,  # a bit for every element of y: see tile.py
    mask_ptr,  # [N, S]: 0 where the input does not count
    kind: tl.float64,
    eps: tl.float64,
    p: tl.float64,
    q: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_dxn: tl.int64,
    stride_dxo: tl.int64,
    stride_dxi,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_dyn: tl.int64,
    stride_dyo: tl.int64,
    stride_dyi,
    stride_rn: tl.int64,
    stride_ro: tl.int64,
    stride_ri,
    stride_mn,
    stride_ms,
    G,
    tiles_per_split,
    PRE: tl.constexpr,
    PRE_GRAD: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
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
    """Two sums, and the parameters' gradients, which they are; g = GRAD(dy) is dresidual.

    Without x the second sum is 0. In evaluation dx = PRE_GRAD(weight * rstd * g) needs no sum and
    is written in the same pass.
    Grid: (channel blocks * G,).
    """
    if ALIKE:  # their offsets are computed once
        stride_xn, stride_xo, stride_xi = stride_dxn, stride_dxo, stride_dxi
        stride_dyn, stride_dyo, stride_dyi = stride_dxn, stride_dxo, stride_dxi
        stride_rn, stride_ro, stride_ri = stride_dxn, stride_dxo, stride_dxi
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, SLAB).to(tl.int32)
    block, g = pid % blocks, pid // blocks
    c, c_mask = columns(block, C, VEC, CHANNELS_LAST, BLOCK_C, SLAB)
    k, k_mask = channels(c, c_mask, block, C, COLUMNS, SLAB)
    first, last = tiles(g, N, S, tiles_per_split, BLOCK_N, BLOCK_S)
    rstd, mean, scale, bias = constants(
        *(k, k_mask, eps, mean_ptr, var_ptr, weight_ptr, bias_ptr),
        *(DTYPE, COLUMNS, SLAB, BLOCK_C, RUN),
    )
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    sum_g = fold(tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE), VEC, CHANNELS_LAST)
    sum_g_x = sum_g
    for tile in tl.range(first, last, num_stages=STAGES):
        dy, x, more = load_inputs(
            *(tile, c, c_mask, dy_ptr, x_ptr, residual_ptr, bits_ptr, N, C, S, stride_dyn),
            *(stride_dyo, stride_dyi, stride_xn, stride_xo, stride_xi, stride_rn, stride_ro),
            *(stride_ri, "", VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S, SLAB),
        )
        exists, _ = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        valid = unmasked(exists, mask_ptr, tile, S, stride_mn, stride_ms, BLOCK_N, BLOCK_S)[None, :]
        mask = c_mask[:, None] & exists[None, :]
        dx, deviation, source = upstream(
            *(dy, x, more, valid, mean, scale, bias, p, q, x_ptr, residual_ptr, bits_ptr, mask_ptr),
            *(PRE, GRAD, INVERSE, SMOOTH, DTYPE, CHANNELS_LAST),
        )
        sum_g += fold(dx, VEC, CHANNELS_LAST)
        if x_ptr is not None:
            dx_x = dx * deviation
            if mask_ptr is not None:
                dx_x = tl.where(valid, dx_x, 0.0)
            sum_g_x += fold(dx_x, VEC, CHANNELS_LAST)
        if dresidual_ptr is not None:
            at = pointers(
                *(dresidual_ptr, tile, c, S, stride_dxn, stride_dxo, stride_dxi),
                *(VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
            )
            store(at, dx, mask, "")
        if dx_ptr is not None:
            dx = dx * scale[:, None]
            if PRE_GRAD is not None:
                dx = PRE_GRAD(dx, source, p, q)
            if mask_ptr is not None:
                dx = tl.where(valid, dx, 0.0)
            at = pointers(
                *(dx_ptr, tile, c, S, stride_dxn, stride_dxo, stride_dxi),
                *(VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
            )
            store(at, dx, mask, "")
    sum_g = sum_lanes(sum_g, tl.float64, COLUMNS, SLAB, RUN)
    sum_g_x = sum_lanes(sum_g_x, tl.float64, COLUMNS, SLAB, RUN)
    K = C // COLUMNS
    results = (sums_ptr, dweight_ptr, dbias_ptr)
    if partials_ptr is None:
        store_results(kind, sum_g, sum_g_x, rstd, K, k, k_mask, *results)
    else:
        store_sums(partials_ptr, g.to(tl.int64) * K + k, sum_g, sum_g_x, G, K, k_mask)
        if is_last(counters_ptr + (1 + block).to(tl.int64), G, g):
            sum_g, sum_g_x = merge_sums(partials_ptr, G, K, k, k_mask, BLOCK_G)
            store_results(kind, sum_g, sum_g_x, rstd, K, k, k_mask, *results)


@triton.jit
def store_results(kind, sum_g, sum_g_x, rstd, C, c, c_mask, sums_ptr, dweight_ptr, dbias_ptr):
    """Stores the sums and the gradients that they are, those of them that are wanted."""
    if sums_ptr is not None:
        store_sums(sums_ptr, 1 + c, sum_g, sum_g_x, 1, C, c_mask)
        tl.store(sums_ptr + c, kind, c == 0)
    store_grads(sum_g, sum_g_x, rstd, c, c_mask, dweight_ptr, dbias_ptr)


@triton.jit
def store_grads(sum_g, sum_g_x, rstd, c, c_mask, dweight_ptr, dbias_ptr):
    """Stores the gradients of weight and bias, those of them that are wanted."""
    if dweight_ptr is not None:
        store(dweight_ptr + c, sum_g_x * rstd, c_mask, "")
    if dbias_ptr is not None:
        store(dbias_ptr + c, sum_g, c_mask, "")


@triton.jit
def means(sum_g, sum_g_x, rstd, count_ptr, N, S, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """sum(g) / n, and sum(g * z) / n * rstd."""
    if count_ptr is not None:
        share = reciprocal(tl.load(count_ptr))
    else:
        share = reciprocal(N * S * COLUMNS)
    return (sum_g * share).to(DTYPE), (sum_g_x * rstd * rstd * share).to(DTYPE)


@triton.jit
def write(
    dy,
    x,
    more,
    tile,
    c,
    c_mask,
    mean,
    scale,
    bias,
    offset,
    slope,
    p,
    q,
    dx_ptr,
    dresidual_ptr,
    x_ptr,
    residual_ptr,
    bits_ptr,
    mask_ptr,
    N,
    S,
    stride_dxn,
    stride_dxo,
    stride_dxi,
    stride_mn,
    stride_ms,
    CENTRED: tl.constexpr,
    PRE: tl.constexpr,
    PRE_GRAD: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
    EVICTION: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Stores dx and dresidual of a tile; CENTRED: the statistics are functions of x."""
    exists, _ = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    valid = unmasked(exists, mask_ptr, tile, S, stride_mn, stride_ms, BLOCK_N, BLOCK_S)[None, :]
    mask = c_mask[:, None] & exists[None, :]
    dx, deviation, source = upstream(
        *(dy, x, more, valid, mean, scale, bias, p, q, x_ptr, residual_ptr, bits_ptr, mask_ptr),
        *(PRE, GRAD, INVERSE, False, DTYPE, CHANNELS_LAST),
    )
    if dresidual_ptr is not None:
        at = pointers(
            *(dresidual_ptr, tile, c, S, stride_dxn, stride_dxo, stride_dxi),
            *(VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
        )
        store(at, dx, mask, EVICTION)
    if dx_ptr is not None:
        if CENTRED:
            dx = dx - offset[:, None] - deviation * slope[:, None]
        dx = dx * scale[:, None]
        if PRE_GRAD is not None:
            dx = PRE_GRAD(dx, source, p, q)
        if mask_ptr is not None:
            dx = tl.where(valid, dx, 0.0)
        at = pointers(
            *(dx_ptr, tile, c, S, stride_dxn, stride_dxo, stride_dxi),
            *(VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
        )
        store(at, dx, mask, EVICTION)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=PER_CHANNEL)
def backward_dx_kernel(
    dx_ptr,  # [N, C, S]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    count_ptr,  # [] values of a channel that count, with a mask only
    sums_ptr,  # [1 + 2 * C] float64: kind, sums of g and of g * (PRE(x) - mean), in training only
    x_ptr,  # [N, C, S], y with INVERSE; in training or if an activation needs it
    dy_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S]
    bits_ptr,  # a bit for every element of y: see tile.py
    mask_ptr,  # [N, S]: 0 where the input does not count
    eps: tl.float64,
    p: tl.float64,
    q: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_dxn: tl.int64,
    stride_dxo: tl.int64,
    stride_dxi,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_dyn: tl.int64,
    stride_dyo: tl.int64,
    stride_dyi,
    stride_rn: tl.int64,
    stride_ro: tl.int64,
    stride_ri,
    stride_mn,
    stride_ms,
    G,
    tiles_per_split,
    PRE: tl.constexpr,
    PRE_GRAD: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
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
    """dx = PRE_GRAD(weight * rstd * (g - sum(g) / n - z * sum(g * z) / n)).

    With g = GRAD(dy) and z = (PRE(x) - mean) * rstd. Without sums the statistics are constants. In
    the reverse of `backward_reduce_kernel`'s order: what it read last may still be in the cache.
    Grid: (channel blocks * G,).
    """
    if ALIKE:  # their offsets are computed once
        stride_xn, stride_xo, stride_xi = stride_dxn, stride_dxo, stride_dxi
        stride_dyn, stride_dyo, stride_dyi = stride_dxn, stride_dxo, stride_dxi
        stride_rn, stride_ro, stride_ri = stride_dxn, stride_dxo, stride_dxi
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(C, SLAB).to(tl.int32)
    block, g = pid % blocks, pid // blocks
    c, c_mask = columns(block, C, VEC, CHANNELS_LAST, BLOCK_C, SLAB)
    k, k_mask = channels(c, c_mask, block, C, COLUMNS, SLAB)
    first, last = tiles(g, N, S, tiles_per_split, BLOCK_N, BLOCK_S)
    rstd, mean, scale, bias = constants(
        *(k, k_mask, eps, mean_ptr, var_ptr, weight_ptr, bias_ptr),
        *(DTYPE, COLUMNS, SLAB, BLOCK_C, RUN),
    )
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    offset, slope = mean, mean
    if sums_ptr is not None:
        sum_g = tl.load(sums_ptr + (1 + k), k_mask, other=0.0)
        sum_g_x = tl.load(sums_ptr + (1 + C // COLUMNS + k), k_mask, other=0.0)
        offset, slope = means(sum_g, sum_g_x, rstd, count_ptr, N, S, COLUMNS, DTYPE)
        offset = by_column(offset, COLUMNS, SLAB, BLOCK_C, RUN)
        slope = by_column(slope, COLUMNS, SLAB, BLOCK_C, RUN)
    for tile in tl.range(last - 1, first - 1, -1, num_stages=STAGES):
        dy, x, more = load_inputs(
            *(tile, c, c_mask, dy_ptr, x_ptr, residual_ptr, bits_ptr, N, C, S, stride_dyn),
            *(stride_dyo, stride_dyi, stride_xn, stride_xo, stride_xi, stride_rn, stride_ro),
            *(stride_ri, "", VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S, SLAB),
        )
        write(
            *(dy, x, more, tile, c, c_mask, mean, scale, bias, offset, slope, p, q, dx_ptr, None),
            *(x_ptr, residual_ptr, bits_ptr, mask_ptr, N, S, stride_dxn, stride_dxo, stride_dxi),
            *(stride_mn, stride_ms, sums_ptr is not None, PRE, PRE_GRAD, GRAD, INVERSE, ""),
            *(DTYPE, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
        )


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=PER_CHANNEL)
def backward_kernel(
    dx_ptr,  # [N, C, S]
    dresidual_ptr,  # [N, C, S]
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    count_ptr,  # [] values of a channel that count, with a mask only
    x_ptr,  # [N, C, S], y with INVERSE
    dy_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S]
    bits_ptr,  # a bit for every element of y: see tile.py
    mask_ptr,  # [N, S]: 0 where the input does not count
    eps: tl.float64,
    p: tl.float64,
    q: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_dxn: tl.int64,
    stride_dxo: tl.int64,
    stride_dxi,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_dyn: tl.int64,
    stride_dyo: tl.int64,
    stride_dyi,
    stride_rn: tl.int64,
    stride_ro: tl.int64,
    stride_ri,
    stride_mn,
    stride_ms,
    G,
    tiles_per_split,
    partials_ptr,  # [2, G + 1, C] float64, scratch
    counters_ptr,  # [1 + groups] int32: see `forward_kernel`
    PRE: tl.constexpr,
    PRE_GRAD: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
    SMOOTH: tl.constexpr,
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
    """All gradients in training; the formulas are those of the other two kernels.

    Groups, visits and grid are those of `forward_kernel`.
    """
    if ALIKE:  # their offsets are computed once
        stride_xn, stride_xo, stride_xi = stride_dxn, stride_dxo, stride_dxi
        stride_dyn, stride_dyo, stride_dyi = stride_dxn, stride_dxo, stride_dxi
        stride_rn, stride_ro, stride_ri = stride_dxn, stride_dxo, stride_dxi
    groups = tl.num_programs(0) // G
    group = tl.program_id(0) // G
    member = tl.program_id(0) % G
    first, last = tiles(member, N, S, tiles_per_split, BLOCK_N, BLOCK_S)
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    K = C // COLUMNS
    for slab in range(group, tl.cdiv(C, SLAB).to(tl.int32), groups):
        c, c_mask = columns(slab, C, VEC, CHANNELS_LAST, BLOCK_C, SLAB)
        k, k_mask = channels(c, c_mask, slab, C, COLUMNS, SLAB)
        if HELD:  # it waits for nothing, not for the numbers of the channels either
            dy, x, more = load_inputs(
                *(first, c, c_mask, dy_ptr, x_ptr, residual_ptr, bits_ptr, N, C, S, stride_dyn),
                *(stride_dyo, stride_dyi, stride_xn, stride_xo, stride_xi, stride_rn, stride_ro),
                *(stride_ri, FIRST, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S, SLAB),
            )
        rstd, mean, scale, bias = constants(
            *(k, k_mask, eps, mean_ptr, var_ptr, weight_ptr, bias_ptr),
            *(DTYPE, COLUMNS, SLAB, BLOCK_C, RUN),
        )
        if HELD:
            sum_g, sum_g_x = terms(
                *(dy, x, more, first, mean, scale, bias, p, q, x_ptr, residual_ptr, bits_ptr),
                *(mask_ptr, N, S, stride_mn, stride_ms, PRE, GRAD, INVERSE, SMOOTH, DTYPE, VEC),
                *(CHANNELS_LAST, BLOCK_N, BLOCK_S),
            )
        else:
            sum_g = fold(tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE), VEC, CHANNELS_LAST)
            sum_g_x = sum_g
            for tile in tl.range(first, last, num_stages=STAGES):
                dy, x, more = load_inputs(
                    *(tile, c, c_mask, dy_ptr, x_ptr, residual_ptr, bits_ptr, N, C, S, stride_dyn),
                    *(stride_dyo, stride_dyi, stride_xn, stride_xo, stride_xi, stride_rn),
                    *(stride_ro, stride_ri, FIRST, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S),
                    *(SLAB,),
                )
                g, g_x = terms(
                    *(dy, x, more, tile, mean, scale, bias, p, q, x_ptr, residual_ptr, bits_ptr),
                    *(mask_ptr, N, S, stride_mn, stride_ms, PRE, GRAD, INVERSE, SMOOTH, DTYPE),
                    *(VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
                )
                sum_g += g
                sum_g_x += g_x
        sum_g = sum_lanes(sum_g, tl.float64, COLUMNS, SLAB, RUN)
        sum_g_x = sum_lanes(sum_g_x, tl.float64, COLUMNS, SLAB, RUN)
        if MERGERS > 0:
            counter_ptr = counters_ptr + (1 + group).to(tl.int64)
            at = member.to(tl.int64) * K + k
            store_sums(partials_ptr, at, sum_g, sum_g_x, G, K, k_mask)
            group_barrier(counter_ptr, G, member)
            if MERGERS > 1:
                merged_ptr = partials_ptr + 2 * G * K
                if member < MERGERS:
                    one, exists = merged_by(member, slab, C, COLUMNS, SLAB)
                    merged = merge_sums(partials_ptr, G, K, one, exists, BLOCK_G)
                    store_sums(merged_ptr, one, *merged, 1, K, exists)
                group_barrier(counter_ptr, G, member)
                sum_g = tl.load(merged_ptr + k, k_mask, other=0.0, cache_modifier=".cg")
                sum_g_x = tl.load(merged_ptr + K + k, k_mask, other=0.0, cache_modifier=".cg")
            else:
                sum_g, sum_g_x = merge_sums(partials_ptr, G, K, k, k_mask, BLOCK_G)
        if member == 0:
            store_grads(sum_g, sum_g_x, rstd, k, k_mask, dweight_ptr, dbias_ptr)
        offset, slope = means(sum_g, sum_g_x, rstd, count_ptr, N, S, COLUMNS, DTYPE)
        offset = by_column(offset, COLUMNS, SLAB, BLOCK_C, RUN)
        slope = by_column(slope, COLUMNS, SLAB, BLOCK_C, RUN)
        if HELD:
            write(
                *(dy, x, more, first, c, c_mask, mean, scale, bias, offset, slope, p, q, dx_ptr),
                *(dresidual_ptr, x_ptr, residual_ptr, bits_ptr, mask_ptr, N, S, stride_dxn),
                *(stride_dxo, stride_dxi, stride_mn, stride_ms, True, PRE, PRE_GRAD, GRAD),
                *(INVERSE, LAST, DTYPE, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
            )
        else:
            for tile in tl.range(last - 1, first - 1, -1, num_stages=STAGES):
                dy, x, more = load_inputs(
                    *(tile, c, c_mask, dy_ptr, x_ptr, residual_ptr, bits_ptr, N, C, S, stride_dyn),
                    *(stride_dyo, stride_dyi, stride_xn, stride_xo, stride_xi, stride_rn),
                    *(
                        stride_ro,
                        stride_ri,
                        LAST,
                        VEC,
                        CHANNELS_LAST,
                        BLOCK_N,
                        BLOCK_C,
                        BLOCK_S,
                        SLAB,
                    ),
                )
                write(
                    *(dy, x, more, tile, c, c_mask, mean, scale, bias, offset, slope, p, q),
                    *(dx_ptr, dresidual_ptr, x_ptr, residual_ptr, bits_ptr, mask_ptr, N, S),
                    *(stride_dxn, stride_dxo, stride_dxi, stride_mn, stride_ms, True, PRE),
                    *(PRE_GRAD, GRAD, INVERSE, LAST, DTYPE, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S),
                )


def reduce(
    launch: Launcher,
    results: Sequence[Tensor | None],
    channels: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    numbers: Sequence[float],
    constants: Constants,
) -> None:
    """Writes sums, dx, dresidual, dweight and dbias, those of them that are there.

    `channels`, `inputs` and `numbers` are those of the kernel.
    """
    sums, _, _, dweight, dbias = results
    plan, dy = launch.plan, inputs[1]
    partials, counters = None, None
    if plan.splits > 1 and any(t is not None for t in (sums, dweight, dbias)):
        partials = dy.new_empty((2, plan.splits, launch.layout.channels), dtype=torch.float64)
        _, counters = scratch(launch.device, 0, 1 + plan.channel_blocks)
    tensors = (partials, counters, *results, *channels, *inputs)
    constants += (("BLOCK_G", plan.block_g(1)),)
    launch(backward_reduce_kernel, tensors, numbers, (0, 1, 2, 3), constants)


@or_in_two_launches
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
    plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    wants_x, wants_weight, wants_bias, wants_residual = wanted
    # Of the output's memory format, like all that is as large: dy has it where there is no x.
    like = torch.empty_like(dy if x is None else x, dtype=dtype, device=None if wants_x else "meta")
    allocate = torch.empty_like if dy.numel() else torch.zeros_like
    dweight, dbias = (
        allocate(mean, dtype=accumulator(dy.dtype)) if w else None
        for w in (wants_weight, wants_bias)
    )
    dx = like if wants_x else None
    dresidual = None
    if wants_residual:
        dresidual = torch.empty_like(like, dtype=residual_dtype, device=dy.device)
    if not dy.numel():
        return dx, dweight, dbias, dresidual
    reads = 2 if training and wants_x else 0
    launch, (x, dy, residual), mask = prepare(
        axis, like, dy.dtype, (x, dy, residual), mask, reads, bits is not None, plan
    )
    constants = _constants(activation, p, q, act_first, from_output, wants_x)
    mean, var, weight, bias = channels = dense(mean, var, weight, bias)
    numbers = (eps, p, torch.finfo(dy.dtype).eps / 2 if from_output else q)
    inputs = (x, dy, residual, bits, mask)
    order = (0, 1, 2, 3)
    if launch.plan.tier is not None:
        tensors = (dx, dresidual, dweight, dbias, *channels, count, *inputs)
        launch(backward_kernel, tensors, numbers, order, constants, results=2)
        return dx, dweight, dbias, dresidual
    sums = None
    if training or wants_weight or wants_bias or wants_residual:
        if training and wants_x:
            sums = mean.new_empty((1 + 2 * len(mean),), dtype=torch.float64)
        results = (sums, None if training else dx, dresidual, dweight, dbias)
        reduce(launch, results, channels, inputs, (0.0, *numbers), constants)
        if sums is None:
            return dx, dweight, dbias, dresidual
    if dresidual is not None and dresidual.dtype == dy.dtype and not act_first:
        # It is what the activation's gradient made of dy, and laid out like dx.
        inputs, order = (x, dresidual, None, None, mask), (0, 1, 0, 3)
        constants = _constants(None, p, q, False, False, wants_x)
    tensors = (dx, *channels, count, sums, *inputs)
    launch(backward_dx_kernel, tensors, numbers, order, constants)
    return dx, dweight, dbias, dresidual


@cache
def _constants(
    activation: str | None, p: float, q: float, act_first: bool, from_output: bool, wants_x: bool
) -> Constants:
    act = Activation(activation, p, q)
    function, gradient = functions(act)
    return (
        ("PRE", function if act_first else None),
        ("PRE_GRAD", gradient if act_first and wants_x else None),
        ("GRAD", None if act_first else gradient),
        ("INVERSE", inverse(act) if from_output else None),
        ("SMOOTH", not (act.name is None or act.one_bit or act_first or from_output)),
    )
