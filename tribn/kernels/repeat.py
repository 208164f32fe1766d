"""Calls that repeat an earlier one: its launch is known, and only memory is new."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tribn import kernels, launch
from tribn.kernels import host

Results = tuple[Tensor | None, ...]


class Repeat:
    """The one launch of a call, for tensors that have the shapes, dtypes and device of before."""

    def __init__(
        self, name: str, args: tuple[Any, ...], results: Results, launched: host.Launched
    ) -> None:
        """Of a call, what it has given, and what it has launched.

        Raises:
            KeyError: with tensors that are neither.
        """
        self.kept, tensors, self.numbers = launched
        places = {id(t): place for place, t in enumerate((*args, *results, None))}
        self.pick = itemgetter(*[places[id(t)] for t in tensors])
        self.sm_margin = launch.sm_margin
        given = [i for i, t in enumerate(args) if isinstance(t, Tensor)]
        self.count = max(given) + 1
        self.rest = args[self.count :]
        large = [(i, args[i]) for i in given if args[i].dim() > 1]
        self.large = [(i, t.stride(), t.data_ptr() % 16) for i, t in large]
        self.device = args[0].device
        self.index = self.device.index
        self.new = [t if t is None else _like(t) for t in results]
        arguments = getattr(torch.ops.tribn, name).default._schema.arguments
        self.written = [i for i in given if arguments[i].is_write]

    def __call__(self, args: tuple[Any, ...]) -> Results | None:
        """What the call gives; None if it is another one."""
        if args[self.count :] != self.rest or launch.sm_margin != self.sm_margin:
            return None
        for i, stride, offset in self.large:
            t = args[i]
            if t.stride() != stride or t.data_ptr() % 16 != offset:
                return None
        if self.index is not None and self.index != torch.cuda.current_device():
            return None
        results = [new and new() for new in self.new]
        tensors = self.pick((*args, *results, None))
        host.start(self.kept, host.arguments(self.kept, self.device, tensors, self.numbers))
        if self.written:
            increment_version([args[i] for i in self.written])
        return results


def _like(t: Tensor) -> Callable[[], Tensor]:
    """Makes tensors like this one, on the current device."""
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{t.device.type}", None)
    if fast is not None:  # which compiled code uses
        return partial(fast, tuple(t.shape), t.stride(), t.dtype)
    return partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=t.device)


def repeated(name: str, args: tuple[Any, ...], repeats: dict[str, Repeat | None]) -> Results:
    """Calls the launcher of an operator, or repeats what it has launched before."""
    repeat = repeats.get(name)
    if repeat is not None:
        try:
            results = repeat(args)
        except host.Refused:
            results = None
        if results is not None:
            return results
    function = getattr(kernels, name)
    if name in repeats and repeat is None:
        return function(*args)
    with host.recording() as launches:
        results = function(*args)
    try:
        (launched,) = launches
        repeats[name] = Repeat(name, args, results, launched)
    except (KeyError, ValueError):
        repeats[name] = None
    return results
