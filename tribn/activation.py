"""The activations that can be fused: names, torch's modules and functions, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten


class Activation(NamedTuple):
    """A name from `KINDS`, or None, and up to two parameters."""

    name: str | None = None
    p: float = 0.0
    q: float = 0.0

    def __str__(self) -> str:
        if self.name is None:
            return "None"
        values = zip(KINDS[self.name].parameters, self[1:], strict=False)
        listed = ", ".join(f"{name}={value}" for name, value in values)
        return f"{self.name}({listed})" if listed else self.name

    @property
    def one_bit(self) -> bool:
        """Whether one bit of the input tells the gradient: it is that at 1, or that at -1."""
        return self.name in ("relu", "relu6", "leaky_relu")

    @property
    def invertible(self) -> bool:
        """Whether the result tells the input, rounding aside, and does not underflow."""
        return self.name is None or (self.name in ("leaky_relu", "elu") and self.p >= 1e-3)

    def inverse(self, y: Tensor, rounding: float) -> Tensor:
        """The input, given the result; `rounding` is what keeps elu's from minus infinity."""
        if self.name == "leaky_relu":
            return torch.where(y > 0, y, y / self.p)
        if self.name == "elu":
            return torch.where(y > 0, y, torch.log1p((y / self.p).clamp(min=rounding - 1)))
        return y

    def __call__(self, z: Tensor) -> Tensor:
        return z if self.name is None else KINDS[self.name].function(z, self.p, self.q)

    def backward(self, dy: Tensor, z: Tensor) -> Tensor:
        """The gradient of z, given that of the result."""
        return dy if self.name is None else KINDS[self.name].backward(dy, z, self.p, self.q)


@dataclass(frozen=True)
class Kind:
    """One activation: torch's module with the names and defaults of its parameters p and q."""

    module: type[nn.Module]
    function: Callable[[Tensor, float, float], Tensor]
    backward: Callable[[Tensor, Tensor, float, float], Tensor]
    parameters: dict[str, float]


def _relu6_backward(dy: Tensor, z: Tensor) -> Tensor:
    return torch.where((z <= 0) | (z >= 6), 0, dy)


def _hardsigmoid_backward(dy: Tensor, z: Tensor) -> Tensor:
    return torch.where((z > -3) & (z < 3), dy / 6, 0)


def _kind(module: type[nn.Module], function: Any, backward: Any, **parameters: float) -> Kind:
    return Kind(module, function, backward, parameters)


# `tribn.kernels.activation` has the device functions of the same names. Functions can be
# differentiated twice, which torch's hardsigmoid cannot; its gradient has 1/6 in float32 besides,
# and that of relu6 is not the same for every NaN on a CPU.
KINDS: dict[str, Kind] = {
    "relu": _kind(
        nn.ReLU, lambda z, p, q: F.relu(z), lambda dy, z, p, q: aten.threshold_backward(dy, z, 0)
    ),
    "relu6": _kind(
        nn.ReLU6,
        lambda z, p, q: F.relu6(z),
        lambda dy, z, p, q: _relu6_backward(dy, z),
    ),
    "leaky_relu": _kind(
        nn.LeakyReLU,
        lambda z, p, q: F.leaky_relu(z, p),
        lambda dy, z, p, q: aten.leaky_relu_backward(dy, z, p, False),
        negative_slope=0.01,
    ),
    "elu": _kind(
        nn.ELU,
        lambda z, p, q: F.elu(z, p),
        lambda dy, z, p, q: aten.elu_backward(dy, p, 1, 1, False, z),
        alpha=1.0,
    ),
    "gelu": _kind(
        nn.GELU, lambda z, p, q: F.gelu(z), lambda dy, z, p, q: aten.gelu_backward(dy, z)
    ),
    "gelu_tanh": _kind(
        nn.GELU,
        lambda z, p, q: F.gelu(z, approximate="tanh"),
        lambda dy, z, p, q: aten.gelu_backward(dy, z, approximate="tanh"),
    ),
    "silu": _kind(
        nn.SiLU, lambda z, p, q: F.silu(z), lambda dy, z, p, q: aten.silu_backward(dy, z)
    ),
    "mish": _kind(
        nn.Mish, lambda z, p, q: F.mish(z), lambda dy, z, p, q: aten.mish_backward(dy, z)
    ),
    "sigmoid": _kind(
        nn.Sigmoid,
        lambda z, p, q: torch.sigmoid(z),
        lambda dy, z, p, q: aten.sigmoid_backward(dy, torch.sigmoid(z)),
    ),
    "tanh": _kind(
        nn.Tanh,
        lambda z, p, q: torch.tanh(z),
        lambda dy, z, p, q: aten.tanh_backward(dy, torch.tanh(z)),
    ),
    "softplus": _kind(
        nn.Softplus,
        lambda z, p, q: F.softplus(z, p, q),
        lambda dy, z, p, q: aten.softplus_backward(dy, z, p, q),
        beta=1.0,
        threshold=20.0,
    ),
    "hardswish": _kind(
        nn.Hardswish,
        lambda z, p, q: F.hardswish(z),
        lambda dy, z, p, q: aten.hardswish_backward(dy, z),
    ),
    "hardsigmoid": _kind(
        nn.Hardsigmoid,
        lambda z, p, q: F.relu6(z + 3) / 6,
        lambda dy, z, p, q: _hardsigmoid_backward(dy, z),
    ),
}


_NAMES = {kind.module: name for name, kind in KINDS.items() if name != "gelu_tanh"}


def of_module(module: nn.Module) -> Activation | None:
    """The activation that one of torch.nn's modules is; None for another module."""
    name = _NAMES.get(type(module))
    if name == "gelu" and module.approximate == "tanh":
        name = "gelu_tanh"
    if name is None:
        return None
    return Activation(name, *(float(getattr(module, p)) for p in KINDS[name].parameters))


def parse(activation: str | nn.Module | Activation | None) -> Activation:
    """The activation that a name or one of torch.nn's modules means; None and Identity: none."""
    if isinstance(activation, Activation):
        return activation
    if activation is None or type(activation) is nn.Identity:
        return Activation()
    if isinstance(activation, str):
        if activation in KINDS:
            return Activation(activation, *KINDS[activation].parameters.values())
    elif isinstance(activation, nn.Module):
        if found := of_module(activation):
            return found
    else:
        raise TypeError(
            f"activation is a {type(activation).__name__}: it must be a name, a module of torch.nn "
            "or None"
        )
    raise ValueError(
        f"activation is {activation!r}: it must be one of {', '.join(KINDS)}, or torch.nn's module "
        "for one of them"
    )
