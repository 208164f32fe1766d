"""Batch normalization across processes: collectives, and the operators made of stages and them.

In each direction every rank contributes a row of float64 numbers and gathers those of all ranks,
which each merges by the same formula in the order of ranks: all have the same bits, whoever came
first. The host waits for nothing on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tribn import ops
from tribn.reference import accumulator, describe, differing, kind


class Ranks(NamedTuple):
    """The processes of a group, two or more."""

    group: str  # its name
    size: int

    @classmethod
    def of(cls, group: Any) -> Ranks | None:
        """Those of a process group; None if this process is the only one.

        Raises:
            ValueError: this process does not belong to it.
        """
        size = torch.distributed.get_world_size(group)
        if size < 0:
            raise ValueError(
                "process_group is one that this process does not belong to: give each process the "
                "group that has it"
            )
        return cls(group.group_name, size) if size > 1 else None


def batch_norm_train(
    ranks: Ranks,
    plain: bool,
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
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The operator of that name with the batches of all ranks as one."""
    _, axis, *activation, _ = options
    dtype = accumulator(
        x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    )
    row = ops.run(ops.sync_stats, plain, x, mask, dtype, axis, *activation)
    _agree(row, ranks, kind(x.dtype, x.shape[axis]))
    mean, var, count = ops.run(
        *(ops.sync_combine, plain, _gather(row, ranks)),
        *(running_mean, running_var, num_batches_tracked),
        *(momentum, correction, skip_nonfinite, dtype),
    )
    y, bits = ops.run(
        *(ops.batch_norm_eval, plain, x, mean, var, weight, bias, residual, mask, *options)
    )
    return y, mean, var, count, bits


def batch_norm_backward(
    ranks: Ranks,
    plain: bool,
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mask: Tensor | None,
    count: Tensor,
    eps: float,
    training: bool,
    axis: int,
    *options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The operator of that name; the gradients of weight and bias are of this rank's batch."""
    *activation, dtype, residual_dtype, wanted = options
    tensors = (dy, x, mean, var, weight, bias, residual, bits, mask)
    options = (eps, axis, *activation)
    sums, *grads = ops.run(
        ops.sync_backward_reduce, plain, *tensors, *options, residual_dtype, wanted[1:]
    )
    dx = None
    if wanted[0]:
        sums = _gather(sums, ranks).sum(0)
        dx = ops.run(ops.sync_backward_dx, plain, *tensors, count, sums, *options, dtype)
    return dx, *grads


class _Sum(torch.autograd.Function):
    """The sum of all ranks' tensors, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _gather(t.double(), ranks).sum(0).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.ranks), None


def all_sum(t: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum of all ranks' (C,) tensors, which can be differentiated."""
    return t if ranks is None else _Sum.apply(t, ranks)  # type: ignore[no-any-return]


def _gather(row: Tensor, ranks: Ranks) -> Tensor:
    """All ranks' rows, [ranks, len(row)]."""
    gather, wait = (
        getattr(torch.ops._c10d_functional, name) for name in ("all_gather_into_tensor", "wait_tensor")
    )
    rows = gather(row.contiguous(), ranks.size, ranks.group)
    if torch.compiler.is_compiling():
        return wait(rows).view(ranks.size, -1)
    try:
        return wait(rows).view(ranks.size, -1)
    except RuntimeError as error:
        raise RuntimeError("TODO") from error


def _agree(row: Tensor, ranks: Ranks, kind: int) -> None:
    pass
