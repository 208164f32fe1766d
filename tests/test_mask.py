"""Masks and lengths: what they leave out counts nowhere."""

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    F16,
    F32,
    F64,
    FUSED_LAYOUTS,
    LAYOUTS,
    MOMENTUM,
    ORDERS,
    Case,
    Inputs,
    mask_of,
    run,
)

from tribn.functional import batch_norm, batch_stats

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
ORDER = pytest.mark.parametrize("order", ORDERS)
SHAPE = (3, 5, 9)  # of which eight divides nothing


def padded(x, lengths, size):
    """The values of x (C, n) cut into rows (N, C, size) of these lengths, and NaN behind them."""
    rows = x.new_full((len(lengths), len(x), size), math.nan)
    for row, part in zip(rows, x.split(list(lengths), 1), strict=True):
        row[:, : part.shape[1]] = part
    return rows


LENGTHS = (4, 0, 9, 1, 6)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "last"])
@pytest.mark.parametrize("options", [
    {}, {"activation": "relu"}, {"activation": "gelu", "order": "act_norm", "momentum": None},
], ids=str)  # fmt: skip
def test_padding_changes_nothing(layout, options, training, device):
    """Statistics, outputs and gradients are those of the same values without padding."""
    C, size, n = 5, 9, sum(LENGTHS)
    t = Inputs.of(Case((C, n), F64, mean=3.0), device)
    residual = t.x.flip(1)

    def train(arrange, channel_axis, **lengths):
        leaves = [arrange(v).requires_grad_() for v in (t.x, residual)]
        leaves += [v[:C].detach().requires_grad_() for v in (t.weight, t.bias)]
        stats = [v[:C].clone() for v in (t.running_mean, t.running_var)]
        counter = torch.tensor(2, device=device)
        x, added, weight, bias = leaves
        y = batch_norm(
            *(x, *stats, weight, bias, training),
            **options, **lengths,
            residual=added, channel_axis=channel_axis, num_batches_tracked=counter,
        )  # fmt: skip
        grads = torch.autograd.grad(y, leaves, arrange(t.dy))
        return [y.detach(), *grads[:2]], [*grads[2:], *stats, counter]

    def rows(x):
        x = LAYOUTS["contiguous" if layout == "last" else layout](padded(x, LENGTHS, size))
        return x.mT.contiguous() if layout == "last" else x

    lengths = torch.tensor(LENGTHS, device=device)
    whole, others = train(lambda x: x.detach()[None].clone(), 1)
    axis = -1 if layout == "last" else 1
    parts, other_parts = train(rows, axis, lengths=lengths)
    for part, expected in zip(parts, whole, strict=True):
        part = part.mT if axis == -1 else part
        zeros = padded(expected[0], LENGTHS, size).nan_to_num()
        torch.testing.assert_close(part.contiguous(), zeros)
    for part, expected in zip(other_parts, others, strict=True):
        torch.testing.assert_close(part, expected)


@MODES
@ORDER
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bits", [False, True])
def test_a_fully_masked_batch_is_an_empty_one(bits, momentum, order, training, device):
    x = torch.full(SHAPE, math.nan, device=device, requires_grad=True)
    residual = torch.full(SHAPE, math.inf, device=device, requires_grad=True) if bits else None
    affine = [torch.ones(5, device=device, requires_grad=True) for _ in range(2)]
    state = [*torch.rand(2, 5, device=device), torch.tensor(5, device=device)]
    mean, var, counter = (s.clone() for s in state)
    y = batch_norm(
        *(x, mean, var, *affine, training, momentum),
        num_batches_tracked=counter,
        mask=torch.zeros(3, 9, dtype=torch.bool, device=device),
        activation="relu" if bits else "sigmoid",
        order=order,
        residual=residual,
    )
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    for tensor in (x, residual, *affine):
        if tensor is not None:
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    for tensor, before in zip((mean, var, counter), state, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("correction", [0, 1])
def test_one_value_has_a_mean_and_no_variance(correction, device):
    t = Inputs.of(Case(SHAPE), device)
    mask = torch.zeros(3, 9, dtype=torch.bool, device=device)
    mask[1, 4] = True
    mean, var, counter = t.running_mean.clone(), t.running_var.clone(), torch.tensor(0)
    counter = counter.to(device)
    y = batch_norm(
        *(t.x, mean, var, t.weight, t.bias, True, MOMENTUM),
        mask=mask,
        num_batches_tracked=counter,
        correction=correction,
    )
    assert torch.equal(y, torch.where(mask[:, None], t.bias[:, None], 0))
    moved = t.running_mean + MOMENTUM * (t.x[1, :, 4] - t.running_mean)
    torch.testing.assert_close(mean, moved)
    kept = t.running_var if correction else t.running_var * (1 - MOMENTUM)
    torch.testing.assert_close(var, kept, rtol=0 if correction else 1e-6, atol=0)
    assert counter == 1


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_lengths_are_the_mask_of_the_first_elements(dtype, axis, device):
    x = Inputs.of(Case((5, 4, 4)), device).x
    lengths = torch.tensor([0, 4, 1, 100, 3], device=device).to(dtype)
    mask = torch.arange(4, device=device) < lengths[:, None]
    results = [
        batch_norm(x, None, None, training=True, channel_axis=axis, **options)
        for options in ({"mask": mask}, {"lengths": lengths})
    ]
    assert torch.equal(*results)
    statistics = (
        batch_stats(x, channel_axis=axis, **options)
        for options in ({"mask": mask}, {"lengths": lengths})
    )
    assert all(torch.equal(*pair) for pair in zip(*statistics, strict=True))


def test_negative_lengths_are_zero(device):
    x, lengths = torch.ones(2, 3, 4, device=device), torch.tensor([-3, 2], device=device)
    assert batch_stats(x, lengths=lengths)[2] == 2


def spread(mask):
    """The same mask in every fifth byte."""
    return mask.new_zeros(*mask.shape, 5)[..., 2].copy_(mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("change", [
    lambda mask: mask.mT.contiguous().mT, spread, lambda mask: spread(mask.mT).mT,
    lambda mask: mask[:1].expand_as(mask), lambda mask: mask[..., :1].expand_as(mask),
    lambda mask: mask[:, :1].expand_as(mask), lambda mask: mask.flip(0)[::1],
    lambda mask: mask[0, 0, 0].expand_as(mask),
])  # fmt: skip
def test_a_mask_may_have_any_strides(change, layout, device):
    t = Inputs.of(Case((3, 5, 4, 2), layout=layout), device)
    mask = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = change(mask.to(device))
    options = {"activation": "relu", "order": "norm_act", "residual": t.dy.flip(0)}
    results = [
        run(batch_norm, t, True, **options, mask=m) for m in (mask, mask.clone().contiguous())
    ]
    for name, result in results[0].items():
        assert torch.equal(result, results[1][name]), name


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
@pytest.mark.parametrize("kind", ["random", "lengths", "rows", "nothing"])
@pytest.mark.parametrize("layout", FUSED_LAYOUTS)
def test_masked_batch_stats(layout, kind, dtype, device):
    case = replace(FUSED_LAYOUTS[layout], dtype=dtype, mean=100.0)
    t = Inputs.of(case, device)
    shape = [size for d, size in enumerate(case.shape) if d != t.axis]
    mask = mask_of(kind, shape, torch.Generator().manual_seed(0)).to(device)
    rows = t.x.movedim(t.axis, -1)[mask]
    t.x.movedim(t.axis, -1)[~mask] = math.nan
    results = batch_stats(t.x, channel_axis=case.channel_axis, mask=mask)
    for result, expected in zip(results, batch_stats(rows), strict=True):
        torch.testing.assert_close(result, expected)
    if kind != "nothing":
        torch.testing.assert_close(results[0], rows.double().mean(0).to(results[0].dtype))
        var = rows.double().var(0, correction=0)
        torch.testing.assert_close(results[1], var.to(results[1].dtype))
    assert results[2] == mask.sum()
