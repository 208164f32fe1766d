"""Counts what kernels load and store, in Triton's interpreter.

    with counting() as launches:  # with TRITON_INTERPRET=1
        y = tribn.functional.batch_norm(x, None, None, training=True)
    launches[0].tensors["x"].read  # bytes of x that the first kernel read, each once

Addresses tell which of the launch's tensors an access belongs to. Masked elements are not accessed.
Programs that are processes, forked from this one, count together.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton._C.libtriton import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


def counts(n: int) -> np.ndarray:
    """Zeros that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, 8 * max(n, 1)), dtype=np.int64)


def increment(counts: np.ndarray, at: np.ndarray) -> None:
    """Adds 1 at every position, as often as it is named, and misses none of another process."""
    addresses = (counts.ctypes.data + 8 * at).astype(np.uint64)
    ones, everywhere = np.ones_like(at), np.ones(at.shape, dtype=bool)
    order = interpreter.MEM_SEMANTIC.RELAXED
    interpreter.atomic_rmw(interpreter.RMW_OP.ADD, addresses, ones, everywhere, order)


class Accesses:
    """How often a launch loads and stores every element of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.start, self.itemsize = tensor.data_ptr(), tensor.itemsize
        # From the first element to the last, whatever lies between them.
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        self.loads, self.stores = (counts(last + 1) for _ in range(2))

    @property
    def read(self) -> int:
        """Bytes that are loaded, once or more: what DRAM sees if the caches do the rest."""
        return int(np.count_nonzero(self.loads)) * self.itemsize

    @property
    def written(self) -> int:
        return int(np.count_nonzero(self.stores)) * self.itemsize

    @property
    def loaded(self) -> int:
        """Bytes of all loads, those of the same bytes included."""
        return int(self.loads.sum()) * self.itemsize


class Launch:
    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        # By parameter, both names without the suffixes that they have in the source.
        self.tensors = {
            name.removesuffix("_ptr"): Accesses(value)
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        }

    def elements(self, addresses: np.ndarray) -> tuple[Accesses, np.ndarray]:
        """The tensor that holds the addresses, and their positions in it."""
        for tensor in self.tensors.values():
            at = (addresses.astype(np.int64) - tensor.start) // tensor.itemsize
            if (at >= 0).all() and (at < len(tensor.loads)).all():
                return tensor, at
        raise IndexError(f"{self.kernel} accesses memory outside its tensors, or in two at once")


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Appends to the list it gives what every kernel launched inside accesses."""
    launches: list[Launch] = []
    arguments, load, store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def counted(which: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if addresses.size:
            tensor, at = launches[-1].elements(addresses)
            increment(getattr(tensor, which), at)

    # The tensors as the programs are given them, which may be copies.
    def counted_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = arguments(self, args, kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__.removesuffix("_kernel"), named))
        return args, kwargs

    # What loads and stores without a mask comes here as well, with a mask that is all true.
    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counted("loads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "_init_args_hst", counted_arguments),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield launches
