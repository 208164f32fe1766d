"""Runs cooperative kernels, whose programs wait for each other, in Triton's interpreter.

    with concurrently(timeout=20):  # with TRITON_INTERPRET=1
        kernel[grid](..., launch_cooperative_grid=True)

The interpreter runs the programs of a grid one after another: the first to wait would wait forever.
Here each has a process of its own, forked from this one, and they share the launch's tensors. The
interpreter's atomics are the processor's, so that they hold between processes as well.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from typing import IO, Any
from unittest import mock

import torch
import triton.experimental.gluon  # noqa: F401  a launch does, and else in every process anew
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, interpreter_builder

FORK = multiprocessing.get_context("fork")
run_grid = GridExecutor.__call__


def shared(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy in memory that forked processes do not copy; it is freed with its last tensor."""
    memory = mmap.mmap(-1, storage.nbytes())
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage().copy_(storage)


def rewrite(values: Iterable[Any]) -> None:
    """Has the interpreter rewrite device functions here and now, and not in every process anew."""
    for value in values:
        if isinstance(value, InterpretedFunction) and value.fn not in value.rewritten_fn:
            value.rewrite()
            rewrite(list(value.fn.__globals__.values()))


def yielding(atomic: Callable[..., Any]) -> Callable[..., Any]:
    """Whoever polls lets the others go on first: there are more programs than processors."""

    def atomic_after_others(*args: Any) -> Any:
        os.sched_yield()
        return atomic(*args)

    return atomic_after_others


def run_program(
    executor: GridExecutor,
    index: tuple[int, ...],
    args: Any,
    kwargs: Any,
    report: IO[str],
    timeout: float,
) -> None:
    """One program of the grid, in a process of its own that has no use for the others.

    What it raises goes to the report, and where it is when its time is up.
    """

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {timeout} seconds")

    sys.stderr = report
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, timeout, timeout)
    interpreter_builder.set_grid_dim(*executor.grid)
    interpreter_builder.set_grid_idx(*index)
    interpreter_builder.set_grid_dim = interpreter_builder.set_grid_idx = lambda *_: None
    interpreter_builder.create_atomic_rmw = yielding(interpreter_builder.create_atomic_rmw)
    executor.grid = (1,)
    executor._init_args_hst = lambda *shared_args: shared_args
    executor._restore_args_dev = lambda *_: None  # would store everything anew, when others have
    run_grid(executor, *args, **kwargs)


def run_programs(executor: GridExecutor, args: Any, kwargs: Any, timeout: float) -> None:
    """All programs at the same time, until all have ended or one has failed."""
    executor.grid = (*executor.grid, 1, 1)[:3]
    running = {}
    with ExitStack() as stack:
        for index in itertools.product(*map(range, executor.grid)):
            report = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = FORK.Process(
                target=run_program, args=(executor, index, args, kwargs, report, timeout)
            )
            with warnings.catch_warnings():
                # of forking where there are threads; the child calls into none of torch's
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            running[process.sentinel] = index, process, report
        while running:
            for ended in wait(running):
                index, process, report = running.pop(ended)
                process.join()
                if process.exitcode != 0:
                    report.seek(0)
                    raise InterpreterError(
                        f"program {index} of {executor.fn.__name__} ended with exit code "
                        f"{process.exitcode}\n{report.read()}"
                    )


@contextmanager
def collected() -> Iterator[None]:
    """Frees in the end what refers to itself, as the interpreter's copies of arguments do.

    What was there before is left out, by the forked processes as well: that is quick.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


@contextmanager
def concurrently(timeout: float = 60) -> Iterator[None]:
    """Launches with launch_cooperative_grid=True run all their programs at the same time.

    If one raises, is killed or has not ended after so many seconds, the launch raises and no
    program goes on. What the programs have stored until then, they have stored.
    """

    def run(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if not kwargs.pop("launch_cooperative_grid", False):
            return run_grid(self, *args, **kwargs)
        rewrite([*args, *kwargs.values(), *self.fn.__globals__.values()])
        with collected():
            # The interpreter's own way to and from a GPU, by storages: views and aliases stay such.
            with mock.patch.object(torch.UntypedStorage, "cpu", shared):
                shared_args, shared_kwargs = self._init_args_hst(args, kwargs)
            try:
                return run_programs(self, shared_args, shared_kwargs, timeout)
            finally:
                self._restore_args_dev(args, shared_args, kwargs, shared_kwargs)

    with mock.patch.object(GridExecutor, "__call__", run):
        yield
