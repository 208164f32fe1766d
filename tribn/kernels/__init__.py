"""The operators of `tribn.ops` as Triton kernels: the only importers of triton."""

from tribn.kernels.backward import batch_norm_backward
from tribn.kernels.forward import batch_norm_eval, batch_norm_train, batch_stats
from tribn.kernels.sync import (
    sync_backward_dx,
    sync_backward_reduce,
    sync_combine,
    sync_stats,
    sync_sum,
)

__all__ = [
    "batch_norm_backward",
    "batch_norm_eval",
    "batch_norm_train",
    "batch_stats",
    "sync_backward_dx",
    "sync_backward_reduce",
    "sync_combine",
    "sync_stats",
    "sync_sum",
]
