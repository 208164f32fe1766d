"""What synchronized batch norm costs: measured on this machine's processes, reckoned for many GPUs.

Measured is a call of a layer in 1, 2 and 4 processes, from when all have come until the last is
done, and what each gives to collectives. tribn's SyncBatchNorm stands against torch.nn's where
there are as many GPUs, by NCCL. torch.nn's does not run on CPUs: there, by Gloo, it stands against
the same stages of PyTorch's operators with the collectives of torch.nn's between them.

Reckoned is a training step of a network on 8 to 4,096 GPUs: its collectives by the latencies and
the bandwidth in perf/devices.py, and its batch norm layers by the bytes that they move at the
bandwidth of the datasheet. The batch from which on collectives are below a tenth of the layers'
time is where synchronizing stops mattering; launches and the host are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tribn
from perf.cases import NETS, layers
from perf.devices import GPUS, NETWORKS, Gpu, Network
from perf.report import (
    Report,
    count,
    device,
    environment,
    name_of,
    parser_of,
    refuse_interpreter,
    short_name,
    write,
)
from perf.traffic import PATHS
from tribn import distributed

Row = dict[str, Any]

WORLDS = (1, 2, 4)
SHAPES = ((64, 56, 56), (256, 14, 14), (2048, 7, 7))  # of ResNet-50
DIRECTIONS = ("forward", "backward")
GROUPS = tuple(2**k for k in range(3, 13))
BATCHES = tuple(2**k for k in range(10))
SHARE = 0.1  # of the layers' time; what takes less does not matter
PATIENCE = timedelta(minutes=10)


# Measured


class _Stages(torch.autograd.Function):
    """torch.nn.SyncBatchNorm's training, by operators that run on CPUs too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        count = mean.new_full((1,), x.numel() // len(mean))
        row = torch.cat((mean, (var + eps).rsqrt(), count))
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row)
        means, rstds, counts = torch.stack(rows).split((len(mean), len(mean), 1), 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        squares = (rstds**-2 - eps + (means - mean) ** 2) * counts
        rstd = (squares.sum(0) / total + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd, total)
        y: Tensor = torch.native_batch_norm(x, weight, bias, mean, rstd**-2 - eps, False, 0.0, eps)[
            0
        ]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, total = ctx.saved_tensors
        shape, others = (1, -1, *(1,) * (x.dim() - 2)), (0, *range(2, x.dim()))
        deviation = x - mean.view(shape)
        sums = torch.stack((dy.sum(others), (dy * deviation).sum(others)))
        dweight, dbias = sums[1] * rstd, sums[0].clone()
        dist.all_reduce(sums)
        offset, slope = sums / total
        slope = slope * rstd**2
        dx = (dy - offset.view(shape) - deviation * slope.view(shape)) * (rstd * weight).view(shape)
        return dx, dweight, dbias, None


class Stages(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Stages.apply(input, self.weight, self.bias, self.eps)
        return y


PROVIDERS: dict[str, dict[str, type[nn.Module]]] = {
    "cpu": {"tribn": tribn.SyncBatchNorm, "torch's stages": Stages},
    "cuda": {"tribn": tribn.SyncBatchNorm, "torch.nn": nn.SyncBatchNorm},
}


# By a collective's operator, the argument that holds what this process gives
GIVEN = {
    "_c10d_functional::all_gather_into_tensor": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "c10d::allreduce_": 0,
}


class Given(TorchDispatchMode):
    """Counts the bytes that this process gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._schema.name == "tribn::gather":  # a collective and what is looked at
            with self:
                return distributed.gather_and_look(*args)
        argument = GIVEN.get(function._schema.name)
        if argument is not None:
            given = args[argument]
            self.bytes += sum(t.nbytes for t in (given if isinstance(given, list) else [given]))
        return function(*args, **(kwargs or {}))


def calls(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """By direction; backward goes through the graph of one forward again and again."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    dy, leaves = torch.ones_like(y), [leaf, *module.parameters()]
    return {
        "forward": lambda: module(leaf),
        "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
    }


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    rank: int,
    world: int,
    device: str,
    shapes: Sequence[tuple[int, ...]],
    rounds: int,
    folder: str,
) -> None:
    """One process, for inputs of these shapes: the first one leaves its rows in the folder."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(f"{folder}/store{world}", world),
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    found: list[Row] = []
    for shape in shapes:
        torch.manual_seed(rank)
        x = 3 + 2 * torch.randn(shape, device=device)
        modules = {name: of(shape[1]).to(device) for name, of in PROVIDERS[device].items()}
        ours, theirs = (module(x) for module in modules.values())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        by_key = {
            (name, direction): call
            for name, module in modules.items()
            for direction, call in calls(module, x).items()
        }
        samples: dict[tuple[str, str], list[float]] = {key: [] for key in by_key}
        given: dict[tuple[str, str], int] = {}
        for key, call in by_key.items():
            with Given() as counted:
                call()
            given[key] = counted.bytes
        for _ in range(rounds):
            for key, call in by_key.items():
                wait(device)
                dist.barrier()
                start = time.perf_counter()
                call()
                wait(device)
                dist.barrier()
                samples[key].append((time.perf_counter() - start) * 1e6)
        found += [
            {
                "world": world,
                "shape": shape,
                "provider": name,
                "direction": direction,
                "us": float(np.median(us)),
                "quartiles_us": np.percentile(us, [25, 75]).tolist(),
                "bytes": given[name, direction],
            }
            for (name, direction), us in samples.items()
        ]
    if rank == 0:
        Path(f"{folder}/rows{world}").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(device: str, batch: int, rounds: int) -> list[Row]:
    """Rows of every number of processes that this machine can run."""
    shapes = [(batch, *shape) for shape in SHAPES]
    worlds = [w for w in WORLDS if device == "cpu" or w <= torch.cuda.device_count()]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            arguments = world, device, shapes, rounds, folder
            try:
                mp.start_processes(measure, arguments, nprocs=world, start_method="spawn")
            except mp.ProcessRaisedException as error:
                reason = str(error).strip().splitlines()[-1]
                raise SystemExit(f"{world} processes cannot be timed: {reason}") from error
            rows += json.loads(Path(f"{folder}/rows{world}").read_text())
    return rows


# Reckoned


def collectives_seconds(net: str, ranks: int, network: Network) -> float:
    """Of a training step, one after the other."""
    return sum(
        layer.count * network.all_gather(ranks, size)
        for layer in layers(net, 1)
        for C in layer.shape[1:2]
        for size in (16 * C + 16, 16 * C + 8)
    )


def image_seconds(net: str, gpu: Gpu) -> float:
    """Of the batch norm layers for each image of a step, in bf16 and two launches."""
    return sum(
        layer.count
        * layer.elements
        * 2
        * sum(PATHS["two launches"][layer.op].units(d, itemsize=2) for d in DIRECTIONS)
        / gpu.bandwidth
        for layer in layers(net, 1)
    )


def reckoned(net: str, gpu: Gpu, network: Network) -> list[Row]:
    """For each size of a group: collectives, and their share of the layers' time by batch."""
    image = image_seconds(net, gpu)
    found = []
    for ranks in GROUPS:
        seconds = collectives_seconds(net, ranks, network)
        found.append(
            {
                "ranks": ranks,
                "collectives_ms": 1e3 * seconds,
                "shares": [seconds / (batch * image) for batch in BATCHES],
                "enough": math.ceil(seconds / (SHARE * image)),
            }
        )
    return found


# Report


def measured_table(report: Report) -> Table:
    table = Table(
        title=report["path"], caption="First: processes", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("", "layer", "direction", "provider", "µs", "quartiles", "bytes given"):
        table.add_column(heading, no_wrap=heading in ("layer", "provider"))
    for row in report["rows"]:
        table.add_row(
            str(row["world"]),
            "x".join(map(str, row["shape"])),
            row["direction"],
            row["provider"],
            f"{row['us']:.0f}",
            "–".join(f"{us:.0f}" for us in row["quartiles_us"]),
            str(row["bytes"]),
        )
    return table


def reckoned_table(report: Report) -> Table:
    estimate = report["estimate"]
    table = Table(
        title=f"Reckoned, not measured: {estimate['net']} on {estimate['network']['name']}",
        caption=f"enough: images a GPU from which on collectives take less than {SHARE:.0%} of the "
        f"{1e6 * estimate['image_seconds']:.0f} µs that an image takes in batch norm",
        box=SIMPLE_HEAD,
    )
    for heading in ("GPUs in a group", "collectives, ms a step", "enough"):
        table.add_column(heading, justify="right")
    for row in estimate["rows"]:
        table.add_row(str(row["ranks"]), f"{row['collectives_ms']:.3g}", str(row["enough"]))
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("sync", __doc__)
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.device_count() > 1 else "cpu",
        help="cpu or cuda (%(default)s)",
    )
    parser.add_argument(
        "--batch", type=count, default=8, metavar="N", help="of a process (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=count, default=30, metavar="N", help="samples of each call (%(default)s)"
    )
    parser.add_argument("--net", choices=NETS, default="resnet50", help="reckoned (%(default)s)")
    arguments = parser.parse_args(argv)
    refuse_interpreter(parser)
    arguments.file = name_of(
        f"sync-{short_name(arguments.device)}", parser, arguments, "net", "batch"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    on_gpu = arguments.device == "cuda"
    gpu, network = GPUS["H100"], NETWORKS["H100"]
    report: Report = {
        "command": "sync",
        "path": "GPUs, NCCL" if on_gpu else "CPU path, no GPU: processes on one machine, Gloo",
        "environment": environment(arguments.device),
        "rounds": arguments.rounds,
        "rows": measured(arguments.device, arguments.batch, arguments.rounds),
        "estimate": {
            "net": arguments.net,
            "gpu": vars(gpu),
            "network": vars(network),
            "batches": BATCHES,
            "share": SHARE,
            "image_seconds": image_seconds(arguments.net, gpu),
            "rows": reckoned(arguments.net, gpu, network),
        },
    }
    path = write(report, arguments.out, arguments.file)
    console = Console()
    console.print(measured_table(report), reckoned_table(report))
    console.print(str(path), soft_wrap=True)
