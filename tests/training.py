"""Whether two models train alike."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from cases import F32, F64, largest, ulp, wide
from torch import Tensor, nn

STEPS = 3


def tensors_of(output: Any) -> list[Tensor]:
    """The floating tensors in what a model returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, (list, tuple)):
        return []
    return (
        [t for item in output for t in tensors_of(item)]
        if isinstance(output, (list, tuple))
        else []
    )


def train(model: nn.Module, inputs: tuple[Any, ...], optimizer: Any = None) -> dict[str, Tensor]:
    """Outputs, gradients and state after each of a few steps of SGD, and then in evaluation."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 1e-2)
    results = {}
    for step in range(STEPS):
        torch.manual_seed(step)  # of dropout, and of the gradient that comes in
        optimizer.zero_grad()
        outputs = tensors_of(model(*inputs))
        dy = [torch.randn(t.shape, dtype=F64).to(t.dtype) / t.numel() ** 0.5 for t in outputs]
        torch.autograd.backward(outputs, dy)
        results |= {f"step {step} output {i}": t.detach().clone() for i, t in enumerate(outputs)}
        results |= {
            f"step {step} gradient of {name}": p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        optimizer.step()
    results |= {f"state {name}": t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        results |= {f"evaluation {i}": t for i, t in enumerate(tensors_of(model.eval()(*inputs)))}
    return results


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype of a tensor that is floating, or of all of them in a model."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(dtype)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_train_alike(
    converted: nn.Module, original: nn.Module, inputs: tuple[Any, ...], optimizer: Any = None
) -> None:
    """In float64, the results of `train` differ by no more than rounding makes of the original's.

    What rounding makes of them is measured: the difference between the original in float64 and in
    float32, by the ratio of their epsilons. Twice that, as other kernels may lose twice as much
    (`assert_accurate`), and half the square root of n besides, since batch norm adds up n float32
    in float64, and n float64 with n roundings (`Exact`). Four ulps of the largest value are left.
    """
    rows = max(t.numel() // t.shape[1] for t in inputs if isinstance(t, Tensor) and t.dim() > 1)
    exact = [in_dtype(t, F64) for t in inputs]
    narrow = train(in_dtype(original, F32), tuple(in_dtype(t, F32) for t in inputs))
    expected = train(in_dtype(original, F64), tuple(exact))
    actual = train(converted, tuple(exact), optimizer)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error, rounding = (largest(wide(t) - wide(tensor)) for t in (actual[name], narrow[name]))
        roundings = (2 + rows**0.5 / 2) * torch.finfo(F64).eps / torch.finfo(F32).eps
        allowed = roundings * rounding + 4 * ulp(largest(wide(tensor)), F64)
        assert math.isfinite(allowed), f"{name}: the original's is not finite in float32"
        assert error <= allowed, f"{name}: differs by {error:.3g}, {allowed=:.3g}"
