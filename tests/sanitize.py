"""Calls that reach every kernel of one process, small, for compute-sanitizer: `make sanitize`."""

from itertools import product
from unittest import mock

import torch
from rich.progress import track

from tribn import functional
from tribn.functional import batch_norm
from tribn.kernels import host

FIRST, LAST = torch.contiguous_format, torch.channels_last
# Planes side by side, with 8-byte accesses and with large tiles; channels that are no multiple of
# anything, a few, their pixels side by side or not, and slabs that several programs wait for.
SHAPES = [
    *[((33, 8, 7, 7), FIRST), ((4, 8, 7, 7), FIRST), ((6, 24, 14, 14), FIRST)],
    ((4, 64, 56, 56), FIRST),
    *[((3, 65, 5, 5), FIRST), ((40, 3, 64, 64), FIRST)],
    *[((4, 64, 56, 56), LAST), ((6, 65, 9, 9), LAST), ((6, 200, 7, 7), LAST)],
    *[((40, 3, 64, 64), LAST), ((8, 65, 16, 16), LAST), ((8, 256, 40, 40), LAST)],
]
FUSED = [(False, None, False), (True, "relu", False), (False, "silu", True)]  # residual, mask


def run(shape, layout, dtype, residual, activation, masked, device):
    """Forward and backward, in training and in evaluation."""

    def new():
        x = torch.randn(shape, device=device).to(dtype, memory_format=layout)
        return x.requires_grad_()

    channels = shape[1]
    x, added = new(), new() if residual else None
    mask = torch.rand(shape[0], *shape[2:], device=device) > 0.3 if masked else None
    weight, bias = (torch.randn(channels, device=device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    leaves = [t for t in (x, added, weight, bias) if t is not None]
    for training in (True, False):
        y = batch_norm(
            *(x, mean, var, weight, bias, training),
            activation=activation,
            residual=added,
            mask=mask,
        )
        gradients = torch.autograd.grad(y, leaves, torch.randn_like(y))
        assert all(t.isfinite().all() for t in (y, *gradients))


def main(device):
    """On a device, which is then taken for one that refuses programs that wait for each other."""
    dtypes = torch.bfloat16, torch.float32
    for refused, what in ((set(), "One launch"), ({torch.empty(0, device=device).device}, "Two")):
        launchers = mock.patch.multiple(host, _refused=refused, _launchers={})
        with launchers, mock.patch.object(functional, "_calls", {}):
            for case, dtype, fused in track(list(product(SHAPES, dtypes, FUSED)), what):
                run(*case, dtype, *fused, device)


if __name__ == "__main__":
    main("cuda")
