"""Batch normalization modules: subclasses of torch.nn's, constructor and forward only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tribn.functional import batch_norm, batch_stats, check_input, check_tensor


def _check_options(eps: float, momentum: float | None, channel_axis: int) -> None:
    if not eps > 0:
        raise ValueError(f"eps is {eps}: it must be positive")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}: it must be in [0, 1], or None for an average")
    if channel_axis not in (1, -1):
        raise ValueError(f"channel_axis is {channel_axis}: it must be 1 or -1")


class _Layer(torch.nn.modules.batchnorm._BatchNorm):
    channel_axis: int

    def forward(self, input: Tensor) -> Tensor:
        check_tensor("input", input)
        self._check_input_dim(input)
        C = input.shape[self.channel_axis]
        if self.num_features != C:
            raise ValueError(
                f"input of shape {tuple(input.shape)} has {C} channels in axis "
                f"{self.channel_axis}: this layer has num_features={self.num_features}"
            )
        # As in torch.nn: without running statistics, evaluation uses the batch's too.
        batch = self.training or (self.running_mean is None and self.running_var is None)
        tracked = self.track_running_stats or not self.training
        return batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            batch,
            self.momentum,
            self.eps,
            channel_axis=self.channel_axis,
            num_batches_tracked=self.num_batches_tracked if batch and tracked else None,
        )

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        return text if self.channel_axis == 1 else f"{text}, channel_axis={self.channel_axis}"


class _BatchNorm(_Layer):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
    ) -> None:
        _check_options(eps, momentum, channel_axis)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.channel_axis = channel_axis


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L) tensors; (N, L, C) with ``channel_axis=-1``.

    `torch.nn.BatchNorm1d` in signature, semantics and state_dict; see `tribn.functional.batch_norm`
    for the formula, the dtypes and the errors.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance; positive.
        momentum: weight of a new batch in the running statistics, in [0, 1]; None averages over
            all batches.
        affine: learn a weight and a bias of shape (C,).
        track_running_stats: keep running statistics for evaluation.
        device, dtype: of parameters and statistics.
        bias: learn a bias, if `affine`.
        channel_axis: 1, or -1 for the last axis.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W) tensors; (N, H, W, C) with ``channel_axis=-1``.

    `torch.nn.BatchNorm2d` in signature, semantics and state_dict; see `BatchNorm1d` for the
    arguments.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W) tensors; (N, D, H, W, C) with ``channel_axis=-1``.

    `torch.nn.BatchNorm3d` in signature, semantics and state_dict; see `BatchNorm1d` for the
    arguments.
    """


class _LazyBatchNorm(torch.nn.modules.batchnorm._LazyNormBase, _Layer):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
    ) -> None:
        _check_options(eps, momentum, channel_axis)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.channel_axis = channel_axis

    def initialize_parameters(self, input: Tensor) -> None:
        check_input(input, self.channel_axis, self.training)
        self._check_input_dim(input)
        self.num_features = input.shape[self.channel_axis]
        if self.has_uninitialized_params():
            for tensor in (*self._parameters.values(), *self._buffers.values()):
                if tensor is not None and torch.nn.parameter.is_lazy(tensor):
                    tensor.materialize((self.num_features,))
            self.reset_parameters()


class LazyBatchNorm1d(_LazyBatchNorm, torch.nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, torch.nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, torch.nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm3d


class StandardScaler(torch.nn.Module):
    """Standardizes the features of a training set: (x - mean_) / scale_, learned batch by batch.

    scikit-learn's StandardScaler in names and results, NaN aside, which is not skipped here. All
    statistics are float64 tensors of shape (C,), C being `num_features`. Before the first batch
    the layer is the identity.

    Attributes:
        mean_: mean of each feature.
        var_: biased variance of each feature.
        scale_: its square root; 1 for a feature that does not vary.
        n_samples_seen_: int64 scalar, values seen of each feature.
    """

    mean_: Tensor
    var_: Tensor
    scale_: Tensor
    n_samples_seen_: Tensor

    def __init__(self, num_features: int, device: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        ones = torch.ones(num_features, dtype=torch.float64, device=device)
        self.register_buffer("mean_", torch.zeros_like(ones))
        self.register_buffer("var_", ones)
        self.register_buffer("scale_", ones.clone())
        self.register_buffer("n_samples_seen_", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def partial_fit(self, batch: Tensor) -> StandardScaler:
        """Merges a batch of shape (N, C) or (N, C, ...) into the statistics and returns itself.

        Reference: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance:
        Analysis and Recommendations", 1983.
        """
        self._check(batch)
        mean, var, count = batch_stats(batch.double())
        seen = self.n_samples_seen_
        total = seen + count
        share = count.double() / total.clamp(min=1)
        delta = mean - self.mean_
        self.var_.copy_(self.var_ * (1 - share) + var * share + delta**2 * share * (1 - share))
        self.mean_.add_(delta * share)
        self.n_samples_seen_.copy_(total)
        # scikit-learn's bound on the variance that rounding alone can give a constant feature.
        rounding = total * torch.finfo(torch.float64).eps
        constant = self.var_ <= rounding * self.var_ + (rounding * self.mean_) ** 2
        self.scale_.copy_(self.var_.sqrt().masked_fill(constant, 1))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean_) / scale_ for x of shape (N, C) or (N, C, ...).

        In the dtype of x, or torch's default if x is integer.
        """
        self._check(x)
        z = batch_norm(x.double(), self.mean_, self.scale_**2, eps=0.0)
        return z.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())

    def inverse(self, z: Tensor) -> Tensor:
        """z * scale_ + mean_ in the dtype of z, which is floating: undoes `forward`."""
        self._check(z)
        shape = (-1,) + (1,) * (z.dim() - 2)
        return (z * self.scale_.view(shape) + self.mean_.view(shape)).to(z.dtype)

    def _check(self, x: Tensor) -> None:
        check_tensor("input", x)
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"input has shape {tuple(x.shape)}: it must be (N, {self.num_features}) or "
                f"(N, {self.num_features}, ...)"
            )

    def extra_repr(self) -> str:
        return str(self.num_features)
