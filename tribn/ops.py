"""The operators: schemas, shapes for tracing, and which implementation serves which device.

CPU tensors run `tribn.reference`, CUDA tensors run `tribn.kernels`. With TRITON_INTERPRET=1 in the
environment at import, CPU tensors run the kernels too, in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tribn import reference
from tribn.reference import accumulator, new_bits, output

_lib = torch.library.Library("tribn", "DEF")
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _kernel(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            from tribn import kernels
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ImportError("tribn needs Triton for this tensor: pip install triton") from error
        return getattr(kernels, name)(*args)

    return call


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Defines tribn::name; `reference` and `kernels` implement it under the same name."""
    _lib.define(name + schema)
    kernel = _kernel(name)
    _lib.impl(name, kernel if _INTERPRET else getattr(reference, name), "CPU")
    _lib.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"tribn::{name}", fake, lib=_lib)
    return getattr(torch.ops.tribn, name).default


# The activation by name, its parameters, and whether it precedes the normalization.
_ACTIVATION = "str? activation, float p, float q, bool act_first"


def _fake_batch_stats(x: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[axis], dtype=accumulator(x.dtype))
    return mean, torch.empty_like(mean), x.new_empty((), dtype=torch.int64)


batch_stats = _define(
    "batch_stats",
    "(Tensor x, Tensor? mask, int axis) -> (Tensor mean, Tensor var, Tensor count)",
    _fake_batch_stats,
)


def _fake_batch_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    *args: Any,
) -> tuple[Tensor | None, ...]:
    axis, save_bits = args[7], args[-1]
    y = output(x, residual)
    mean = x.new_empty(x.shape[axis], dtype=accumulator(y.dtype))
    count = None if mask is None else x.new_empty((), dtype=torch.int64)
    return y, mean, torch.empty_like(mean), count, new_bits(y, axis) if save_bits else None


batch_norm_train = _define(
    "batch_norm_train",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
    " float? momentum, int correction, bool skip_nonfinite, float eps, int axis,"
    f" {_ACTIVATION}, bool save_bits)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor count, Tensor bits)",
    _fake_batch_norm_train,
)


def _fake_batch_norm_eval(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor | None]:
    y = output(x, residual)
    return y, new_bits(y, args[2]) if args[-1] else None


batch_norm_eval = _define(
    "batch_norm_eval",
    "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual,"
    f" Tensor? mask, float eps, int axis, {_ACTIVATION}, bool save_bits)"
    " -> (Tensor y, Tensor bits)",
    _fake_batch_norm_eval,
)


def _fake_batch_norm_backward(
    dy: Tensor, x: Tensor | None, mean: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    dtype, residual_dtype, wanted = args[-3:]
    like = dy if x is None else x
    dx = torch.empty_like(like, dtype=dtype) if wanted[0] else None
    dweight, dbias = (
        dy.new_empty(mean.shape, dtype=accumulator(dy.dtype)) if w else None for w in wanted[1:3]
    )
    return dx, dweight, dbias, torch.empty_like(like, dtype=residual_dtype) if wanted[3] else None


batch_norm_backward = _define(
    "batch_norm_backward",
    "(Tensor dy, Tensor? x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? bits, Tensor? mask, Tensor? count, float eps, bool training,"
    f" int axis, {_ACTIVATION}, bool from_output, ScalarType dtype, ScalarType? residual_dtype,"
    " bool[4] wanted)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _fake_batch_norm_backward,
)
