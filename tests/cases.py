"""The one table of shapes, layouts and tolerances, and the oracle they are measured against."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tribn.functional import batch_norm
from tribn.launch import Layout
from tribn.reference import accumulator

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Each program of a grid takes the interpreter milliseconds.
SLOW = pytest.mark.skipif(INTERPRET, reason="thousands of programs: minutes in the interpreter")


ALIKE = "the same whatever computes the operators: run it without TRITON_INTERPRET=1"
OF_NO_KERNEL = pytest.mark.skipif(INTERPRET, reason=ALIKE)


def of_no_kernel() -> None:
    """Skips the rest of a file in the interpreter's pass, which is there to check kernels."""
    if INTERPRET:
        pytest.skip(ALIKE, allow_module_level=True)


F16, BF16, F32, F64 = DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOMENTUM, EPS = 0.3, 1e-5
PLAIN = (None, 0.0, 0.0, False)  # to an operator: no activation


def least_columns(layout: Layout) -> int:
    """How many a tile must have at least, for its slab to be of whole channels."""
    return 1 << (layout.whole - 1).bit_length()


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
    return [pytest.param(case, id=str(case), marks=[SLOW] if case.large else []) for case in cases]


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
    if x.is_cuda and weight is None and bias is not None:  # torch's backward fails there
        weight = torch.ones_like(bias)
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
    tensors = {"x": t.x, "weight": t.weight, "bias": t.bias, "residual": options.get("residual")}
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point()
    }
    if "residual" in leaves:
        options["residual"] = leaves["residual"]
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
    as in the gradient of a sum, or where the result's dtype is wider than the arithmetic's. Sums
    are rounded on the way, where n terms of either sign have come to the square root of n of them,
    which may be far more than in the end: an ulp of that. And the batch's mean is a number of that
    dtype, off by up to half an ulp, which shifts every xhat. In float64 the sum it comes from has
    no wider dtype to be taken in: its n roundings, of half an ulp each and as often up as down,
    make that the square root of n times as much.
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

    def summed(terms: np.ndarray) -> float:
        return ulp(largest(np.sqrt((terms**2).sum(1))), arithmetic)

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
    on_the_way = summed(dy * xhat)
    add("dweight", dweight, dy * xhat, shifted=np.abs(shift * dbias) + on_the_way)
    add("dbias", dbias, dy, shifted=summed(dy))
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


# What is fused around the normalization: an activation, a residual, a mask.

ACTIVATIONS: dict[str, torch.nn.Module] = {
    "relu": torch.nn.ReLU(),
    "relu6": torch.nn.ReLU6(),
    "leaky_relu": torch.nn.LeakyReLU(),
    "elu": torch.nn.ELU(),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"),
    "silu": torch.nn.SiLU(),
    "mish": torch.nn.Mish(),
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
    "softplus": torch.nn.Softplus(),
    "hardswish": torch.nn.Hardswish(),
    "hardsigmoid": torch.nn.Hardsigmoid(),
}
ORDERS = ("norm_act", "act_norm")
ONE_BIT = ("relu", "relu6", "leaky_relu")

# The input's shape and layout; sizes that eight does not divide.
FUSED_LAYOUTS: dict[str, Case] = {
    "contiguous": Case((3, 5, 3, 4)),
    "channels_last": Case((2, 9, 3, 3), layout="channels_last"),
    "channels_last_3d": Case((2, 3, 2, 3, 3), layout="channels_last_3d"),
    "NC": Case((17, 6)),
    "NLC": Case((3, 6, 5), channel_axis=-1),
    "side by side": Case((5, 8, 7)),
    "pixels": Case((4, 3, 2, 4), layout="channels_last"),
    "sliced": Case((3, 5, 9), layout="sliced"),
}
# A residual with the given values, which are laid out as the input is.
RESIDUALS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "same": lambda x: x,
    "transposed": _transposed,
    "sliced": _sliced,
    "wider": lambda x: x.to(F64 if x.dtype == F32 else F32),
    "bfloat16": lambda x: x.to(BF16),
    "integer": lambda x: x.int(),
}
MASKS = ("none", "random", "lengths", "rows", "nothing")


def lengths_of(shape: Sequence[int]) -> Tensor:
    """The lengths of the rows of a mask of this shape: 0, 2, 4 and so on."""
    return (2 * torch.arange(shape[0])).clamp(max=shape[-1])


def mask_of(kind: str, shape: Sequence[int], g: torch.Generator) -> Tensor | None:
    """One of the `MASKS` for an input that has this shape without its channel axis."""
    shape = tuple(shape)
    ahead = (-1, *(1,) * (len(shape) - 1))
    if kind == "none":
        return None
    if kind == "random":
        return torch.rand(shape, generator=g) < 0.6
    if kind == "lengths":
        return (torch.arange(shape[-1]) < lengths_of(shape).view(ahead)).expand(shape)
    if kind == "rows":
        return (torch.arange(shape[0]) % 2 == 1).view(ahead).expand(shape)
    assert kind == "nothing"
    return torch.zeros(shape, dtype=torch.bool)


@dataclass(frozen=True)
class Fused:
    """One way to call batch_norm with all that can be fused."""

    training: bool
    activation: str
    order: str
    residual: str
    mask: str
    layout: str
    dtype: torch.dtype

    def __str__(self) -> str:
        mode = "training" if self.training else "eval"
        return "-".join((mode, *map(str, list(vars(self).values())[1:]))).replace("torch.", "")

    def call(self, device: str = "cpu") -> tuple[Inputs, dict[str, Any]]:
        """The inputs, and the keywords beside them. What the mask leaves out holds NaN."""
        case = replace(FUSED_LAYOUTS[self.layout], dtype=self.dtype, std=3.0)
        t = Inputs.of(case, device)
        g = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        options: dict[str, Any] = {"activation": self.activation, "order": self.order}
        if residual_of := RESIDUALS[self.residual]:
            values = torch.randn(case.shape, generator=g, dtype=F64) * 3
            options["residual"] = residual_of(torch.empty_like(t.x).copy_(values))
            t = replace(t, dy=t.dy.to(torch.result_type(t.x, options["residual"])))
        mask = mask_of(self.mask, [size for d, size in enumerate(case.shape) if d != t.axis], g)
        if mask is not None:
            options["mask"] = mask = mask.to(device)
            for tensor in (t.x, t.dy, options.get("residual")):
                if tensor is not None and tensor.is_floating_point():
                    tensor.movedim(t.axis, -1)[~mask] = math.nan
        return t, options


def pairwise(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows in which every value of a factor meets every value of every other.

    Greedily: a row starts with the first pair that has not occurred, and takes of each other factor
    the value that makes the most new pairs with the row so far, the least used of them.
    """

    def pair(*values: tuple[str, Any]) -> frozenset[tuple[str, Any]]:
        return frozenset(values)

    missing = {
        pair((a, v), (b, w)): {a: v, b: w}
        for a, b in itertools.combinations(factors, 2)
        for v, w in itertools.product(factors[a], factors[b])
    }
    rows, uses = [], Counter()
    while missing:
        row = dict(next(iter(missing.values())))
        for name in factors:
            if name not in row:
                new = {
                    v: sum(pair((name, v), other) in missing for other in row.items())
                    for v in factors[name]
                }
                row[name] = max(new, key=lambda v: (new[v], -uses[name, v]))
        uses.update(row.items())
        for two in itertools.combinations(row.items(), 2):
            missing.pop(pair(*two), None)
        rows.append(row)
    return rows


FACTORS: dict[str, Sequence[Any]] = {
    "activation": (None, *ACTIVATIONS),
    "residual": tuple(RESIDUALS),
    "layout": tuple(FUSED_LAYOUTS),
    "mask": MASKS,
    "dtype": DTYPES,
    "order": ORDERS,
    "training": (True, False),
}
FUSED = [Fused(**row) for row in pairwise(FACTORS)]


def compose(
    x, running_mean, running_var, weight, bias, training, momentum, eps,
    channel_axis=1, activation=None, order="norm_act", residual=None, mask=None,
):  # fmt: skip
    """batch_norm by torch's own operators, one after another, on what the mask counts in."""
    act = ACTIVATIONS.get(activation, activation) or torch.nn.Identity()
    if mask is not None:
        rows = [None if t is None else t.movedim(channel_axis, -1)[mask] for t in (x, residual)]
        y = compose(
            *(rows[0], running_mean, running_var, weight, bias),
            *(training and len(rows[0]) > 0, momentum, eps, 1, act, order, rows[1]),
        )
        out = y.new_zeros(*mask.shape, x.shape[channel_axis])
        return out.index_put((mask,), y).movedim(-1, channel_axis)
    z = torch_batch_norm(
        *(act(x) if order == "act_norm" else x, running_mean, running_var, weight, bias),
        *(training, momentum, eps, channel_axis),
    )
    z = z if residual is None else z + residual
    return act(z) if order == "norm_act" else z


def converted(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers, those that are floating in another dtype."""
    return {
        name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in values.items()
    }


# torch's gradient of hardsigmoid has 1/6 in float32, whatever the dtype, and no derivative.
EXACT = {"hardsigmoid": lambda z: torch.nn.functional.relu6(z + 3) / 6}
STEEPEST = 1.5  # the largest derivative of an activation: hardswish at 3


def fused_exact(inputs: Inputs, training: bool, options: dict[str, Any]) -> dict[str, Exact]:
    """What `run` should return: the composition in float64, and what the arithmetic's dtype costs.

    That is four ulps of the largest term of a sum, as in `exact`. And the composition in float64 is
    no measure of itself: it is taken to lose as many ulps as it loses in float32.
    """
    t, o = Inputs(**converted(vars(inputs), F64)), converted(options, F64)
    name = o["activation"]
    o["activation"] = act = EXACT.get(name, ACTIVATIONS.get(name, name))
    results = run(compose, t, training, **o)

    def rows(x: Tensor) -> Tensor:
        x, mask = x.movedim(t.axis, -1), o.get("mask")
        return x.flatten(0, -2) if mask is None else x[mask]

    a, dy = rows(t.x), STEEPEST * rows(t.dy)
    if act is not None and o["order"] == "act_norm":
        a = act(a)
    mean, var = t.running_mean, t.running_var
    if training and len(a):
        mean, var = a.mean(0), a.var(0, correction=0)
    rstd = (var + EPS).rsqrt()
    xhat = (a - mean) * rstd
    residual = o.get("residual")
    terms = {
        "y": [xhat * t.weight, t.bias] + ([] if residual is None else [rows(residual)]),
        "dx": [dy * t.weight * rstd],
        "dweight": [dy * xhat],
        "dbias": [dy],
    }
    dtype = accumulator(inputs.x.dtype)
    slack = dict.fromkeys(results, 0.0)
    for name, values in terms.items():
        slack[name] = 4 * ulp(max(largest(wide(value)) for value in values), dtype)
    if dtype == F64:
        narrow = Inputs(**converted(vars(inputs), F32)), converted(options, F32)
        same = Inputs(**converted(vars(narrow[0]), F64)), converted(narrow[1], F64)
        lossy, lossless = (run(compose, i, training, **o) for i, o in (narrow, same))
        for name in slack:
            error = largest(wide(lossy[name]) - wide(lossless[name]))
            slack[name] += 2 * error * torch.finfo(F64).eps / torch.finfo(F32).eps
    return {name: Exact(wide(result), slack[name]) for name, result in results.items()}


def assert_fused_accurate(inputs: Inputs, training: bool, options: dict[str, Any]) -> None:
    """`assert_matches_torch` for the composition; what the mask leaves out is zero."""
    results = run(batch_norm, inputs, training, **options)
    torch_results = run(compose, inputs, training, **options)
    assert_all_accurate(results, torch_results, fused_exact(inputs, training, options))
    for name in ("y", "dx"):
        assert strides(results[name]) == strides(torch.empty_like(inputs.x)), name
    if (mask := options.get("mask")) is not None:
        for name in results.keys() & {"y", "dx", "dresidual"}:
            left_out = results[name].movedim(inputs.axis, -1)[~mask]
            assert torch.equal(left_out, torch.zeros_like(left_out)), name
