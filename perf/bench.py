"""Times batch norm in training and evaluation: tribn, torch eager and torch.compile.

All providers run on the same inputs in one process, in turn. One whose results are not as accurate
as torch eager's is reported as wrong and not timed. Bandwidth is the fewest bytes the operation can
move (forward and eval: input and output; backward: input, two gradients) over the time.

On a GPU the clocks are `cold` and `hot`: CUDA graph replays over inputs that do not, or do, fit the
L2 cache together. `wall` is the eager call, host included; without a GPU it is the only one, and
what is timed is the CPU path.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import tribn
from perf.cases import NETS
from perf.environment import RESULTS, environment

Function = Callable[..., Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = {"forward": 2, "backward": 3, "eval": 2}  # tensors read and written
ROUNDS = 15  # samples of each clock
ALLOWED = 4  # errors, in units of torch eager's, before a provider counts as wrong


def providers() -> dict[str, Function]:
    def compiled(*args: Any) -> Tensor:
        return F.batch_norm(*args)

    torch._dynamo.reset()  # or a new shape would count as a recompilation
    torch._functorch.config.donated_buffer = False  # so that backward can be timed many times
    return {
        "tribn": tribn.functional.batch_norm,
        "eager": F.batch_norm,
        "compile": torch.compile(compiled, dynamic=False, fullgraph=True),
    }


class Inputs:
    """One layer's tensors, and a call of each operation on them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str) -> None:
        memory_format = torch.channels_last if last else torch.contiguous_format
        C = shape[1]
        x = torch.randn(shape, device=device) * 2 + 3
        self.x = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        self.dy = torch.randn_like(self.x)
        self.weight = torch.rand(C, device=device).requires_grad_()
        self.bias = torch.randn(C, device=device).requires_grad_()
        self.running = torch.zeros(C, device=device), torch.ones(C, device=device)

    def forward(self, function: Function, running: Sequence[Tensor]) -> Tensor:
        return function(self.x, *running, self.weight, self.bias, True)

    def calls(self, function: Function) -> dict[str, Callable[[], Any]]:
        # Statistics of its own: eager's backward refuses those that a later forward has changed.
        y = self.forward(function, [t.clone() for t in self.running])
        leaves = self.x, self.weight, self.bias

        def forward() -> Tensor:
            with torch.no_grad():
                return self.forward(function, self.running)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, leaves, self.dy, retain_graph=True)

        def evaluate() -> Tensor:
            with torch.no_grad():
                return function(self.x, *self.running, self.weight, self.bias, False)

        return {"forward": forward, "backward": backward, "eval": evaluate}


def errors(function: Function, inputs: Inputs) -> list[float]:
    """Largest errors of output and gradients against float64."""
    leaves = inputs.x, inputs.weight, inputs.bias
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y64 = F.batch_norm(exact[0], None, None, exact[1], exact[2], True)
    expected = [y64, *torch.autograd.grad(y64, exact, inputs.dy.double())]
    y = inputs.forward(function, inputs.running)
    actual = [y, *torch.autograd.grad(y, leaves, inputs.dy)]
    return [(a.double() - e).abs().max().item() for a, e in zip(actual, expected, strict=True)]


def accurate(candidate: Sequence[float], eager: Sequence[float]) -> bool:
    """Whether no error is more than a few times torch eager's; NaN is."""
    return all(c <= ALLOWED * e + 1e-12 for c, e in zip(candidate, eager, strict=True))


def wall(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, host and device."""
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Replay:
    """A CUDA graph of some calls, one after another."""

    def __init__(self, calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> None:
        self.count = len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.results = [call() for call in calls]  # kept: their memory belongs to the graph

    def __call__(self) -> float:
        """Seconds of one call in a replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.count


def clocks(
    function: Function, sets: Sequence[Inputs], device: str
) -> dict[tuple[str, str], Callable[[], float]]:
    """What to sample, by operation and clock, for a provider on several sets of inputs."""
    if device == "cpu":
        calls = sets[0].calls(function)
        return {(op, "wall"): lambda call=call: wall(call, device) for op, call in calls.items()}
    samplers: dict[tuple[str, str], Callable[[], float]] = {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # backward runs on the stream of its forward
        per_set = [inputs.calls(function) for inputs in sets]
        for calls in per_set:
            for call in calls.values():
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    for op in PASSES:
        samplers[op, "cold"] = Replay([calls[op] for calls in per_set], stream)
        samplers[op, "hot"] = Replay([per_set[0][op]] * 10, stream)
        samplers[op, "wall"] = lambda call=per_set[0][op]: wall(call, device)
    return samplers


def copy_bandwidth(like: Tensor) -> float:
    """Bytes a second, read and written, of a copy of a tensor; best of several."""
    source, target = torch.empty_like(like).normal_(), torch.empty_like(like)
    device = like.device.type
    seconds = min(wall(lambda: target.copy_(source), device) for _ in range(ROUNDS))
    return 2 * like.nbytes / seconds


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str
) -> list[dict[str, Any]]:
    """A row for each operation, clock and provider."""
    size = math.prod(shape) * dtype.itemsize
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    sets = [Inputs(shape, dtype, last, device) for _ in range(1 + -(-3 * l2 // size))]
    samplers, rows = {}, []
    labels = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "channels_last": last}
    eager = errors(F.batch_norm, sets[0])
    for name, function in providers().items():
        try:
            if accurate(errors(function, sets[0]), eager):
                samplers[name] = clocks(function, sets, device)
                continue
            problem = "wrong"
        except Exception as error:  # a rival that does not run here is a result, not a failure
            problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        rows.append({**labels, "provider": name, "problem": problem})
    samples: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(ROUNDS):  # in turn, so that a slow moment of the machine slows all
        for name, sampled in samplers.items():
            for (op, clock), sample in sampled.items():
                samples.setdefault((op, clock, name), []).append(sample())
    copied = copy_bandwidth(sets[0].x.detach())
    for (op, clock, name), seconds in samples.items():
        low, _, high = quantiles(seconds, n=4)
        bandwidth = PASSES[op] * size / median(seconds)
        rows.append(
            {
                **labels,
                "op": op,
                "clock": clock,
                "provider": name,
                "us": median(seconds) * 1e6,
                "quartiles_us": [low * 1e6, high * 1e6],
                "TB/s": bandwidth / 1e12,
                "share_of_copy": bandwidth / copied,
            }
        )
    return rows


def speed_ups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Geometric mean over layers of a rival's time over tribn's, by (op, clock, rival)."""
    timed = [row for row in rows if "us" in row]
    own = {layer(row): row["us"] for row in timed if row["provider"] == "tribn"}
    logs: dict[tuple[str, str, str], list[float]] = {}
    for row in timed:
        if row["provider"] != "tribn" and layer(row) in own:
            key = row["op"], row["clock"], row["provider"]
            ratio = math.log(row["us"] / own[layer(row)])
            logs.setdefault(key, []).extend([ratio] * row["count"])
    return {key: math.exp(mean(ratios)) for key, ratios in logs.items()}


def layer(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows of different providers have in common."""
    return tuple(str(row[key]) for key in ("shape", "dtype", "channels_last", "op", "clock"))


def parse(argv: Sequence[str] | None, device: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch = 128 if device == "cuda" else 2
    parser.add_argument("--net", choices=NETS, default="resnet50")
    parser.add_argument("--batch", type=int, default=batch, help="images (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if device == "cuda" else "fp32")
    parser.add_argument(
        "--seconds", type=float, default=240, help="start no layer after so long (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1:
        parser.error(f"--batch is {arguments.batch}: it must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = parse(argv, device)
    console = Console()
    started = time.perf_counter()
    layers = [(layer, last) for layer in NETS[arguments.net] for last in (False, True)]
    rows: list[dict[str, Any]] = []
    left_out = []
    with Progress(console=console) as progress:
        for (count, *chw), last in progress.track(layers, description=arguments.net):
            shape = (arguments.batch, *chw)
            if time.perf_counter() - started > arguments.seconds:
                left_out.append({"shape": shape, "channels_last": last})
                continue
            measured = measure(shape, DTYPES[arguments.dtype], last, device)
            rows += [{"count": count, **row} for row in measured]
    means = speed_ups(rows)
    report = {
        "environment": environment(device),
        "clock": "GPU" if device == "cuda" else "CPU path, no GPU",
        "rows": rows,
        "left_out": left_out,
        "speed_up": [
            {"op": op, "clock": clock, "over": rival, "times": value}
            for (op, clock, rival), value in means.items()
        ],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name().replace(" ", "-") if device == "cuda" else "cpu"
    path = arguments.out / f"bench-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(
        "op", "clock", "rival's time over tribn's", "rival", title=report["environment"]["device"]
    )
    for (op, clock, rival), value in means.items():
        table.add_row(op, clock, f"{value:.2f}", rival)
    console.print(table)
    for row in rows:
        if "problem" in row:
            console.print(f"{row['provider']} {row['shape']}: {row['problem']}")
    if left_out:
        console.print(f"not reached in {arguments.seconds:.0f} s: {len(left_out)} layers")
    console.print(f"{report['clock']}; {path}")
