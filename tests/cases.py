"""The one table of shapes, layouts and tolerances, and the oracle they are measured against."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tribn.functional import batch_norm
from tribn.reference import accumulator

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
F16, BF16, F32, F64 = DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOMENTUM, EPS = 0.3, 1e-5
PLAIN = (None, 0.0, 0.0, False)  # to an operator: no activation


# Layouts: the same values behind other strides. What lies between the elements is NaN, so that
# reading a neighbour shows.


def _sliced(x: Tensor) -> Tensor:
    base = x.new_full([2 * n + 1 for n in x.shape], math.nan)
    return base[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)


def _transposed(x: Tensor) -> Tensor:
    return (
        x.mT.contiguous().mT if x.dim() == 2 else x.transpose(0, -1).contiguous().transpose(0, -1)
    )


def _offset(x: Tensor) -> Tensor:
    return x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "sliced": _sliced,
    "transposed": _transposed,
    "offset": _offset,
    # these repeat the values along an axis
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_channel": lambda x: x[:, :1].expand_as(x),
    "expanded_inner": lambda x: x[..., :1].expand_as(x),
    "expanded_scalar": lambda x: x.flatten()[0].expand_as(x),
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    channel_axis: int = 1
    param_dtype: torch.dtype | None = None  # of parameters and running statistics; None: dtype
    mean: float = 0.5
    std: float = 2.0
    large: bool = False  # too many programs for the interpreter

    def __str__(self) -> str:
        """The shape and whatever is not the default, as a test's id."""
        parts = ["x".join(map(str, self.shape))]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                value = str(value).removeprefix("torch.")
                parts.append(value if field.name == "dtype" else f"{field.name}={value}")
        return "-".join(parts)


def params(cases: list[Case]) -> list[object]:
    """The cases for pytest.mark.parametrize."""
    slow = pytest.mark.skipif(INTERPRET, reason="too many programs for the interpreter")
    return [pytest.param(case, id=str(case), marks=[slow] if case.large else []) for case in cases]


_PLAIN = [
    *[(4, 1), (6, 3), (5, 24), (7, 40), (33, 65)],
    *[(2, 1, 5), (3, 3, 8), (2, 24, 7), (3, 40, 16), (2, 65, 9)],
    *[(2, 1, 3, 4), (3, 3, 5, 7), (2, 24, 6, 6), (2, 40, 8, 8), (2, 65, 7, 7), (1, 3, 2, 1)],
    *[(2, 3, 2, 3, 4), (2, 24, 3, 3, 3)],
    *[(3000, 1, 9), (2560, 1, 12), (2049, 2, 9), (2, 2048, 1, 1), (2, 3, 5000)],
]
_LAST = [(2, 5, 3), (3, 7, 24), (2, 9, 65), (2, 3, 5, 40), (2, 3, 2, 4, 8)]
_STRIDED = [
    "sliced",
    "transposed",
    "offset",
    "expanded_batch",
    "expanded_channel",
    "expanded_inner",
]
_HALF = (F16, BF16)

CASES = [
    *[Case(shape) for shape in _PLAIN],
    *[Case(shape, channel_axis=-1) for shape in _LAST],
    *[Case((3, 24, 5, 4), d, m) for d in DTYPES for m in ("contiguous", "channels_last")],
    *[Case((2, 40, 3, 2, 3), d, m) for d in DTYPES for m in ("contiguous", "channels_last_3d")],
    *[Case((5, 65), d) for d in (F16, BF16, F64)],
    *[Case((2, 7, 65), d, channel_axis=-1) for d in (F16, BF16, F64)],
    *[Case((3, 5, 4, 6), layout=layout, dy_layout="channels_last") for layout in _STRIDED],
    *[Case((3, 5, 4, 6), dy_layout=layout) for layout in [*_STRIDED, "expanded_scalar"]],
    *[Case((3, 4, 5), BF16, layout, layout, channel_axis=-1) for layout in _STRIDED],
    *[Case((12, 10), F16, layout, "expanded_scalar") for layout in _STRIDED],
    Case((2, 65, 20, 20), layout="channels_last", dy_layout="contiguous"),
    Case((2, 65, 20, 20), BF16, "channels_last", "channels_last"),
    # parameters of another dtype
    *[Case((4, 24, 5), d, param_dtype=F32) for d in (F16, BF16, F64)],
    *[Case((4, 3, 5, 4), d, "channels_last", param_dtype=F32) for d in (F16, BF16)],
    *[Case((4, 24, 5), F32, param_dtype=d) for d in (F16, BF16, F64)],
    # far from zero, and hardly any variance
    *[Case((64, 3, 10), d, mean=m) for d in (F32, F64) for m in (2e3, -2e4)],
    *[Case((64, 3, 4, 4), layout="channels_last", mean=m) for m in (2e3, -2e4)],
    *[Case((64, 3, 10), d, mean=50.0, std=1.0) for d in (F16, BF16)],
    *[Case((64, 3), d, mean=50.0, std=1.0) for d in (F16, BF16)],
    *[Case((16, 3, 10), d, mean=0.1, std=0.0) for d in DTYPES],
    *[Case((16, 40), d, mean=-300.3, std=0.0) for d in DTYPES],
    *[Case((16, 3, 10), d, mean=m, std=1e-9**0.5) for d in (F32, F64) for m in (0.0, 1.0)],
    # many values a channel
    Case((100, 2, 28, 28), F16),
    Case((100, 2, 28, 28), F16, "channels_last", "channels_last"),
    Case((64, 2, 128, 128), large=True),
    Case((64, 2, 128, 128), BF16, "channels_last", large=True),
    Case((2**21, 1), mean=100.0, std=1.0, large=True),
    Case((2, 65, 100, 100), layout="channels_last", large=True),
    Case((65536, 3), large=True),
]


@dataclass(frozen=True)
class Inputs:
    """Everything a batch norm and its backward take; parameters and statistics may be None."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    channel_axis: int = 1

    @classmethod
    def of(cls, case: Case, device: str = "cpu") -> Inputs:
        g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
        C = case.shape[case.channel_axis]

        def tensor(values: Tensor, layout: str = "contiguous", dtype: torch.dtype = case.dtype):
            return LAYOUTS[layout](values.to(device, dtype))

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=F64)

        param_dtype = case.param_dtype or case.dtype
        x = tensor(randn(*case.shape) * case.std + case.mean, case.layout)
        return cls(
            x,
            tensor(randn(*case.shape), case.dy_layout),
            weight=tensor(randn(C), dtype=param_dtype),
            bias=tensor(randn(C), dtype=param_dtype),
            running_mean=tensor(randn(C) + case.mean, dtype=param_dtype),
            running_var=tensor(randn(C).exp() * case.std**2 + 1e-3, dtype=param_dtype),
            channel_axis=case.channel_axis,
        )

    @property
    def axis(self) -> int:
        return self.channel_axis % self.x.dim()


def torch_batch_norm(
    x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis
):
    """torch.nn.functional.batch_norm along channel_axis, for parameters of any dtype."""
    dtype = accumulator(x.dtype)
    stats = [None if s is None else s.to(dtype) for s in (running_mean, running_var)]
    affine = [None if p is None else p.to(dtype) for p in (weight, bias)]
    y = torch.nn.functional.batch_norm(
        x.movedim(channel_axis, 1), *stats, *affine, training, momentum, eps
    ).movedim(1, channel_axis)
    for mine, given in zip(stats, (running_mean, running_var), strict=True):
        if mine is not given:
            given.copy_(mine)
    return y


def run(function, inputs: Inputs, training: bool, momentum=MOMENTUM, eps=EPS, **options):
    """The outputs, gradients and new running statistics of `function`, by name."""
    t = inputs
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in (("x", t.x), ("weight", t.weight), ("bias", t.bias))
        if tensor is not None
    }
    stats = [deepcopy(s) for s in (t.running_mean, t.running_var)]  # which keeps the strides
    y = function(
        *(leaves["x"], *stats, leaves.get("weight"), leaves.get("bias")),
        *(training, momentum, eps),
        channel_axis=t.channel_axis,
        **options,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), t.dy)
    results = {"y": y.detach()}
    results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    results |= dict(zip(("running_mean", "running_var"), stats, strict=True))
    return {name: result for name, result in results.items() if result is not None}


def wide(tensor: Tensor) -> np.ndarray:
    """The tensor's values in extended precision; float64 on a platform that has no wider type."""
    return tensor.detach().to("cpu", F64).numpy().astype(np.longdouble)


class Exact(NamedTuple):
    """A result in extended precision, and what the dtype of the arithmetic costs any algorithm.

    Terms are rounded before they are added up: four ulps of the largest one stay where they cancel,
    as in the gradient of a sum, or where the result's dtype is wider than the arithmetic's. And the
    batch's mean is a number of that dtype, off by up to half an ulp, which shifts every xhat. In
    float64 the sum it comes from has no wider dtype to be taken in: its n roundings, of half an ulp
    each and as often up as down, make that the square root of n times as much.
    """

    values: np.ndarray
    slack: float


def exact(inputs: Inputs, training: bool, momentum=MOMENTUM, eps=EPS) -> dict[str, Exact]:
    """What `run` should return: the formulas in extended precision."""
    t = inputs
    x, dy = (np.moveaxis(wide(a), t.axis, 0) for a in (t.x, t.dy))
    C, shape = len(x), x.shape
    x, dy = x.reshape(C, -1), dy.reshape(C, -1)
    n = x.shape[1]
    weight = (np.ones(C) if t.weight is None else wide(t.weight))[:, None]
    bias = (np.zeros(C) if t.bias is None else wide(t.bias))[:, None]
    arithmetic = accumulator(t.x.dtype)
    results = {}

    def add(name: str, values: np.ndarray, *terms: np.ndarray, shifted: np.ndarray | float = 0.0):
        if values.size == C:
            values = values.reshape(C)
        else:
            values = np.moveaxis(values.reshape(shape), 0, t.axis)
        term = max(map(largest, terms))
        results[name] = Exact(values, 4 * ulp(term, arithmetic) + largest(shifted))

    mean, var = (None if s is None else wide(s)[:, None] for s in (t.running_mean, t.running_var))
    if training:
        running = {"running_mean": mean, "running_var": var}
        mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        for (name, old), new in zip(running.items(), (mean, var * n / (n - 1)), strict=True):
            if old is not None:
                add(name, (1 - momentum) * old + momentum * new, old, new)
    else:
        add("running_mean", mean, mean)
        add("running_var", var, var)
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    ulps = n**0.5 / 2 if arithmetic == F64 else 1 / 2
    shift = ulps * ulp(largest(mean), arithmetic) * rstd if training else 0.0
    dweight, dbias = (dy * xhat).sum(1, keepdims=True), dy.sum(1, keepdims=True)
    dxhat = dy - (dbias + xhat * dweight) / n if training else dy
    shifted = shift * (np.abs(dweight) + np.abs(dbias * xhat)) / n
    add("y", xhat * weight + bias, xhat * weight, bias, shifted=shift * weight)
    add("dx", dxhat * weight * rstd, dy * weight * rstd, shifted=shifted * weight * rstd)
    add("dweight", dweight, dy * xhat, shifted=shift * dbias)
    add("dbias", dbias, dy)
    return results


def largest(values: np.ndarray | float) -> float:
    return float(np.abs(values).max(initial=0))


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbours in dtype at this magnitude."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (math.frexp(max(magnitude, info.smallest_normal))[1] - 1)


def assert_accurate(
    actual: Tensor,
    torch_result: Tensor,
    exact: np.ndarray,
    name: str = "result",
    slack: float = 0.0,
) -> None:
    """The largest error is at most twice torch's plus four ulps of the largest exact value.

    `slack` comes on top, where an error is derived that no algorithm can avoid.
    """
    assert (actual.dtype, actual.shape) == (torch_result.dtype, torch_result.shape), name
    error, torch_error = (largest(wide(t) - exact) for t in (actual, torch_result))
    assert math.isfinite(torch_error), f"{name}: torch's own result is not finite"
    allowed = 2 * torch_error + 4 * ulp(largest(exact), actual.dtype) + slack
    assert error <= allowed, f"{name}: error {error:.3g}, torch's {torch_error:.3g}, {allowed=:.3g}"


def assert_all_accurate(results, torch_results, exact_results, roundings: float = 1.0) -> None:
    """`assert_accurate` for dictionaries as `run` and `exact` return them."""
    for name, result in results.items():
        values, slack = exact_results[name]
        assert_accurate(result, torch_results[name], values, name, slack * roundings)


def assert_matches_torch(inputs: Inputs, training: bool, roundings: float = 1.0) -> None:
    """tribn's outputs, gradients and running statistics are as accurate as torch's.

    Output and input gradient are laid out as `empty_like` of the input.
    """
    results = run(batch_norm, inputs, training)
    torch_results = run(torch_batch_norm, inputs, training)
    assert_all_accurate(results, torch_results, exact(inputs, training), roundings)
    for name in ("y", "dx"):
        assert strides(results[name]) == strides(torch.empty_like(inputs.x)), name


def strides(x: Tensor) -> list[int]:
    """The strides that matter: those of axes with more than one element."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def without(inputs: Inputs, *names: str) -> Inputs:
    """The inputs with some of them None."""
    return replace(inputs, **dict.fromkeys(names))
