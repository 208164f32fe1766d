"""What every launcher needs on the host: tensors as (N, C, S), device facts, and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tribn.launch import Device, Layout, Plan, collapse, make_plan

INTERPRETER = Device(sms=2)  # few programs, yet several for each block of channels


@cache
def device_facts(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    return Device(sms=torch.cuda.get_device_properties(device).multi_processor_count)


def lay_out(axis: int, *inputs: Tensor, out: bool) -> tuple[Layout, list[Tensor]]:
    """The inputs, and with `out` an output like the first of them, seen as (N, C, S).

    Inputs that no strides can express so are copied into the memory format of the output.
    """
    outputs = [torch.empty_like(inputs[0])] if out else []
    tensors = [*inputs, *outputs]
    layout = collapse(inputs[0].shape, [t.stride() for t in tensors], axis)
    if layout is None:
        tensors = [*(torch.empty_like(inputs[0]).copy_(t) for t in inputs), *outputs]
        layout = collapse(inputs[0].shape, [t.stride() for t in tensors], axis)
        assert layout is not None, "around the channel, a dense tensor has at most two runs of axes"
    return layout, tensors


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
    def of(cls, layout: Layout, x: Tensor, plan: Plan | None) -> Launcher:
        dtype = tl.float64 if x.dtype == torch.float64 else tl.float32
        plan = plan or make_plan(layout, x.element_size(), device_facts(x.device))
        return cls(layout, plan, dtype)

    def __call__(self, kernel: Any, *args: Any, tensors: int, **constants: Any) -> None:
        """Appends to `args` what every kernel takes: sizes, strides of `tensors`, splits, tile."""
        layout, plan = self.layout, self.plan
        with torch.cuda.device_of(args[0]):
            kernel[plan.grid](
                *args,
                *(layout.N, layout.C, layout.S),
                *plan.strides(layout)[: 3 * tensors],
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
