"""Whose batch norm is measured, and how each is called. A new rival is a line in PROVIDERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tribn
from perf.cases import Layer

# y of (x, residual, running_mean, running_var, weight, bias, training); the residual may be None.
Function = Callable[..., Tensor]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Provider:
    """Makes the function of a layer; `module` is what it imports, and takes CUDA tensors only."""

    build: Callable[[Layer], Function]
    module: str | None = None

    def obstacle(self, device: str) -> str | None:
        """Why it cannot run on "cpu" or "cuda"; None if it can."""
        if self.module is None:
            return None
        if device == "cpu":
            return "needs a CUDA device"
        try:
            import_module(self.module)
        except Exception as error:
            return f"{self.module} cannot be imported ({error})"
        return None


def unfused(norm: Function, layer: Layer) -> Function:
    """A batch norm of (x, running_mean, ...), and what follows it in separate operations."""
    activation = ACTIVATIONS.get(layer.activation)

    def function(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
        y = norm(x, *arguments)
        if residual is not None:
            y = y + residual
        return y if activation is None else activation(y)

    return function


def _tribn(layer: Layer) -> Function:
    def function(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
        return tribn.functional.batch_norm(
            x, *arguments, activation=layer.activation, residual=residual
        )

    return function


def _eager(layer: Layer) -> Function:
    return unfused(F.batch_norm, layer)


def _compiled(**options: Any) -> Callable[[Layer], Function]:
    def build(layer: Layer) -> Function:
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # so that backward can run many times
        eager = _eager(layer)
        # Compilations belong to the code: with one of its own, no call first tries those of others.
        own = FunctionType(eager.__code__.replace(), eager.__globals__, closure=eager.__closure__)
        return torch.compile(own, dynamic=False, fullgraph=True, **options)

    return build


def _apex(layer: Layer) -> Function:
    from apex.contrib.groupbn import BatchNorm2d_NHWC

    fused = layer.activation == "relu"
    activation = None if fused else ACTIVATIONS.get(layer.activation)
    module = BatchNorm2d_NHWC(layer.shape[1], fuse_relu=fused)

    def function(
        x: Tensor,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
    ) -> Tensor:
        module.running_mean, module.running_var = running_mean, running_var
        module.weight, module.bias, module.training = weight, bias, training
        if fused:  # it adds only before a ReLU
            rows = None if residual is None else residual.permute(0, 2, 3, 1)
            return module(x.permute(0, 2, 3, 1), rows).permute(0, 3, 1, 2)
        y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if residual is not None:
            y = y + residual
        return y if activation is None else activation(y)

    return function


def _flag_gems(layer: Layer) -> Function:
    from flag_gems.ops import batch_norm, batch_norm_backward

    class FlagGems(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
            running_mean, running_var, weight, bias, training = arguments
            y, mean, rstd = batch_norm(x, weight, bias, running_mean, running_var, training)
            ctx.save_for_backward(x, weight, mean, rstd)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, mean, rstd = ctx.saved_tensors
            dx, dweight, dbias = batch_norm_backward(
                dy, x, weight, None, None, mean, rstd, train=True, output_mask=[True] * 3
            )
            return dx, None, None, dweight, dbias, None

    return unfused(FlagGems.apply, layer)


def _attorch(layer: Layer) -> Function:
    from attorch.batch_norm_layer import BatchNormAutoGrad

    def norm(
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
    ) -> Tensor:
        return BatchNormAutoGrad.apply(x, training, weight, bias, running_mean, running_var)

    return unfused(norm, layer)


PROVIDERS = {
    "tribn": Provider(_tribn),
    "eager": Provider(_eager),
    "compile": Provider(_compiled()),
    "max-autotune": Provider(_compiled(mode="max-autotune-no-cudagraphs")),
    "cooperative": Provider(_compiled(options={"triton.cooperative_reductions": True})),
    "apex": Provider(_apex, module="apex.contrib.groupbn"),
    "flag_gems": Provider(_flag_gems, module="flag_gems"),
    "attorch": Provider(_attorch, module="attorch"),
}
