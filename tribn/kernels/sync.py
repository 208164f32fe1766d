"""Operators of synchronized training: the stages of two launches, cut where ranks are gathered.

`stats` leaves a rank's statistics in a row, `sync_combine` merges the rows of all ranks and moves
the running statistics, and evaluation's operator normalizes. In backward the sums of
`backward_reduce` are a rank's row, and `sync_sum` adds up those of all. What merges rows asserts on
the device that they are of one kind: the host, which does not wait for them, cannot tell.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tribn.kernels import backward, forward
from tribn.kernels.backward import backward_dx_kernel, reduce
from tribn.kernels.forward import store_and_track
from tribn.kernels.host import dense, prepare
from tribn.kernels.tile import PER_CHANNEL, load_or, merge_rows, reciprocal
from tribn.launch import Plan
from tribn.reference import kind

MERGE = 16  # ranks that a program merges at once
CHANNELS = 16  # of such a program: few, for many programs
DIFFER = tl.constexpr(
    "the ranks of a synchronized batch norm's process group differ: all must call the same layers "
    "in the same order, with inputs of one dtype"
)
# How kernels are compiled that assert: Triton takes assertions for debugging.
ASSERTING: dict[str, Any] = {
    "do_not_specialize": ["C", "W", "size"],
    "do_not_specialize_on_alignment": PER_CHANNEL,
    "debug": True,
}


def sync_stats(
    x: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    axis: int,
    activation: str | None,
    p: float,
    q: float,
    act_first: bool,
    plan: Plan | None = None,
) -> Tensor:
    C = x.shape[axis]
    number = float(kind(x.dtype, C))
    if not x.numel():
        row = x.new_zeros((2 + 2 * C,), dtype=torch.float64)
        row[0].fill_(number)
        return row
    row = x.new_empty((2 + 2 * C,), dtype=torch.float64)
    like = torch.empty_like(x, device="meta")
    launch, (x,), mask = prepare(axis, like, dtype, (x,), mask, 0, plan=plan)
    constants = forward._constants(activation, p, q, act_first, False)
    forward.stats(launch, (row, *[None] * 6), x, mask, (number, 0.0, 0.0, p, q), constants)
    return row


@triton.jit
def assert_one_kind(rows_ptr, stride, W, BLOCK_W: tl.constexpr):
    """That W rows, which are so far apart, begin with the same number."""
    first = tl.load(rows_ptr)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        kinds = tl.load(rows_ptr + w * stride, w < W, other=0.0)
        same = (w >= W) | (kinds == first)
        tl.device_assert(same, DIFFER)


@triton.jit(**ASSERTING)
def sync_combine_kernel(
    running_mean_ptr,  # [C], updated
    running_var_ptr,  # [C], updated
    mean_ptr,  # [C]
    var_ptr,  # [C]
    count_ptr,  # [] int64
    num_batches_tracked_ptr,  # [], incremented if anything counts
    tracked_ptr,  # [], as num_batches_tracked was before, if CUMULATIVE
    rows_ptr,  # [W, 2 + 2 * C] float64: kinds, counts, means, sums of squared deviations
    momentum: tl.float64,
    correction: tl.float64,
    C: tl.int64,
    W: tl.int64,
    CUMULATIVE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the statistics of W ranks, and moves the running ones towards them.

    Grid: (channel blocks,).
    """
    pid = tl.program_id(0)
    c = pid.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    stride = 2 + 2 * C
    assert_one_kind(rows_ptr, stride, W, BLOCK_W)
    count, mean, m2 = merge_rows(
        *(rows_ptr, W, stride, 2 + c, 2 + C + c, 1 + 0 * c, c_mask, BLOCK_W)
    )
    if CUMULATIVE:
        momentum = reciprocal(tl.load(tracked_ptr) + 1)
    var = m2 * reciprocal(count)
    running_mean = load_or(running_mean_ptr, c, c_mask, 0.0, tl.float64)
    running_var = load_or(running_var_ptr, c, c_mask, 0.0, tl.float64)
    store_and_track(
        *(count, mean, var, m2, momentum, correction, c, c_mask, running_mean, running_var),
        *(running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, True, SKIP_NONFINITE, DTYPE),
    )
    if pid == 0:
        total = tl.max(count, 0).to(tl.int64)
        tl.store(count_ptr, total)
        if num_batches_tracked_ptr is not None:
            tracked = tl.load(num_batches_tracked_ptr)
            tl.store(num_batches_tracked_ptr, tracked + (total > 0).to(tl.int64))


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
    rows = rows.contiguous()
    W, size = rows.shape
    C = (size - 2) // 2
    mean, var = (rows.new_empty((C,), dtype=dtype) for _ in range(2))
    if not C:
        return mean, var, rows.new_zeros((), dtype=torch.int64)
    count = rows.new_empty((), dtype=torch.int64)
    given = (running_mean, running_var)
    states = dense(*given)
    cumulative = momentum is None and num_batches_tracked is not None
    tracked = num_batches_tracked.clone() if cumulative else None
    with torch.cuda.device_of(rows):
        sync_combine_kernel[(triton.cdiv(C, CHANNELS),)](
            *(*states, mean, var, count, num_batches_tracked, tracked, rows),
            *(momentum or 0.0, float(correction), C, W),
            CUMULATIVE=cumulative,
            SKIP_NONFINITE=skip_nonfinite,
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK_W=MERGE,
            BLOCK_C=CHANNELS,
            sanitize_overflow=False,
        )
    for state, written in zip(given, states, strict=True):
        if state is not written:
            state.copy_(written)
    torch.autograd.graph.increment_version(
        [t for t in (*given, num_batches_tracked) if t is not None]
    )
    return mean, var, count


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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    like = torch.empty_like(dy if x is None else x, device="meta")
    allocate = torch.empty_like if dy.numel() else torch.zeros_like
    dweight, dbias = (allocate(mean) if w else None for w in wanted[:2])
    dresidual = None
    if wanted[2]:
        dresidual = torch.empty_like(like, dtype=residual_dtype, device=dy.device)
    number = float(kind(dy.dtype, len(mean), "backward"))
    if not dy.numel():
        sums = mean.new_zeros((1 + 2 * len(mean),), dtype=torch.float64)
        sums[0].fill_(number)
        return sums, dweight, dbias, dresidual
    launch, (x, dy, residual), mask = prepare(
        axis, like, dy.dtype, (x, dy, residual), mask, 0, bits is not None, plan
    )
    sums = mean.new_empty((1 + 2 * len(mean),), dtype=torch.float64)
    reduce(
        launch,
        (sums, None, dresidual, dweight, dbias),
        dense(mean, var, weight, bias),
        (x, dy, residual, bits, mask),
        (number, eps, p, torch.finfo(dy.dtype).eps / 2 if from_output else q),
        backward._constants(activation, p, q, act_first, from_output, False),
    )
    return sums, dweight, dbias, dresidual


@triton.jit(**ASSERTING)
def sync_sum_kernel(
    sum_ptr,  # [size] float64
    rows_ptr,  # [W, size] float64: kinds, and what is added up
    size: tl.int64,
    W: tl.int64,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds up the rows of W ranks. Grid: (blocks of their numbers,)."""
    assert_one_kind(rows_ptr, size, W, BLOCK_W)
    i = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        exists = (w < W)[:, None] & (i < size)[None, :]
        rows = tl.load(rows_ptr + w[:, None] * size + i[None, :], exists, other=0.0)
        total += tl.sum(rows, 0)
    tl.store(sum_ptr + i, tl.where(i == 0, tl.load(rows_ptr), total), i < size)


def sync_sum(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    W, size = rows.shape
    total = rows.new_empty((size,))
    with torch.cuda.device_of(rows):
        sync_sum_kernel[(triton.cdiv(size, CHANNELS),)](
            *(total, rows, size, W),
            BLOCK_W=MERGE,
            BLOCK_C=CHANNELS,
            sanitize_overflow=False,
        )
    return total


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
    plan: Plan | None = None,
) -> Tensor:
    dx = torch.empty_like(x, dtype=dtype)
    if not dx.numel():
        return dx
    launch, (x, dy, residual), mask = prepare(
        axis, dx, dy.dtype, (x, dy, residual), mask, None, bits is not None, plan
    )
    channels = dense(mean, var, weight, bias)
    constants = backward._constants(activation, p, q, act_first, from_output, True)
    launch(
        backward_dx_kernel,
        (dx, *channels, count, sums.contiguous(), x, dy, residual, bits, mask),
        (eps, p, torch.finfo(dy.dtype).eps / 2 if from_output else q),
        (0, 1, 2, 3),
        constants,
    )
    return dx
