"""Compiles kernels ahead of time, for devices that are not there, and reads the machine code.

Every kernel at every plan that the shapes of perf/cases.py lead to, in both layouts and in bf16 and
fp32; shapes that share a kernel share a row. Plans in fp16 are those in bf16. What differs from the
last full table is shown as a diff. A part of the table is compared with it as well, and saved
beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
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

from perf.cases import LAYOUTS, NETS, SETS, Layer, layers, strides
from perf.devices import GPUS
from perf.report import Report, environment, parser_of, write
from tribn import kernels, ops
from tribn.functional import batch_norm
from tribn.kernels import host
from tribn.launch import Device

Row = dict[str, Any]

FIELDS = ("registers", "spills", "shared", "loads", "stores", "ctas_per_sm", "warps_per_sm")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCHEDULERS = 4  # of a multiprocessor, each with registers of its own
SCALARS = 800  # scalar registers of AMD's


@dataclass(frozen=True)
class Target:
    """A device to compile for, and what one of its multiprocessors holds at a time.

    NVIDIA: "Technical specifications per compute capability" in the CUDA programming guide, and its
    occupancy calculator. AMD: the AMDGPU backend of LLVM, for gfx942; a warp is a wave there.
    """

    gpu: GPUTarget
    sms: int
    l2: int  # bytes, of the whole device
    shared: int  # bytes of shared memory
    warps: int = 64
    ctas: int = 32
    reserved: int = 1024  # bytes of shared memory that every CTA takes besides its own
    shared_unit: int = 128  # what a CTA takes is a multiple of it
    registers: int = 16384  # of a scheduler
    register_unit: int = 256  # what a warp takes is a multiple of it

    @property
    def facts(self) -> Device:
        return Device(
            sms=self.sms,
            l2=self.l2,
            registers=4 * SCHEDULERS * self.registers,
            shared=self.shared,
            threads=self.warps * self.gpu.warp_size,
            warp=self.gpu.warp_size,
        )


A100, H100 = GPUS["A100"], GPUS["H100"]
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), A100.sms, A100.l2, A100.shared),
    "sm_90": Target(GPUTarget("cuda", 90, 32), H100.sms, H100.l2, H100.shared),
    "sm_100": Target(GPUTarget("cuda", 100, 32), sms=148, l2=126 * 2**20, shared=228 * 1024),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64),
        sms=304,
        l2=4 * 2**20,  # of each of 8 chiplets
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
    spills: int  # those of them that lie in local memory
    shared: int  # bytes of a CTA
    scalars: int  # AMD's scalar registers of a wave; 0 elsewhere
    loads: Counter[int]  # instructions by bytes a thread moves, from and to global memory
    stores: Counter[int]


@contextmanager
def absent(target: str) -> Iterator[None]:
    """Launchers and compiler see the target, which launches nothing."""
    wanted = TARGETS[target]
    device = mock.Mock()
    device.get_current_target.return_value = wanted.gpu
    device.get_current_device.return_value = target  # the key of Triton's cache of kernels
    device.get_current_stream.return_value = 0

    def needs(compiled: Any) -> tuple[int, int, int]:
        return *registers(compiled), compiled.metadata.shared

    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(host, "device_facts", return_value=wanted.facts),
        mock.patch.object(host, "needs", needs),
        mock.patch.dict(host._launchers, clear=True),
    ):
        yield


@contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Compiles for `target` what would be launched inside, into the list it gives.

    The launchers run as they are, on tensors of the meta device: no memory, no launch.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        if not warmup:
            compiled.append(kernel)
        return kernel

    with (
        absent(target),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(host, "start", lambda kept, *args: compiled.append(kept.kernel)),
    ):
        yield compiled


class Variant(NamedTuple):
    """A kernel as it is compiled for a target: what tells a row of the table from every other."""

    target: str
    kernel: str
    tensors: str  # by type
    constants: str
    warps: int

    @classmethod
    def of(cls, target: str, compiled: Any) -> Variant:
        """By what Triton's own cache of kernels goes by."""
        source, about = compiled.src, compiled.metadata
        tensors: dict[str, list[str]] = {}
        constants: dict[str, Any] = {}
        for at, (name, kind) in enumerate(source.signature.items()):
            value = source.constants.get((at,))
            if kind.startswith("*"):
                tensors.setdefault(kind[1:], []).append(name.removesuffix("_ptr"))
            elif value is not None:
                constants[name] = getattr(value, "__name__", value)
            elif source.attrs.get((at,)):
                constants[name] = "multiple of 16"
        constants["waits"] = about.launch_cooperative_grid
        return cls(
            target,
            about.name.removesuffix("_kernel"),
            ", ".join(f"{kind} {' '.join(names)}" for kind, names in tensors.items()),
            ", ".join(f"{name} {value}" for name, value in constants.items()),
            about.num_warps,
        )


def launched(target: str, layer: Layer) -> dict[Variant, tuple[Any, str]]:
    """What a layer launches, compiled, each distinct kernel with an example of what it is for."""
    found: dict[Variant, tuple[Any, str]] = {}
    for layout, dtype in product(LAYOUTS, DTYPES):
        stride = strides(layer.shape, layout)
        x = torch.empty_strided(layer.shape, stride, dtype=DTYPES[dtype], device="meta")
        with compiling(target) as kernels:
            train_and_evaluate(x, layer)
        for kernel in kernels:
            example = f"{layer} {layer.op} {dtype} {layout}"
            found.setdefault(Variant.of(target, kernel), (kernel, example))
    return found


def train_and_evaluate(x: Tensor, layer: Layer) -> None:
    """Launches what a module does in training, forward and backward, and in evaluation."""
    weight, bias, *running = (torch.empty(x.shape[1], device="meta") for _ in range(4))
    counter = torch.empty((), dtype=torch.int64, device="meta")
    residual = torch.empty_like(x) if layer.residual else None

    def apply(training: bool) -> Tensor:
        return batch_norm(
            *(x, *running, weight, bias, training),
            num_batches_tracked=counter,
            activation=layer.activation,
            residual=residual,
        )

    # Tensors of the meta device would not get as far as the launchers.
    with mock.patch.multiple(ops, **{name: getattr(kernels, name) for name in kernels.__all__}):
        apply(training=False)
        leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
        y = apply(training=True)
        torch.autograd.grad(y, leaves, torch.empty_like(y))


def resources(kernel: Any) -> Resources:
    """Reads what `kernel` needs from its machine code."""
    scalars = 0
    if "cubin" in kernel.asm:
        loads, stores = _nvidia_accesses(kernel.asm["cubin"])
    else:
        code = kernel.asm["amdgcn"]
        scalars = int(re.search(r"\.sgpr_count:\s*(\d+)", code)[1])
        accesses = r"\b(?:global|buffer)_{}_[us]?(byte|short|dword(?:x\d)?)"
        loads, stores = (
            Counter(_amd_bytes(m) for m in re.findall(accesses.format(op), code))
            for op in ("load", "store")
        )
    about = kernel.metadata
    return Resources(
        about.name, about.num_warps, *registers(kernel), about.shared, scalars, loads, stores
    )


def registers(kernel: Any) -> tuple[int, int]:
    """Registers of a thread, and those of them that are spilled."""
    if "cubin" in kernel.asm:
        usage = _tool("cuobjdump", "--dump-resource-usage", binary=kernel.asm["cubin"])
        held, spilled = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return int(held), int(spilled) // 4  # from bytes
    code = kernel.asm["amdgcn"]
    # Scalar registers spill into lanes of vector registers, not into memory.
    held, spilled = (
        re.search(rf"\.{name}:\s*(\d+)", code)[1] for name in ("vgpr_count", "vgpr_spill_count")
    )
    return int(held), int(spilled)


@cache
def _nvidia_accesses(cubin: bytes) -> tuple[Counter[int], Counter[int]]:
    """Loads and stores."""
    code = _tool("nvdisasm", "--print-code", "--no-dataflow", binary=cubin)
    loads, stores = (
        Counter(_nvidia_bytes(m) for m in re.findall(rf"\b{op}\.E([.\w]*)", code))
        for op in ("LDG(?:STS)?", "STG")  # LDGSTS goes to shared memory
    )
    return loads, stores


def _tool(name: str, *options: str, binary: bytes) -> str:
    """What a tool of Triton's wheel prints about a cubin."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, *options, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} cannot read machine code: {done.stderr}")
    return done.stdout


def _nvidia_bytes(suffix: str) -> int:
    if width := re.search(r"\.(\d+)(?:\.|$)", suffix):
        return int(width[1]) // 8
    narrow = re.search(r"\.[US](8|16)", suffix)
    return int(narrow[1]) // 8 if narrow else 4


def _amd_bytes(suffix: str) -> int:
    return {"byte": 1, "short": 2, "dword": 4}.get(suffix) or 4 * int(suffix[-1])


def warps_per_sm(target: str, registers: int, scalars: int = 0) -> int:
    """Warps of so many registers a thread that a multiprocessor holds."""
    of = TARGETS[target]
    per_warp = round_up(registers * of.gpu.warp_size, of.register_unit)
    of_scheduler = of.registers // per_warp
    if scalars:
        of_scheduler = min(of_scheduler, SCALARS // round_up(scalars, 16))
    return min(of.warps, SCHEDULERS * of_scheduler)


def ctas_per_sm(target: str, needs: Resources) -> int:
    of = TARGETS[target]
    by_warps = warps_per_sm(target, needs.registers, needs.scalars) // needs.warps
    shared = round_up(needs.shared + of.reserved, of.shared_unit)
    return min(of.ctas, by_warps, of.shared // shared if shared else of.ctas)


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def rows_of(target: str, layer: Layer) -> list[Row]:
    """What each kernel of a layer needs."""
    return [row(variant, *of) for variant, of in launched(target, layer).items()]


def row(variant: Variant, kernel: Any, example: str) -> Row:
    needs = resources(kernel)
    ctas = ctas_per_sm(variant.target, needs)
    return {
        **variant._asdict(),
        "registers": needs.registers,
        "spills": needs.spills,
        "shared": needs.shared,
        "loads": widths(needs.loads),
        "stores": widths(needs.stores),
        "ctas_per_sm": ctas,
        "warps_per_sm": ctas * needs.warps,
        "example": example,
    }


def widths(accesses: Counter[int]) -> str:
    """As in "2x16 5x8": two of 16 bytes, five of 8."""
    return " ".join(f"{accesses[width]}x{width}" for width in sorted(accesses, reverse=True))


def key(row: Row) -> Variant:
    return Variant(*(row[name] for name in Variant._fields))


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """A line for each row that was added, removed or changed."""
    old, new = ({key(row): row for row in rows} for rows in (before, after))
    lines = []
    for variant in [*new, *(variant for variant in old if variant not in new)]:
        target, kernel, tensors, constants, warps = variant
        name = f"{target} {kernel}: {tensors}; {constants}; {warps} warps"
        if variant not in old:
            lines.append(f"+ {name}")
        elif variant not in new:
            lines.append(f"- {name}")
        elif differences := [
            f"{field} {old[variant][field]} -> {new[variant][field]}"
            for field in FIELDS
            if old[variant][field] != new[variant][field]
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
    parser = parser_of("codegen", __doc__)
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
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    return arguments


def compile_all(chosen: Sequence[Layer], targets: Sequence[str]) -> list[Row]:
    """A row for each variant, in as many processes as there are processors."""
    found: dict[Variant, Row] = {}
    tasks = list(product(targets, chosen))
    with (
        Progress() as progress,
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool,
    ):
        of_layers = pool.map(rows_of, *zip(*tasks, strict=True))
        for rows in progress.track(of_layers, total=len(tasks), description="compile"):
            for of in rows:
                found.setdefault(key(of), of)
    return list(found.values())


def read(path: Path) -> list[Row]:
    """The rows of a saved table."""
    try:
        report = json.loads(path.read_text())
        rows: list[Row] = report["rows"]
        if report["command"] == "codegen" and all(map(key, rows)):
            return rows
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise SystemExit(f"{path} is no table of codegen to compare with: move it away")


def comparable(last: Sequence[Row], rows: Sequence[Row], part: bool) -> list[Row]:
    """Of the last table the rows of the same targets; of a part of the shapes only the same."""
    targets, keys = {row["target"] for row in rows}, set(map(key, rows))
    return [row for row in last if row["target"] in targets and (not part or key(row) in keys)]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    targets = [target for target in TARGETS if target in arguments.targets]
    chosen = [name for name in (arguments.net, arguments.set) if name]
    names = chosen or [*NETS, *SETS]
    distinct = dict.fromkeys(replace(layer, count=1) for name in names for layer in layers(name))
    saved = arguments.out / "codegen.json"
    last = read(saved) if saved.exists() else None  # before it takes an hour
    rows = sorted(compile_all(tuple(distinct), targets), key=key)
    before = None if last is None else comparable(last, rows, part=bool(chosen))
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
