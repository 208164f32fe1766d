"""Processes that form a process group, to run functions in all of them at the same time.

    results = pool(function, *args)  # function(rank, *args) of every rank, by rank

They are kept from one test to the next, for each has to import torch.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# torch is imported once, by a server that has no threads yet, and forked from there.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.distributed.tensor", "tribn", "cases"])

PATIENCE = 120  # seconds


class Pool:
    def __init__(self, size: int, timeout: float = 60) -> None:
        """Starts the processes; collectives of the default group wait so many seconds."""
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        pipes = [SERVER.Pipe() for _ in range(size)]
        self._connections = [ours for ours, _ in pipes]
        self.processes = [
            SERVER.Process(target=_serve, args=(theirs, rank, size, store, timeout), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What it returns on each rank, None of one that has died; raises what it raises on any."""
        for connection in self._connections:
            _send(connection, (function, args))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"rank {rank} is not done in {PATIENCE} s")
            try:
                results.append(_receive(connection))
            except EOFError:
                results.append((None, None))
        failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(results) if text]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for _, result in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(connection: Connection, rank: int, size: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    with suppress(EOFError):
        while True:
            function, args = _receive(connection)
            try:
                _send(connection, (None, function(rank, *args)))
            except BaseException:
                _send(connection, (traceback.format_exc(), None))


def _send(connection: Connection, value: Any) -> None:
    """Tensors by their values: torch's own way shares memory, which ends with its process."""
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def group_of(ranks: Sequence[int], timeout: float | None = None) -> dist.ProcessGroup | None:
    """A new group of some ranks; all ranks must ask for it, and those outside get None."""
    limit = None if timeout is None else timedelta(seconds=timeout)
    group = dist.new_group(ranks, timeout=limit)
    return group if dist.get_rank() in ranks else None
