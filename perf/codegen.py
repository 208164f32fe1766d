"""Compiles kernels ahead of time, for devices that are not there, and reads the machine code.

Every kernel at every plan that the shapes of perf/cases.py lead to, in both layouts and in bf16,
fp16 and fp32; shapes that share a kernel share a row. What differs from the last full table is
shown as a diff. A part of the table is compared with it as well, and saved beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton.backends.nvidia
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from perf.cases import DTYPES, LAYOUTS, NETS, SETS, layers, strides
from perf.devices import GPUS
from perf.report import RESULTS, Report, directory, environment, write
from tribn import kernels
from tribn.kernels import host
from tribn.launch import Device

Row = dict[str, Any]

KEY = ("target", "kernel", "tensors", "constants", "warps")  # tells a row from every other
FIELDS = ("registers", "spills", "shared", "loads", "stores", "ctas_per_sm", "warps_per_sm")

SCHEDULERS = 4  # of a multiprocessor, each with registers of its own


@dataclass(frozen=True)
class Target:
    """A device to compile for, and what one of its multiprocessors holds at a time.

    NVIDIA: "Technical specifications per compute capability" in the CUDA programming guide, and its
    occupancy calculator. AMD: the AMDGPU backend of LLVM, for gfx942; a warp is a wave there.
    """

    gpu: GPUTarget
    sms: int
    shared: int  # bytes of shared memory
    warps: int = 64
    ctas: int = 32
    reserved: int = 1024  # bytes of shared memory that every CTA takes besides its own
    shared_unit: int = 128  # what a CTA takes is a multiple of it
    registers: int = 16384  # of a scheduler
    register_unit: int = 256  # what a warp takes is a multiple of it


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), GPUS["A100"].sms, shared=164 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), GPUS["H100"].sms, shared=228 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), sms=148, shared=228 * 1024),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64),
        sms=304,
        shared=64 * 1024,
        warps=32,
        reserved=0,
        shared_unit=512,
        registers=512 * 64,
        register_unit=8 * 64,
    ),
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of the device."""

    name: str
    warps: int  # of a CTA
    registers: int  # of a thread
    spills: int  # instructions that move registers to or from local memory
    shared: int  # bytes of a CTA
    loads: Counter[int]  # instructions by bytes a thread moves, from and to global memory
    stores: Counter[int]


@contextmanager
def absent(target: str, key: object) -> Iterator[None]:
    """Launchers and compiler see `target`. Kernels are cached by `key`."""
    wanted = TARGETS[target]
    device = mock.Mock()
    device.get_current_target.return_value = wanted.gpu
    device.get_current_device.return_value = key
    device.get_current_stream.return_value = 0
    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(host, "device_facts", return_value=Device(wanted.sms)),
    ):
        yield


@contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Compiles for `target` what would be launched inside, into the list it gives.

    The launchers run as they are, on tensors of the meta device: no memory, no launch.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, warmup=True, **kwargs))

    with absent(target, key=target), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


@dataclass(frozen=True)
class Variant:
    """A kernel as it would be compiled, which any process can do."""

    target: str
    module: str
    name: str
    specialization: str  # Triton's JSON

    def compile(self) -> Any:
        with absent(self.target, key=self.target):
            return getattr(import_module(self.module), self.name).preload(self.specialization)

    def labels(self) -> dict[str, Any]:
        """What tells it from others: target, types of the tensors, constants, warps."""
        data = json.loads(self.specialization)
        signature = data["signature"]
        names = list(signature)
        tensors: dict[str, list[str]] = {}
        for name, kind in signature.items():
            if kind.startswith("*"):
                tensors.setdefault(kind[1:], []).append(name.removesuffix("_ptr"))
        constants = {
            names[index]: value
            for (index, *_), value in zip(data["constant_keys"], data["constant_vals"], strict=True)
            if value is not None
        }
        for (index, *_), attributes in zip(data["attrs_keys"], data["attrs_vals"], strict=True):
            if attributes and not signature[names[index]].startswith("*"):
                constants[names[index]] = "multiple of 16"
        return {
            "target": self.target,
            "kernel": self.name.removesuffix("_kernel"),
            "tensors": ", ".join(f"{kind} {' '.join(of)}" for kind, of in tensors.items()),
            "constants": ", ".join(f"{name} {value}" for name, value in constants.items()),
            "warps": data["options"]["num_warps"],
        }


def variants(target: str, shapes: Iterable[tuple[int, ...]]) -> dict[Variant, str]:
    """What the operators launch on tensors of these shapes, each with its first example."""
    found: dict[Variant, str] = {}

    def skip_compilation(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        variant = Variant(target, fn.module, fn.name, compile["specialization_data"])
        found.setdefault(variant, f"{'x'.join(map(str, shape))} {dtype} {layout}")
        return True

    with (
        absent(target, key=object()),  # a new key: nothing is compiled yet
        mock.patch.object(knobs.runtime, "jit_cache_hook", skip_compilation),
    ):
        for shape, layout, dtype in product(shapes, LAYOUTS, DTYPES):
            stride = strides(shape, layout)
            launch(torch.empty_strided(shape, stride, dtype=DTYPES[dtype], device="meta"))
    return found


def launch(x: Tensor) -> None:
    """What a module launches in training, forward and backward, and in evaluation."""
    c = torch.empty(x.shape[1], device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")
    kernels.batch_norm_train(x, c, c, c, c, counter, 0.1, 1e-5, 1)
    kernels.batch_norm_backward(x, x, c, c, c, 1e-5, True, 1, [True] * 3)
    kernels.batch_norm_eval(x, c, c, c, c, 1e-5, 1)


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
    about = kernel.metadata
    return Resources(about.name, about.num_warps, registers, spills, about.shared, loads, stores)


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


def warps_per_sm(target: str, registers: int) -> int:
    """Warps of so many registers a thread that a multiprocessor holds."""
    of = TARGETS[target]
    per_warp = round_up(registers * of.gpu.warp_size, of.register_unit)
    return min(of.warps, SCHEDULERS * (of.registers // per_warp))


def ctas_per_sm(target: str, needs: Resources) -> int:
    of = TARGETS[target]
    by_warps = warps_per_sm(target, needs.registers) // needs.warps
    shared = round_up(needs.shared + of.reserved, of.shared_unit)
    return min(of.ctas, by_warps, of.shared // shared if shared else of.ctas)


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def row(variant: Variant) -> Row:
    """Compiles it and says what it needs."""
    needs = resources(variant.compile())
    ctas = ctas_per_sm(variant.target, needs)
    return {
        **variant.labels(),
        "registers": needs.registers,
        "spills": needs.spills,
        "shared": needs.shared,
        "loads": widths(needs.loads),
        "stores": widths(needs.stores),
        "ctas_per_sm": ctas,
        "warps_per_sm": ctas * needs.warps,
    }


def widths(accesses: Counter[int]) -> str:
    """As in "2x16 5x8": two of 16 bytes, five of 8."""
    return " ".join(f"{accesses[width]}x{width}" for width in sorted(accesses, reverse=True))


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """A line for each row that was added, removed or changed."""
    old, new = ({key(row): row for row in rows} for rows in (before, after))
    lines = []
    for which in [*new, *(which for which in old if which not in new)]:
        target, kernel, tensors, constants, warps = which
        name = f"{target} {kernel}: {tensors}; {constants}; {warps} warps"
        if which not in old:
            lines.append(f"+ {name}")
        elif which not in new:
            lines.append(f"- {name}")
        elif differences := [
            f"{field} {old[which][field]} -> {new[which][field]}"
            for field in FIELDS
            if old[which][field] != new[which][field]
        ]:
            lines.append(f"  {name}: {', '.join(differences)}")
    return lines


def summary(rows: Sequence[Row]) -> Table:
    """For each kernel and target the least and most over its variants."""
    table = Table("target", "kernel", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("variants", "spill", "16-byte", "registers", "shared", "CTAs per SM"):
        table.add_column(heading, justify="right")
    for (target, kernel), group in groupby(rows, key=lambda row: (row["target"], row["kernel"])):
        of = list(group)
        table.add_row(
            *(target, kernel, str(len(of))),
            str(sum(row["spills"] > 0 for row in of)),
            str(sum("x16" in row["loads"] for row in of)),
            *(extent([row[name] for row in of]) for name in ("registers", "shared", "ctas_per_sm")),
        )
    return table


def extent(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least} to {most}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf codegen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=list(TARGETS),
        help="all of them if not given",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--net", choices=NETS, help="only the shapes of this network")
    what.add_argument("--set", choices=SETS, help="only the shapes of this set")
    parser.add_argument(
        "--out", type=directory, default=RESULTS, metavar="DIR", help="for the JSON (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    return arguments


def compile_all(examples: dict[Variant, str]) -> list[Row]:
    """A row for each variant, in as many processes as there are processors."""
    with (
        Progress() as progress,
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool,
    ):
        rows = progress.track(
            pool.map(row, examples, chunksize=4), total=len(examples), description="compile"
        )
        return [
            {**row, "example": example}
            for row, example in zip(rows, examples.values(), strict=True)
        ]


def last_saved(path: Path, rows: Sequence[Row], part: bool) -> list[Row]:
    """Rows to compare with: those of the same targets; of a part of the shapes only the same."""
    targets, keys = {row["target"] for row in rows}, set(map(key, rows))
    return [
        row
        for row in json.loads(path.read_text())["rows"]
        if row["target"] in targets and (not part or key(row) in keys)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    targets = [target for target in TARGETS if target in arguments.targets]
    chosen = [name for name in (arguments.net, arguments.set) if name]
    names = chosen or [*NETS, *SETS]
    shapes = dict.fromkeys(layer.shape for name in names for layer in layers(name))
    examples: dict[Variant, str] = {}
    for target in targets:
        examples |= variants(target, shapes)
    rows = sorted(compile_all(examples), key=key)

    saved = arguments.out / "codegen.json"
    before = last_saved(saved, rows, part=bool(chosen)) if saved.exists() else None
    report: Report = {
        "command": "codegen",
        "environment": environment("cpu"),
        "targets": targets,
        "shapes": names,
        "rows": rows,
    }
    part = chosen + (targets if len(targets) < len(TARGETS) else [])
    path = write(report, arguments.out, "-".join(["codegen", *part]))
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary(rows))
    if before is not None:
        lines = changes(before, rows)
        console.print(f"{len(lines)} rows differ from the last table:", *lines, sep="\n")
    console.print(path)
