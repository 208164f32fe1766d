"""What is fused around the normalization, against the composition of torch's own operators."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import (
    ACTIVATIONS,
    DTYPES,
    EPS,
    EXACT,
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
    assert_fused_accurate,
    compose,
    wide,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import tribn
from tribn.activation import KINDS
from tribn.functional import batch_norm

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
ORDER = pytest.mark.parametrize("order", ORDERS)
SHAPE = (3, 5, 9)  # of which eight divides nothing


# Values and gradients


def test_every_pair_of_values_occurs():
    assert set(ACTIVATIONS) == set(KINDS)
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(getattr(case, a), getattr(case, b)) for case in FUSED}
        assert seen == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_as_accurate_as_torchs_composition(case, device):
    inputs, options = case.call(device)
    assert_fused_accurate(inputs, case.training, options)


@MODES
@pytest.mark.parametrize(
    "case",
    [
        *[Case((batch, 8, 7, 7), std=3.0) for batch in (32, 33)],
        *[Case((batch, 6, 4, 8), layout="channels_last", std=3.0) for batch in (4, 5)],
    ],
    ids=str,
)
def test_short_planes_and_pixels_of_few_and_of_many_elements(case, training, device):
    """Which lie one by one and side by side, and so do their bits."""
    t = Inputs.of(case, device)
    options = {"activation": "relu", "order": "norm_act", "residual": t.dy.flip(0)}
    assert_fused_accurate(t, training, options)


@pytest.mark.parametrize("residual", [*DTYPES, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_that_of_the_addition(dtype, residual, device):
    t = Inputs.of(Case((3, 2, 6), dtype), device)
    options = {"activation": "leaky_relu", "order": "norm_act"}
    options["residual"] = (t.dy * 2).abs().to(residual)
    t = replace(t, dy=t.dy.to((t.x + options["residual"]).dtype))
    assert_fused_accurate(t, True, options)


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
    assert_fused_accurate(t, True, options)
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
    if isinstance(activation, torch.nn.ReLU6):
        # on a CPU 0 in vectorized loops, else dy
        dz = torch.where(x.isnan(), dy, dz)
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
    [
        *itertools.product([True], ACTIVATIONS, ORDERS),
        *itertools.product([False], ["mish"], ORDERS),
    ],
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
    grads = []
    for function, act in ((batch_norm, activation), (compose, EXACT.get(activation, activation))):
        y = function(
            *(x, None, None, t.weight, None, True, MOMENTUM, EPS),
            activation=act,
            order=order,
            residual=residual,
        )
        (dx,) = torch.autograd.grad(y, x, t.dy, create_graph=True)
        grads.append((dx, *torch.autograd.grad(dx, x, t.dy)))
    torch.testing.assert_close(*grads)


# What is kept for backward

X, RESIDUAL, BITS = "x", "residual", "bits"
KEPT = [  # training, activation, order, with a residual, gradients wanted: what is kept
    (True, None, "norm_act", False, "x weight bias", {X}),
    (True, None, "norm_act", True, "x weight bias residual", {X}),
    (True, None, "norm_act", True, "bias residual", set()),
    *[(True, a, "norm_act", False, "x weight bias", {X}) for a in (*ONE_BIT, "softplus")],
    *[(True, a, "norm_act", True, "x weight bias residual", {X, BITS}) for a in ONE_BIT],
    *[(True, a, "norm_act", True, "residual", {BITS}) for a in ONE_BIT],
    (True, "relu", "norm_act", False, "bias", {BITS}),
    (True, "relu", "norm_act", True, "weight", {X, BITS}),
    *[(True, a, "norm_act", True, "x weight bias residual", {X, RESIDUAL})
      for a in ACTIVATIONS if a not in ONE_BIT],
    (True, "gelu", "norm_act", False, "bias", {X}),
    (True, "gelu", "norm_act", True, "residual", {X, RESIDUAL}),
    *[(True, a, "act_norm", True, "x weight bias residual", {X}) for a in (*ONE_BIT, "elu")],
    (True, "relu", "act_norm", True, "x", {X}),
    (True, "silu", "act_norm", True, "weight", {X}),
    (True, "silu", "act_norm", True, "bias residual", set()),
    (False, None, "norm_act", True, "x bias residual", set()),
    (False, None, "norm_act", False, "x weight", {X}),
    *[(False, a, "norm_act", False, "x", {BITS}) for a in ONE_BIT],
    *[(False, a, "act_norm", True, "x bias residual", {BITS}) for a in ONE_BIT],
    (False, "relu", "norm_act", False, "x weight bias", {X}),
    (False, "relu", "norm_act", True, "x bias residual", {BITS}),
    (False, "relu", "norm_act", True, "x weight bias residual", {X, BITS}),
    (False, "relu", "act_norm", True, "x weight bias residual", {X}),
    (False, "relu", "act_norm", True, "bias residual", set()),
    (False, "mish", "norm_act", False, "x", {X}),
    (False, "mish", "norm_act", True, "x", {X, RESIDUAL}),
    (False, "mish", "act_norm", True, "x", {X}),
    (False, "mish", "act_norm", True, "bias residual", set()),
]  # fmt: skip


class Storages:
    """The bytes of every storage that is saved for backward while this is entered."""

    def __enter__(self):
        self.tensors = []
        self.hooks = saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def pack(self, tensor):
        self.tensors.append(tensor)
        return tensor

    @property
    def bytes(self):
        storages = (tensor.untyped_storage() for tensor in self.tensors)
        return {storage.data_ptr(): storage.nbytes() for storage in storages}


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("training", "activation", "order", "residual", "wanted", "kept", "layout"),
    [
        pytest.param(*row, layout, id="-".join(map(str, (*row[:5], layout))).replace(" ", "+"))
        for row in KEPT
        for layout in ("contiguous", "channels_last")[: 1 + (BITS in row[-1])]
    ],
)
def test_kept_for_backward(training, activation, order, residual, wanted, kept, layout, device):
    t = Inputs.of(Case((3, 5, 3, 3), layout=layout), device)
    tensors = {"x": t.x, "weight": t.weight, "bias": t.bias}
    if residual:
        tensors["residual"] = LAYOUTS[layout](t.dy * 2)
    leaves = {n: v.detach().requires_grad_(n in wanted.split()) for n, v in tensors.items()}
    options = {"activation": activation, "order": order, "residual": leaves.get("residual")}
    stats = (t.running_mean, t.running_var)
    with Storages() as saved:
        y = batch_norm(leaves["x"], *stats, leaves["weight"], leaves["bias"], training, **options)
    large = {name for name in (X, RESIDUAL) if name in tensors}
    assert {n for n in large if address(tensors[n]) in saved.bytes} == kept - {BITS}
    given = {address(v) for v in (*tensors.values(), *stats)}
    new = sum(size for at, size in saved.bytes.items() if at not in given)
    bits = (3 * 5 * 2 if layout == "contiguous" else 3 * 9 * 1) if BITS in kept else 0
    assert new == bits + 2 * 5 * 4 * training, "bits, and mean and variance"

    names = wanted.split()
    some = torch.autograd.grad(y, [leaves[name] for name in names], t.dy)
    tensors = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    y = batch_norm(
        *(tensors["x"], *stats, tensors["weight"], tensors["bias"], training),
        **options | {"residual": tensors.get("residual")},
    )
    every = torch.autograd.grad(y, [tensors[name] for name in names], t.dy)
    torch.testing.assert_close(some, every, rtol=1e-6, atol=1e-6)


@MODES
def test_a_mask_keeps_itself_and_a_count(training, device):
    t = Inputs.of(Case(SHAPE), device)
    mask = torch.rand(3, 9, device=device) < 0.5
    with Storages() as saved:
        batch_norm(
            *(t.x.requires_grad_(), t.running_mean, t.running_var, t.weight, t.bias, training),
            mask=mask,
            activation="relu",
        )
    given = (t.running_mean, t.running_var, t.weight, t.bias)
    sizes = [size for at, size in saved.bytes.items() if at not in set(map(address, given))]
    small = [8, *[5 * 4] * 2] if training else []
    large = t.x.numel() * 4 if training else 3 * 5 * 2
    assert sorted(sizes) == sorted([*small, mask.numel(), large])


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_hooks_may_change_the_strides_of_what_is_kept(layout, device):
    """As torch.autograd.graph.save_on_cpu does with pinned memory."""
    t = Inputs.of(Case((3, 9, 3, 4), layout=layout, dy_layout=layout), device)
    x, residual = t.x.requires_grad_(), t.dy.flip(0)
    grads = []
    for pack in (lambda tensor: tensor, lambda tensor: tensor.contiguous()):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            options = {"activation": "relu", "residual": residual}
            y = batch_norm(x, None, None, t.weight, t.bias, True, **options)
        grads += torch.autograd.grad(y, x, t.dy)
    torch.testing.assert_close(*grads)


# Networks


class Count(TorchDispatchMode):
    """Counts tribn's operators and all others by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        return func(*args, **kwargs or {})


class Block(torch.nn.Module):
    """A ResNet block of tribn's layers, or of torch's."""

    def __init__(self, layers, device):
        super().__init__()
        self.fused = layers is tribn
        options = {"device": device}
        self.conv1 = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False, **options)
        self.conv2 = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False, **options)
        if self.fused:
            options["activation"] = "relu"
        self.bn1, self.bn2 = layers.BatchNorm2d(8, **options), layers.BatchNorm2d(8, **options)

    def forward(self, x):
        if self.fused:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + x).relu()

    def observe(self, x, dy):
        """Output, gradients and state after a step of training."""
        x = x.detach().requires_grad_()
        y = self.train()(x)
        y.backward(dy)
        seen = {"y": y.detach(), "dx": x.grad}
        seen |= {f"d{name}": parameter.grad for name, parameter in self.named_parameters()}
        return seen | {
            name: value for name, value in self.state_dict().items() if "num" not in name
        }


@pytest.fixture
def blocks(device):
    """A block of tribn's layers and one of torch's, with one state."""
    torch.manual_seed(0)
    ours, theirs = Block(tribn, device), Block(torch.nn, device)
    for name, value in theirs.named_parameters():
        torch.nn.init.normal_(value, std=1.0 if "bn" in name else 0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
)


@FORMATS
def test_resnet_block_is_as_accurate_as_torchs(memory_format, blocks, device):
    ours, theirs = blocks
    x, dy = torch.randn(2, 4, 8, 6, 6, device=device)
    x, dy = (t.to(memory_format=memory_format) for t in (x, dy))
    exact = copy.deepcopy(theirs).double().observe(x.double(), dy.double())
    results, torch_results = ours.observe(x, dy), theirs.observe(x, dy)
    assert results.keys() == torch_results.keys()
    for name, result in results.items():
        assert_accurate(result, torch_results[name], wide(exact[name]), name)
    y = ours.eval()(x)
    torch.testing.assert_close(y, theirs.eval()(x))


@FORMATS
def test_resnet_block_launches_one_operator_a_layer_and_direction(memory_format, blocks, device):
    x = torch.randn(4, 8, 6, 6, device=device).to(memory_format=memory_format)
    with Count() as forward:
        y = blocks[0](x)
    with Count() as backward:
        y.sum().backward()
    own = [{n: k for n, k in c.seen.items() if n.startswith("tribn")} for c in (forward, backward)]
    assert own == [{"tribn::batch_norm_train": 2}, {"tribn::batch_norm_backward": 2}]
    others = {name.split("::")[1].split(".")[0] for name in forward.seen if "tribn" not in name}
    assert others == {"convolution", "detach"} or others == {"convolution"}, "nothing else"


@FORMATS
def test_resnet_block_keeps_one_tensor_a_layer_and_bits(memory_format, blocks, device):
    """The inputs of four layers, and of the second batch norm the signs."""
    x = torch.randn(4, 8, 6, 6, device=device).to(memory_format=memory_format).requires_grad_()
    block = blocks[0]
    with Storages() as saved:
        block(x)
    parameters = {address(p) for p in block.parameters()}
    kept = sum(size for at, size in saved.bytes.items() if at not in parameters)
    statistics = 2 * 2 * 8 * 4
    bits = 4 * 8 * 5 if memory_format == torch.contiguous_format else 4 * 36 * 1
    assert kept == 4 * x.numel() * 4 + bits + statistics


@MODES
def test_without_gradients_no_bits_are_written(training, device, monkeypatch):
    asked = []
    name = f"batch_norm_{'train' if training else 'eval'}"
    operator = getattr(tribn.ops, name)

    def spy(*args):
        asked.append(args[-1])
        return operator(*args)

    monkeypatch.setattr(tribn.ops, name, spy)
    layer = tribn.BatchNorm2d(3, activation="relu", device=device).train(training)
    x = torch.randn(2, 3, 4, 4, device=device)
    layer(x, residual=x)
    with torch.no_grad():
        layer(x, residual=x)
    assert asked == [True, False]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "mish"])
def test_what_does_not_exist_adds_nothing_to_gradients(activation, device):
    """Tiles are not full; 0 would become infinity, of which some derivatives are NaN."""
    x = torch.full((3, 5, 7), 16.0, device=device, requires_grad=True)
    weight = torch.full((5,), 1e36, device=device)
    bias = torch.linspace(-1, 1, 5, device=device).requires_grad_()
    y = batch_norm(x, None, None, weight, bias, True, activation=activation)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    function = getattr(torch.nn.functional, activation)
    (derivative,) = torch.autograd.grad(function(bias).sum(), bias)
    torch.testing.assert_close(dbias, 21 * derivative)
    assert dx.isfinite().all()
