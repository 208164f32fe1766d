"""The three clocks, which are never mixed, and the names of the kernels that ran.

cold   kernel time when no input is in the L2 cache: a CUDA graph that goes round sets of inputs
       which are together several times that cache
hot    kernel time when the inputs were just used: a CUDA graph of one call, again and again
wall   time of the call in Python, host and device; on a CPU the only clock
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle, islice
from typing import Any

import torch

Call = Callable[[], Any]
Sampler = Callable[[], float]  # takes a sample: seconds of one call

CLOCKS = ("cold", "hot", "wall")
L2_TURNS = 3  # inputs of a round of the cold clock, in sizes of the L2 cache
MOST_SETS = 1024  # of inputs; smaller ones have no cold clock
GRAPH_BYTES = 512e6  # a replay goes through about so much input: some 0.3 ms on an H100
WALL_CALLS = 10  # between two synchronizations


def sets_of_inputs(nbytes: int, device: str) -> int:
    """How many inputs of this size the cold clock needs; 1 if that is too many, or on a CPU."""
    if device == "cpu":
        return 1
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sets = 1 + math.ceil(L2_TURNS * l2 / nbytes)
    return sets if sets <= MOST_SETS else 1


def samplers(calls: Mapping[str, Sequence[Call]], nbytes: int, device: str) -> dict[Any, Sampler]:
    """By (direction, clock): samplers of calls on every set of inputs, `nbytes` each.

    On a GPU, the current stream must be `capturable`.
    """
    found: dict[Any, Sampler] = {}
    if device == "cuda":
        pool = torch.cuda.graph_pool_handle()  # one for all: no replay needs another's results
        repeats = min(max(math.ceil(GRAPH_BYTES / nbytes), 5), 200)
        for direction, sets in calls.items():
            if len(sets) > 1:
                found[direction, "cold"] = Replay(sets, math.ceil(repeats / len(sets)), pool)
            found[direction, "hot"] = Replay(sets[:1], repeats, pool)
    for direction, sets in calls.items():
        found[direction, "wall"] = Wall(sets[0], device)
    return found


def capturable(device: str) -> AbstractContextManager[Any]:
    """Makes another than the default stream the current one, on a GPU: that one is not captured."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


@contextmanager
def unsynchronized() -> Iterator[None]:
    """Raises where the host would wait for the device: a capture would break down there."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Wall:
    """Times calls from the host, until the device is done too.

    An untimed call comes first: after another provider's, Python and processor have to find back.
    """

    def __init__(self, call: Call, device: str) -> None:
        self.call, self.device = call, device
        self.count = WALL_CALLS if device == "cuda" else 1

    def __call__(self) -> float:
        self.call()
        wait(self.device)
        return timed(self.call, self.device, self.count)


def timed(call: Call, device: str, count: int = 1) -> float:
    """Seconds of a call, of so many in a row, until the device is done too."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    return (time.perf_counter() - started) / count


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Replay:
    """Times a CUDA graph that goes a number of rounds through some calls."""

    def __init__(self, calls: Sequence[Call], rounds: int, pool: Any) -> None:
        self.count = rounds * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        calls[0]()  # what only a first call does cannot be captured
        with unsynchronized():
            calls[0]()
        # A round's results stay until the next one, so that each call of it writes other memory.
        results: deque[Any] = deque(maxlen=len(calls))
        with torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.current_stream()):
            for call in islice(cycle(calls), self.count):
                results.append(call())

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()  # hides the launch of the next, and leaves its inputs as they come
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.count


def launched(calls: Mapping[str, Call]) -> dict[str, dict[str, int]]:
    """The kernels and copies that each call puts on the GPU: how often, by name."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for label, call in calls.items():
            with record_function(label):
                call()
                torch.cuda.synchronize()
    return by_label(profiler.events(), calls)


def by_label(events: Iterable[Any], labels: Iterable[str]) -> dict[str, dict[str, int]]:
    """Counts the events of the GPU within the time of each label, by short name."""
    ordered = sorted(events, key=lambda event: event.time_range.start)
    names: dict[str, Counter[str]] = {label: Counter() for label in labels}
    spans = {e.name: e.time_range for e in ordered if on_host(e) and e.name in names}
    for event in ordered:
        for label, span in spans.items():
            inside = span.start <= event.time_range.start <= span.end
            # A label shows on the GPU too, as the time from its first to its last kernel.
            if inside and not on_host(event) and event.name not in names:
                names[label][short(event.name)] += 1
    return {label: dict(counter) for label, counter in names.items()}


def on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def short(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name, maxsplit=1)[0].strip()
