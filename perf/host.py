"""Microseconds of Python and dispatcher in a call of batch norm, by layer, beside torch.nn's.

    module      tribn.BatchNorm2d
    functional  tribn.functional.batch_norm: checks of the arguments
    autograd    torch.autograd.Function; backward, the engine that calls it
    launch      Triton: the launch of a compiled kernel
    launcher    tribn.kernels: plan, memory and arguments of the launch

`total` is a call of that layer, `own` what it takes more than the layer below it. `both` is a
forward and its backward, with the graph that is made and freed. Samples are many calls in a row
without synchronization, on a tensor so small that the host is slower than the GPU.

Without a GPU the launches are no-ops, and every row says so: tribn's are the host's share of a call
on a GPU. torch.nn's rows then hold the operators of the CPU, which are small here but not nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product, zip_longest
from timeit import Timer
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tribn
from perf.codegen import absent
from perf.networks import norm_of
from perf.report import (
    Report,
    count,
    device,
    environment,
    parser_of,
    refuse_interpreter,
    short_name,
    write,
)
from tribn import functional, kernels, ops

SHAPE = (2, 4, 2, 2)
CALLS = 10  # of a sample: too short to be interrupted often
PROVIDERS = {"tribn": tribn, "eager": torch.nn}
ACTIVATIONS = {"bn": None, "bn_relu": "relu"}  # by op
# By direction, tribn's layers as attributes that the layer above calls. The last two differ in what
# is measured: with launches and without.
LAYERS: dict[str, dict[str, tuple[Any, str]]] = {
    "forward": {
        "functional": (tribn.nn, "normalize"),
        "autograd": (functional.BatchNormTrain, "apply_plain"),
        **dict.fromkeys(("launch", "launcher"), (ops, "run")),
    },
    "backward": {
        **dict.fromkeys(("launch", "launcher"), (ops, "run")),
    },
}
# What is timed without a GPU
NOTES = {"tribn": "launches are no-ops", "eager": "CPU operators included"}

Row = dict[str, Any]
Call = Callable[[], Any]
Key = tuple[str, str, str, str]  # op, direction, provider, layer


def nothing(*args: Any) -> None:
    """A mock would take its time."""


@contextmanager
def no_launches() -> Iterator[None]:
    """Triton launches nothing."""
    with mock.patch.object(kernels.host, "start", nothing):
        yield


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Tensors of a CPU run tribn's kernels for an absent GPU, without their launches."""
    with mock.patch.object(ops, "_INTERPRET", True), absent("sm_90"), no_launches():
        yield


@contextmanager
def within(layer: str) -> Iterator[None]:
    """As the layer above calls it: an autograd.Function without gradients."""
    inner = layer in ("launch", "launcher")
    with torch.set_grad_enabled(not inner), no_launches() if layer == "launcher" else nullcontext():
        yield


def recorded(call: Call, owner: Any, name: str) -> Call:
    """The call of `owner.name` that is made within a call."""
    function = getattr(owner, name)
    with mock.patch.object(owner, name, wraps=function) as spy:
        call()
    return partial(function, *spy.call_args.args, **spy.call_args.kwargs)


def calls(op: str, provider: str, device: str) -> dict[Key, Call]:
    """A provider's layers from the outermost inwards; torch.nn's are one."""
    norm = norm_of(PROVIDERS[provider], axes=len(SHAPE) - 2)
    # Two, for torch's backward refuses running statistics that a later forward has changed.
    module, other = (norm(SHAPE[1], ACTIVATIONS[op]).to(device) for _ in range(2))
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    y, dy, leaves = other(x), torch.ones_like(x), [x, *module.parameters()]
    gradients = partial(torch.autograd.grad, y, [x, *other.parameters()], dy, retain_graph=True)
    found: dict[Key, Call] = {}
    for direction, layer, call in (
        ("forward", "module", partial(module, x)),
        ("backward", "autograd", gradients),
        ("both", "module", lambda: torch.autograd.grad(module(x), leaves, dy)),
    ):
        found[op, direction, provider, layer] = call
        for _ in range(3):  # tribn remembers what is repeated
            call()
        if provider == "tribn":
            for inner, attribute in LAYERS.get(direction, {}).items():
                found[op, direction, provider, inner] = recorded(call, *attribute)
    return found


def sample(
    calls: dict[Key, Call], rounds: int, device: str, advance: Call
) -> dict[Key, list[float]]:
    """Microseconds, in rounds and to and fro: what slows the machine for a while slows all."""
    # A call comes first that is not timed: after another layer's, Python has to find back.
    timers = {key: Timer(call, setup=call) for key, call in calls.items()}
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    for _ in range(rounds):
        for key in order:
            with within(key[-1]):
                samples[key].append(timers[key].timeit(CALLS) / CALLS * 1e6)
            if device == "cuda":
                torch.cuda.synchronize()
        order.reverse()
        advance()
    return samples


def rows(samples: dict[Key, list[float]], device: str) -> list[Row]:
    """Median and quartiles of every layer, and how much its median is above the next layer's."""
    quartiles = {key: np.percentile(us, [25, 50, 75]) for key, us in samples.items()}
    found = []
    for key, below in zip_longest(samples, list(samples)[1:]):
        low, median, high = quartiles[key]
        inner = below is not None and below[:-1] == key[:-1]
        found.append(
            {
                **dict(zip(("op", "direction", "provider", "layer"), key, strict=True)),
                "clock": "wall",
                "us": median,
                "quartiles_us": (low, high),
                "own_us": median - quartiles[below][1] if inner else median,
                "note": NOTES[key[2]] if device == "cpu" else None,
            }
        )
    return found


def table(report: Report) -> Table:
    found = Table("op", "direction", "provider", "layer", box=SIMPLE_HEAD)
    for column in ("own µs", "total µs", "quartiles"):
        found.add_column(column, justify="right", no_wrap=True)
    for row in report["rows"]:
        found.add_row(
            *(row[key] for key in ("op", "direction", "provider", "layer")),
            f"{row['own_us']:.1f}",
            f"{row['us']:.1f}",
            "–".join(f"{us:.1f}" for us in row["quartiles_us"]),
            end_section=row["direction"] == "both",
        )
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("host", __doc__)
    parser.add_argument(
        "--rounds",
        type=count,
        default=300,
        metavar="N",
        help=f"samples of each layer, {CALLS} calls each (%(default)s)",
    )
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (%(default)s)",
    )
    arguments = parser.parse_args(argv)
    refuse_interpreter(parser)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    on_gpu = arguments.device == "cuda"
    console = Console()
    with Progress(console=console) as progress, nullcontext() if on_gpu else kernels_on_cpu():
        task = progress.add_task("rounds", total=arguments.rounds)
        layers: dict[Key, Call] = {}
        for op, provider in product(ACTIVATIONS, PROVIDERS):
            layers |= calls(op, provider, arguments.device)
        advance = partial(progress.advance, task)
        samples = sample(layers, arguments.rounds, arguments.device, advance)
    report: Report = {
        "command": "host",
        "path": "GPU" if on_gpu else "no GPU: launches are no-ops",
        "environment": environment(arguments.device),
        "shape": SHAPE,
        "calls": CALLS,
        "rounds": arguments.rounds,
        "rows": rows(samples, arguments.device),
    }
    path = write(report, arguments.out, f"host-{short_name(arguments.device)}")
    console.print(f"{report['path']}, {report['environment']['device']}")
    console.print(table(report))
    console.print(str(path), soft_wrap=True)
