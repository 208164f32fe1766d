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

_lib = torch.library.Library("tribn", "DEF")
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _kernel(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            from tribn import kernels
        except ModuleNotFoundError as error:
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


def _fake_batch_stats(x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[axis], dtype=reference.accumulator(x.dtype))
    return mean, torch.empty_like(mean), x.new_empty((), dtype=torch.int64)


batch_stats = _define(
    "batch_stats",
    "(Tensor x, int axis) -> (Tensor mean, Tensor var, Tensor count)",
    _fake_batch_stats,
)


def _fake_batch_norm_train(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[args[-1]], dtype=reference.accumulator(x.dtype))
    return torch.empty_like(x), mean, torch.empty_like(mean)


batch_norm_train = _define(
    "batch_norm_train",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, float? momentum, float eps, int axis)"
    " -> (Tensor y, Tensor mean, Tensor var)",
    _fake_batch_norm_train,
)


batch_norm_eval = _define(
    "batch_norm_eval",
    "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, int axis)"
    " -> Tensor y",
    lambda x, *args: torch.empty_like(x),
)


def _fake_batch_norm_backward(
    dy: Tensor, x: Tensor | None, mean: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mask = args[-1]
    grad = torch.empty_like(dy if x is None else x) if mask[0] else None
    dweight, dbias = (
        dy.new_empty(mean.shape, dtype=reference.accumulator(dy.dtype)) if wanted else None
        for wanted in mask[1:]
    )
    return grad, dweight, dbias


batch_norm_backward = _define(
    "batch_norm_backward",
    "(Tensor dy, Tensor? x, Tensor mean, Tensor var, Tensor? weight, float eps, bool training,"
    " int axis, bool[3] mask) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_batch_norm_backward,
)
