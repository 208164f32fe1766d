"""memory="inplace": the output is kept for backward in place of the input."""

import pytest
import torch
from cases import BF16, F16, F32, F64, INTERPRET, LAYOUTS

from tribn import BatchNorm2d
from tribn.activation import parse
from tribn.functional import batch_norm
from tribn.reference import accumulator

ACTIVATIONS = [None, torch.nn.LeakyReLU(0.2), torch.nn.ELU(0.7)]
NAMES = ["none", "leaky_relu", "elu"]
ids = dict(zip(NAMES, ACTIVATIONS, strict=True))


def inputs(device, dtype=F64, layout="contiguous", shape=(4, 5, 6, 3)):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=F64)

    x = LAYOUTS[layout]((randn(*shape) * 2 + 30).to(device, dtype)).requires_grad_()
    weight = (randn(shape[1]).sign() * (randn(shape[1]).abs() + 0.5)).to(device, dtype)
    bias = randn(shape[1]).clamp(-2, 2).to(device, dtype)
    dy = LAYOUTS[layout](randn(*shape).to(device, dtype))
    return x, weight.requires_grad_(), bias.requires_grad_(), dy


def gradients(x, weight, bias, dy, memory, activation, **options):
    y = batch_norm(
        *(x, None, None, weight, bias, True), memory=memory, activation=activation, **options
    )
    leaves = [t for t in (x, weight, bias) if t is not None]
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_from_the_input(activation, layout, masked, device):
    x, *rest = inputs(device, layout=layout)
    options = {}
    if masked:
        options["mask"] = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(1)) < 0.5
        options["mask"] = options["mask"].to(device)
    args = (x, *rest)
    kept, undone = (
        gradients(*args, memory, ids[activation], **options) for memory in ("input", "inplace")
    )
    assert torch.equal(kept[0], undone[0])
    for a, b in zip(kept[1:], undone[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_error_of_the_gradients_is_a_few_roundings(activation, dtype, device):
    """xhat is off by a rounding of z, over the weight, which the test for it bounds by 16.

    The sum of n products with dy grows with the root of n, and where elu is flat, more is lost:
    up to 1 / slope, with values of z down to -4 a factor of 50.
    """
    x, weight, bias, dy = inputs(device, dtype)
    exact = gradients(
        *(t.detach().double().requires_grad_() for t in (x, weight, bias)),
        dy.double(),
        "input",
        ids[activation],
    )
    undone = gradients(x, weight, bias, dy, "inplace", ids[activation])
    factor = 16 * (50 if activation == "elu" else 1)
    for a, b in zip(exact, undone, strict=True):
        rounding = torch.finfo(dtype).eps * a.abs().max()
        assert (a - b.double()).abs().max() <= factor * rounding


@pytest.mark.parametrize("activation", NAMES)
def test_numerical_gradients(activation, device):
    x, weight, bias, _ = inputs(device, shape=(3, 2, 2, 2))

    def function(*leaves):
        return batch_norm(
            *(leaves[0], None, None, *leaves[1:], True),
            memory="inplace",
            activation=ids[activation],
        )

    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=INTERPRET)


def kept(layer, x):
    """The storages of tensors as large as x that are kept for backward."""
    found = set()

    def pack(tensor):
        if tensor.numel() == x.numel():
            found.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    return found, y


@pytest.mark.parametrize("weight", [0.0, 1e-3, -1e-4, 0.99 / 8])
def test_a_weight_near_zero_keeps_the_input(weight, device):
    x = inputs(device)[0]
    layer = BatchNorm2d(5, activation="leaky_relu", memory="inplace", device=device, dtype=F64)
    found, y = kept(layer, x)
    assert found == {y.data_ptr()}
    with torch.no_grad():
        layer.weight[3] = weight
        layer.bias[3] = 1.0
    found, y = kept(layer, x)
    assert found == {x.data_ptr()}
    dy = torch.randn_like(x)
    expected = gradients(x, layer.weight, layer.bias, dy, "input", "leaky_relu")
    results = [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_without_affine_nothing_is_near_zero(device):
    x = inputs(device)[0]
    layer = BatchNorm2d(5, affine=False, memory="inplace", device=device, dtype=F64)
    found, y = kept(layer, x)
    assert found == {y.data_ptr()}


@pytest.mark.parametrize(
    ("dtype", "least"), [(F16, -7.6), (BF16, -5.5), (F32, -16.6), (F64, -36.7)]
)
def test_elu_below_its_range_is_the_least_in_it(dtype, least, device):
    """What the docstring says of half precision."""
    y = torch.full((4,), -1.0, dtype=dtype, device=device)
    z = parse("elu").inverse(y.to(accumulator(dtype)), torch.finfo(dtype).eps / 2)
    assert (z - least).abs().max() < 0.1
    x = torch.zeros(512, 1, dtype=dtype, device=device)
    x[0] = -1  # 22 standard deviations away
    x.requires_grad_()
    y = batch_norm(x, None, None, training=True, activation="elu", memory="inplace")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.isfinite().all()


def test_gradients_of_gradients_are_refused(device):
    x = inputs(device)[0]
    y = batch_norm(x, None, None, training=True, memory="inplace")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="memory='input'"):
        dx.square().sum().backward()


def test_changing_the_output_is_noticed(device):
    x = inputs(device)[0]
    y = batch_norm(x, None, None, training=True, memory="inplace")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "output"},
        {"memory": "inplace", "activation": "relu"},
        {"memory": "inplace", "activation": torch.nn.LeakyReLU(-0.1)},
        {"memory": "inplace", "activation": torch.nn.ELU(0.0)},
        {"memory": "inplace", "activation": torch.nn.LeakyReLU(1e-4)},
        {"memory": "inplace", "order": "act_norm"},
    ],
)
def test_what_cannot_be_undone_is_refused(options):
    with pytest.raises(ValueError, match="memory is '"):
        BatchNorm2d(3, **options)


def test_a_residual_is_refused():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="a residual"):
        BatchNorm2d(3, memory="inplace")(x, residual=x)


@pytest.mark.gpu
def test_a_captured_graph_keeps_the_input():
    x = inputs("cuda")[0]
    layer = BatchNorm2d(5, memory="inplace", device="cuda", dtype=F64)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        found, _ = kept(layer, x)
    assert found == {x.data_ptr()}
