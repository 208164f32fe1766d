"""Batch normalization modules: subclasses of torch.nn's, constructor and forward only."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.parameter import is_lazy

from tribn.activation import Activation, parse
from tribn.distributed import Ranks, check_group, is_dtensor, on_shards
from tribn.functional import (
    batch_norm,
    batch_stats,
    check_bool,
    check_dtype,
    check_eps,
    check_floating,
    check_input,
    check_memory,
    check_number,
    check_options,
    check_tensor,
    merge_stats,
    normalize,
)

Device = torch.device | str | int | None


def _check_num_features(num_features: object) -> None:
    if not isinstance(num_features, int) or isinstance(num_features, bool):
        raise TypeError(f"num_features is {num_features!r}: it must be an int")
    if num_features < 0:
        raise ValueError(f"num_features is {num_features}: it must not be negative")


def _check_dtype_and_bias(dtype: object, bias: object) -> None:
    if dtype is not None:
        check_dtype("dtype", dtype)
    check_bool("bias", bias)


def _restore(module: torch.nn.Module, kept: dict[str, Tensor]) -> None:
    """Gives buffers that were cast their dtype and their values back."""
    for name, old in kept.items():
        new = getattr(module, name)
        if new.dtype != old.dtype:
            setattr(module, name, old.to(new.device))


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def watched(module: torch.nn.Module) -> bool:
    """Whether hooks, or a forward of its own, see or change what goes in or comes out."""
    everywhere = torch.nn.modules.module
    return (
        any(getattr(module, hooks) for hooks in HOOKS)
        or "forward" in vars(module)
        or bool(everywhere._global_forward_hooks)
        or bool(everywhere._global_forward_pre_hooks)
        or bool(everywhere._global_backward_hooks)
        or bool(everywhere._global_backward_pre_hooks)
    )


class Layer(torch.nn.modules.batchnorm._BatchNorm):
    """What all batch norm layers have in common."""

    __call__: Callable[..., Tensor]  # of anything, in torch.nn
    _ranks: tuple[int, ...]  # how many axes the input may have
    channel_axis: int
    activation: Activation
    order: str
    nonfinite: str
    correction: int
    stats_dtype: torch.dtype | None
    memory: str
    frozen: bool

    def _set(
        self,
        channel_axis: int,
        activation: str | torch.nn.Module | Activation | None,
        order: str,
        nonfinite: str,
        correction: int,
        stats_dtype: torch.dtype | None,
        memory: str,
    ) -> None:
        """Takes what torch.nn's layers do not have, and checks what they do not check."""
        check_eps(self.eps)
        if self.momentum is not None:
            check_number("momentum", self.momentum)
            if not 0 <= self.momentum <= 1:
                raise ValueError(
                    f"momentum is {self.momentum}: it must be in [0, 1], or None for an average"
                )
        for name in ("affine", "track_running_stats"):
            check_bool(name, getattr(self, name))
        if channel_axis not in (1, -1) or not isinstance(channel_axis, int):
            raise ValueError(f"channel_axis is {channel_axis}: it must be 1 or -1")
        if stats_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"stats_dtype is {stats_dtype}: it must be torch.float32, torch.float64 or None"
            )
        check_options(order, nonfinite, correction)
        self.channel_axis = channel_axis
        self.activation = parse(activation)
        check_memory(memory, self.activation, order)
        self.order = order
        self.nonfinite = nonfinite
        self.correction = correction
        self.stats_dtype = stats_dtype
        self.memory = memory
        self.frozen = False
        for name, statistic in self._kept().items():
            self._buffers[name] = statistic.to(self.stats_dtype)

    def _per_channel(self) -> dict[str, Tensor]:
        """The parameters and statistics that there are."""
        tensors = {**self._parameters, **self._buffers}
        names = ("weight", "bias", "running_mean", "running_var")
        return {name: t for name in names if (t := tensors[name]) is not None}

    def _kept(self) -> dict[str, Tensor]:
        """The statistics whose dtype no cast changes."""
        return {
            name: t
            for name, t in self._per_channel().items()
            if name.startswith("running") and self.stats_dtype
        }

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        activation: str | torch.nn.Module | Activation | None = None,
    ) -> Tensor:
        """Normalizes the input, and applies what the layer was made with besides.

        Args:
            input: tensor of this layer's axes, float16, bfloat16, float32 or float64, any strides.
            residual: tensor of the input's shape, added before the activation, or with
                ``order="act_norm"`` to the result.
            mask: bool tensor of the input's shape without the channel axis, True where the input
                counts. Elsewhere it may hold anything, and output and gradients are zero.
            lengths: integer tensor (N,), for input with one axis besides batch and channel: only
                the first lengths[n] elements of row n count.
            activation: in this call, in place of the layer's.

        Returns:
            A tensor of the input's shape and memory format, in the dtype of input + residual.

        Raises:
            ValueError: a shape or device does not fit, or training has one value per channel.
            TypeError: an argument has a dtype that cannot be served.
        """
        if isinstance(
            input, fx.Proxy
        ):  # in a symbolic trace a layer is one call, as torch.nn's are
            given = {"residual": residual, "mask": mask, "lengths": lengths}
            given["activation"] = activation
            given = {name: value for name, value in given.items() if value is not None}
            if input.tracer.root is self:
                raise TypeError(
                    f"{type(self).__name__} is traced by itself: a layer is one call; trace a "
                    "module that has it"
                )
            path = input.tracer.path_of_module(self)
            return input.tracer.create_proxy("call_module", path, (input,), given)
        weight, bias, running_mean, running_var, num_batches_tracked = self._tensors()
        training = self.training and not self.frozen
        # As in torch.nn: without running statistics, evaluation uses the batch's too.
        batch = training or (running_mean is None and running_var is None)
        if training and not self.track_running_stats:
            running_mean = running_var = num_batches_tracked = None
        tensors = (
            *(input, residual, mask, lengths, weight, bias),
            *(running_mean, running_var, num_batches_tracked if training else None),
        )
        numbers = (
            *(batch, self.momentum, self.eps, self.channel_axis),
            self.activation if activation is None else parse(activation),
            *(self.order, self.nonfinite, self.correction, self.memory),
        )
        call = normalize
        if type(input) is not Tensor and is_dtensor(input):
            call = on_shards(normalize)
        return call(tensors, numbers, self._group() if training else None, self)

    def _check_input(self, input: Tensor) -> None:
        """That an input is one for this layer."""
        check_tensor("input", input)
        self._check_input_dim(input)
        C = input.shape[self.channel_axis]
        if self.num_features != C:
            raise ValueError(
                f"input of shape {tuple(input.shape)} has {C} channels in axis "
                f"{self.channel_axis}: this layer has num_features={self.num_features}"
            )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._ranks:
            ranks = " or ".join(map(str, self._ranks))
            raise ValueError(
                f"input has shape {tuple(input.shape)}: {type(self).__name__} takes {ranks} axes, "
                "batch and channels included"
            )

    def _group(self) -> Any:
        """The process group, if any, whose batches are one in training."""
        return None

    def _tensors(self) -> tuple[Tensor | None, ...]:
        parameters, buffers = self._parameters, self._buffers
        try:  # self.weight takes nn.Module ten times as long
            return (
                *(parameters["weight"], parameters["bias"]),
                *(buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]),
            )
        except KeyError:  # pruned, parametrized and replicated ones are elsewhere
            return (
                *(self.weight, self.bias),
                *(self.running_mean, self.running_var, self.num_batches_tracked),
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = self._kept()
        super()._apply(fn, recurse)
        _restore(self, kept)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.running_mean is not None and self.num_batches_tracked is None:
            state_dict.pop(f"{prefix}num_batches_tracked", None)  # torchvision's frozen ones do so
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, statistic in self._kept().items():  # loading may put others in their place
            self._buffers[name] = statistic.to(self.stats_dtype)

    def reset_parameters(self) -> None:
        """Sets the weight to 1, the bias to 0, and the running statistics to those of no batch."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Sets the running statistics to those of no batch; a frozen layer keeps its own."""
        if not vars(self).get("frozen"):  # which torch.optim.swa_utils.update_bn does not ask
            super().reset_running_stats()

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        others = {
            "channel_axis": (self.channel_axis, 1),
            "activation": (str(self.activation), "None"),
            "order": (self.order, "norm_act"),
            "nonfinite": (self.nonfinite, "propagate"),
            "correction": (self.correction, 1),
            "stats_dtype": (self.stats_dtype, None),
            "memory": (self.memory, "input"),
            "frozen": (self.frozen, False),
        }
        return ", ".join(
            [
                text,
                *(f"{name}={value}" for name, (value, usual) in others.items() if value != usual),
            ]
        )


class _BatchNorm(Layer):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | torch.nn.Module | Activation | None = None,
        order: str = "norm_act",
        nonfinite: str = "propagate",
        correction: int = 1,
        stats_dtype: torch.dtype | None = None,
        memory: str = "input",
    ) -> None:
        """Makes a layer that is in training mode.

        Args:
            num_features: C, the number of channels.
            eps: added to the variance; positive.
            momentum: weight of a new batch in the running statistics, in [0, 1]; None averages
                over all batches.
            affine: learn a weight and a bias of shape (C,).
            track_running_stats: keep running statistics of shape (C,) for evaluation.
            device, dtype: of parameters and statistics.
            bias: learn a bias, if `affine`.
            channel_axis: 1, or -1 for the last axis.
            activation: applied to the result, or with ``order="act_norm"`` to the input: "relu",
                "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "mish", "sigmoid",
                "tanh", "softplus", "hardswish" or "hardsigmoid", or torch.nn's module for one.
            order: "norm_act" or "act_norm".
            nonfinite: "propagate", or "skip" for channels whose batch statistics are infinite or
                NaN to leave their running statistics alone.
            correction: 1 for the unbiased variance in running_var, 0 for the biased one.
            stats_dtype: torch.float32 or torch.float64 for running statistics that keep this dtype
                when the layer is cast, as by `.half()`; None for those that do not.
            memory: "input", or "inplace" to keep the output for backward in place of the input,
                which `tribn.functional.batch_norm` says when it can.

        Raises:
            ValueError: a number or a name is none that is listed here.
            TypeError: an argument is of another type.
        """
        _check_num_features(num_features)
        _check_dtype_and_bias(dtype, bias)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set(channel_axis, activation, order, nonfinite, correction, stats_dtype, memory)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L) tensors; (N, L, C) with ``channel_axis=-1``.

        act((input - mean) / sqrt(var + eps) * weight + bias + residual)

    `torch.nn.BatchNorm1d` in signature, semantics and state_dict. Below ``__init__`` says what a
    layer is made with, ``forward`` what it is called with; `tribn.functional.batch_norm` has the
    rest.
    """

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W) tensors; (N, H, W, C) with ``channel_axis=-1``.

        act((input - mean) / sqrt(var + eps) * weight + bias + residual)

    `torch.nn.BatchNorm2d` in signature, semantics and state_dict. Below ``__init__`` says what a
    layer is made with, ``forward`` what it is called with; `tribn.functional.batch_norm` has the
    rest.
    """

    _ranks = (4,)


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W) tensors; (N, D, H, W, C) with ``channel_axis=-1``.

        act((input - mean) / sqrt(var + eps) * weight + bias + residual)

    `torch.nn.BatchNorm3d` in signature, semantics and state_dict. Below ``__init__`` says what a
    layer is made with, ``forward`` what it is called with; `tribn.functional.batch_norm` has the
    rest.
    """

    _ranks = (5,)


class SyncBatchNorm(_BatchNorm):
    """Batch normalization by the statistics of the batches of all processes of a group.

    Takes (N, C), (N, C, L), (N, C, H, W) and any more axes. `torch.nn.SyncBatchNorm` in signature,
    semantics and state_dict, on CPUs too.

    Output, gradient of the input, running statistics and counter are those of one process whose
    batch is the concatenation of all of them, which may differ in size and be empty. The gradients
    of weight and bias are of this process's batch alone: DistributedDataParallel and FSDP reduce
    them along with all others. Each direction in training takes one collective, an `all_gather` of
    16 * C + 16 bytes from each process in forward and of 16 * C + 8 in backward (on CPUs both are
    as long as the group's longest so far, for processes to compare), whose results are merged in
    the order of ranks: all processes have the same bits. Evaluation and frozen layers take none.
    While torch.distributed is not initialized, or the group has one process, this is plain batch
    normalization.

    All processes must run the same synchronized layers in the same order, backward too: the loss of
    a process whose batch is empty must depend on the output all the same. A call raises ValueError
    on every process if they come with numbers of channels or dtypes that differ, and RuntimeError
    if one has failed, does not come within the group's timeout, or comes with what is new to it
    alone; that layer's running statistics have not moved then. On GPUs the host does not look at
    what it has come with before: there a kernel's assertion fails, which ends the process's use of
    the device, or NCCL waits until its timeout.

    A DTensor's batch is that over the mesh dimension it is sharded along, whatever the group.

    It is no subclass of torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on CPUs.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | torch.nn.Module | Activation | None = None,
        order: str = "norm_act",
        nonfinite: str = "propagate",
        correction: int = 1,
        stats_dtype: torch.dtype | None = None,
        memory: str = "input",
    ) -> None:
        """Makes a layer that is in training mode.

        Args:
            num_features, eps, momentum, affine, track_running_stats: as of `BatchNorm1d`.
            process_group: the torch.distributed.ProcessGroup; None for the default one, of all
                processes.
            device, dtype: of parameters and statistics.
            bias, channel_axis, activation, order: as of `BatchNorm1d`.
            nonfinite, correction, stats_dtype, memory: as of `BatchNorm1d`.

        Raises:
            ValueError: a number or a name is none that is listed there.
            TypeError: an argument is of another type.
        """
        check_group(process_group)
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            channel_axis=channel_axis,
            activation=activation,
            order=order,
            nonfinite=nonfinite,
            correction=correction,
            stats_dtype=stats_dtype,
            memory=memory,
        )
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        for group in (self.process_group, vars(self).get("_tribn_group")):
            memo[id(group)] = group  # which cannot be copied
        memo[id(self)] = copied = type(self).__new__(type(self))
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    def _check_input_dim(self, input: Tensor) -> None:
        check_input(input, self.channel_axis)

    def _group(self) -> Any:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        return self.process_group or torch.distributed.group.WORLD


def ranks_of(layer: Layer) -> Ranks | None:
    """The processes whose batches are one for a layer in training, if it is not this one alone."""
    group = layer._group()
    return None if group is None else Ranks.of(group)


class _LazyBatchNorm(torch.nn.modules.batchnorm._LazyNormBase, Layer):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | torch.nn.Module | Activation | None = None,
        order: str = "norm_act",
        nonfinite: str = "propagate",
        correction: int = 1,
        stats_dtype: torch.dtype | None = None,
        memory: str = "input",
    ) -> None:
        """Takes what the layer that it becomes takes, which see, but for `num_features`."""
        _check_dtype_and_bias(dtype, bias)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set(channel_axis, activation, order, nonfinite, correction, stats_dtype, memory)

    _check_input_dim = Layer._check_input_dim  # torch.nn's comes first

    def initialize_parameters(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Called with the first input, whose channels are counted."""
        check_input(input, self.channel_axis, self.training)
        self._check_input_dim(input)
        tensors = self._per_channel()
        C = input.shape[self.channel_axis]
        for name, tensor in tensors.items():
            if tensor.device != input.device:
                raise ValueError(
                    f"{name} is on {tensor.device} and input on {input.device}: move one to the "
                    "other"
                )
            if not is_lazy(tensor) and len(tensor) != C:
                raise ValueError(
                    f"input of shape {tuple(input.shape)} has {C} channels in axis "
                    f"{self.channel_axis}: the {name} that was loaded has {len(tensor)}"
                )
        self.num_features = C
        if self.has_uninitialized_params():
            for tensor in tensors.values():
                if is_lazy(tensor):
                    tensor.materialize((C,))
            self.reset_parameters()


class LazyBatchNorm1d(_LazyBatchNorm, torch.nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that takes `num_features` from its first input, which makes it one."""

    _ranks = BatchNorm1d._ranks
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, torch.nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that takes `num_features` from its first input, which makes it one."""

    _ranks = BatchNorm2d._ranks
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, torch.nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that takes `num_features` from its first input, which makes it one."""

    _ranks = BatchNorm3d._ranks
    cls_to_become = BatchNorm3d


class StandardScaler(torch.nn.Module):
    """Standardizes the features of a training set: (x - mean_) / scale_, learned batch by batch.

    scikit-learn's StandardScaler in names and results, NaN aside, which is not skipped here. All
    statistics are float64 tensors of shape (C,), C being `num_features`, and stay so when the
    module is cast. Before the first batch the layer is the identity.

    Attributes:
        mean_: mean of each feature.
        var_: biased variance of each feature.
        scale_: its square root; 1 for a feature that does not vary.
        n_samples_seen_: int64 scalar, values seen of each feature.
    """

    __call__: Callable[..., Tensor]
    mean_: Tensor
    var_: Tensor
    scale_: Tensor
    n_samples_seen_: Tensor

    def __init__(self, num_features: int, device: Device = None) -> None:
        """Makes a scaler that has seen nothing yet.

        Args:
            num_features: C, the number of features.
            device: of the statistics.

        Raises:
            ValueError, TypeError: `num_features` is negative or no int.
        """
        super().__init__()
        _check_num_features(num_features)
        self.num_features = num_features
        ones = torch.ones(num_features, dtype=torch.float64, device=device)
        self.register_buffer("mean_", torch.zeros_like(ones))
        self.register_buffer("var_", ones)
        self.register_buffer("scale_", ones.clone())
        self.register_buffer("n_samples_seen_", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def partial_fit(self, batch: Tensor) -> "StandardScaler":
        """Merges a batch into the statistics.

        Args:
            batch: tensor of shape (N, C) or (N, C, ...), of any real dtype.

        Returns:
            The scaler itself.

        Raises:
            ValueError, TypeError: the batch has another shape, device or dtype.
        """
        self._check("batch", batch)
        seen = (self.mean_, self.var_, self.n_samples_seen_)
        merged = merge_stats(*seen, *batch_stats(batch.double()))
        for statistic, new in zip(seen, merged, strict=True):
            statistic.copy_(new)
        # scikit-learn's bound on the variance that rounding alone can give a constant feature.
        rounding = self.n_samples_seen_ * torch.finfo(torch.float64).eps
        constant = self.var_ <= rounding * self.var_ + (rounding * self.mean_) ** 2
        self.scale_.copy_(self.var_.sqrt().masked_fill(constant, 1))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Standardizes.

        Args:
            x: tensor of shape (N, C) or (N, C, ...), of any real dtype.

        Returns:
            (x - mean_) / scale_ in the dtype of x, or torch's default if that is integer.

        Raises:
            ValueError, TypeError: x has another shape, device or dtype.
        """
        self._check("x", x)
        z = batch_norm(x.double(), self.mean_, self.scale_**2, eps=0.0)
        return z.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())

    def inverse(self, z: Tensor) -> Tensor:
        """Undoes `forward`.

        Args:
            z: tensor of shape (N, C) or (N, C, ...), of a floating dtype.

        Returns:
            z * scale_ + mean_ in the dtype of z.

        Raises:
            ValueError, TypeError: z has another shape, device or dtype.
        """
        self._check("z", z)
        check_floating("z", z)
        shape = (-1,) + (1,) * (z.dim() - 2)
        return (z * self.scale_.view(shape) + self.mean_.view(shape)).to(z.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)
        _restore(self, kept)
        return self

    def _check(self, name: str, x: Tensor) -> None:
        check_tensor(name, x)
        if x.is_complex() or x.is_quantized:
            raise TypeError(f"{name} is {x.dtype}: it must be a real number; convert it first")
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: it must be (N, {self.num_features}) or "
                f"(N, {self.num_features}, ...)"
            )
        if x.device != self.mean_.device:
            raise ValueError(
                f"{name} is on {x.device} and this scaler on {self.mean_.device}: move one to the "
                "other"
            )

    def extra_repr(self) -> str:
        return str(self.num_features)
