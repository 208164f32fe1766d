"""Batch norm in graphs for use elsewhere, by torch.export, ONNX and TorchScript.

Evaluation is there in PyTorch's own operators, which are fused there as well as here, and need no
tribn; by the batch's statistics too, where there are no others. Training that moves some, or has a
mask, is one operator, which can be differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tribn import ops
from tribn.autograd import Options
from tribn.reference import accumulator


def exporting() -> bool:
    """Whether a graph is being made for use elsewhere."""
    # is_exporting() itself is true under torch.compile too, with PyTorch 2.11.
    flag: bool = torch.compiler._is_exporting_flag
    return flag or torch._C._get_tracing_state() is not None


def batch_norm(
    options: Options,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    *state: Tensor | None,  # running_mean, running_var and, in training, the counter
) -> Tensor:
    if options.ranks is not None:
        raise ValueError(
            "a synchronized layer in training has no graph for use elsewhere: export it in "
            "evaluation, after model.eval()"
        )
    if options.training and (mask is not None or state[0] is not None):
        tensors = (x, weight, bias, residual, mask, *state)
        y: Tensor
        y, *_ = ops.batch_norm_train(*tensors, *options.forward[:-1], False)
        return y
    axis, act_first = options.axis, options.act_first
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wider = accumulator(dtype)

    # No nodes in the graph where there is nothing to do.
    def cast(t: Tensor, dtype: torch.dtype = wider) -> Tensor:
        return t if t.dtype == dtype else t.to(dtype)

    def moved(t: Tensor, source: int, destination: int) -> Tensor:
        return t if source == destination else t.movedim(source, destination)

    z = moved(cast(x), axis, 1)
    if act_first:
        z = options.activation(z)
    weight, bias = (None if t is None else cast(t) for t in (weight, bias))
    mean, var = (None if t is None else cast(t) for t in state[:2])
    z = F.batch_norm(z, mean, var, weight, bias, options.training, eps=options.eps)
    z = moved(z, 1, axis)
    if residual is not None:
        z = z + residual
    if not act_first:
        z = options.activation(z)
    if mask is not None:
        z = z.masked_fill(~mask.unsqueeze(axis), 0)
    return cast(z, dtype)
