"""The formula of batch normalization in operations that PyTorch can differentiate, and derivatives.

For what the operators do not do: gradients of gradients, and directional derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tribn.activation import Activation
from tribn.distributed import Ranks, all_sum
from tribn.reference import accumulator, unpack

Tensors = Mapping[str, Tensor]
NAMES = ("x", "weight", "bias", "residual", "dy")


@dataclass(frozen=True)
class Formula:
    """Of what the output is a function, besides x, weight, bias and residual.

    Where bits are given they tell the activation's gradient, and x and residual may be zeros: a
    kept bit makes the activation linear.
    """

    training: bool
    eps: float
    axis: int
    activation: Activation
    act_first: bool
    mean: Tensor
    var: Tensor
    bits: Tensor | None
    mask: Tensor | None
    count: Tensor | None
    dtype: torch.dtype  # of the output
    stride: tuple[int, ...]  # of the output, in whose order the bits lie
    ranks: Ranks | None = None  # whose batches are one

    def output(self, tensors: Tensors) -> Tensor:
        dtype, axis = accumulator(self.dtype), self.axis
        x = tensors["x"].to(dtype)
        padding = None if self.mask is None else ~self.mask.unsqueeze(axis)
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        others = [d for d in range(x.dim()) if d != axis]

        def inside(t: Tensor) -> Tensor:
            return t if padding is None else t.masked_fill(padding, 0)

        def per_channel(t: Tensor) -> Tensor:
            return t.to(dtype).view(shape)

        def activation(t: Tensor) -> Tensor:
            if self.bits is None:
                return self.activation(t)
            like = torch.empty_strided(x.shape, self.stride, dtype=dtype, device=x.device)
            return self.activation.backward(t, unpack(self.bits, like, axis, padding is not None))

        z = inside(x)
        if self.act_first:
            z = inside(activation(z))
        if self.training:
            n = x.numel() // max(x.shape[axis], 1) if self.count is None else self.count
            n = max(n, 1) if isinstance(n, int) else n.clamp(min=1)
            z = inside(z - per_channel(all_sum(z.sum(others), self.ranks) / n))
            var = all_sum(z.square().sum(others), self.ranks) / n
        else:
            z, var = z - per_channel(self.mean), self.var.to(dtype)
        z = z * per_channel((var + self.eps).rsqrt())
        if "weight" in tensors:
            z = z * per_channel(tensors["weight"])
        if "bias" in tensors:
            z = z + per_channel(tensors["bias"])
        if "residual" in tensors:
            z = z + inside(tensors["residual"])
        return inside(z if self.act_first else activation(z)).to(self.dtype)


def named(*tensors: Tensor | None) -> dict[str, Tensor]:
    """x, weight, bias, residual and dy, those that there are, by name."""
    return {name: t for name, t in zip(NAMES, tensors, strict=False) if t is not None}


def pull(function: Callable[[Tensors], Any], inputs: Tensors, gradients: Any) -> Tensors:
    """The gradients of a function's inputs, given those of what it returns."""
    _, backward, *_ = torch.func.vjp(function, inputs)
    (found,) = backward(gradients)
    return found  # type: ignore[no-any-return]


def push(function: Callable[[Tensors], Any], inputs: Tensors, tangents: Tensors) -> Any:
    """The tangents of what a function returns, given those of its inputs, 0 where there is none.

    A gradient depends linearly on that of the output: the gradient of this is what is asked for.
    Forward mode itself would not do, as it may run already.
    """
    outputs, backward, *_ = torch.func.vjp(function, inputs)
    _, forward, *_ = torch.func.vjp(backward, tree_map(torch.zeros_like, outputs))
    zeros = {name: torch.zeros_like(t) for name, t in inputs.items() if name not in tangents}
    (found,) = forward(({**tangents, **zeros},))
    return found
