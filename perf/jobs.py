"""Cases that are prepared in several processes at once, and timed one after the other.

Compilation takes most of a benchmark's time, and one processor; a clock takes the whole machine.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from perf.clocks import capturable
from perf.report import Report

# Adds to a report what it finds out about a case; yields when all is prepared, and times after that
Measure = Callable[[Any, Report], Iterator[None]]
# Gives a report of each case, in order; None of one whose process has ended
Measured = Callable[[Sequence[Any]], Iterator[Report | None]]


@contextmanager
def measuring(jobs: int, measure: Measure, device: str) -> Iterator[Measured]:
    """Measures as many cases together as there are jobs; one in this process."""
    if jobs == 1:
        with capturable(device):
            yield partial(_here, measure)
        return
    workers = [_Worker(measure, device) for _ in range(jobs)]
    try:
        yield partial(_together, workers)
    finally:
        for worker in workers:
            worker.end()


def _here(measure: Measure, cases: Sequence[Any]) -> Iterator[Report]:
    for case in cases:
        report = _empty()
        for _ in measure(case, report):
            pass
        yield report


def _together(workers: Sequence[_Worker], cases: Sequence[Any]) -> Iterator[Report | None]:
    chosen = workers[: len(cases)]
    for worker, case in zip(chosen, cases, strict=True):
        worker.send(case)
    prepared = [worker.receive() for worker in chosen]
    for worker, is_prepared in zip(chosen, prepared, strict=True):
        if is_prepared:
            worker.send(True)
        yield worker.receive() if is_prepared else None


class _Worker:
    """A process that prepares the case it is sent, answers, and times it when it is told to."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.start()

    def start(self) -> None:
        context = get_context("spawn")  # a fork would have no GPU
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()  # or its end would not be noticed

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()

    def send(self, message: Any) -> None:
        with suppress(OSError):  # one that has ended answers nothing either
            self.connection.send(message)

    def receive(self) -> Any:
        """Its answer; None, and a new process, if it has ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.end()
            self.start()


def _serve(connection: Connection, measure: Measure, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is for the one who reports
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with suppress(EOFError), capturable(device):
        while True:
            report = _empty()
            steps = measure(connection.recv(), report)
            next(steps, None)
            release()
            connection.send(True)
            connection.recv()
            for _ in steps:
                pass
            del steps
            release()
            connection.send(report)


def _empty() -> Report:
    return {"rows": [], "kernels": [], "problems": []}


def release() -> None:
    """Gives back what nothing holds of the GPU's memory: other processes need it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
