"""Batch normalization across processes: collectives, and the operators made of stages and them.

In each direction every rank contributes a row of float64 numbers and gathers those of all ranks,
which each merges by the same formula in the order of ranks: all have the same bits, whoever came
first. The host waits for nothing on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tribn import ops
from tribn.reference import accumulator, check_same, describe, kind


class Ranks(NamedTuple):
    """The processes of a group, two or more."""

    group: str  # its name
    size: int

    @classmethod
    def of(cls, group: Any) -> Ranks | None:
        """Those of a process group; None if this process is the only one.

        Raises:
            ValueError: this process does not belong to it.
            TypeError: it is none.
        """
        check_group(group)
        size = torch.distributed.get_world_size(group)
        if size < 0:
            raise ValueError(
                "process_group is one that this process does not belong to: give each process the "
                "group that has it"
            )
        return cls(group.group_name, size) if size > 1 else None


def check_group(group: Any) -> None:
    """Raises a TypeError unless it is a process group, or what others than its members have."""
    if group is None:
        return
    given = torch.distributed.is_available() and (
        isinstance(group, torch.distributed.ProcessGroup)
        or group == torch.distributed.GroupMember.NON_GROUP_MEMBER
    )
    if not given:
        raise TypeError(
            f"process_group is {group!r} of type {type(group).__name__}: give the ProcessGroup "
            "that torch.distributed.new_group returns, or None for all processes"
        )


def batch_norm_train(
    ranks: Ranks | None, repeats: ops.Repeats | None, args: tuple[Any, ...]
) -> Any:
    """The operator of that name, with the batches of all ranks as one."""
    if ranks is None:
        return ops.run(ops.batch_norm_train, repeats, args)
    return _train(ranks, repeats, *args)


def batch_norm_backward(
    ranks: Ranks | None, repeats: ops.Repeats | None, args: tuple[Any, ...]
) -> Any:
    """The operator of that name; the gradients of weight and bias are of this rank's batch."""
    if ranks is None:
        return ops.run(ops.batch_norm_backward, repeats, args)
    return _backward(ranks, repeats, *args)


def _train(
    ranks: Ranks,
    repeats: ops.Repeats | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    correction: int,
    skip_nonfinite: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    _, axis, *activation, _ = options
    dtype = accumulator(
        x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    )
    row = ops.run(ops.sync_stats, repeats, (x, mask, dtype, axis, *activation))
    rows = gather(row, ranks, kind(x.dtype, x.shape[axis]))
    running = (running_mean, running_var, num_batches_tracked)
    tracking = (momentum, correction, skip_nonfinite, dtype)
    mean, var, count = ops.run(ops.sync_combine, repeats, (rows, *running, *tracking))
    tensors = (x, mean, var, weight, bias, residual, mask)
    y, bits = ops.run(ops.batch_norm_eval, repeats, (*tensors, *options))
    return y, mean, var, count, bits


def _backward(
    ranks: Ranks,
    repeats: ops.Repeats | None,
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mask: Tensor | None,
    count: Tensor,
    eps: float,
    training: bool,
    axis: int,
    *options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    *activation, dtype, residual_dtype, wanted = options
    tensors = (dy, x, mean, var, weight, bias, residual, bits, mask)
    options = (eps, axis, *activation)
    sums, *grads = ops.run(
        *(ops.sync_backward_reduce, repeats),
        (*tensors, *options, residual_dtype, wanted[1:]),
    )
    dx = None
    if wanted[0]:
        rows = gather(sums, ranks, kind(dy.dtype, len(mean), "backward"))
        sums = ops.run(ops.sync_sum, repeats, (rows,))
        args = (*tensors, count, sums, *options, dtype)
        dx = ops.run(ops.sync_backward_dx, repeats, args)
    return dx, *grads


def is_dtensor(t: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # which takes a second to import
    return tensor is not None and isinstance(t, tensor.DTensor)


def on_shards(normalize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`tribn.functional.normalize` of a DTensor: all shards are one batch, and so is the output.

    What else it is given may be DTensors too. Gradients of weight and bias that are none are those
    of the local shard.

    Raises:
        ValueError: input is placed otherwise than Shard along one dimension of the mesh, by another
            axis than the channels', and Replicate; a tensor per channel otherwise than Replicate;
            another otherwise than the input, or lengths where that is divided by their axis.
    """

    def run(tensors: Sequence[Any], numbers: Sequence[Any], process_group: Any, layer: Any) -> Any:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        input, residual, mask, lengths, *per_channel, num_batches_tracked = tensors
        layer._check_input(input)
        mesh, placements, axis = input.device_mesh, input.placements, numbers[3] % input.dim()
        dims = [d for d, placement in enumerate(placements) if not placement.is_replicate()]
        if len(dims) > 1 or not all(placements[d].is_shard() for d in dims):
            raise ValueError(
                f"input is a DTensor placed {placements}: it must be Shard along one dimension of "
                "the mesh at most, and else Replicate; redistribute it"
            )
        if any(placements[d].dim == axis for d in dims):
            raise ValueError(
                f"input is a DTensor placed {placements}, which divides its channels, axis {axis}: "
                "redistribute it to be divided along another axis"
            )
        summed = [Partial() if d in dims else Replicate() for d in range(mesh.ndim)]

        def whole(t: Any) -> Any:
            if not isinstance(t, DTensor):
                return t
            if not all(placement.is_replicate() for placement in t.placements):
                raise ValueError(
                    f"a parameter or running statistic is a DTensor placed {t.placements}: it must "
                    "be Replicate; redistribute it"
                )
            return t.to_local(grad_placements=summed)

        def local(name: str, t: Any) -> Any:
            if name == "lengths" and t is not None and any(placements[d].dim != 0 for d in dims):
                raise ValueError(
                    f"input is a DTensor placed {placements}, which divides the axis that lengths "
                    "are of: redistribute it, or give a mask"
                )
            if not isinstance(t, DTensor):
                return t
            wanted = placements
            if name == "num_batches_tracked":
                wanted = (Replicate(),) * mesh.ndim
            if name == "mask":  # which has no axis of channels
                wanted = tuple(
                    Shard(p.dim - (p.dim > axis)) if p.is_shard() else p for p in placements
                )
            if (t.device_mesh, t.placements) != (mesh, wanted):
                raise ValueError(
                    f"{name} is a DTensor placed {t.placements} on {t.device_mesh}: with input "
                    f"placed {placements} on {mesh} it must be {wanted}; redistribute it"
                )
            return t.to_local()

        others = {"residual": residual, "mask": mask, "lengths": lengths}
        y = normalize(
            (
                *(input.to_local(), *(local(name, t) for name, t in others.items())),
                *(*map(whole, per_channel), local("num_batches_tracked", num_batches_tracked)),
            ),
            *(numbers, mesh.get_group(dims[0]) if dims else None, layer),
        )
        like = torch.empty_strided(input.shape, input.stride(), device="meta")
        return DTensor.from_local(
            y,
            mesh,
            placements,
            run_check=False,
            shape=input.shape,
            stride=torch.empty_like(like).stride(),
        )

    return run


class _Sum(torch.autograd.Function):
    """The sum of all ranks' tensors, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(t: Tensor, ranks: Ranks) -> Tensor:
        number = kind(t.dtype, len(t), "the gradient of backward")
        row = torch.cat((t.new_full((1,), number, dtype=torch.float64), t))
        return ops.sync_sum(gather(row, ranks, number))[1:].to(t.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.ranks), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Sum.apply(tangent, ctx.ranks)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], t: Tensor, ranks: Ranks) -> tuple[Tensor, int]:
        examples = t.movedim(in_dims[0], 0)
        return _Sum.apply(examples.flatten(), ranks).view(examples.shape), 0


def all_sum(t: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum of all ranks' (C,) tensors, which can be differentiated."""
    return t if ranks is None else _Sum.apply(t, ranks)


def gather(row: Tensor, ranks: Ranks, kind: int) -> Tensor:
    """All ranks' rows, [ranks, len(row)], of which each begins with its kind, `kind`.

    Raises:
        ValueError, RuntimeError: see `agree`; another rank's row is of another kind that the ranks
            have had in common, which only shows where the host can look, and elsewhere to the
            operators that merge rows; the collective has failed.
    """
    if host_looks(row):
        return torch.ops.tribn.gather(row, *ranks, kind)  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():
        torch.ops.tribn.agree(row, ranks.group, kind)
        return _gathered(row, ranks)
    agree(row, ranks.group, kind)
    return _gathered_or_said(row, ranks)


def host_looks(row: Tensor) -> bool:
    """Whether the host waits for a row's values anyway, and can look at them."""
    return not row.is_cuda


def gather_and_look(row: Tensor, group: str, size: int, kind: int) -> Tensor:
    """`gather` on a CPU: each row as long as any may be."""
    agree(row, group, kind)
    padded = row.new_zeros(_met(_resolve(group)).longest)
    padded[: len(row)] = row
    rows = _gathered_or_said(padded, Ranks(group, size))
    check_same(rows[:, 0].long().tolist())
    return rows[:, : len(row)].contiguous()


def _gathered_or_said(row: Tensor, ranks: Ranks) -> Tensor:
    try:
        return _gathered(row, ranks)
    except RuntimeError as error:
        group = _resolve(ranks.group)
        raise RuntimeError(
            f"a collective of synchronized batch norm failed on rank {group.rank()} of "
            f"{ranks.size} in the process group: another has died, or did not come within "
            f"{_timeout(group, row.device)}{_new(group)}. All ranks must call the same layers in "
            "the same order, backward too. Running statistics move only when forward's collective "
            "has succeeded"
        ) from error


def _gathered(row: Tensor, ranks: Ranks) -> Tensor:
    collectives = torch.ops._c10d_functional
    rows = collectives.all_gather_into_tensor(row.contiguous(), ranks.size, ranks.group)
    rows = collectives.wait_tensor(rows)
    return rows.view(ranks.size, -1)  # type: ignore[no-any-return]


# Rows of different lengths must never meet in a collective: one that is told to expect another
# length aborts the process, or gives wrong numbers. Whoever comes with a kind that is new to it
# waits until all ranks of the group have said which they come with. So all have met with the same
# kinds whenever rows meet, and know the same longest row.

GIVEN_UP = b"given up"  # of a turn: not all ranks have come in time


@dataclass
class _Met:
    """What a process group's ranks are known to have in common."""

    kinds: set[int] = field(default_factory=set)
    longest: int = 0  # row of these kinds
    turns: int = 0  # in which this rank has said what it comes with, or which it has missed


_groups: WeakKeyDictionary[Any, _Met] = WeakKeyDictionary()


def _met(group: Any) -> _Met:
    if group not in _groups:
        _groups[group] = _Met()
    return _groups[group]


def agree(row: Tensor, group: str, kind: int) -> None:
    """Waits, if it is of a new kind, for all ranks of a group to come with a row of that kind.

    Raises:
        ValueError: another rank has come with another kind.
        RuntimeError: not all ranks have come within the group's timeout.
    """
    met = _met(_resolve(group))
    if kind not in met.kinds:
        meet(row, group, kind)
        met.kinds.add(kind)
        met.longest = max(met.longest, len(row))


def meet(row: Tensor, group: str, kind: int) -> None:
    """Waits for all ranks of a group to come with the same, and raises what `agree` does."""
    found = _resolve(group)
    try:
        come = _meet(found, kind, _timeout(found, row.device))
    except torch.distributed.DistNetworkError as error:
        raise RuntimeError(
            f"rank {found.rank()} of the process group has lost the store in which ranks meet: the "
            "process that keeps it, rank 0 as a rule, has ended"
        ) from error
    check_same(come)


def _meet(group: Any, kind: int, timeout: timedelta) -> list[int]:
    """What all ranks have come with, once if it is the same."""
    store, turn = _store(group), _turn(group, kind, timeout)
    same = store.get(f"{turn}/outcome") == b"True"
    come = [kind] if same else [*_come(group, turn).values()]
    if store.add(f"{turn}/left", 1) == group.size():  # another group may be given this store
        for key in ("come", "left", "outcome", *(f"kind/{k}" for k in {*come})):
            store.delete_key(f"{turn}/{key}")
        for rank in range(group.size()):
            store.delete_key(f"{turn}/rank/{rank}")
    return come


def _turn(group: Any, kind: int, timeout: timedelta) -> str:
    """The turn in which all ranks have said what they come with.

    Who waits in vain gives a turn up, for all: whoever comes later takes the next one.
    """
    store, met = _store(group), _met(group)
    while True:
        turn = f"tribn/{met.turns}"
        met.turns += 1
        if store.check([f"{turn}/outcome"]):
            continue
        store.set(f"{turn}/rank/{group.rank()}", str(kind))
        store.add(f"{turn}/kind/{kind}", 1)
        if store.add(f"{turn}/come", 1) == group.size():  # the last, when all have added theirs
            same = store.add(f"{turn}/kind/{kind}", 0) == group.size()
            if store.compare_set(f"{turn}/outcome", "", str(same)) == GIVEN_UP:
                continue
            return turn
        try:
            store.wait([f"{turn}/outcome"], timeout)
        except torch.distributed.DistNetworkError:
            raise
        except RuntimeError:  # in time; a FileStore's is of no narrower class
            store.compare_set(f"{turn}/outcome", "", GIVEN_UP.decode())
        if store.get(f"{turn}/outcome") != GIVEN_UP:
            return turn
        come = _come(group, turn)
        missing = ", ".join(str(rank) for rank in range(group.size()) if rank not in come)
        raise RuntimeError(
            f"rank {group.rank()} of the process group waited {timeout} with {describe(kind)} in a "
            f"synchronized batch norm for {f'rank {missing}' if missing else 'one that is late'}: "
            "all ranks of the group must call the same layers in the same order"
        )


def _come(group: Any, turn: str) -> dict[int, int]:
    """The kinds that ranks have come with in a turn."""
    store = _store(group)
    keys = {rank: f"{turn}/rank/{rank}" for rank in range(group.size())}
    return {rank: int(store.get(key)) for rank, key in keys.items() if store.check([key])}


def _new(group: Any) -> str:
    """Who has come meanwhile with what is new to it."""
    with suppress(RuntimeError):  # the store may have died as well
        come = _come(group, f"tribn/{_met(group).turns}").items()
        return "".join(f"; rank {rank} has come with {describe(kind)}" for rank, kind in come)
    return ""


def _resolve(name: Any) -> Any:
    return torch._C._distributed_c10d._resolve_process_group(name)


def _store(group: Any) -> Any:
    return torch.distributed.distributed_c10d._get_process_group_store(group)


def _timeout(group: Any, device: torch.device) -> timedelta:
    return group._get_backend(device).options._timeout  # type: ignore[no-any-return]


_lib = torch.library.Library("tribn", "FRAGMENT")
# Said to change the row, so that no compiler moves it behind the collective.
_lib.define("agree(Tensor(a!) row, str group, int kind) -> ()")
_lib.impl("agree", agree, "CompositeExplicitAutograd")
torch.library.register_fake("tribn::agree", lambda row, group, kind: None, lib=_lib)

_lib.define("gather(Tensor row, str group, int size, int kind) -> Tensor")
_lib.impl("gather", gather_and_look, "CompositeExplicitAutograd")
torch.library.register_fake(
    "tribn::gather", lambda row, group, size, kind: row.new_empty((size, len(row))), lib=_lib
)
