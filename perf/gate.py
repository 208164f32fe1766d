"""Inputs of a layer, and the gate before the clocks: does a provider compute what float64 does?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perf.cases import DTYPES, Layer
from perf.providers import ACTIVATIONS, Function, unfused

# The largest ‖result − exact‖ / ‖exact‖: a few roundings of the input's dtype. Running statistics
# are in float32 whatever the input.
TOLERANCE = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 1e-4}

# Where an activation with a cut-off lets the gradient pass, by its value
PASSES: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: y > 0,
    "relu6": lambda y: (y > 0) & (y < 6),
}


class WrongResult(Exception):
    """A provider's results are not the expected ones."""


@dataclass(frozen=True)
class Case:
    """A layer in a layout and a dtype."""

    layer: Layer
    layout: str
    dtype: str

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.layer.op} {self.layer} {self.layout} {self.dtype}"


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running: tuple[Tensor, Tensor]  # mean and variance

    @classmethod
    def random(cls, case: Case, device: str) -> Inputs:
        """A mean far from zero; parameters and statistics in float32, as in training by AMP.

        Running statistics are not the batch's, or one that does not move them would look right;
        beside the variance even a small eps counts.
        """
        shape, dtype = case.layer.shape, DTYPES[case.dtype]
        C = shape[1]
        # One of its own: a capture that has failed keeps the device's.
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**31, ())))

        def normal(mean: float = 0, std: float = 1) -> Tensor:
            values = torch.empty(shape, device=device).normal_(mean, std, generator=generator)
            values = values.to(dtype)
            if case.layout == "channels-last":
                values = values.movedim(1, -1).contiguous().movedim(-1, 1)
            return values

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(C, device=device).uniform_(low, high, generator=generator)

        return cls(
            x=normal(mean=3, std=2).requires_grad_(),
            dy=normal(),
            residual=normal().requires_grad_() if case.layer.residual else None,
            weight=torch.nn.Parameter(uniform(0.5, 1.5)),
            bias=torch.nn.Parameter(uniform(-2, 2)),
            running=(uniform(-0.5, 0.5), uniform(0.01, 0.11)),
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        leaves = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return leaves if self.residual is None else leaves | {"residual": self.residual}

    def double(self) -> Inputs:
        leaves = {name: t.detach().double().requires_grad_() for name, t in self.leaves.items()}
        mean, var = self.running
        return replace(self, **leaves, dy=self.dy.double(), running=(mean.double(), var.double()))

    def apply(self, function: Function, running: Sequence[Tensor], training: bool) -> Tensor:
        return function(self.x, self.residual, *running, self.weight, self.bias, training)

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(self.leaves.values()), self.dy, retain_graph=True)

    def calls(self, function: Function) -> dict[str, Callable[[], Any]]:
        """What is timed, by direction."""
        # Statistics of its own: torch's backward refuses those that a later forward has changed.
        output = self.apply(function, [t.clone() for t in self.running], True)

        def forward() -> Tensor:
            return self.apply(function, self.running, True)

        def backward() -> tuple[Tensor, ...]:
            return self.gradients(output)

        def both() -> tuple[Tensor, ...]:
            return self.gradients(forward())

        @torch.no_grad()
        def evaluate() -> Tensor:
            return self.apply(function, self.running, False)

        return {"forward": forward, "backward": backward, "both": both, "eval": evaluate}


def results(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """Everything that a batch norm gives."""
    running = [t.clone() for t in inputs.running]
    with torch.no_grad():
        evaluated = inputs.apply(function, running, False)
    y = inputs.apply(function, running, True)
    gradients = zip(inputs.leaves, inputs.gradients(y), strict=True)
    return {
        "output": y.detach(),
        "output of eval": evaluated,
        **{f"gradient of {name}": gradient for name, gradient in gradients},
        **dict(zip(("running_mean", "running_var"), running, strict=True)),
    }


def exact(layer: Layer, inputs: Inputs, y: Tensor) -> dict[str, Tensor]:
    """`results` in float64.

    An activation's cut-off lets the gradient pass where it does for y, the output that is judged:
    a value that rounding has carried across is no error, and changes the gradient by all of itself.
    """
    normalize = unfused(F.batch_norm, replace(layer, activation=None))
    activation, passes = ACTIVATIONS.get(layer.activation), PASSES.get(layer.activation)

    def function(*arguments: Any) -> Tensor:
        z = normalize(*arguments)
        if activation is None:
            return z
        if passes is None:
            return activation(z)
        passed = z * passes(y)
        return activation(z).detach() + passed - passed.detach()

    return results(function, inputs.double())


def check(function: Function, case: Case, inputs: Inputs) -> None:
    """Raises WrongResult that says which result is off, and by how much."""
    actual = results(function, inputs)
    y = actual["output"]
    if y.shape != inputs.x.shape or y.dtype != inputs.x.dtype:
        raise WrongResult(f"output is {y.dtype} of shape {tuple(y.shape)}")
    try:
        wanted = exact(case.layer, inputs, y)
    except torch.OutOfMemoryError as error:
        raise MemoryError("there is no room for the check in float64") from error
    for name, expected in wanted.items():
        dtype = "fp32" if name.startswith("running") else case.dtype
        compare(name, actual[name], expected, TOLERANCE[dtype])


def compare(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises WrongResult if ‖actual − expected‖ / ‖expected‖ is above the tolerance."""
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:  # nor is NaN
        raise WrongResult(f"{name} is off by {error:.2g}, {tolerance:.2g} is allowed")


def described(error: Exception) -> dict[str, Any]:
    """What a report says of a provider that is wrong or raises."""
    text = str(error).strip().partition("\n")[0]
    wrong = isinstance(error, WrongResult)
    return {"wrong": wrong, "problem": text if wrong else f"{type(error).__name__}: {text}"}
