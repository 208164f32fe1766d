"""The operators: schemas, shapes for tracing, and which implementation serves which device.

CPU tensors run `tribn.reference`, CUDA tensors run `tribn.kernels`. With TRITON_INTERPRET=1 in the
environment at import, CPU tensors run the kernels too, in Triton's interpreter. The dispatcher
decides; calls that repeat an earlier one, for which it would do nothing else, go past it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tribn import reference
from tribn.reference import accumulator, new_bits, output

_lib = torch.library.Library("tribn", "DEF")
# Private to PyTorch: without it every call is checked and dispatched.
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_function_modes = torch._C._len_torch_function_stack
_profiling = torch._C._autograd._profiler_enabled
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _kernels() -> Any:
    try:
        from tribn import kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError("tribn needs Triton for this tensor: pip install triton") from error
    return kernels


# By operator, what repeats its launch for tensors that are alike: see `tribn.kernels.repeat`
Repeats = dict[str, Callable[[tuple[Any, ...]], Any] | None]


def run(operator: Any, repeats: Repeats | None, args: tuple[Any, ...]) -> Any:
    """Calls an operator; with `repeats` of its tensors, which are plain, without the dispatcher."""
    if repeats is None:
        return operator(*args)
    name = operator._opname
    repeat = repeats.get(name)
    if repeat is not None and (results := repeat(args)) is not None:
        return results
    function = _implementation(name, args[0])
    if args[0].is_cpu and not _INTERPRET:
        return function(*args)
    from tribn.kernels.repeat import call_and_remember

    return call_and_remember(name, function, args, repeats)


def _implementation(name: str, x: Tensor) -> Callable[..., Any]:
    return getattr(reference if x.is_cpu and not _INTERPRET else _kernels(), name)  # type: ignore[no-any-return]


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Defines tribn::name; `reference` and `kernels` implement it under the same name."""
    _lib.define(name + schema)
    operator = getattr(torch.ops.tribn, name).default

    def run(*args: Any) -> Any:
        return _implementation(name, args[0])(*args)

    for key in ("CPU", "CUDA"):
        _lib.impl(name, run, key)
    torch.library.register_fake(f"tribn::{name}", fake, lib=_lib)
    return operator


def differentiate(operator: Any, function: Callable[..., Any]) -> None:
    """What takes an operator's place where a gradient may be asked for."""

    def run(keys: Any, *args: Any) -> Any:
        # In a function's forward neither is on.
        grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if grad or (forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()):
            return function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _lib.impl(operator._opname, run, "Autograd", with_keyset=True)


class Signature:
    """What tensors were like, by all that matters but their values, if they were plain.

    Plain tensors are those in whose operators nothing has a say but CPU, CUDA and autograd: no
    subclass, mode, transform or tracer. The comparison is that of torch.compile's guards: types,
    dtypes, devices, sizes, strides, requires_grad and dispatch keys, also those that modes add.
    """

    def __init__(self) -> None:
        self._last: tuple[int, Any, Any] = 0, None, None  # how many, their guards, what goes along
        self._met = False

    def recall(self, tensors: Sequence[Tensor]) -> tuple[Any, Repeats] | None:
        """What was remembered along with the last tensors, and repeats, if these are like them."""
        count, guards, known = self._last
        same = (
            count == len(tensors)
            and guards.check(*tensors)
            and not _function_modes()
            and not _profiling()  # which shows operators
        )
        return known if same else None

    def remember(self, tensors: Sequence[Tensor], value: Any) -> None:
        """Not at the first time, which may remain the only one: this takes longer than it saves."""
        if self._met and _TensorGuards is not None and _plain(tensors):
            guards = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self._last = len(tensors), guards, (value, {})
        self._met = True


# CPU and CUDA have the same keys but for these.
_PLAIN = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
for _key in ("AutogradCPU", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView", "BackendSelect"):
    _PLAIN = _PLAIN.add(getattr(torch._C.DispatchKey, _key))


def _plain(tensors: Sequence[Tensor]) -> bool:
    keys = torch._C._dispatch_tls_local_include_set()
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or not (t.is_cpu or t.is_cuda):
            return False
        keys = keys | torch._C._dispatch_keys(t)
    keys = keys - torch._C._dispatch_tls_local_exclude_set() - _PLAIN
    return keys.highestPriorityTypeId() == torch._C.DispatchKey.Undefined


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
differentiate(batch_stats, lambda x, *args: batch_stats(x.detach(), *args))  # no gradients


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


# Synchronized training: stages, between which the ranks' float64 rows are gathered.


def _fake_sync_stats(x: Tensor, mask: Tensor | None, dtype: torch.dtype, axis: int, *_: Any) -> Any:
    return x.new_empty(2 + 2 * x.shape[axis], dtype=torch.float64)


sync_stats = _define(
    "sync_stats",
    f"(Tensor x, Tensor? mask, ScalarType dtype, int axis, {_ACTIVATION}) -> Tensor row",
    _fake_sync_stats,
)


def _fake_sync_combine(rows: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = rows.new_empty((rows.shape[1] - 2) // 2, dtype=args[-1])
    return mean, torch.empty_like(mean), rows.new_empty((), dtype=torch.int64)


sync_combine = _define(
    "sync_combine",
    "(Tensor rows, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, float? momentum, int correction, bool skip_nonfinite,"
    " ScalarType dtype) -> (Tensor mean, Tensor var, Tensor count)",
    _fake_sync_combine,
)


def _fake_sync_backward_reduce(
    dy: Tensor, x: Tensor | None, mean: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    residual_dtype, wanted = args[-2:]
    like = dy if x is None else x
    dweight, dbias = (torch.empty_like(mean) if w else None for w in wanted[:2])
    dresidual = torch.empty_like(like, dtype=residual_dtype) if wanted[2] else None
    return mean.new_empty(1 + 2 * len(mean), dtype=torch.float64), dweight, dbias, dresidual


sync_backward_reduce = _define(
    "sync_backward_reduce",
    "(Tensor dy, Tensor? x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? bits, Tensor? mask, float eps, int axis,"
    f" {_ACTIVATION}, bool from_output, ScalarType? residual_dtype, bool[3] wanted)"
    " -> (Tensor sums, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _fake_sync_backward_reduce,
)


sync_sum = _define(
    "sync_sum", "(Tensor rows) -> Tensor sum", lambda rows: rows.new_empty(rows.shape[1:])
)


def _fake_sync_backward_dx(dy: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, dtype=args[-1])


sync_backward_dx = _define(
    "sync_backward_dx",
    "(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? bits, Tensor? mask, Tensor count, Tensor sums, float eps, int axis,"
    f" {_ACTIVATION}, bool from_output, ScalarType dtype) -> Tensor dx",
    _fake_sync_backward_dx,
)
