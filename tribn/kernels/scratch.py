"""Memory in which the programs of a launch meet: partial results, and counters that start at 0.

Launches on one stream run one after another and share it. Graphs may be replayed on any stream, and
at the same time: what is captured has memory of its own.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

PAGE = 2**16  # counters that are set to 0 at once

_lock = Lock()  # held while counters are taken
_left: dict[torch.device, Tensor] = {}  # of the newest page
_captured: list[Tensor] = []  # in use as long as a graph may be
_of_streams: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def scratch(device: torch.device, doubles: int, counters: int) -> tuple[Tensor, Tensor]:
    """So many float64 and int32 numbers, the latter as the last launch on this stream left them."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            results = torch.empty(doubles, dtype=torch.float64, device=device)
            return results, _captured_zeros(device, counters)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    of_stream = _of_streams.get((device, stream))
    if of_stream is None or len(of_stream[0]) < doubles or len(of_stream[1]) < counters:
        with _lock:
            # Before anything is captured there are counters for what will be.
            if len(_left.get(device, ())) < max(counters, PAGE // 2):
                _left[device] = torch.zeros(max(counters, PAGE), dtype=torch.int32, device=device)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()  # for all streams
            zeros = _take(device, counters)
        of_stream = torch.empty(doubles, dtype=torch.float64, device=device), zeros
        _of_streams[device, stream] = of_stream
    return of_stream


def _captured_zeros(device: torch.device, count: int) -> Tensor:
    with _lock:
        if len(_left.get(device, ())) >= count:
            zeros = _take(device, count)
            _captured.append(zeros)
            return zeros
    return torch.zeros(count, dtype=torch.int32, device=device)  # by the graph, in every replay


def _take(device: torch.device, count: int) -> Tensor:
    taken, _left[device] = _left[device].split((count, len(_left[device]) - count))
    return taken
