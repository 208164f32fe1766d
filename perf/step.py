"""Times training steps of whole networks, with batch norm from torch, torch.compile and tribn.

A step is forward, cross entropy, backward and SGD with momentum, on one batch of random inputs
that stays on the device. Samples are steps, those of all providers in turn. Before, every provider
takes a step in float32 from the same weights: one that leads to another loss, other weights or
other running statistics than torch eager's is reported as wrong and not timed.

    eager      torch.nn's batch norm, then sum and activation
    compile    the same network in torch.compile
    tribn      tribn's batch norm, not compiled

With a GPU the steps run in bfloat16 autocast at the sizes people train. Without one they run in
float32 at small sizes, and what is timed is the CPU path. Tensors are channels_last on both.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import tribn
from perf.clocks import timed
from perf.gate import compare, described
from perf.networks import NETWORKS, Network, norm_of
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

PROVIDERS = {"eager": torch.nn, "compile": torch.nn, "tribn": tribn}  # where batch norm is from
# Batch, and pixels or voxels a side
SIZES: dict[str, dict[str, tuple[int, int | None]]] = {
    "resnet50": {"cuda": (128, 224), "cpu": (8, 64)},
    "mobilenet_v2": {"cuda": (128, 224), "cpu": (8, 64)},
    "unet3d": {"cuda": (2, 128), "cpu": (2, 16)},
    "mlp": {"cuda": (4096, None), "cpu": (1024, None)},
}
MEMORY_FORMATS = {0: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}
RATE, MOMENTUM = 0.01, 0.9
WARM_UP = 3  # steps
# The largest ‖result − eager's‖ / ‖eager's‖ after a step. Backward through many layers multiplies
# rounding: torch eager's own change of ResNet-50's weights is 3 % from float64's.
TOLERANCES = {"weights": 0.1, "loss": 0.05, "statistics": 1e-3}

Row = dict[str, Any]


class Training:
    """A network with its optimizer and a batch, the same for every provider."""

    def __init__(
        self, network: Network, provider: str, shape: tuple[int, ...], device: str
    ) -> None:
        placed = {"device": device, "memory_format": MEMORY_FORMATS[network.axes]}
        torch.manual_seed(0)
        self.model = network.build(norm_of(PROVIDERS[provider], network.axes)).to(**placed)
        batch, classes, *space = output_shape(network, shape)
        self.inputs = torch.randn(shape).to(**placed)
        self.labels = torch.randint(classes, (batch, *space)).to(device)
        compiled = provider == "compile"
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, MOMENTUM)

    def step(self, amp: bool) -> Tensor:
        """One step; the loss before it."""
        with torch.autocast(self.inputs.device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(self.forward(self.inputs), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Parameters and running statistics, a vector each."""
        tensors = {"weights": self.model.parameters(), "statistics": self.model.buffers()}
        return {
            name: torch.cat([t.detach().flatten().cpu().double() for t in group])
            for name, group in tensors.items()
        }

    def first_step(self) -> dict[str, Tensor]:
        """What a step in float32 changes, and the loss after it."""
        before = self.state()
        self.step(amp=False)
        after = self.state()
        changes = {name: after[name] - before[name] for name in after}
        return {**changes, "loss": self.step(amp=False).cpu()}


def output_shape(network: Network, shape: tuple[int, ...]) -> torch.Size:
    """(N, classes, ...), or the error that inputs of this shape would give."""
    with torch.device("meta"):
        return network.build(norm_of(torch.nn, network.axes))(torch.empty(shape)).shape


def check(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises WrongResult if a step leads elsewhere than torch eager's."""
    for name, tolerance in TOLERANCES.items():
        compare(f"what a step makes of {name}", results[name], expected[name], tolerance)


def peak(call: Callable[[], Any]) -> int:
    """The most bytes of GPU memory that are allocated during a call."""
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(
    name: str,
    shape: tuple[int, ...],
    providers: Sequence[str],
    steps: int,
    device: str,
    advance: Callable[[], None],
) -> tuple[list[Row], list[Row]]:
    """Rows and problems of a network; `advance` is called after each check and each round.

    The first provider, eager, is what the others are compared with.
    """
    torch._dynamo.reset()  # or the networks together would exceed its limit of compilations
    amp = device == "cuda"
    expected: dict[str, Tensor] = {}
    calls: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    problems = []
    training: Training | None = None
    for provider in providers:
        training = None  # of one that failed, which would count as held
        gc.collect()
        held = torch.cuda.memory_allocated()  # by other providers
        try:
            training = Training(NETWORKS[name], provider, shape, device)
            results = training.first_step()
            expected = expected or results
            check(results, expected)
            call = partial(training.step, amp)
            for _ in range(WARM_UP):
                call()
            peaks[provider] = peak(call) - held if device == "cuda" else None
            calls[provider] = call
        except Exception as error:  # a rival that does not run here is a result, not a failure
            if provider == "eager":
                raise
            problems.append(problem(name, shape, provider, error))
        advance()
    samples = sample(calls, steps, device, advance)
    return rows(name, shape, samples, peaks), problems


def sample(
    calls: dict[str, Callable[[], Any]], steps: int, device: str, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds, in rounds and to and fro: what slows the machine for a while slows all providers."""
    order = list(calls)
    samples: dict[str, list[float]] = {provider: [] for provider in order}
    for _ in range(steps):
        for provider in order:
            samples[provider].append(timed(calls[provider], device))
        order.reverse()
        advance()
    return samples


def rows(
    name: str,
    shape: tuple[int, ...],
    samples: dict[str, list[float]],
    peaks: dict[str, int | None],
) -> list[Row]:
    found = []
    for provider, seconds in samples.items():
        low, middle, high = np.percentile(seconds, [25, 50, 75])
        found.append(
            {
                "net": name,
                "shape": shape,
                "provider": provider,
                "clock": "wall",
                "ms": middle * 1e3,
                "quartiles_ms": (low * 1e3, high * 1e3),
                "samples": len(seconds),
                "unit": NETWORKS[name].inputs,
                "per_second": shape[0] / middle,
                "quartiles_per_second": (shape[0] / high, shape[0] / low),
                "over_eager": np.median(samples["eager"]) / middle,
                "peak_bytes": peaks[provider],
            }
        )
    return found


def problem(name: str, shape: tuple[int, ...], provider: str | None, error: Exception) -> Row:
    """Of a provider, or if None of the network."""
    return {"net": name, "shape": shape, "provider": provider, **described(error)}


def table(report: Report) -> Table:
    inputs = {row["net"]: "x".join(map(str, row["shape"])) for row in report["rows"]}
    found = Table("network", "provider", box=SIMPLE_HEAD, caption_justify="left")
    found.caption = "inputs: " + ", ".join(f"{net} {shape}" for net, shape in inputs.items())
    for column in ("a second", "quartiles", "over eager", "peak MB"):
        found.add_column(column, justify="right", no_wrap=True)
    for row in report["rows"]:
        found.add_row(
            row["net"],
            row["provider"],
            f"{number(row['per_second'])} {row['unit']}",
            "–".join(map(number, row["quartiles_per_second"])),
            f"{row['over_eager']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "",
        )
    return found


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with `shapes` of the inputs, by network, and the result's `file`."""
    rivals = [name for name in PROVIDERS if name != "eager"]
    parser = parser_of("step", __doc__)
    parser.add_argument(
        "--net",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar="NAME",
        help=f"of {', '.join(NETWORKS)} (all)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=rivals,
        metavar="NAME",
        help=f"besides eager, of {', '.join(rivals)} (both; on a CPU, where compile takes minutes "
        "before its first step, tribn)",
    )
    parser.add_argument("--batch", type=count, metavar="N", help="inputs of a step")
    parser.add_argument(
        "--size", type=count, metavar="N", help="pixels or voxels a side; mlp has none"
    )
    parser.add_argument(
        "--steps", type=count, default=20, metavar="N", help="of each provider (%(default)s)"
    )
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (%(default)s)",
    )
    arguments = parser.parse_args(argv)
    refuse_interpreter(parser)
    options = "net", "providers", "batch", "size"
    arguments.file = name_of(f"step-{short_name(arguments.device)}", parser, arguments, *options)
    chosen = arguments.providers or (rivals if arguments.device == "cuda" else ["tribn"])
    arguments.providers = ["eager", *(name for name in rivals if name in chosen)]
    arguments.shapes = {}
    for name in dict.fromkeys(arguments.net):
        network = NETWORKS[name]
        batch, size = SIZES[name][arguments.device]
        shape = network.shape(arguments.batch or batch, arguments.size or size)
        if arguments.size and not network.axes:
            parser.error(f"--size: {name} has none; name the networks that do with --net")
        try:
            output_shape(network, shape)
        except (RuntimeError, ValueError) as error:
            parser.error(f"{name} cannot train on inputs of shape {shape}: {error}")
        arguments.shapes[name] = shape
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    on_gpu = arguments.device == "cuda"
    report: Report = {
        "command": "step",
        "path": "GPU" if on_gpu else "CPU path, no GPU",
        "environment": environment(arguments.device),
        "dtype": "bfloat16 autocast" if on_gpu else "float32",
        "memory_format": "channels_last",
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "rows": [],
        "problems": [],
    }
    console = Console()
    with (
        Progress(console=console) as progress,
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
    ):
        rounds = len(arguments.providers) + arguments.steps
        tasks = {name: progress.add_task(name, total=rounds) for name in arguments.shapes}
        for name, shape in arguments.shapes.items():
            advance = partial(progress.advance, tasks[name])
            try:
                found = measure(
                    name, shape, arguments.providers, arguments.steps, arguments.device, advance
                )
            except Exception as error:  # the networks before it are worth their file
                found = [], [problem(name, shape, None, error)]
            report["rows"] += found[0]
            report["problems"] += found[1]
            gc.collect()  # what a network leaves behind would count as another's
            torch.cuda.empty_cache()
    path = write(report, arguments.out, arguments.file)
    console.print(f"{report['path']}: {report['environment']['device']}, {report['dtype']}")
    console.print(table(report))
    for row in report["problems"]:
        console.print(f"{row['net']} {row['provider'] or ''}: {row['problem']}", markup=False)
    console.print(str(path), soft_wrap=True)
