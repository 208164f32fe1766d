"""Times batch norm layers: tribn beside its rivals, on the same inputs, in one process, in turn.

A provider whose results are not those of float64 is reported as wrong and not timed. There are
three clocks, never mixed: kernels with a cold L2 cache, kernels with a hot one, and the call in
Python, host included. Without a GPU it times the CPU path against torch's, by the last of them,
and says so in file, table and plot. perf/README.md tells how to read a row.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice, product
from statistics import median, quantiles
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from perf.cases import DIRECTIONS, DTYPES, LAYOUTS, NETS, OPS, SETS, Layer, layers
from perf.clocks import CLOCKS, Call, Sampler, launched, samplers, sets_of_inputs
from perf.gate import Case, Inputs, check, described
from perf.jobs import measuring, release
from perf.providers import PROVIDERS
from perf.report import (
    Report,
    count,
    environment,
    name_of,
    parser_of,
    refuse_interpreter,
    short_name,
    write,
)

ROUNDS, FEWEST_ROUNDS = 12, 5  # samples of each clock
PATIENCE = 10.0  # seconds of sampling, after which the fewest are enough
PROCESS_BYTES = 1_000_000_000  # of GPU memory, for a job's context and compiled kernels
COPY = "copy"  # of the input: direction and provider of what bandwidths are compared with

Row = dict[str, Any]
Key = tuple[str, str, str]  # direction, clock, provider
Calls = dict[str, dict[str, list[Call]]]  # by provider and direction, on each set of inputs


# Measuring a case


def attempt(case: Case, report: Report, names: Sequence[str], device: str) -> Iterator[None]:
    """`measure`; what it raises is a problem of the case: others are worth their file."""
    try:
        yield from measure(case, report, names, device)
    except Exception as error:
        report["problems"].append(problem(case, None, error))


def measure(case: Case, report: Report, names: Sequence[str], device: str) -> Iterator[None]:
    """Adds to the report the case's rows, problems and launched kernels; yields before it times."""
    nbytes = case.layer.elements * case.itemsize
    sets = [Inputs.random(case, device) for _ in range(sets_of_inputs(nbytes, device))]
    calls: Calls = {COPY: {COPY: [inputs.x.detach().clone for inputs in sets]}}
    clocks = {COPY: samplers(calls[COPY], nbytes, device)}
    for name in names:
        try:
            function = PROVIDERS[name].build(case.layer)
            check(function, case, sets[0])
            release()
            on_sets = [inputs.calls(function) for inputs in sets]
            timed = {direction: [on[direction] for on in on_sets] for direction in DIRECTIONS}
            clocks[name] = samplers(timed, nbytes, device)
            calls[name] = timed
        except Exception as error:  # a rival that does not run here is a result, not a failure
            report["problems"].append(problem(case, name, error))
    yield
    samples = sample(
        {
            (direction, clock, name): sampler
            for name, of_provider in clocks.items()
            for (direction, clock), sampler in of_provider.items()
        }
    )
    report["rows"] += rows(case, samples)
    if device == "cuda":
        report["kernels"] += kernels(case, calls)


def labels(case: Case) -> Row:
    layer = case.layer
    return {
        "op": layer.op,
        "shape": layer.shape,
        "count": layer.count,
        "layout": case.layout,
        "dtype": case.dtype,
    }


def problem(case: Case, provider: str | None, error: Exception) -> Row:
    """Of a provider, or if None of the case's inputs."""
    return {**labels(case), "provider": provider, **described(error)}


def sample(samplers: dict[Key, Sampler]) -> dict[Key, list[float]]:
    """Seconds, in rounds and to and fro: what slows the machine for a while slows all providers."""
    order = sorted(samplers, key=lambda key: key[:2])  # providers follow each other
    samples: dict[Key, list[float]] = {key: [] for key in order}
    started = time.perf_counter()
    for number in range(ROUNDS):
        if number >= FEWEST_ROUNDS and time.perf_counter() - started > PATIENCE:
            break
        for key in order:
            samples[key].append(samplers[key]())
        order.reverse()
    return samples


def rows(case: Case, samples: dict[Key, list[float]]) -> list[Row]:
    medians = {key: median(seconds) for key, seconds in samples.items()}
    copied = moved_by(case, COPY)
    found = []
    for (direction, clock, name), seconds in samples.items():
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
        moved = moved_by(case, direction)
        own = medians.get((direction, clock, "tribn"))
        found.append(
            {
                **labels(case),
                "direction": direction,
                "clock": clock,
                "provider": name,
                "us": middle * 1e6,
                "quartiles_us": (low * 1e6, high * 1e6),
                "samples": len(seconds),
                "bytes": moved,
                "TB/s": moved / middle / 1e12,
                "share_of_copy": moved / middle / (copied / medians[COPY, clock, COPY]),
                "times_tribn": middle / own if own else None,
            }
        )
    return found


def moved_by(case: Case, direction: str) -> int:
    """The fewest bytes; a copy reads and writes the input."""
    if direction == COPY:
        return 2 * case.layer.elements * case.itemsize
    return case.layer.minimum_bytes(direction, case.itemsize)


def kernels(case: Case, calls: Calls) -> list[Row]:
    """What each provider launches for each direction."""
    keys = {
        f"{name} {direction}": (name, direction, sets[0])
        for name, of_provider in calls.items()
        for direction, sets in of_provider.items()
    }
    found = launched({label: call for label, (_, _, call) in keys.items()})
    return [
        {**labels(case), "provider": name, "direction": direction, "kernels": found[label]}
        for label, (name, direction, _) in keys.items()
    ]


# Summary


def summarize(rows: Iterable[Row]) -> list[Row]:
    """Each provider over all layers it was timed on, each counted as often as it occurs.

    `us` and `share_of_copy` are of all layers one after another; `speed_up`, `lowest` and `highest`
    are the geometric mean and the extremes of the provider's time over tribn's.
    """
    keys = "dtype", "layout", "direction", "clock", "provider"
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["direction"] != COPY:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [dict(zip(keys, key, strict=True)) | summary(group) for key, group in groups.items()]


def summary(rows: Sequence[Row]) -> Row:
    us = sum(row["count"] * row["us"] for row in rows)
    found = {
        "layers": sum(row["count"] for row in rows),
        "us": us,
        "share_of_copy": sum(row["count"] * row["us"] * row["share_of_copy"] for row in rows) / us,
    }
    if ratios := [(row["times_tribn"], row["count"]) for row in rows if row["times_tribn"]]:
        found["speed_up"] = geometric_mean(ratios)
        found["lowest"], found["highest"] = min(ratios)[0], max(ratios)[0]
    return found


def geometric_mean(weighted: Sequence[tuple[float, int]]) -> float:
    """Of (value, weight)."""
    total = sum(weight for _, weight in weighted)
    return math.exp(sum(math.log(value) * weight for value, weight in weighted) / total)


def tables(report: Report) -> list[Table]:
    """The summary, a table for each dtype and layout."""
    found: dict[str, Table] = {}
    for row in sorted(report["summary"], key=place):
        title = f"{row['dtype']}, {row['layout']}"
        if title not in found:
            found[title] = Table("direction", "clock", "provider", title=title, box=SIMPLE_HEAD)
            for column in ("layers", "µs", "copy", "speed-up", "range"):
                found[title].add_column(column, justify="right", no_wrap=True)
        ratios = []
        if "speed_up" in row and row["provider"] != "tribn":
            ratios = [f"{row['speed_up']:.2f}", f"{row['lowest']:.2f}–{row['highest']:.2f}"]
        found[title].add_row(
            *(row[key] for key in ("direction", "clock", "provider")),
            str(row["layers"]),
            f"{row['us']:.1f}",
            f"{row['share_of_copy']:.0%}",
            *ratios,
        )
    return list(found.values())


def place(row: Row) -> tuple[int, ...]:
    """Directions and clocks in their usual order; providers as listed."""
    return (
        DIRECTIONS.index(row["direction"]),
        CLOCKS.index(row["clock"]),
        list(PROVIDERS).index(row["provider"]),
    )


def show(report: Report, console: Console) -> None:
    lines = [f"{report['cases']}: {report['path']}, {report['environment']['device']}"]
    if report["summary"]:
        lines.append("speed-up: the provider's time over tribn's, geometric mean over layers")
    launches: dict[str, set[str]] = {}
    for row in report["kernels"]:
        title = f"{row['provider']}, {row['dtype']}, {row['layout']}"
        launches.setdefault(title, set()).update(row["kernels"])
    lines += [f"kernels of {title}: {', '.join(sorted(n))}" for title, n in launches.items()]
    lines += [f"{name} {obstacle}" for name, obstacle in report["unavailable"].items()]
    problems = Counter((row["provider"], row["problem"]) for row in report["problems"])
    for (provider, text), times in problems.items():
        lines.append(f"not timed ({times}×): {provider or 'inputs'}: {text}")
    for layer in report["left_out"]:
        sizes = "x".join(map(str, layer["shape"]))
        lines.append(f"not reached in time: {layer['op']} {sizes} {layer['layout']}")
    for table in tables(report):
        console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


# Command line


FEWEST_VALUES = 4  # per channel: the gradient of fewer is little but rounding


def shape(text: str) -> tuple[int, ...]:
    """As in 128x256x56x56, for argparse."""
    sizes = tuple(map(count, text.split("x")))
    if len(sizes) < 2 or math.prod(sizes) < FEWEST_VALUES * sizes[1]:
        raise argparse.ArgumentTypeError(
            f"{text} is no shape as 128x256x56x56, of at least {FEWEST_VALUES} values a channel"
        )
    return sizes


def parser(device: str) -> argparse.ArgumentParser:
    parser = parser_of("bench", __doc__)
    on_gpu = device == "cuda"
    what = parser.add_mutually_exclusive_group()
    for option, named, text in (
        ("--net", NETS, "layers of a network (resnet50)"),
        ("--set", SETS, "shapes of a kind"),
    ):
        what.add_argument(
            option, choices=named, metavar="NAME", help=f"{text}: of {', '.join(named)}"
        )
    what.add_argument(
        "--shape",
        type=shape,
        metavar="NxC[x...]",
        help=f"one input, as 128x256x56x56; at least {FEWEST_VALUES} values a channel",
    )
    parser.add_argument(
        "--op", choices=OPS, metavar="NAME", help=f"with --shape: of {', '.join(OPS)} (bn)"
    )
    parser.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help=f"images, with --net ({'the usual for each' if on_gpu else '2'})",
    )
    for option, choices, default in (
        ("--providers", [*PROVIDERS, "all"], ["tribn", "eager", *["compile"] * on_gpu]),
        ("--layouts", LAYOUTS, list(LAYOUTS)),
        ("--dtypes", DTYPES, ["bf16" if on_gpu else "fp32"]),
    ):
        parser.add_argument(
            option,
            nargs="+",
            choices=choices,
            default=default,
            metavar="NAME",
            help=f"of {', '.join(choices)} ({' '.join(default)})",
        )
    parser.add_argument(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="prepare so many layers at once, in processes; they are timed in turn (%(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=count,
        default=200,
        metavar="N",
        help="start no further layer after so long (%(default)s); the largest come first",
    )
    return parser


def parse(argv: Sequence[str] | None, device: str) -> argparse.Namespace:
    """The arguments, with `cases`, `what` they are, the result's `file`, and providers that run."""
    parsing = parser(device)
    arguments = parsing.parse_args(argv)
    refuse_interpreter(parsing)
    if arguments.batch and (arguments.set or arguments.shape):
        parsing.error("--batch goes with --net: sets and shapes have theirs")
    if arguments.op and not arguments.shape:
        parsing.error("--op goes with --shape: networks and sets have theirs")
    if arguments.shape:
        chosen = [replace(OPS[arguments.op or "bn"], shape=arguments.shape, count=1)]
        arguments.what = f"{chosen[0].op} {chosen[0]}"
    else:
        arguments.what = arguments.set or arguments.net or "resnet50"
        usual = None if device == "cuda" else 2
        chosen = layers(arguments.what, arguments.batch or usual)
    options = "batch", "providers", "layouts", "dtypes"
    arguments.file = name_of(arguments.what, parsing, arguments, *options)
    arguments.cases = cases(chosen, arguments.layouts, arguments.dtypes)
    everyone = "all" in arguments.providers
    named = list(dict.fromkeys(PROVIDERS if everyone else arguments.providers))
    found = {name: PROVIDERS[name].obstacle(device) for name in named}
    arguments.unavailable = {name: obstacle for name, obstacle in found.items() if obstacle}
    arguments.providers = [name for name in named if name not in arguments.unavailable]
    if arguments.unavailable and not everyone:
        parsing.error("; ".join(f"{name} {why}" for name, why in arguments.unavailable.items()))
    return arguments


def cases(chosen: Iterable[Layer], layouts: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """Layers that move most of a network's bytes first; (N, C) has only one layout."""
    by_size = sorted(chosen, key=lambda layer: -layer.elements * layer.count)
    return [
        Case(layer, layout, dtype)
        for layer, layout, dtype in product(by_size, dict.fromkeys(layouts), dict.fromkeys(dtypes))
        if len(layer.shape) > 2 or layout == layouts[0]
    ]


def run(
    pending: deque[Case],
    arguments: argparse.Namespace,
    device: str,
    report: Report,
    console: Console,
) -> None:
    """Measures the pending cases, as far as the time allows."""
    deadline = time.perf_counter() + arguments.seconds
    names, jobs = arguments.providers, min(arguments.jobs, len(pending))
    measure = partial(attempt, names=names, device=device)
    room = math.inf
    if device == "cuda":
        room = torch.cuda.mem_get_info()[0] - jobs * PROCESS_BYTES
    with Progress(console=console) as progress, measuring(jobs, measure, device) as measured:
        task = progress.add_task("", total=len(pending))
        while pending and time.perf_counter() < deadline:
            cases = list(islice(pending, jobs))
            if len(cases) > 1:
                taken = accumulate(footprint(case, len(names), device) for case in cases)
                cases = cases[: max(1, sum(nbytes <= room for nbytes in taken))]
            more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
            progress.update(task, description=f"{cases[0]}{more}")
            for case, found in zip(cases, measured(cases), strict=True):
                if found is None:
                    error = ChildProcessError("the process that measured it has ended")
                    found = {"problems": [problem(case, None, error)]}
                for name, rows in found.items():
                    report[name] += rows
                pending.popleft()
                progress.advance(task)


def footprint(case: Case, providers: int, device: str) -> int:
    """About the bytes of GPU memory that a case takes: in the gate, or with all its graphs."""
    nbytes = case.layer.elements * case.itemsize
    graphs = (3 + 7 * providers) * sets_of_inputs(nbytes, device) * nbytes
    return max(graphs, 12 * 8 * case.layer.elements)


def main(argv: Sequence[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = parse(argv, device)
    pending = deque(arguments.cases)
    report: Report = {
        "command": "bench",
        "path": "GPU" if device == "cuda" else "CPU path, no GPU",
        "environment": environment(device),
        "cases": arguments.what,
        "providers": arguments.providers,
        "unavailable": arguments.unavailable,
        "threads": torch.get_num_threads(),
        "rows": [],
        "kernels": [],
        "problems": [],
    }
    console = Console()
    interrupted = False
    try:
        run(pending, arguments, device, report, console)
    except KeyboardInterrupt:
        interrupted = True
    report["left_out"] = [labels(case) for case in pending]
    report["summary"] = summarize(report["rows"])
    file = f"bench-{short_name(device)}-{arguments.file}" + "-interrupted" * interrupted
    path = write(report, arguments.out, file)
    show(report, console)
    console.print(str(path), soft_wrap=True)
    if interrupted:
        sys.exit("interrupted")
    if "tribn" in arguments.providers and not any(r["provider"] == "tribn" for r in report["rows"]):
        sys.exit("tribn was timed on nothing")
