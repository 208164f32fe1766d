"""Bytes that batch norm moves to and from memory: counted, not timed, so that no GPU is needed.

The unit is N, the bytes of one activation tensor. A launch is charged each tensor of that size that
it reads or writes, once, and for the bits that tell an activation's gradient N/16 in 16-bit types;
what has one number per channel is left out. That is the DRAM traffic of tensors well above the size
of the L2 cache; smaller ones, marked with a star, may stay in it from one launch to the next. Times
are these bytes over the bandwidth in the datasheet, which no kernel quite reaches.

torch.compile is what its partitioner and fusion make of a network by default. tribn visits its
inputs twice in one launch. Where its plan for the device keeps a slab of channels on the chip in
between, in registers or in half of the L2 cache, they are charged once; where a slab is too large,
the tier being memory, twice, though the end of the first visit may still be in the cache.
`two launches` are tribn on a device that does not run programs at the same time. `single read` is
the least that a kernel can move.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from perf.cases import DTYPES, LAYOUTS, NETS, SETS, Layer, layers, strides
from perf.devices import GPUS, Gpu
from perf.report import Report, count, environment, parser_of, write
from tribn.launch import collapse, single_read_plan

PASSES = ("forward", "backward", "eval")
TWICE = {"forward": 1, "backward": 2}  # how many inputs each direction in training visits twice


@dataclass(frozen=True)
class Kernel:
    """A launch: its parameters, by their names in it, that are as large as the activation."""

    name: str
    reads: str = ""
    writes: str = ""
    again: str = ""  # of the reads, what is read once more unless the chip has held it
    share: float = 1.0  # of the cases in which it is what runs

    def units(self, itemsize: int, held: bool = True) -> float:
        """Bytes in units of N."""
        again = "" if held else self.again
        return self.share * size(f"{self.reads} {again} {self.writes}", itemsize)


def size(tensors: str, itemsize: int) -> float:
    """Of tensors of `itemsize` bytes an element, in units of N."""
    return sum(1 / (8 * itemsize) if name == "bits" else 1 for name in tensors.split())


@dataclass(frozen=True)
class Model:
    """What runs for one operation, and the large tensors it keeps for backward."""

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    eval: tuple[Kernel, ...]
    saved: str

    def units(self, direction: str, itemsize: int, held: bool = True) -> float:
        return sum(kernel.units(itemsize, held) for kernel in getattr(self, direction))


STATS, NORMALIZE = Kernel("stats", "x"), Kernel("normalize", "x", "y")
REDUCE, DX = Kernel("backward_reduce", "x dy"), Kernel("backward_dx", "x dy", "dx")
NORMALIZE_ADD = Kernel("normalize", "x residual", "y")
NORMALIZE_ADD_KEEP = Kernel("normalize", "x residual", "y bits")
TORCH_BN = Model((STATS, NORMALIZE), (REDUCE, DX), (NORMALIZE,), "x")


def activations(model: Model) -> dict[str, Model]:
    return {f"bn_{name}": model for name in ("relu", "relu6", "silu")}


def eager() -> dict[str, Model]:
    """Kernels of their own for what follows, each of which goes through memory.

    The gradient of the residual is the one that batch norm's output gets, and costs nothing.
    """
    add, activation = Kernel("add", "x residual", "y"), Kernel("activation", "x", "y")
    # ReLU reads its output, the others their input: one tensor either way.
    derivative = Kernel("activation_backward", "y dy", "dx")

    def followed_by(*more: Kernel) -> Model:
        model = replace(TORCH_BN, forward=(*TORCH_BN.forward, *more), eval=(*TORCH_BN.eval, *more))
        if activation not in more:
            return model
        return replace(model, backward=(derivative, *TORCH_BN.backward), saved="x y")

    return {
        "bn": TORCH_BN,
        **activations(followed_by(activation)),
        "bn_add": followed_by(add),
        "bn_add_relu": followed_by(add, activation),
    }


def compiled() -> dict[str, Model]:
    """What the partitioner and the fusion make of a network by default."""
    # The output, which the next layer keeps as well, says where ReLU was zero.
    relu = replace(
        TORCH_BN,
        backward=(
            Kernel("backward_reduce", "x y dy"),
            Kernel("backward_dx", "x y dy", "dx"),
        ),
        saved="x y",
    )
    add_relu = Model(
        forward=(STATS, NORMALIZE_ADD),
        backward=(
            # 7 or 8, as the first kernel stores the residual's gradient or the second does, which
            # depends on what else is fused: taken as half and half.
            Kernel("backward_reduce", "x y dy", "dresidual", share=0.5),
            Kernel("backward_dx", "x dresidual", "dx", share=0.5),
            Kernel("backward_reduce", "x y dy", share=0.5),
            Kernel("backward_dx", "x y dy", "dx dresidual", share=0.5),
        ),
        eval=(NORMALIZE_ADD,),
        saved="x y",
    )
    # The derivatives of other activations are computed anew from x.
    add = replace(TORCH_BN, forward=(STATS, NORMALIZE_ADD), eval=(NORMALIZE_ADD,))
    return {
        "bn": TORCH_BN,
        **activations(TORCH_BN),
        "bn_relu": relu,
        "bn_add": add,
        "bn_add_relu": add_relu,
    }


def two_launches() -> dict[str, Model]:
    """One pass for the statistics or sums, one with everything fused."""
    bn = Model((STATS, NORMALIZE), (REDUCE, DX), (NORMALIZE,), "x")
    add = replace(bn, forward=(STATS, NORMALIZE_ADD), eval=(NORMALIZE_ADD,))
    add_relu = Model(
        forward=(STATS, NORMALIZE_ADD_KEEP),
        # The second kernel takes up what the first made of dy.
        backward=(Kernel("backward_reduce", "x dy bits", "dresidual"), DX),
        eval=(NORMALIZE_ADD,),
        saved="x bits",
    )
    return {"bn": bn, **activations(bn), "bn_add": add, "bn_add_relu": add_relu}


def one_launch() -> dict[str, Model]:
    """Everything in one launch, whose second visit alone reads what is added."""
    bn = Model(
        forward=(Kernel("forward", "x", "y", again="x"),),
        backward=(Kernel("backward", "x dy", "dx", again="x dy"),),
        eval=(NORMALIZE,),
        saved="x",
    )
    forward_add = Kernel("forward", "x residual", "y", again="x")
    add = replace(bn, forward=(forward_add,), eval=(NORMALIZE_ADD,))
    add_relu = Model(
        forward=(replace(forward_add, writes="y bits"),),
        backward=(Kernel("backward", "x dy bits", "dx dresidual", again="x dy bits"),),
        eval=(NORMALIZE_ADD,),
        saved="x bits",
    )
    return {"bn": bn, **activations(bn), "bn_add": add, "bn_add_relu": add_relu}


TRIBN, FLOOR = "tribn", "single read"
# By path and operation. The floor is that of a chip which holds everything.
PATHS = {
    "eager": eager(),
    "torch.compile": compiled(),
    "two launches": two_launches(),
    TRIBN: one_launch(),
    FLOOR: one_launch(),
}


def row(layer: Layer, layout: str, itemsize: int, gpu: Gpu) -> dict[str, Any]:
    """A layer's traffic on every path."""
    n = math.prod(layer.shape) * itemsize
    models = {path: ops[layer.op] for path, ops in PATHS.items()}
    tensors = collapse(layer.shape, [strides(layer.shape, layout)], axis=1)
    assert tensors is not None, "they are dense"
    bits = "bits" in models[TRIBN].saved
    tiers = {
        direction: single_read_plan(tensors, itemsize, gpu.facts, inputs, bits).tier
        for direction, inputs in TWICE.items()
    }

    def units(path: str, direction: str) -> float:
        held = path != TRIBN or tiers.get(direction) != "memory"
        return models[path].units(direction, itemsize, held)

    return {
        "shape": layer.shape,
        "op": layer.op,
        "count": layer.count,
        "bytes": n,
        "fits_l2": n <= gpu.l2,
        "units": {path: {d: units(path, d) for d in PASSES} for path in PATHS},
        "saved": {path: size(model.saved, itemsize) for path, model in models.items()},
        "tiers": tiers,
        "floor_us": {
            direction: models[FLOOR].units(direction, itemsize) * n / gpu.bandwidth * 1e6
            for direction in PASSES
        },
    }


def totals(rows: Sequence[dict[str, Any]], gpu: Gpu) -> list[dict[str, Any]]:
    """Of all layers together, by path: in units of the bytes of all their tensors, and times."""
    weights = [row["count"] * row["bytes"] for row in rows]

    def mean(values: list[float]) -> float:
        return sum(map(math.prod, zip(weights, values, strict=True))) / sum(weights)

    found = []
    for path in PATHS:
        units = {d: mean([row["units"][path][d] for row in rows]) for d in PASSES}
        both = units["forward"] + units["backward"]
        found.append(
            {
                "path": path,
                "units": {**units, "both": both},
                "saved": mean([row["saved"][path] for row in rows]),
                "floor_ms": both * sum(weights) / gpu.bandwidth * 1e3,
            }
        )
    return found


def described(model: Model, itemsize: int) -> dict[str, Any]:
    """For JSON."""
    kernels = {
        direction: [
            {**asdict(kernel), "units": kernel.units(itemsize)}
            for kernel in getattr(model, direction)
        ]
        for direction in PASSES
    }
    return {**kernels, "saved": model.saved}


# What the name of the JSON leaves out
USUAL = {"batch": None, "dtype": "bf16", "layout": LAYOUTS[0], "device": "H100"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("traffic", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--net", choices=NETS, help="a network (resnet50)")
    what.add_argument("--set", choices=SETS, help="a set of single shapes instead")
    parser.add_argument("--batch", type=count, help="of a network; its usual one if not given")
    parser.add_argument("--dtype", choices=DTYPES, help="(%(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, help="(%(default)s)")
    parser.add_argument("--device", choices=GPUS, help="for plans and floor times (%(default)s)")
    parser.set_defaults(**USUAL)
    arguments = parser.parse_args(argv)
    if arguments.set and arguments.batch:
        parser.error(f"--batch: the shapes of --set {arguments.set} have theirs")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    gpu, itemsize = GPUS[arguments.device], DTYPES[arguments.dtype].itemsize
    name = arguments.set or arguments.net or "resnet50"
    chosen = layers(name, arguments.batch)
    rows = [row(layer, arguments.layout, itemsize, gpu) for layer in chosen]
    ops = sorted({layer.op for layer in chosen})
    report: Report = {
        "command": "traffic",
        "environment": environment("cpu"),
        "name": name,
        "batch": chosen[0].shape[0] if name in NETS else None,
        "dtype": arguments.dtype,
        "layout": arguments.layout,
        "gpu": vars(gpu),
        "kernels": {
            path: {op: described(models[op], itemsize) for op in ops}
            for path, models in PATHS.items()
        },
        "rows": rows,
        "totals": totals(rows, gpu),
        "ops": {op: totals([row for row in rows if row["op"] == op], gpu) for op in ops},
    }
    given = vars(arguments)
    unusual = [str(given[option]) for option, usual in USUAL.items() if given[option] != usual]
    path = write(report, arguments.out, "-".join(["traffic", name, *unusual]))
    console = Console()
    console.print(layer_table(report), total_table(report))
    if any("memory" in row["tiers"].values() for row in rows):
        console.print(memory_table(report))
    console.print(f"Bytes counted, not timed; {path}")


def layer_table(report: Report) -> Table:
    table = Table(
        title=f"Units of N, forward+backward ({report['dtype']}, {report['layout']})",
        caption=f"* may stay in the L2 cache of {report['gpu']['name']}, and move less",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for heading in ("shape", "op", "", "N, MB"):
        table.add_column(heading, overflow="fold")
    paths = [path for path in PATHS if path != FLOOR]
    for heading in (*paths, "tier", "floor, µs"):
        name = re.sub(r"(?<=[ .])", "\n", heading)
        table.add_column(name, justify="right", no_wrap=heading != "tier")
    for row in report["rows"]:
        units = [row["units"][path] for path in paths]
        table.add_row(
            "x".join(map(str, row["shape"])),
            row["op"],
            f"{row['count']}x",
            f"{row['bytes'] / 1e6:.1f}" + "*" * row["fits_l2"],
            *(f"{of['forward']:.2g}+{of['backward']:.2g}" for of in units),
            " + ".join(dict.fromkeys(row["tiers"].values())),
            f"{row['floor_us']['forward'] + row['floor_us']['backward']:.3g}",
        )
    return table


def total_table(report: Report) -> Table:
    gpu = report["gpu"]
    table = Table(
        "path",
        title=f"{report['name']}, {sum(row['count'] for row in report['rows'])} layers",
        caption=f"ms at the {gpu['bandwidth'] / 1e12:.3g} TB/s in the datasheet of {gpu['name']}",
        box=SIMPLE_HEAD,
    )
    headings = ["forward", "backward", "both", "eval"]
    for heading in (*headings, "saved", "ms"):
        table.add_column(heading, justify="right")
    for total in report["totals"]:
        units = [*(total["units"][heading] for heading in headings), total["saved"]]
        table.add_row(
            total["path"], *(f"{value:.1f}" for value in units), f"{total['floor_ms']:.2f}"
        )
    return table


def memory_table(report: Report) -> Table:
    """The layers that tribn reads twice, and their share of the bytes of all activations."""
    rows = report["rows"]
    whole = sum(row["count"] * row["bytes"] for row in rows)
    shares = dict.fromkeys(TWICE, 0.0)
    table = Table(
        title=f"Slabs that do not fit half the L2 cache of {report['gpu']['name']}",
        box=SIMPLE_HEAD,
    )
    for heading in ("shape", "op", "", "read twice", "of bytes"):
        table.add_column(heading)
    for row in rows:
        twice = [direction for direction, tier in row["tiers"].items() if tier == "memory"]
        share = row["count"] * row["bytes"] / whole
        for direction in twice:
            shares[direction] += share
        if twice:
            table.add_row(
                "x".join(map(str, row["shape"])),
                row["op"],
                f"{row['count']}x",
                ", ".join(twice),
                f"{share:.0%}",
            )
    table.caption = ", ".join(f"{direction} {share:.0%}" for direction, share in shares.items())
    return table
