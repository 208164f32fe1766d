"""Backward kernels, each followed by its launcher, and the operator made of them.

Training runs `backward_reduce`, one partial result for each split of the reduction, and then
`backward_dx`, whose programs merge the partials for themselves; where they are many, or nothing
else wants them, `backward_combine` merges them once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tribn.activation import Activation
from tribn.kernels.activation import functions, inverse
from tribn.kernels.host import Launcher, dense, lay_out
from tribn.kernels.tile import (
    UNSPECIALIZED,
    affine,
    bit_offsets,
    load_or,
    merge_sums,
    offsets,
    program,
    reciprocal,
    reciprocal_std,
    reduced,
    store,
    unmasked,
    unpack,
)
from tribn.launch import COMBINE_C, MERGE, Plan
from tribn.reference import accumulator


@triton.jit
def upstream(
    tile,
    n,
    c,
    s,
    exists,  # of the tile
    valid,  # of the tile, and counted in by the mask
    mean,
    scale,
    bias,
    p,
    q,
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
    PRE: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """GRAD(dy), PRE(x) - mean and what the activation was applied to, of a tile.

    Bits stand for the latter where there are any, as 1 and -1; else it is computed from x as
    forward did. With INVERSE x is forward's output, and both come from that. Where there is no x or
    no activation, dy stands in for it.
    """
    at = offsets(n, c, s, stride_dyn, stride_dyo, stride_dyi, VEC, CHANNELS_LAST)
    g = tl.load(dy_ptr + at, exists, other=0.0).to(DTYPE)
    source = g
    deviation = g
    if x_ptr is not None:
        at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
        source = tl.load(x_ptr + at, exists, other=0.0).to(DTYPE)
        if INVERSE is not None:
            source = INVERSE(source, p, q)
            deviation = (source - bias[:, None]) / scale[:, None]
        elif PRE is not None:
            deviation = PRE(source, p, q) - mean[:, None]
        else:
            deviation = source - mean[:, None]
    if bits_ptr is not None:
        at, whole = bit_offsets(tile, c, N, C, S, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S)
        source = unpack(tl.load(bits_ptr + at, whole, other=0), CHANNELS_LAST, DTYPE)
    elif GRAD is not None and INVERSE is None:
        source = affine(source, mean, scale, bias)
        if residual_ptr is not None:
            at = offsets(n, c, s, stride_rn, stride_ro, stride_ri, VEC, CHANNELS_LAST)
            source += tl.load(residual_ptr + at, exists, other=0.0).to(DTYPE)
    if GRAD is not None:
        g = GRAD(g, source, p, q)
    return tl.where(valid, g, 0.0), deviation, source


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_reduce_kernel(
    partials_ptr,  # [2, G, C] float64: sums of g and of g * (PRE(x) - mean)
    dx_ptr,  # [N, C, S], in evaluation only
    dresidual_ptr,  # [N, C, S]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
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
    PRE: tl.constexpr,
    PRE_GRAD: tl.constexpr,
    GRAD: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The two sums of each split, g = GRAD(dy) being dresidual; without x the second sum is 0.

    In evaluation dx = PRE_GRAD(weight * rstd * g) needs no sum and is written in the same pass.
    Grid: (channel blocks * G,).
    """
    pid = tl.program_id(0)
    c, c_mask, group, first, last = program(
        pid, N, C, S, tiles_per_split, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S
    )
    mean = load_or(mean_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
    var = load_or(var_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
    scale = load_or(weight_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE) * reciprocal_std(var, eps, DTYPE)
    bias = load_or(bias_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    sum_g = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    sum_g_x = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    for tile in range(first, last):
        n, s, exists = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        valid = unmasked(exists, mask_ptr, n, s, stride_mn, stride_ms)
        mask = c_mask[:, None] & exists[None, :]
        g, deviation, source = upstream(
            *(
                tile,
                n,
                c,
                s,
                mask,
                valid[None, :],
                mean,
                scale,
                bias,
                p,
                q,
                dy_ptr,
                x_ptr,
                residual_ptr,
                bits_ptr,
            ),
            *(N, C, S, stride_dyn, stride_dyo, stride_dyi, stride_xn, stride_xo, stride_xi),
            *(stride_rn, stride_ro, stride_ri, PRE, GRAD, INVERSE, DTYPE, VEC),
            *(CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S),
        )
        sum_g += g
        if x_ptr is not None:
            sum_g_x += tl.where(valid[None, :], g * deviation, 0.0)
        at = offsets(n, c, s, stride_dxn, stride_dxo, stride_dxi, VEC, CHANNELS_LAST)
        if dresidual_ptr is not None:
            store(dresidual_ptr, at, g, mask)
        if dx_ptr is not None:
            dx = g * scale[:, None]
            if PRE_GRAD is not None:
                dx = PRE_GRAD(dx, source, p, q)
            if mask_ptr is not None:
                dx = tl.where(valid[None, :], dx, 0.0)
            store(dx_ptr, at, dx, mask)
    at = group * C + c
    tl.store(partials_ptr + at, tl.sum(sum_g, 1), c_mask)
    tl.store(partials_ptr + G * C + at, tl.sum(sum_g_x, 1), c_mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_combine_kernel(
    merged_ptr,  # [2, 1, C] float64
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    var_ptr,  # [C]
    partials_ptr,  # [2, G, C] float64: sums of dy and of dy * (x - mean)
    eps: tl.float64,
    C: tl.int64,
    G: tl.int64,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Merges the sums of G parts; stores the parameters' gradients. Grid: (channel blocks,)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    sum_dy, sum_dy_x = merge_sums(partials_ptr, G, C, c, c_mask, BLOCK_G, BLOCK_C)
    tl.store(merged_ptr + c, sum_dy, c_mask)
    tl.store(merged_ptr + C + c, sum_dy_x, c_mask)
    if dweight_ptr is not None:
        var = load_or(var_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
        store(dweight_ptr, c, sum_dy_x * reciprocal_std(var, eps, DTYPE), c_mask)
    if dbias_ptr is not None:
        store(dbias_ptr, c, sum_dy, c_mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_dx_kernel(
    dx_ptr,  # [N, C, S]
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    count_ptr,  # [] values of a channel that count, with a mask only
    partials_ptr,  # [2, parts, C] float64: sums of g and of g * (PRE(x) - mean), in training only
    x_ptr,  # [N, C, S], y with INVERSE; in training or if an activation needs it
    dy_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S]
    bits_ptr,  # a bit for every element of y: see tile.py
    mask_ptr,  # [N, S]: 0 where the input does not count
    parts: tl.int64,
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
    BLOCK_G: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx = PRE_GRAD(weight * rstd * (g - sum(g) / n - z * sum(g * z) / n)).

    With g = GRAD(dy) and z = (PRE(x) - mean) * rstd. Without partials the statistics are constants
    and the sums left out. Programs of the first split store the parameters' gradients. In the
    reverse of `backward_reduce_kernel`'s order: what it read last may still be in the cache.
    Grid: (channel blocks * G,).
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c, c_mask, group, first, last = program(
        pid, N, C, S, tiles_per_split, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S
    )
    mean = load_or(mean_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
    var = load_or(var_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
    rstd = reciprocal_std(var, eps, DTYPE)
    scale = load_or(weight_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE) * rstd
    bias = load_or(bias_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
    p, q = tl.full([1, 1], p, DTYPE), tl.full([1, 1], q, DTYPE)
    if partials_ptr is not None:
        sum_g, sum_g_x = merge_sums(partials_ptr, parts, C, c, c_mask, BLOCK_G, BLOCK_C)
        if group == 0:
            if dweight_ptr is not None:
                store(dweight_ptr, c, sum_g_x * rstd, c_mask)
            if dbias_ptr is not None:
                store(dbias_ptr, c, sum_g, c_mask)
        if count_ptr is not None:
            share = reciprocal(tl.load(count_ptr))
        else:
            share = reciprocal(N * S)
        offset = (sum_g * share).to(DTYPE)
        slope = (sum_g_x * rstd * rstd * share).to(DTYPE)
    for tile in range(last - 1, first - 1, -1):
        n, s, exists = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        valid = unmasked(exists, mask_ptr, n, s, stride_mn, stride_ms)
        mask = c_mask[:, None] & exists[None, :]
        dx, deviation, source = upstream(
            *(
                tile,
                n,
                c,
                s,
                mask,
                valid[None, :],
                mean,
                scale,
                bias,
                p,
                q,
                dy_ptr,
                x_ptr,
                residual_ptr,
                bits_ptr,
            ),
            *(N, C, S, stride_dyn, stride_dyo, stride_dyi, stride_xn, stride_xo, stride_xi),
            *(stride_rn, stride_ro, stride_ri, PRE, GRAD, INVERSE, DTYPE, VEC),
            *(CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S),
        )
        if partials_ptr is not None:
            dx = dx - offset[:, None] - deviation * slope[:, None]
        dx = dx * scale[:, None]
        if PRE_GRAD is not None:
            dx = PRE_GRAD(dx, source, p, q)
        if mask_ptr is not None:
            dx = tl.where(valid[None, :], dx, 0.0)
        at = offsets(n, c, s, stride_dxn, stride_dxo, stride_dxi, VEC, CHANNELS_LAST)
        store(dx_ptr, at, dx, mask)


def backward_combine(
    partials: Tensor, dweight: Tensor | None, dbias: Tensor | None, var: Tensor, eps: float
) -> Tensor:
    """Partial sums [2, G, C] merged into [2, 1, C]; writes the parameters' gradients."""
    _, G, C = partials.shape
    merged = partials.new_empty((2, 1, C))
    grid = (triton.cdiv(C, COMBINE_C),)
    dtype = tl.float64 if dweight is not None and dweight.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(partials):
        backward_combine_kernel[grid](
            *(merged, dweight, dbias, var, partials, eps, C, G),
            BLOCK_G=MERGE,
            BLOCK_C=COMBINE_C,
            DTYPE=dtype,
        )
    return merged


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
    layout, (x, dy, residual), mask = lay_out(axis, like, (x, dy, residual), mask, bits is not None)
    launch = Launcher.of(layout, dy, plan, bits is not None)
    act = Activation(activation, p, q)
    constants = {
        "PRE": functions(act)[0] if act_first else None,
        "PRE_GRAD": functions(act)[1] if act_first and wants_x else None,
        "GRAD": None if act_first else functions(act)[1],
        "INVERSE": inverse(act) if from_output else None,
    }
    mean, var, weight, bias = dense(mean, var, weight, bias)
    numbers = (eps, p, torch.finfo(dy.dtype).eps / 2 if from_output else q)
    partials, grads = None, (dweight, dbias)
    if training or wants_weight or wants_bias or wants_residual:
        partials = dy.new_empty((2, launch.plan.splits, layout.C), dtype=torch.float64)
        written = None if training else dx
        tensors = (mean, var, weight, bias, x, dy, residual, bits, mask)
        launch(
            backward_reduce_kernel,
            *(partials, written, dresidual, *tensors, *numbers),
            tensors=(0, 1, 2, 3),
            **constants,
        )
        if launch.plan.combine or not (training and wants_x):
            if training or wants_weight or wants_bias:
                partials = backward_combine(partials, dweight, dbias, var, eps)
            grads = (None, None)
    if wants_x and (training or partials is None):
        order = (0, 1, 2, 3)
        if dresidual is not None and dresidual.dtype == dy.dtype and not act_first:
            # It is what the activation's gradient made of dy, and laid out like dx.
            dy, residual, bits, order = dresidual, None, None, (0, 1, 0, 3)
            constants["GRAD"] = None
        parts = 1 if partials is None else partials.shape[1]
        launch(
            backward_dx_kernel,
            *(dx, *grads, mean, var, weight, bias, count, partials, x, dy, residual, bits, mask),
            *(parts, *numbers),
            tensors=order,
            BLOCK_G=1 if parts == 1 else MERGE,
            **constants,
        )
    return dx, dweight, dbias, dresidual
