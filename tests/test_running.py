"""What moves the running statistics: values that are not finite, correction, checkpointing."""

import copy
import math

import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    MOMENTUM,
    Case,
    Inputs,
    compose,
    run,
)
from torch.utils.checkpoint import checkpoint

import tribn
from tribn.functional import batch_norm, batch_stats

# numpy, which the interpreter computes with
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
SHAPE = (3, 5, 9)  # of which eight divides nothing


# Statistics that are not finite, and other options of the running ones


@pytest.mark.parametrize("momentum", [MOMENTUM, None])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e30])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_skip_leaves_the_statistics_of_a_channel_that_is_not_finite(value, dtype, momentum, device):
    t = Inputs.of(Case(SHAPE, dtype, param_dtype=F32), device)
    t.x[1, 2, 3] = value
    if value > 1e9:
        t.x[0, 2, 0] = -value  # the mean is finite
    runs = {}
    for nonfinite in ("skip", "propagate"):
        stats = [t.running_mean.clone(), t.running_var.clone(), torch.tensor(1, device=device)]
        y = batch_norm(
            *(t.x, *stats[:2], t.weight, t.bias, True, momentum),
            nonfinite=nonfinite,
            num_batches_tracked=stats[2],
        )
        runs[nonfinite] = (*stats, y)
    mean, var, counter, y = runs["skip"]
    assert counter == 2
    torch.testing.assert_close(y, runs["propagate"][-1], rtol=0, atol=0, equal_nan=True)
    others = torch.arange(5) != 2
    for moved, given, propagated in zip(
        (mean, var), (t.running_mean, t.running_var), runs["propagate"][:2], strict=True
    ):
        assert torch.equal(moved[2], given[2])
        assert torch.equal(moved[others], propagated[others])
        assert (moved[others] != given[others]).all()
    assert not runs["propagate"][1][2].isfinite()


def test_skip_goes_by_the_statistics_in_their_dtype(device):
    """Parts without a variance each, so far apart that only float64 holds that of the whole."""
    x = torch.full((8, 1, 4096), 2.0**100, device=device)
    x[4:] *= -1
    state = torch.ones(2, 1, device=device)
    batch_norm(x, *state, training=True, nonfinite="skip")
    assert torch.equal(state, torch.ones_like(state))
    assert batch_stats(x)[1].isinf()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e38])
def test_propagate_is_torchs(value, device):
    t = Inputs.of(Case(SHAPE), device)
    t.x[1, 2, 3] = value
    t.x[:2, 4, 0] = torch.tensor([math.inf, -math.inf])
    ours, theirs = (
        run(function, t, True, activation="sigmoid", order="norm_act")
        for function in (batch_norm, compose)
    )
    for name, result in ours.items():
        torch.testing.assert_close(
            result, theirs[name], equal_nan=True, rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "order": "act_norm"}], ids=str)
def test_correction_of_the_running_variance(correction, options, device):
    t = Inputs.of(Case(SHAPE, F64), device)
    mean, var = torch.zeros(2, 5, dtype=F64, device=device)
    y = batch_norm(t.x, mean, var, None, None, True, 1.0, correction=correction, **options)
    x = t.x.relu() if options else t.x
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(var, x.var((0, 2), correction=correction))
    assert torch.equal(y, batch_norm(t.x, None, None, training=True, **options))


def test_without_running_statistics_momentum_is_of_no_use(device):
    x = Inputs.of(Case(SHAPE), device).x
    results = [batch_norm(x, None, None, training=True, momentum=m) for m in (None, MOMENTUM)]
    assert torch.equal(*results)


@MODES
def test_training_alone_changes_the_running_statistics_and_autograd_knows(training, device):
    t = Inputs.of(Case(SHAPE), device)
    states = (t.running_mean, t.running_var, torch.tensor(0, device=device))
    versions = [state._version for state in states]
    batch_norm(t.x, *states[:2], training=training, num_batches_tracked=states[2])
    assert all((s._version > v) == training for s, v in zip(states, versions, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("masked", [False, True])
def test_infinity_in_running_statistics_is_torchs(masked, layout, device):
    inf = math.inf
    x = torch.randn(6, 5, 8)
    x[1, 0, 3], x[1, 1, 3], x[:2, 2, 4] = inf, -inf, torch.tensor([inf, -inf])
    x[0, 3, 0] = math.nan
    mask = torch.arange(8) > (-1 if not masked else 2)
    ours, theirs = torch.zeros(2, 2, 5)
    ours = ours.to(device)
    batch_norm(
        LAYOUTS[layout](x).to(device),
        *ours, training=True, momentum=1.0, mask=mask.expand(6, 8).to(device),
    )  # fmt: skip
    torch.nn.functional.batch_norm(x[..., mask], *theirs, training=True, momentum=1.0)
    torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)
    assert theirs[0, :2].tolist() == [inf, -inf]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "value"), [(F32, 1e36), (F32, -3e38), (F64, 1e200), (F16, 6e4)])
def test_the_mean_does_not_overflow(dtype, value, masked, layout, device):
    x = LAYOUTS[layout](torch.full((64, 3, 32), value, dtype=dtype)).to(device)
    mask = torch.arange(32, device=device).expand(64, 32) % 3 > 0 if masked else None
    mean, _, _ = batch_stats(x, mask=mask)
    torch.testing.assert_close(mean.to(dtype), x[0, :, 0])


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.1, -300.3, 1e-3, 60000.0])
def test_variance_of_a_constant_is_not_negative(value, dtype, layout, device):
    x = LAYOUTS[layout](torch.full((7, 3, 41), value, dtype=dtype)).to(device)
    for options in ({}, {"mask": torch.arange(41, device=device).expand(7, 41) > 5}):
        _, var, n = batch_stats(x, **options)
        assert (var >= 0).all()
        # The mean is off by half an ulp, or by all the roundings of a sum in float64.
        ulps = n / 2 if dtype == F64 else 1
        assert (var <= (ulps * value * torch.finfo(var.dtype).eps) ** 2).all()


# Checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_changes_nothing(use_reentrant, momentum, device):
    """Outputs, gradients, running statistics and counters, of layers one of which occurs twice."""
    torch.manual_seed(0)
    options = {"momentum": momentum, "device": device}
    twice = tribn.BatchNorm2d(4, activation="relu", **options)
    layers = [torch.nn.Conv2d(4, 4, 3, device=device), tribn.BatchNorm2d(4, **options)]
    model = torch.nn.Sequential(twice, *layers, torch.nn.Dropout(0.3), twice)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 4, 5, 5, device=device, requires_grad=True)
    dy = torch.randn(3, 4, 3, 3, device=device)

    def train(step):
        model.load_state_dict(state)
        seen = []
        for seed in range(2):
            torch.manual_seed(seed)
            y = step(x)
            y.backward(dy)
            seen.append(y.detach())
        for leaf in (x, *model.parameters()):
            seen.append(leaf.grad)
            leaf.grad = None
        return [*seen, *(value.clone() for value in model.state_dict().values())]

    plain = train(model)
    checkpointed = train(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert all(torch.equal(*pair) for pair in zip(checkpointed, plain, strict=True))
    assert twice.num_batches_tracked == 4
