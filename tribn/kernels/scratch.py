"""Memory in which the programs of a launch meet: partial results, and counters that start at 0.

Launches on one stream run one after another and share counters. Graphs may be replayed on any
stream, and at the same time: every launch that is captured has counters of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

PAGE = 2**18  # counters that are set to 0 at once, of which a launch takes some 100

_lock = Lock()  # held while counters are taken
_left: dict[torch.device, Tensor] = {}  # of the newest page
_short: set[torch.device] = set()  # where graphs have taken half of it
NONE = None, 0
_captured: list[Tensor] = []  # in use as long as a graph may be
_of_streams: dict[tuple[torch.device, int], tuple[Tensor, int]] = {}  # and how many there are


def scratch(device: torch.device, doubles: int, counters: int) -> tuple[Tensor | None, Tensor]:
    """So many float64 and int32 numbers, the latter as the last launch on this stream left them."""
    results = torch.empty(doubles, dtype=torch.float64, device=device) if doubles else None
    return results, _counters(device, counters)


def _counters(device: torch.device, count: int) -> Tensor:
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured_zeros(device, count)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    of_stream, there = _of_streams.get((device, stream), NONE)
    if of_stream is None or there < count or (_short and device in _short):
        with _lock:
            # Before anything is captured there are counters for what will be.
            if len(_left.get(device, ())) < max(count, PAGE // 2):
                _left[device] = _page(device, max(count, PAGE))
            _short.discard(device)
            if of_stream is None or there < count:
                of_stream = _take(device, count)
                _of_streams[device, stream] = of_stream, count
    return of_stream


def _page(device: torch.device, count: int) -> Tensor:
    """Zeros that stay: made by a thread of their own, which no pool of a graph's memory serves."""

    def zeros() -> Tensor:
        page = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # for all streams
        return page

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(zeros).result()


def _captured_zeros(device: torch.device, count: int) -> Tensor:
    with _lock:
        if len(_left.get(device, ())) >= count:
            zeros = _take(device, count)
            _captured.append(zeros)
            if len(_left[device]) < PAGE // 2:
                _short.add(device)
            return zeros
    return torch.zeros(count, dtype=torch.int32, device=device)  # by the graph, in every replay


def _take(device: torch.device, count: int) -> Tensor:
    taken, _left[device] = _left[device].split((count, len(_left[device]) - count))
    return taken
