"""Batch normalization for PyTorch, in Triton kernels on a GPU and plain PyTorch on a CPU."""

from tribn import functional
from tribn.convert import (
    Report,
    convert,
    convert_sync_batchnorm,
    freeze,
    revert,
    unfreeze,
)
from tribn.explain import explain
from tribn.launch import set_sm_margin
from tribn.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    StandardScaler,
    SyncBatchNorm,
)
from tribn.statistics import accumulate_stats, update_stats

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Report",
    "StandardScaler",
    "SyncBatchNorm",
    "accumulate_stats",
    "convert",
    "convert_sync_batchnorm",
    "explain",
    "freeze",
    "functional",
    "revert",
    "set_sm_margin",
    "unfreeze",
    "update_stats",
]
