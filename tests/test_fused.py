"""What is fused around the normalization, against the composition of torch's own operators."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import (
    ACTIVATIONS,
    BF16,
    DTYPES,
    EPS,
    EXACT,
    F16,
    F32,
    F64,
    FACTORS,
    FUSED,
    INTERPRET,
    LAYOUTS,
    MOMENTUM,
    ONE_BIT,
    ORDERS,
    Case,
    Inputs,
    assert_accurate,
    assert_all_accurate,
    compose,
    fused_exact,
    run,
    strides,
    wide,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tribn
from tribn import ops, reference
from tribn.activation import KINDS
from tribn.functional import batch_norm, batch_stats

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
ORDER = pytest.mark.parametrize("order", ORDERS)
SHAPE = (3, 5, 9)  # of which eight divides nothing


# Values and gradients


def assert_as_accurate_as_torch(inputs, training, options):
    """Outputs, gradients and running statistics, and what the mask leaves out is zero."""
    results = run(batch_norm, inputs, training, **options)
    torch_results = run(compose, inputs, training, **options)
    assert_all_accurate(results, torch_results, fused_exact(inputs, training, options))
    for name in ("y", "dx"):
        assert strides(results[name]) == strides(torch.empty_like(inputs.x)), name
    if (mask := options.get("mask")) is not None:
        for name in results.keys() & {"y", "dx", "dresidual"}:
            left_out = results[name].movedim(inputs.axis, -1)[~mask]
            assert torch.equal(left_out, torch.zeros_like(left_out)), name


def test_every_pair_of_values_occurs():
    assert set(ACTIVATIONS) == set(KINDS)
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(getattr(case, a), getattr(case, b)) for case in FUSED}
        assert seen == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_as_accurate_as_torchs_composition(case, device):
    inputs, options = case.call(device)
    assert_as_accurate_as_torch(inputs, case.training, options)


@MODES
@pytest.mark.parametrize("residual", [*DTYPES, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_that_of_the_addition(dtype, residual, training, device):
    t = Inputs.of(Case((3, 2, 6), dtype), device)
    options = {"activation": "leaky_relu", "order": "norm_act"}
    options["residual"] = (t.dy * 2).abs().to(residual)
    t = replace(t, dy=t.dy.to((t.x + options["residual"]).dtype))
    assert_as_accurate_as_torch(t, training, options)


MODULES = [
    torch.nn.LeakyReLU(0.2),
    torch.nn.LeakyReLU(-0.5),
    torch.nn.LeakyReLU(1.0),
    torch.nn.ELU(0.5),
    torch.nn.Softplus(2.0, 3.0),
    torch.nn.GELU("tanh"),
    torch.nn.ReLU(inplace=True),
    torch.nn.Identity(),
]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("module", MODULES, ids=str)
def test_parameters_are_read_from_the_module(module, residual, device):
    t = Inputs.of(Case(SHAPE, std=5.0), device)
    options = {"activation": module, "order": "norm_act"}
    if residual:
        options["residual"] = t.dy.flip(0)
    assert_as_accurate_as_torch(t, True, options)
    layer = tribn.BatchNorm1d(5, activation=module, device=device)
    expected = compose(t.x, None, None, None, None, True, 0.1, EPS, 1, **options)
    torch.testing.assert_close(layer(t.x, options.get("residual")), expected)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), *MODULES[:5]], ids=str)
# numpy, which the interpreter computes with
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_special_values_are_torchs(activation, dtype, device):
    """Evaluation with mean 0, variance 1 and eps 0 gives the activation the input itself."""
    limits = torch.finfo(dtype)
    points = [0.0, 1e-20, 1e-3, 0.1, 0.3465, 0.5, 1.0, 1.5, 3.0, 5.0, 6.0, 10.0, 20.0, 30.0, 88.0]
    points += [100.0, 1e4, 1e19, 1e20, limits.max / 8, limits.tiny, limits.tiny / 8]
    x = torch.tensor(points, dtype=dtype)
    infinity = torch.full_like(x, math.inf)
    x = torch.cat([x, x.nextafter(infinity), x.nextafter(-infinity), infinity[:1]])
    x = torch.cat([x, -x, x.new_tensor([math.nan])])[:, None].to(device)
    zero, one = x.new_zeros(1), x.new_ones(1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = batch_norm(ours, zero, one, eps=0.0, activation=activation)
    z = activation(theirs * 1)
    dy = torch.linspace(1, 2, len(x), dtype=dtype, device=device)[:, None]
    (dx,), (dz,) = (torch.autograd.grad(*pair, dy) for pair in ((y, ours), (z, theirs)))
    if isinstance(activation, torch.nn.GELU):
        # torch's vectorized gelu of float32 infinity is NaN on a CPU
        z = torch.where(z.isnan() & (x == math.inf) & ~y.isnan(), x, z)
    if isinstance(activation, torch.nn.Hardsigmoid) and dtype == F64:
        # whose 1/6 is float32's
        dz = torch.where((dz - dx).abs() <= dz / 2**24, dx, dz)
    # Numbers of size 1 cancel in 1 + erf, 1 - tanh² and the like, and leave their rounding.
    small = (x.abs() <= 1) | x.isnan()
    for result, expected in ((y.detach(), z.detach()), (dx, dz)):
        for where, rtol, atol in ((small, 8, limits.tiny), (~small, 8, 32 * limits.eps)):
            torch.testing.assert_close(
                *(result[where], expected[where]),
                rtol=rtol * limits.eps,
                atol=atol,
                equal_nan=True,
            )


# Numerical gradients


def small_inputs(device):
    return Inputs.of(Case((3, 2, 2), F64, std=3.0), device)


def differentiable(t, training, **options):
    """batch_norm as a function of x, weight, bias and, maybe, residual alone, and these."""
    stats = (None, None) if training else (t.running_mean, t.running_var)

    def function(x, weight, bias, residual=None):
        return batch_norm(x, *stats, weight, bias, training, residual=residual, **options)

    return function, [tensor.requires_grad_() for tensor in (t.x, t.weight, t.bias, t.dy)]


@pytest.mark.parametrize(
    ("training", "activation", "order"),
    [*itertools.product([True], ACTIVATIONS, ORDERS), *itertools.product([False], ["mish"], ORDERS)],
)
def test_numerical_gradients(activation, order, training, device):
    t = small_inputs(device)
    function, leaves = differentiable(t, training, activation=activation, order=order)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=INTERPRET)


@pytest.mark.parametrize(
    ("training", "activation", "order", "residual", "masked"),
    [
        (True, "relu", "norm_act", True, False),
        (False, "relu", "norm_act", True, True),
        (True, "gelu", "norm_act", True, True),
        (True, "gelu", "act_norm", False, False),
        (True, "relu", "act_norm", True, True),
        (False, "gelu", "norm_act", False, False),
        (True, None, "norm_act", True, True),
    ],
)
def test_second_derivatives(training, activation, order, residual, masked, device):
    t = small_inputs(device)
    options = {"activation": activation, "order": order}
    if masked:
        mask = [[1, 1], [0, 1], [1, 0]]
        options["mask"] = torch.tensor(mask, dtype=torch.bool, device=device)
    function, leaves = differentiable(t, training, **options)
    leaves = leaves if residual else leaves[:3]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=INTERPRET)


@ORDER
@ACTIVATION
def test_every_activation_can_be_differentiated_twice(activation, order, device):
    t = small_inputs(device)
    x, residual = t.x.requires_grad_(), t.dy.flip(0)
    options = {"activation": activation, "order": order, "residual": residual}
    grads = []
    twice = options | {"activation": EXACT.get(activation, activation)}
    for function, options in ((batch_norm, options), (compose, twice)):
        y = function(x, None, None, t.weight, None, True, MOMENTUM, EPS, **options)
        (dx,) = torch.autograd.grad(y, x, t.dy, create_graph=True)
        grads.append((dx, *torch.autograd.grad(dx, x, t.dy)))
    torch.testing.assert_close(*grads)
