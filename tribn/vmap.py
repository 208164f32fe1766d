"""What torch.func.vmap does with batch norm: the examples become channels, or go one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def levels(kind: str) -> int:
    """How many of torch.func's transforms of a kind, "Jvp" or "Vmap", are at work."""
    functorch = torch._C._functorch
    wanted = getattr(functorch.TransformType, kind)
    return sum(level.key() == wanted for level in functorch.get_interpreter_stack() or ())


Dims = Sequence[Any]  # the axis of the examples in each argument, None in tensors without


def fold(t: Tensor | None, dim: int | None, axis: int | None, examples: int) -> Tensor | None:
    """The examples' tensors, or the one of all, side by side along the channels' axis."""
    if not examples:
        raise ValueError("torch.func.vmap has no examples: give it at least one")
    if t is None or axis is None:
        return t
    t = t.unsqueeze(0).expand(examples, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, axis).flatten(axis, axis + 1)


def unfold(t: Tensor | None, axis: int, examples: int) -> Tensor | None:
    """The other way: the examples' axis comes before the channels'."""
    return None if t is None else t.unflatten(axis, (examples, t.shape[axis] // examples))


def one_by_one(
    function: Callable[..., tuple[Tensor | None, ...]], examples: int, dims: Dims, args: Any
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """A call for every example, in their order, and where the examples are in what they return."""

    def example(n: int) -> list[Any]:
        of = zip(args, dims, strict=True)
        return [a.select(d, n) if isinstance(d, int) else a for a, d in of]

    results = zip(*(function(*example(n)) for n in range(examples)), strict=True)
    stacked = tuple(None if r[0] is None else torch.stack(r) for r in results)
    return stacked, tuple(None if t is None else 0 for t in stacked)
