"""What every launcher needs on the host: tensors as (N, C, S), device facts, and the launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from threading import local
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from tribn import launch
from tribn.kernels.scratch import scratch
from tribn.launch import (
    BYTES_PER_THREAD,
    HELD_PER_THREAD,
    Device,
    Layout,
    Plan,
    collapse,
    make_plan,
    runs,
    single_read_plan,
)

INTERPRETED: bool = knobs.runtime.interpret  # are kernels, from their import on
# Few programs, yet several for each block of channels. They run one after another.
INTERPRETER = Device(2, l2=2**20, registers=2**18, shared=2**16, threads=2048, cooperative=False)
MOST_LAUNCHERS = 4096  # to keep


@cache
def device_facts(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    of = torch.cuda.get_device_properties(device)
    return Device(
        sms=of.multi_processor_count,
        l2=of.L2_cache_size,
        registers=4 * of.regs_per_multiprocessor,
        shared=of.shared_memory_per_multiprocessor,
        threads=of.max_threads_per_multi_processor,
        warp=of.warp_size,
    )


def lay_out(
    axis: int,
    like: Tensor,
    inputs: Sequence[Tensor | None],
    mask: Tensor | None,
    rows: bool = False,
    sums: bool = True,
) -> tuple[Layout, list[Tensor | None], Tensor | None]:
    """Tensors of the shape of `like`, which is dense, seen as (N, C, S) along with it.

    The mask has no channel axis. What no strides can express so is copied into the memory format of
    `like`; with `rows` also what would cut its runs of neighbouring elements into shorter ones.
    """

    def collapsed() -> Layout | None:
        strides = [(like if t is None else t).stride() for t in inputs]
        around = None if mask is None else mask.unsqueeze(axis).stride()
        layout = collapse(like.shape, [like.stride(), *strides], axis, around, sums)
        if rows and layout is not None:
            own = runs(like.shape, like.stride(), axis, mask is not None)
            return layout if (own.N, own.S) == (layout.N, layout.S) else None
        return layout

    layout = collapsed()
    if layout is None:
        inputs = [None if t is None else _copy(t, like) for t in inputs]
        mask = None if mask is None else _copy(mask, like.select(axis, 0))
        layout = collapsed()
        assert layout is not None, "around the channel, dense tensors have two runs of axes at most"
    return layout, list(inputs), mask


def _copy(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory format of another tensor."""
    return torch.empty_like(like, dtype=t.dtype, device=t.device).copy_(t)


def dense(*statistics: Tensor | None) -> list[Any]:
    """Tensors of one number per channel with their numbers side by side, copied if they are not."""
    return [None if t is None else t.contiguous() for t in statistics]


class Refused(RuntimeError):
    """The driver does not run so many programs at the same time."""


# What a kernel is compiled for, by name, besides its plan
Constants = tuple[tuple[str, Any], ...]


class Kept(NamedTuple):
    """A compiled kernel, and what it is launched with besides tensors and numbers."""

    function: Any  # what it is compiled from
    kernel: Any
    plan: Plan
    sizes: tuple[int | None, ...]
    constants: tuple[Any, ...]
    room: tuple[int, int] | None  # see `scratch`


class Launcher:
    """Launches kernels that visit the same tensors, of which it keeps the compiled ones.

    `reads` of the tensors are to be visited twice and read once, for which the programs wait for
    each other; 0 is for kernels whose programs do not, and None for those that sum up nothing. With
    `bits` every element has one.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        reads: int | None,
        bits: bool = False,
        plan: Plan | None = None,
    ) -> None:
        self.layout, self.device = layout, device
        self.dtype = tl.float64 if dtype == torch.float64 else tl.float32
        self.facts = device_facts(device)
        self.facts = replace(self.facts, sms=max(self.facts.sms - launch.sm_margin, 1))
        self.plans = [plan] if plan else self._plans(dtype.itemsize, reads, bits)
        self.plan = self.plans[0]
        self.kept: dict[tuple[Any, ...], Kept] = {}

    def _plans(self, itemsize: int, reads: int | None, bits: bool) -> list[Plan]:
        """The plans to try: for fewer and fewer programs on a multiprocessor, then smaller ones."""
        if reads and self.device not in _refused:
            of = self.layout, itemsize, self.facts, reads, bits
            held = [(2, HELD_PER_THREAD), (1, HELD_PER_THREAD), (1, HELD_PER_THREAD // 2)]
            plans = [single_read_plan(*of, *how) for how in held]
            plans = [plan for plan in plans if plan.tier == "registers"]
            large = [single_read_plan(*of, n, 0) for n in (4, 3, 2, 1)]
            # One program with a large tile beats two with smaller ones only over neighbouring
            # channels, and where accesses are no narrower than 8 bytes.
            rows = self.layout.channels_last and self.layout.plane == 1
            plans += large if rows and large[0].vec * itemsize >= 8 else large[:-1]
            plans += [single_read_plan(*of, n, 0, BYTES_PER_THREAD) for n in (3, 2, 1)]
            if self.facts.cooperative or not any(plan.waits for plan in plans):
                return plans
        return [make_plan(self.layout, itemsize, self.facts, bits, reads is not None)]

    def __call__(
        self,
        kernel: Any,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float],
        order: tuple[int, ...],
        constants: Constants,
        results: int = 0,
    ) -> None:
        """Launches it with what every kernel takes besides: sizes, strides, splits, tile.

        The strides are those of the layout's tensors in `order`, and the mask's. Programs that wait
        for each other have so many `results` for each channel.
        """
        key = (kernel, order, constants, *[None if t is None else t.dtype for t in tensors])
        kept = self.kept.get(key)
        if elsewhere(self.device):
            with torch.cuda.device(self.device):
                return self(kernel, tensors, numbers, order, constants, results)
        if kept is None:
            kept = self._keep(kernel, tensors, numbers, order, constants, results)
            self.kept[key] = kept
        if (launched := getattr(_recording, "launched", None)) is not None:
            launched.append((kept, tensors, numbers))
        room = scratch(self.device, *kept.room) if kept.room else ()
        start(kept, tensors, (*numbers, *kept.sizes), room)

    def _keep(
        self,
        kernel: Any,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float],
        order: tuple[int, ...],
        constants: Constants,
        results: int,
    ) -> Kept:
        """The kernel, compiled for the first plan whose programs fit the device, without spills."""
        for plan in self.plans:
            values = dict(constants) | self._constants(plan, order)
            kept = Kept(
                kernel,
                kernel,
                plan,
                (
                    *(self.layout.N, self.layout.C, self.layout.S),
                    *plan.strides(self.layout, order),
                    *self.layout.mask,
                    *(plan.splits, plan.tiles_per_split),
                ),
                tuple(values[name] for name in kernel.arg_names if name in values),
                None,
            )
            room: tuple[Any, ...] = ()
            if plan.waits:
                doubles = results * (plan.splits + 1) * self.layout.channels
                kept = kept._replace(room=(doubles, 1 + plan.groups))
                room = torch.float64, torch.int32
            elif values.get("CUMULATIVE") and plan.tier is not None:
                kept = kept._replace(room=(0, 1))
                room = None, torch.int32
            elif plan.tier is not None:
                kept = kept._replace(sizes=(*kept.sizes, None, None))
            if INTERPRETED:
                break
            compiled = build(kernel, kept, (*tensors, *numbers, *kept.sizes, *room), self.facts)
            kept = kept._replace(kernel=compiled)
            registers, spills, shared = needs(compiled)
            programs = self.facts.programs_per_sm(plan.num_warps, registers, shared)
            if plan.grid[0] <= programs * self.facts.sms and not spills:
                break
        return kept

    def _constants(self, plan: Plan, order: tuple[int, ...]) -> dict[str, Any]:
        constants: dict[str, Any] = {
            "DTYPE": self.dtype,
            "VEC": plan.vec,
            "CHANNELS_LAST": plan.channels_last,
            "RUN": plan.run,
            "ALIKE": len({self.layout.strides[i] for i in order}) == 1,
            "BLOCK_N": plan.block_n,
            "BLOCK_C": plan.block_c,
            "BLOCK_S": plan.block_s,
            "COLUMNS": plan.columns,
            "SLAB": plan.slab,
            "STAGES": plan.stages,
            "LOOPS": plan.tiles_per_split > 1,
        }
        if plan.tier is not None:
            constants["BLOCK_G"] = plan.block_g(plan.mergers)
            constants["MERGERS"] = plan.mergers
            constants["HELD"] = plan.tier == "registers"
            constants["FIRST"], constants["LAST"] = plan.policies
        return constants


def build(kernel: Any, kept: Kept, args: Sequence[Any], facts: Device) -> Any:
    """Compiles a kernel.

    Left alone the compiler takes more registers than it needs, and for programs that stay on the
    device these are loads in flight: as many programs as fit without spilling.
    """
    plan = kept.plan
    options: dict[str, Any] = {"num_warps": plan.num_warps}
    if plan.tier is not None:
        options["launch_cooperative_grid"] = plan.waits

    def compiled(**more: Any) -> Any:
        return kernel.warmup(*args, *kept.constants, grid=plan.grid, **options, **more)

    found = None if plan.tier else compiled()
    if driver.active.get_current_target().backend != "cuda":
        return found or compiled()
    for programs in (3, 2, 1):
        if found is not None and not needs(found)[1]:
            break
        most = facts.registers // (4 * programs * facts.warp * plan.num_warps) // 8 * 8
        found = compiled(maxnreg=min(most, 255))
    return found


def needs(compiled: Any) -> tuple[int, int, int]:
    """Registers a thread, those of them that are spilled, and bytes of shared memory."""
    compiled._init_handles()
    return compiled.n_regs, compiled.n_spills, compiled.metadata.shared


# What a call has launched, with which tensors and numbers
Launched = tuple[Kept, Sequence[Tensor | None], Sequence[float]]
_recording = local()


@contextmanager
def recording() -> Iterator[list[Launched]]:
    """What this thread launches meanwhile."""
    _recording.launched = launched = []
    try:
        yield launched
    finally:
        del _recording.launched


def elsewhere(device: torch.device) -> bool:
    """Whether another device is the current one, which Triton launches on."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def start(
    kept: Kept,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[float | None],
    room: Sequence[Tensor | None],
) -> None:
    kernel, grid = kept.kernel, kept.plan.grid
    if launch.launches is not None:
        registers = None if INTERPRETED else needs(kernel)[0]
        args = (*tensors, *sizes, *room, *kept.constants)
        launch.launches.append((kept, registers, args))
    if INTERPRETED:
        waits = kept.plan.waits
        kernel[grid](*tensors, *sizes, *room, *kept.constants, launch_cooperative_grid=waits)
        return
    runtime = knobs.runtime
    try:
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler's
            kernel[grid](*tensors, *sizes, *room, *kept.constants)
            return
        # Hooks that do nothing, and tensors instead of addresses, take as long as all else.
        active = driver.active
        kernel.run(
            *grid,
            active.get_current_stream(active.get_current_device()),
            *(kernel.function, kernel.packed_metadata, None, None, None),
            *[t if t is None else t.data_ptr() for t in tensors],
            *sizes,
            *[t if t is None else t.data_ptr() for t in room],
            *kept.constants,
        )
    except RuntimeError as error:
        # "too many blocks in cooperative launch", "operation not supported"
        if kept.plan.waits and ("cooperative" in str(error) or "not supported" in str(error)):
            raise Refused from error
        raise


_launchers: dict[tuple[Any, ...], Launcher] = {}
_refused: set[torch.device] = set()  # devices that do not run programs at the same time


def prepare(
    axis: int,
    like: Tensor,
    dtype: torch.dtype,
    inputs: Sequence[Tensor | None],
    mask: Tensor | None,
    reads: int | None,
    bits: bool = False,
    plan: Plan | None = None,
) -> tuple[Launcher, Sequence[Tensor | None], Tensor | None]:
    """A launcher for tensors of the shape of `like`, and these laid out like it.

    The mask becomes one of bytes. `like` may be without memory, on the meta device; `dtype` is that
    of the output, or of its gradient.
    """
    device = next(t.device for t in inputs if t is not None)
    key = (axis, like.shape, like.stride(), dtype, device, reads, bits, plan, launch.sm_margin)
    for t in (*inputs, mask):
        key += (None,) if t is None else (t.stride(), t.data_ptr() % 16 == 0)
    launcher = _launchers.get(key)
    if launcher is None:
        sums = reads is not None or bits  # bits lie as those that sum up see them
        layout, laid_out, mask_laid_out = lay_out(axis, like, inputs, mask, bits, sums)
        launcher = Launcher(layout, dtype, device, reads, bits, plan)
        if all(a is b for a, b in zip(inputs, laid_out, strict=True)):
            if len(_launchers) >= MOST_LAUNCHERS:
                _launchers.clear()
            _launchers[key] = launcher
        inputs, mask = laid_out, mask_laid_out
    return launcher, inputs, None if mask is None else mask.view(torch.uint8)


def or_in_two_launches(op: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that does without single launches on a device that turns out to refuse them."""

    @wraps(op)
    def run(*args: Any) -> Any:
        try:
            return op(*args)
        except Refused:
            device = args[0].device
            if device in _refused:
                raise
            _refused.add(device)
            _launchers.clear()
            return op(*args)

    return run
