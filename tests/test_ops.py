"""The operators against their schemas and fakes, the bits that one hands on to another, and when
the dispatcher is left out."""

import pytest
import torch
from cases import BF16, EPS, F16, F32, F64, INTERPRET, LAYOUTS, PLAIN, strides
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tribn
from tribn import ops, reference

RELU, SILU = ("relu", 0.0, 0.0, False), ("silu", 0.0, 0.0, False)
TANH_FIRST = ("tanh", 0.0, 0.0, True)
LEAKY = ("leaky_relu", 0.1, 0.0, False)  # undone from the output
EVERY, ALONE = [True, True, True, True], [True, True, True, False]


def calls(shape):
    """Every operator, with arguments that have to do with what is fused."""
    torch.manual_seed(0)
    C = shape[1]
    x, residual, dy = torch.randn(3, *shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    weight, bias, mean, var = torch.rand(4, C)
    states, absent = (mean.clone(), var.clone(), torch.tensor(3)), (None,) * 3
    bits = torch.randint(0, 256, reference.new_bits(x, 1).shape, dtype=torch.uint8)
    statistics, wider, count = (mean, var), (mean.double(), var.double()), torch.tensor(7)
    frozen, at = (None, mean, var, weight, bias), (EPS, 1)
    train = [
        (x, weight, bias, residual, mask, *states, 0.1, 1, True, *at, *RELU, True),
        (x, None, None, residual.to(BF16), None, *states, None, 0, False, *at, *TANH_FIRST, False),
        (x, weight, None, residual.double(), mask, *absent, 0.1, 1, False, *at, *SILU, False),
    ]
    evaluate = [
        (x, *statistics, weight, bias, residual, mask, *at, *RELU, True),
        (x, *statistics, None, None, residual.double(), None, *at, *TANH_FIRST, False),
    ]
    backward = [  # the tensors; training, activation, dtypes of dx and dresidual, what is wanted
        ((dy, x, *statistics, weight, bias, None, bits, mask, count), True, RELU, F32, F32, EVERY),
        ((dy, x, *statistics, weight, bias, residual, *absent), True, SILU, F32, BF16, EVERY),
        ((dy.double(), x, *wider, weight, *absent, mask, count), True, TANH_FIRST, F32, F64, EVERY),
        ((dy, *frozen, None, bits, *absent[:2]), False, RELU, F16, F32, [True, False, True, True]),
        ((dy, *frozen, None, None, mask, None), False, PLAIN, F32, F32, [True, False, False, True]),
        ((dy, x, *statistics, weight, bias, *absent, None), True, LEAKY, F32, None, ALONE),
    ]
    yield ops.batch_stats, (x, mask, 1)
    for arguments in train:
        yield ops.batch_norm_train, arguments
    for arguments in evaluate:
        yield ops.batch_norm_eval, arguments
    for tensors, training, activation, *dtypes, wanted in backward:
        rest = (EPS, training, 1, *activation, activation == LEAKY, *dtypes, wanted)
        yield ops.batch_norm_backward, (*tensors, *rest)
    rows, sums = torch.rand(3, 2 + 2 * C, dtype=F64), torch.rand(1 + 2 * C, dtype=F64)
    rows[:, :2] = torch.tensor([reference.kind(F32, C), 7])
    for activation in (RELU, TANH_FIRST):
        yield ops.sync_stats, (x, mask, F32, 1, *activation)
    yield ops.sync_combine, (rows, *states, None, 1, True, F32)
    yield ops.sync_combine, (rows, *absent, 0.1, 0, False, F64)
    yield ops.sync_sum, (rows,)
    for tensors, training, activation, *dtypes, wanted in backward:
        rest = (EPS, 1, *activation, False)
        yield ops.sync_backward_reduce, (*tensors[:-1], *rest, dtypes[1], wanted[1:])
        if training:
            at = (*tensors[:-1], count, sums)
            yield ops.sync_backward_dx, (*at, *rest, dtypes[0])


@pytest.mark.parametrize("shape", [(3, 5, 9), (0, 5, 9), (3, 5, 0), (3, 0, 9)], ids=str)
def test_operators_are_what_their_schemas_and_fakes_say(shape):
    for operator, arguments in calls(shape):
        torch.library.opcheck(operator, arguments)


def test_operators_called_directly_have_gradients(device):
    """As they are in exported graphs."""
    torch.manual_seed(0)
    x, residual, dy = torch.randn(3, 4, 3, 2, dtype=F64, device=device)
    weight, bias, mean, var = torch.rand(4, 3, dtype=F64, device=device)
    rest = (EPS, 1, *SILU, True)

    def train(x, weight, bias, residual):
        states = (None, None, None, 0.1, 1, False)
        return ops.batch_norm_train(x, weight, bias, residual, None, *states, *rest)[0]

    def evaluate(x, weight, bias, residual):
        return ops.batch_norm_eval(x, mean, var, weight, bias, residual, None, *rest)[0]

    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    for function in (train, evaluate):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=INTERPRET)
    y = train(*inputs)
    dx, *_ = torch.autograd.grad(y, inputs, dy, create_graph=True)
    of_x = x.detach().mean((0, 2)), x.detach().var((0, 2), correction=0)
    tensors = (dy, x, *of_x, weight, bias, residual, None, None, None)
    direct, *_ = ops.batch_norm_backward(*tensors, EPS, True, 1, *SILU, False, F64, F64, EVERY)
    expected, found = (torch.autograd.grad(g, inputs, dy, retain_graph=True) for g in (dx, direct))
    torch.testing.assert_close(found, expected)
    assert not ops.batch_stats(x, None, 1)[0].requires_grad


SHAPES = [(3, 5, 9), (2, 8, 16), (2, 3, 7), (17, 6), (16, 24), (1, 1, 1), (2, 1, 9), (5, 1)]
# planes and pixels side by side, unless there is a mask
SHAPES += [(3, 8, 7), (2, 4, 3, 2), (136, 6)]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("masked", [False, True])
def test_unpack_is_the_inverse_of_pack(masked, shape, axis, layout):
    y = LAYOUTS[layout](torch.randn(shape))
    axis %= y.dim()
    on = torch.rand(shape) < 0.5
    bits = reference.pack(on, y, axis, masked)
    assert bits.dtype == torch.uint8
    assert bits.shape == reference.new_bits(y, axis).shape
    runs = [size for d, size in enumerate(shape) if y.stride(d) != 1] if y.numel() else []
    assert bits.numel() <= max(y.numel(), *runs, 0)
    assert sum(int(byte).bit_count() for byte in bits.flatten()) == on.sum()
    signs = reference.unpack(bits, y, axis, masked)
    assert torch.equal(signs, on.float() * 2 - 1)
    assert strides(signs) == strides(y)


def step(layer, x):
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, layer.weight], torch.ones_like(y))


@pytest.fixture
def known(device):
    """A layer and an input that it has seen so often that the dispatcher is left out."""
    layer = tribn.BatchNorm2d(3, activation="relu", device=device)
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    for _ in range(3):
        step(layer, x)
    return layer, x


class Recorded:
    """An operator that notes when the dispatcher is called."""

    def __init__(self, name, names):
        self._opname, self._operator, self._names = name, getattr(ops, name), names

    def __call__(self, *args):
        self._names.append(self._opname)
        return self._operator(*args)


BOTH = ["batch_norm_train", "batch_norm_backward"]


def test_calls_like_those_before_go_past_the_dispatcher(known, monkeypatch):
    layer, x = known
    names = []
    for name in BOTH:
        monkeypatch.setattr(ops, name, Recorded(name, names))
    step(layer, x)
    assert names == []
    other = torch.randn_like(x).transpose(2, 3).requires_grad_()
    results = step(layer, other)
    assert names == BOTH
    for result, expected in zip(step(layer, other), results, strict=True):
        torch.testing.assert_close(result, expected)


class Dispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatch, Function])
def test_modes_see_the_operators(mode, known):
    layer, x = known
    with mode() as active:
        step(layer, x)
    assert "tribn.batch_norm_train.default" in active.seen


def test_the_profiler_sees_the_operators(known):
    with torch.autograd.profiler.profile() as profile:
        step(*known)
    assert {f"tribn::{name}" for name in BOTH} <= {event.name for event in profile.function_events}


class Subclass(torch.Tensor):
    pass


def test_subclasses_stay_what_they_are(known):
    layer, x = known
    assert type(layer(x.as_subclass(Subclass))) is Subclass


def test_values_that_are_only_marked_negative_are_negated(known):
    layer, x = known
    marked = torch.complex(x.detach(), -x.detach()).conj().imag
    assert marked.is_neg()
    y = layer(x)
    assert torch.equal(layer(marked), y)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert torch.equal(*torch.autograd.grad(y, x, torch.complex(dy, -dy).conj().imag), *expected)


def test_batched_gradients(known):
    layer, x = known
    y = layer(x)
    dys = torch.randn(2, *y.shape, device=y.device)
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for dx, dy in zip(batched, dys, strict=True):
        torch.testing.assert_close((dx,), torch.autograd.grad(y, x, dy, retain_graph=True))


CHANGES = {
    "input dtype": (lambda layer, x: x.data.long(), TypeError, "input is torch.int64"),
    "input layout": (lambda layer, x: x.detach().to_sparse(), TypeError, "input is torch.sparse"),
    "weight size": (lambda layer, x: setattr(layer.weight, "data", torch.ones(4)), ValueError, "4"),
    "statistic expanded": (
        lambda layer, x: setattr(layer, "running_mean", torch.zeros(1, device=x.device).expand(3)),
        ValueError,
        "running_mean is expanded",
    ),
    "statistic trained": (
        lambda layer, x: setattr(layer.running_var, "requires_grad", True),
        ValueError,
        "running_var requires a gradient",
    ),
    "statistics twice": (
        lambda layer, x: setattr(layer, "running_mean", layer.running_var),
        ValueError,
        "one tensor",
    ),
    "statistic missing": (
        lambda layer, x: setattr(layer, "running_mean", None),
        ValueError,
        "running_var is given without running_mean",
    ),
    "counter dtype": (
        lambda layer, x: setattr(layer, "num_batches_tracked", layer.running_mean.sum()),
        TypeError,
        "num_batches_tracked is torch.float32",
    ),
    "eps": (lambda layer, x: setattr(layer, "eps", -1.0), ValueError, "eps is -1.0"),
    "momentum": (lambda layer, x: setattr(layer, "momentum", [0.1]), TypeError, "momentum is"),
    "correction": (lambda layer, x: setattr(layer, "correction", True), ValueError, "correction"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_checked(change, known):
    layer, x = known
    apply, error, text = CHANGES[change]
    changed = apply(layer, x)
    before = [t.clone() for t in layer.buffers()]
    with pytest.raises(error, match=text):
        layer(x if changed is None else changed)
    assert all(map(torch.equal, layer.buffers(), before))


def test_what_is_kept_follows_what_requires_a_gradient(known):
    layer, x = known
    expected = step(layer, x)
    frozen = tribn.BatchNorm2d(3, activation="relu", device=x.device).requires_grad_(False)
    for _ in range(4):  # now one, now the other, with the same numbers and shapes
        y = frozen(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        torch.testing.assert_close((y.detach(), dx), expected[:2])
        torch.testing.assert_close(step(layer, x), expected)
        assert not frozen(x.detach()).requires_grad
