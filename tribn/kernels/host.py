"""What every launcher needs on the host: tensors as (N, C, S), device facts, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tribn.launch import Device, Layout, Plan, collapse, make_plan
from tribn.reference import new_bits

INTERPRETER = Device(sms=2)  # few programs, yet several for each block of channels


@cache
def device_facts(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    return Device(sms=torch.cuda.get_device_properties(device).multi_processor_count)


def lay_out(
    axis: int,
    like: Tensor,
    inputs: Sequence[Tensor | None],
    mask: Tensor | None,
    rows: bool = False,
) -> tuple[Layout, list[Tensor | None], Tensor | None]:
    """Tensors of the shape of `like`, which is dense, seen as (N, C, S) along with it.

    The mask has no channel axis and becomes one of bytes. What no strides can express so is copied
    into the memory format of `like`; with `rows` also what would cut its runs of neighbouring
    elements into shorter ones.
    """

    def collapsed() -> Layout | None:
        strides = [(like if t is None else t).stride() for t in inputs]
        around = None if mask is None else mask.unsqueeze(axis).stride()
        layout = collapse(like.shape, [like.stride(), *strides], axis, around)
        if rows and layout is not None:
            own = collapse(like.shape, [like.stride()], axis)
            return layout if own and (own.N, own.S) == (layout.N, layout.S) else None
        return layout

    layout = collapsed()
    if layout is None:
        inputs = [None if t is None else _copy(t, like) for t in inputs]
        mask = None if mask is None else _copy(mask, like.select(axis, 0))
        layout = collapsed()
        assert layout is not None, "around the channel, dense tensors have two runs of axes at most"
    return layout, list(inputs), None if mask is None else mask.view(torch.uint8)


def _copy(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory format of another tensor."""
    return torch.empty_like(like, dtype=t.dtype, device=t.device).copy_(t)


def prepare(
    axis: int,
    y: Tensor,
    inputs: Sequence[Tensor | None],
    mask: Tensor | None,
    save_bits: bool,
    plan: Plan | None,
) -> tuple[Launcher, list[Tensor | None], Tensor | None, Tensor | None]:
    """A launcher for the inputs of y, these and the mask laid out like it, and room for bits."""
    layout, inputs, mask = lay_out(axis, y, inputs, mask, save_bits)
    launch = Launcher.of(layout, y, plan, save_bits)
    return launch, inputs, mask, new_bits(y, axis) if save_bits else None


def dense(*statistics: Tensor | None) -> list[Any]:
    """Tensors of one number per channel with their numbers side by side, copied if they are not."""
    return [None if t is None else t.contiguous() for t in statistics]


@dataclass(frozen=True)
class Launcher:
    """Launches kernels that visit the same tensors by the same plan."""

    layout: Layout
    plan: Plan
    dtype: tl.dtype  # of arithmetic

    @classmethod
    def of(cls, layout: Layout, y: Tensor, plan: Plan | None, bits: bool = False) -> Launcher:
        """By the usual plan for the dtype and device of y, or of its gradient, if none is given."""
        plan = plan or make_plan(layout, y.element_size(), device_facts(y.device), bits)
        return cls(layout, plan, tl.float64 if y.dtype == torch.float64 else tl.float32)

    def __call__(self, kernel: Any, *args: Any, tensors: tuple[int, ...], **constants: Any) -> None:
        """Appends to `args` what every kernel takes: sizes, strides, splits, tile.

        The strides are those of the layout's `tensors`, and the mask's.
        """
        layout, plan = self.layout, self.plan
        with torch.cuda.device_of(args[0]):
            kernel[plan.grid](
                *args,
                *(layout.N, layout.C, layout.S),
                *plan.strides(layout, tensors),
                *layout.mask,
                *(plan.splits, plan.tiles_per_split),
                DTYPE=self.dtype,
                VEC=plan.vec,
                CHANNELS_LAST=plan.channels_last,
                BLOCK_N=plan.block_n,
                BLOCK_C=plan.block_c,
                BLOCK_S=plan.block_s,
                num_warps=plan.num_warps,
                **constants,
            )
