"""torch.func's transforms, forward mode and gradients of gradients, against plain PyTorch."""

import copy
from functools import partial

import pytest
import torch
from cases import EPS, F64, INTERPRET
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import tribn
from tribn.functional import batch_norm

C = 3
SHAPE = (4, C, 5)
VARIANTS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "residual": {"activation": "mish", "residual": True},
    "relu residual": {"activation": "relu", "residual": True},
    "first": {"activation": "softplus", "order": "act_norm", "residual": True},
    "mask": {"activation": "tanh", "mask": True},
    "last axis": {"activation": "silu", "channel_axis": -1},
}


def formula(x, weight, bias, residual, mean, var, mask, activation, order, channel_axis):
    """Batch norm in operations that every transform knows; statistics of the batch without mean."""
    act = {
        None: lambda z: z,
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "mish": torch.nn.functional.mish,
        "softplus": torch.nn.functional.softplus,
        "tanh": torch.tanh,
    }[activation]
    x = x.movedim(channel_axis, -1)
    inside = torch.ones_like(x) if mask is None else mask.unsqueeze(-1).to(x.dtype)
    z = act(x) if order == "act_norm" else x
    if mean is None:
        others = tuple(range(x.dim() - 1))
        n = inside.sum(others)
        mean = (z * inside).sum(others) / n
        var = ((z - mean).square() * inside).sum(others) / n
    z = (z - mean) * (var + EPS).rsqrt() * weight + bias
    z = z if residual is None else z + residual.movedim(channel_axis, -1)
    z = z if order == "act_norm" else act(z)
    return (z * inside).movedim(-1, channel_axis)


class Case:
    """Both implementations as functions of x, weight, bias and, if there is one, residual."""

    def __init__(self, variant, training, device):
        torch.manual_seed(0)
        options = {"activation": None, "order": "norm_act", "channel_axis": 1} | VARIANTS[variant]
        axis = options["channel_axis"]

        def random(*shape):
            return torch.randn(shape, dtype=F64, device=device)

        x = 2 + random(*SHAPE).movedim(1, axis).contiguous()
        residual = [random(*x.shape)] if options.pop("residual", False) else []
        mask = options.pop("mask", False)
        self.mask = torch.rand(SHAPE[0], SHAPE[2], device=device) < 0.7 if mask else None
        self.inputs = (x, 1 + random(C) / 4, random(C), *residual)
        self.statistics = (None, None) if training else (random(C), random(C).square())
        self.training, self.options = training, options

    def ours(self, x, weight, bias, residual=None):
        return batch_norm(
            *(x, *self.statistics, weight, bias, self.training),
            **{"eps": EPS, "residual": residual, "mask": self.mask, **self.options},
        )

    def theirs(self, x, weight, bias, residual=None):
        return formula(x, weight, bias, residual, *self.statistics, self.mask, **self.options)


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def training(request):
    return request.param


# The interpreter has time for some.
@pytest.fixture(params=["relu residual", "mask", "last axis"] if INTERPRET else VARIANTS)
def case(request, training, device):
    return Case(request.param, training, device)


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def scalar(function):
    return lambda *inputs: function(*inputs).square().sum()


def every(case):
    return tuple(range(len(case.inputs)))


TRANSFORMS = {
    "grad": lambda f, inputs, of: grad(scalar(f), of)(*inputs),
    "grad of grad": lambda f, inputs, of: grad(
        lambda *inputs: sum(g.square().sum() for g in grad(scalar(f), of)(*inputs)), of
    )(*inputs),
    "vjp": lambda f, inputs, of: vjp(f, *inputs)[1](torch.ones_like(inputs[0]).cumsum(0)),
    "jvp": lambda f, inputs, of: jvp(f, inputs, tuple(t.cos() for t in inputs)),
    "jvp of grad": lambda f, inputs, of: jvp(
        grad(scalar(f), of), inputs, tuple(t.cos() for t in inputs)
    ),
    "jacrev": lambda f, inputs, of: jacrev(f, of)(*inputs),
    "jacfwd": lambda f, inputs, of: jacfwd(f, of)(*inputs),
    "hessian": lambda f, inputs, of: hessian(scalar(f), of)(*inputs),
    "jacrev of jacfwd": lambda f, inputs, of: jacrev(jacfwd(scalar(f)))(*inputs),
    "jacfwd of jacfwd": lambda f, inputs, of: jacfwd(jacfwd(scalar(f), of), of)(*inputs),
    "jvp of jvp of grad": lambda f, inputs, of: jvp(
        lambda *i: jvp(grad(scalar(f), of), i, tuple(t.cos() for t in i)),
        *(inputs, tuple(t.sin() for t in inputs)),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives(transform, case):
    results = (TRANSFORMS[transform](f, case.inputs, every(case)) for f in (case.ours, case.theirs))
    assert_equal(*results)


def test_running_statistics_move_once_under_forward_mode_twice(device):
    case = Case("silu", True, device)
    state = torch.zeros(C, dtype=F64), torch.ones(C, dtype=F64), torch.tensor(0)
    case.statistics = [t.to(device) for t in state[:2]]
    case.options["num_batches_tracked"] = state[2].to(device)
    x = case.inputs[0]
    jvp(lambda x: jvp(lambda x: case.ours(x, *case.inputs[1:]), (x,), (x,)), (x,), (x,))
    assert case.options["num_batches_tracked"] == 1
    torch.testing.assert_close(case.statistics[0], 0.1 * x.mean((0, 2)))


def examples(case, axis=0):
    """Two of each input, side by side along an axis."""
    return tuple(torch.stack([t, t.flip(0) * 1.5], axis) for t in case.inputs)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("which", ["all", "x", "weight"])
def test_vmap(case, which, axis):
    several = {"all": every(case), "x": (0,), "weight": (1,)}[which]
    inputs = [
        b if n in several else t
        for n, (t, b) in enumerate(zip(case.inputs, examples(case, axis), strict=True))
    ]
    dims = tuple(axis if n in several else None for n in every(case))
    assert_equal(*(vmap(f, dims, axis)(*inputs) for f in (case.ours, case.theirs)))
    of_each = (vmap(grad(scalar(f), every(case)), dims)(*inputs) for f in (case.ours, case.theirs))
    assert_equal(*of_each)
    of_all = (
        grad(lambda *i, f=f: vmap(scalar(f), dims)(*i).square().sum(), every(case))(*inputs)
        for f in (case.ours, case.theirs)
    )
    assert_equal(*of_all)


def test_gradients_through_those_of_examples_with_one_mask(device):
    """Where examples go one by one, so that each has a count of its own."""
    results = []
    for ours in (True, False):
        case = Case("mask", True, device)
        if ours:
            case.statistics = [torch.zeros(C, dtype=F64, device=device) for _ in range(2)]
        xs, weight, bias = examples(case)[0], *case.inputs[1:]

        def gradient(weight, x, f=case.ours if ours else case.theirs, bias=bias):
            return grad(lambda w: scalar(f)(x, w, bias))(weight)

        def total(weight, xs=xs, gradient=gradient):
            return vmap(gradient, (None, 0))(weight, xs).square().sum()

        results.append(grad(total)(weight))
    assert_equal(*results)


def test_vmap_of_no_examples_is_an_error(device):
    with pytest.raises(ValueError, match="has no examples: give it at least one"):
        vmap(lambda x: batch_norm(x, None, None, training=True))(
            torch.randn(0, 4, 3, device=device)
        )


def test_operators_called_directly_have_tangents(device):
    case = Case("relu", True, device)
    x = case.inputs[0]
    numbers = (0.1, 1, False, EPS, 1, "relu", 0.0, 0.0, False, False)

    def operator(x):
        return torch.ops.tribn.batch_norm_train(x, *case.inputs[1:3], *[None] * 5, *numbers)[0]

    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent
            for f in (operator, lambda x: case.theirs(x, *case.inputs[1:]))
        ]
    assert_equal(*tangents)


def test_vmap_over_masks(device):
    case = Case("mask", True, device)
    masks = torch.stack([case.mask, ~case.mask])

    def of_mask(function, mask):
        case.mask = mask
        return function(*case.inputs)

    assert_equal(*(vmap(partial(of_mask, f))(masks) for f in (case.ours, case.theirs)))
    gradients = (
        vmap(grad(lambda x, mask, f=f: of_mask(lambda *i: scalar(f)(x, *i[1:]), mask)), (None, 0))(
            case.inputs[0], masks
        )
        for f in (case.ours, case.theirs)
    )
    assert_equal(*gradients)


def test_forward_mode(case):
    tangents = [t.cos() for t in case.inputs]
    results = []
    for function in (case.ours, case.theirs):
        with forward_ad.dual_level():
            y = function(*map(forward_ad.make_dual, case.inputs, tangents))
            results.append(tuple(forward_ad.unpack_dual(y)))
    assert_equal(*results)


def test_forward_mode_of_a_call_that_is_known(device):
    """Calls that repeat an earlier one are remembered, but not for a tangent."""
    case = Case("relu", True, device)
    for _ in range(3):
        case.ours(*case.inputs)
    x = case.inputs[0]
    with forward_ad.dual_level():
        y = case.ours(forward_ad.make_dual(x, x.cos()), *case.inputs[1:])
        assert forward_ad.unpack_dual(y).tangent is not None


def layers(count, device, **options):
    torch.manual_seed(1)
    found = [tribn.BatchNorm1d(C, device=device, dtype=F64, **options) for _ in range(count)]
    for layer in found:
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.running_mean)
    return found


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shared_input", [True, False])
def test_ensemble(momentum, shared_input, training, device):
    """Every layer's statistics follow its own batches, as if it had been called alone."""
    models = [m.train(training) for m in layers(3, device, momentum=momentum, activation="silu")]
    x = torch.randn(*(() if shared_input else (3,)), *SHAPE, dtype=F64, device=device)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    for _ in range(2):
        y = vmap(call, (0, 0, None if shared_input else 0))(parameters, buffers, x)
        alone = [m(x if shared_input else x[n]) for n, m in enumerate(models)]
        assert_equal(y, torch.stack(alone))
    for name, t in stack_module_state(models)[1].items():
        assert_equal(buffers[name], t)
    assert buffers["num_batches_tracked"].tolist() == [2 * training] * 3


def test_an_ensemble_of_statistics_that_are_not_contiguous(device):
    running = (
        torch.zeros(C, 2, dtype=F64, device=device),
        torch.ones(C, 2, dtype=F64, device=device),
    )
    x = 3 + torch.randn(2, *SHAPE, dtype=F64, device=device)

    def call(x, mean, var):
        return batch_norm(x, mean, var, training=True)

    vmap(call, (0, 1, 1))(x, *running)
    expected = (
        torch.zeros(2, C, dtype=F64, device=device),
        torch.ones(2, C, dtype=F64, device=device),
    )
    for n in range(2):
        call(x[n], expected[0][n], expected[1][n])
    assert_equal(running, tuple(t.T for t in expected))


def test_statistics_that_examples_share_follow_them_in_turn(device):
    """As in a loop over the examples."""
    model, other = layers(1, device)[0], layers(1, device)[0]
    x = 2 + torch.randn(3, *SHAPE, dtype=F64, device=device)
    y = vmap(model)(x)
    assert_equal(y, torch.stack([other(t) for t in x]))
    assert_equal(dict(model.named_buffers()), dict(other.named_buffers()))
    assert model.num_batches_tracked == 3


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian, grad])
def test_running_statistics_move_once_under_derivatives(transform, device):
    model, other = layers(1, device)[0], layers(1, device)[0]
    x = 2 + torch.randn(SHAPE, dtype=F64, device=device)
    transform(lambda x: model(x).square().sum())(x)
    other(x)
    assert_equal(dict(model.named_buffers()), dict(other.named_buffers()))


def test_empty_examples_leave_statistics_alone(device):
    models = layers(2, device)
    _, buffers = stack_module_state(models)
    before = {name: t.clone() for name, t in buffers.items()}
    x = torch.empty(2, 0, C, 5, dtype=F64, device=device)
    y = vmap(lambda buffers, x: functional_call(models[0], buffers, (x,)))(buffers, x)
    assert y.shape == x.shape
    assert all(torch.equal(buffers[name], t) for name, t in before.items())


@pytest.mark.parametrize("options", [{}, {"activation": "leaky_relu", "memory": "inplace"}])
def test_transforms_of_half_precision(options, device):
    """The fused operators run: what comes out is what they give, bit by bit."""
    layer = tribn.BatchNorm1d(C, device=device, track_running_stats=False, **options)
    x = torch.randn(SHAPE, device=device).bfloat16().requires_grad_()
    dy = torch.randn(SHAPE, device=device).bfloat16()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    z, back = vjp(layer, x.detach())
    assert torch.equal(z, y)
    if not options:
        assert torch.equal(*back(dy), dx)


def test_gradients_are_the_same_with_and_without_their_graph(case):
    inputs = [t.clone().requires_grad_() for t in case.inputs]
    y = case.ours(*inputs)
    dy = torch.randn_like(y)
    plain = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    differentiable = torch.autograd.grad(y, inputs, dy, create_graph=True)
    assert all(map(torch.equal, plain, differentiable))


def test_third_derivatives(device):
    case = Case("residual", True, device)
    inputs = [t.clone().requires_grad_() for t in case.inputs]
    results = []
    for function in (case.ours, case.theirs):
        value = scalar(function)(*inputs)
        for _ in range(3):
            value = sum(
                g.square().sum() for g in torch.autograd.grad(value, inputs, create_graph=True)
            )
        results.append(value)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
