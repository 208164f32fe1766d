"""Backward kernels, each followed by its launcher, and the operator made of them.

Training runs `backward_reduce`, one partial result for each split of the reduction, and then
`backward_dx`, whose programs merge the partials for themselves; where they are many, or nothing
else wants them, `backward_combine` merges them once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tribn.kernels.host import Launcher, dense, lay_out
from tribn.kernels.tile import (
    UNSPECIALIZED,
    load_or,
    merge_sums,
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
def backward_reduce_kernel(
    partials_ptr,  # [2, G, C] float64: sums of dy and of dy * (x - mean)
    dx_ptr,  # [N, C, S], in evaluation only
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C]
    x_ptr,  # [N, C, S]
    dy_ptr,  # [N, C, S]
    eps: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_dyn: tl.int64,
    stride_dyo: tl.int64,
    stride_dyi,
    stride_dxn: tl.int64,
    stride_dxo: tl.int64,
    stride_dxi,
    G,
    tiles_per_split,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The two sums of each split; without x the second is 0. Grid: (channel blocks * G,).

    In evaluation dx = weight * rstd * dy needs no sum and is written in the same pass.
    """
    pid = tl.program_id(0)
    c, c_mask, g, first, last = program(
        pid, N, C, S, tiles_per_split, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S
    )
    mean = load_or(mean_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
    if dx_ptr is not None:
        var = load_or(var_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
        scale = load_or(weight_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
        scale *= reciprocal_std(var, eps, DTYPE)
    sum_dy = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    sum_dy_x = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_S], DTYPE)
    for tile in range(first, last):
        n, s, valid = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        mask = c_mask[:, None] & valid[None, :]
        at = offsets(n, c, s, stride_dyn, stride_dyo, stride_dyi, VEC, CHANNELS_LAST)
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(DTYPE)
        sum_dy += dy
        if x_ptr is not None:
            at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
            x = tl.load(x_ptr + at, mask, other=0.0).to(DTYPE)
            sum_dy_x += tl.where(mask, dy * (x - mean[:, None]), 0.0)
        if dx_ptr is not None:
            at = offsets(n, c, s, stride_dxn, stride_dxo, stride_dxi, VEC, CHANNELS_LAST)
            tl.store(dx_ptr + at, dy * scale[:, None], mask)
    at = g * C + c
    tl.store(partials_ptr + at, tl.sum(sum_dy, 1), c_mask)
    tl.store(partials_ptr + G * C + at, tl.sum(sum_dy_x, 1), c_mask)


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
    partials_ptr,  # [2, parts, C] float64: sums of dy and of dy * (x - mean), in training only
    x_ptr,  # [N, C, S], in training only
    dy_ptr,  # [N, C, S]
    parts: tl.int64,
    eps: tl.float64,
    N: tl.int64,
    C: tl.int64,
    S: tl.int64,
    stride_xn: tl.int64,
    stride_xo: tl.int64,
    stride_xi,
    stride_dyn: tl.int64,
    stride_dyo: tl.int64,
    stride_dyi,
    stride_dxn: tl.int64,
    stride_dxo: tl.int64,
    stride_dxi,
    G,
    tiles_per_split,
    BLOCK_G: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx = weight * rstd * (dy - sum(dy) / n - (x - mean) * rstd^2 * sum(dy * (x - mean)) / n).

    Without partials the statistics are constants: dx = weight * rstd * dy. Programs of the first
    split store the parameters' gradients. In the reverse of `backward_reduce_kernel`'s order: what
    it read last may still be in the cache. Grid: (channel blocks * G,).
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c, c_mask, g, first, last = program(
        pid, N, C, S, tiles_per_split, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_C, BLOCK_S
    )
    var = load_or(var_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE)
    rstd = reciprocal_std(var, eps, DTYPE)
    scale = load_or(weight_ptr, c, c_mask, 1.0, BLOCK_C, DTYPE) * rstd
    if partials_ptr is not None:
        mean = load_or(mean_ptr, c, c_mask, 0.0, BLOCK_C, DTYPE)
        sum_dy, sum_dy_x = merge_sums(partials_ptr, parts, C, c, c_mask, BLOCK_G, BLOCK_C)
        if g == 0:
            if dweight_ptr is not None:
                store(dweight_ptr, c, sum_dy_x * rstd, c_mask)
            if dbias_ptr is not None:
                store(dbias_ptr, c, sum_dy, c_mask)
        share = reciprocal(N * S)
        offset = (sum_dy * share).to(DTYPE)
        slope = (sum_dy_x * rstd * rstd * share).to(DTYPE)
    for tile in range(last - 1, first - 1, -1):
        n, s, valid = reduced(tile, N, S, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        mask = c_mask[:, None] & valid[None, :]
        at = offsets(n, c, s, stride_dyn, stride_dyo, stride_dyi, VEC, CHANNELS_LAST)
        dx = tl.load(dy_ptr + at, mask, other=0.0).to(DTYPE)
        if partials_ptr is not None:
            at = offsets(n, c, s, stride_xn, stride_xo, stride_xi, VEC, CHANNELS_LAST)
            x = tl.load(x_ptr + at, mask, other=0.0).to(DTYPE)
            dx = dx - offset[:, None] - (x - mean[:, None]) * slope[:, None]
        at = offsets(n, c, s, stride_dxn, stride_dxo, stride_dxi, VEC, CHANNELS_LAST)
        tl.store(dx_ptr + at, dx * scale[:, None], mask)


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
    eps: float,
    training: bool,
    axis: int,
    mask: list[bool],
    plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    like = dy if x is None else x
    empty = torch.empty_like if dy.numel() else torch.zeros_like
    dweight, dbias = (
        empty(mean, dtype=accumulator(dy.dtype)) if wanted else None for wanted in mask[1:]
    )
    if not dy.numel():
        return torch.empty_like(like) if mask[0] else None, dweight, dbias
    mean, var, weight = dense(mean, var, weight)
    # The kernels take strides of x, dy and dx: those of dy stand in for an absent tensor's.
    inputs = (like, dy) if mask[0] else (like, dy, dy)
    layout, (like, dy, out) = lay_out(axis, *inputs, out=mask[0])
    x = None if x is None else like
    dx = out if mask[0] else None
    launch = Launcher.of(layout, dy, plan)
    partials, grads = None, (dweight, dbias)
    if training or mask[1] or mask[2]:
        partials = dy.new_empty((2, launch.plan.splits, layout.C), dtype=torch.float64)
        fused = None if training else dx
        tensors = (partials, fused, mean, var, weight, x, dy)
        launch(backward_reduce_kernel, *tensors, eps, tensors=3)
        if launch.plan.combine or not (training and mask[0]):
            partials = backward_combine(partials, dweight, dbias, var, eps)
            grads = (None, None)
    if mask[0] and (training or partials is None):
        tensors = (dx, *grads, mean, var, weight, partials, x, dy)
        parts = 1 if partials is None else partials.shape[1]
        block_g = 1 if parts == 1 else MERGE
        launch(backward_dx_kernel, *tensors, parts, eps, tensors=3, BLOCK_G=block_g)
    return dx, dweight, dbias
