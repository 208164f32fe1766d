"""Compiles kernels ahead of time, for devices that are not there, and reads the machine code.

    with compiling("sm_90") as kernels:
        tribn.kernels.batch_norm_train(x, ...)  # x on the meta device: no memory, no launch
    print(resources(kernels[0]))

The launchers run as they are, so what is compiled is what they would launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tribn.kernels import host
from tribn.launch import Device

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device(sms=108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device(sms=132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Device(sms=148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device(sms=304)),
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of the device."""

    name: str
    registers: int  # of a thread
    spills: int  # instructions that move registers to or from local memory
    loads: Counter[int]  # instructions by bytes a thread moves, from and to global memory
    stores: Counter[int]


@contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Compiles for `target` what would be launched inside, into the list it gives."""
    gpu, device = TARGETS[target]
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, warmup=True, **kwargs))

    absent = mock.Mock()
    absent.get_current_target.return_value = gpu
    absent.get_current_device.return_value = target  # the key of Triton's cache of kernels
    absent.get_current_stream.return_value = 0
    with (
        mock.patch.object(driver, "_active", absent),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(host, "device_facts", return_value=device),
    ):
        yield kernels


def resources(kernel: Any) -> Resources:
    """Reads what `kernel` needs from its machine code."""
    if "cubin" in kernel.asm:
        registers, code = _disassemble(kernel.asm["cubin"])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        loads, stores = (
            Counter(_nvidia_bytes(m) for m in re.findall(rf"\b{op}\.E([.\w]*)", code))
            for op in ("LDG", "STG")
        )
    else:
        code = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code))
        widths = {"ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
        loads, stores = (
            Counter(
                widths[m]
                for m in re.findall(rf"\b(?:global|buffer)_{op}_(dwordx?\d?|u?short)", code)
            )
            for op in ("load", "store")
        )
    return Resources(kernel.metadata.name, registers, spills, loads, stores)


@cache
def _disassemble(cubin: bytes) -> tuple[int, str]:
    """Registers of a thread, and SASS, by the tools of Triton's wheel."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool[0], *tool[1:], file.name], capture_output=True, text=True)
            for tool in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm",))
        )
    if usage.returncode or code.returncode:
        raise RuntimeError(f"cannot read machine code: {usage.stderr}{code.stderr}")
    return int(re.search(r"REG:(\d+)", usage.stdout)[1]), code.stdout


def _nvidia_bytes(suffix: str) -> int:
    if width := re.search(r"\.(\d+)(?:\.|$)", suffix):
        return int(width[1]) // 8
    narrow = re.search(r"\.[US](8|16)", suffix)
    return int(narrow[1]) // 8 if narrow else 4
