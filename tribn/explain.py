"""`tribn.explain`: what a batch norm does on the device that its input is on."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from tribn import launch
from tribn.functional import batch_norm
from tribn.launch import Plan
from tribn.nn import Layer, ranks_of

# Tensors as large as the input, by their names in the kernels, and those of them that a single
# launch visits twice: in memory, unless a slab of channels stays on the chip meanwhile.
LARGE = ("y", "x", "residual", "dy", "dx", "dresidual", "bits")
VISITED_TWICE = {"forward": ("x",), "backward": ("x", "dy", "residual", "bits")}
TIERS = {
    "registers": "which stays in registers",
    "l2": "which stays in the L2 cache",
    "memory": "which does not fit the L2 cache and is read twice",
}


def explain(call: torch.nn.Module | Tensor, *args: Any, **options: Any) -> None:
    """Prints how a batch norm is computed: path, launches, bytes moved and kept, registers.

    `explain(module, input, ...)` is about a call of the module; `explain(input, ...)` about one of
    `tribn.functional.batch_norm`, in training unless it is given, whose tensors of statistics may
    be left out. The call is made: forward, and backward if gradients are enabled. Modules,
    statistics and gradients stay as they are.

    Args:
        call: module or input.
        args, options: what else it is called with.

    Raises:
        TypeError: `call` is neither, lacks its input, or gives no tensor.
    """
    if isinstance(call, torch.nn.Module):
        title, function = str(call), cast(Callable[..., Any], copy.deepcopy(call))
    elif isinstance(call, Tensor):
        title, function = "batch_norm", batch_norm
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | options
        options = {"running_mean": None, "running_var": None, "training": True} | given
        args = (call, *args[len(names) :])
    else:
        raise TypeError(f"call is a {type(call).__name__}: it must be a module or a tensor")
    if not args and "input" not in options:
        raise TypeError("input is missing: it follows the module, explain(module, input)")
    args = tuple(_copied(t, first=i == 0) for i, t in enumerate(args))
    options = {name: _copied(t, first=name == "input") for name, t in options.items()}
    x: Tensor = args[0] if args else options["input"]
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.nbytes
        return t

    forward: list[Any] = []
    backward: list[Any] = []
    try:
        launch.launches = forward
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = function(*args, **options)
        if not isinstance(y, Tensor):
            raise TypeError(f"call gives a {type(y).__name__}: it must give a tensor")
        launch.launches = backward
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    finally:
        launch.launches = None

    print(f"{title} of {tuple(x.shape)}, strides {x.stride()}, {x.dtype}, on {_name(x.device)}")
    if not forward:
        print("  PyTorch's operators: kernels run for tensors on a GPU")
    why = "the device does not run programs at the same time"
    if isinstance(call, Layer) and ranks_of(call) is not None:
        why = "what all ranks have is gathered in between"
    for direction, launches in (("forward", forward), ("backward", backward)):
        if launches:
            _print(direction, launches, why)
    if y.requires_grad:
        print(f"  kept for backward: {_size(sum(kept.values()))}, parameters included")


def _copied(value: Any, first: bool) -> Any:
    """A tensor that can be changed, and whose gradient is no one's; the first wants one."""
    if not isinstance(value, Tensor):
        return value
    copied = value.detach().clone(memory_format=torch.preserve_format)
    return copied.requires_grad_(value.requires_grad or first)


def _print(direction: str, launches: list[Any], why: str) -> None:
    """What is launched, why more than once, and what it moves against reading everything once."""
    moved, floor = 0, {}
    count = f"{len(launches)} launch{'es' * (len(launches) > 1)}"
    print(f"  {direction}: {count}" + f": {why}" * (len(launches) > 1))
    for kept, registers, args in launches:
        name, plan = kept.function.__name__.removesuffix("_kernel"), kept.plan
        for parameter, t in zip(kept.function.arg_names, args, strict=False):
            tensor = parameter.removesuffix("_ptr")
            if isinstance(t, Tensor) and tensor in LARGE:
                twice = plan.tier == "memory" and tensor in VISITED_TWICE[name]
                moved += t.nbytes * (1 + twice)
                floor[t.data_ptr()] = t.nbytes
        print(f"    {name}: {_programs(plan)}" + f", {registers} registers" * bool(registers))
    share = moved / max(sum(floor.values()), 1)
    print(f"    {_size(moved)} moved, {share:.3g} times the least possible")


def _programs(plan: Plan) -> str:
    programs = f"programs of {plan.num_warps} warps"
    if plan.tier is None:
        return f"{plan.grid[0]} {programs}"
    slab = f"slab of {plan.channels} channel{'s' * (plan.channels > 1)}"
    groups = f"groups: {plan.groups}, each of {plan.splits} {programs}"
    return f"{groups} on one {slab} after another, {TIERS[plan.tier]}"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
