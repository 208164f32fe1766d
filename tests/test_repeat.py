"""Calls that repeat earlier ones launch what those did, for tensors that lie elsewhere."""

import copy
import gc
import weakref

import pytest
import torch
from cases import BF16, F32, F64, INTERPRET
from conftest import GPU

import tribn
from tribn import functional
from tribn.activation import parse

if not (INTERPRET or GPU):
    pytest.skip(
        "kernels run on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter",
        allow_module_level=True,
    )

from tribn import kernels
from tribn.kernels import host

CALLS = 5  # of which the first three or four are remembered
SHAPE = (2, 4, 3, 5)


@pytest.fixture
def looked_up(monkeypatch):
    """A list that grows with every call that looks for a plan."""
    found, prepare = [], host.prepare

    def noted(*args):
        found.append(args)
        return prepare(*args)

    for module in (kernels.forward, kernels.backward):
        monkeypatch.setattr(module, "prepare", noted)
    return found


def batches(device, dtype=F32, shape=SHAPE, calls=CALLS):
    """x, dy and residual."""
    for _ in range(calls):
        tensors = (3 + torch.randn(shape, device=device).to(dtype) for _ in range(3))
        yield [t.contiguous(memory_format=torch.channels_last) for t in tensors]


def step(layer, x, dy, residual=None):
    """Output, gradients and statistics of a training step."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x, residual)
    y.backward(dy)
    grads = [p.grad for p in (x, *layer.parameters())]
    return [t.detach().clone() for t in (y, *grads, *layer.buffers()) if t is not None]


def step_as_if_first(layer, *batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_calls", {})
        return step(layer, *batch)


def assert_same(ours, expected):
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(mine, theirs)


SETTINGS = {
    "bare": {},
    "relu": {"activation": "relu"},
    "silu first": {"activation": "silu", "order": "act_norm"},
    "no parameters": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "average": {"momentum": None},
    "skip": {"nonfinite": "skip"},
    "in place": {"activation": "leaky_relu", "memory": "inplace"},
}


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_repeats_have_the_bits_of_first_calls(name, dtype, device, looked_up):
    layer = tribn.BatchNorm2d(4, **SETTINGS[name]).to(device)
    first = copy.deepcopy(layer)
    for x, dy, residual in batches(device, dtype):
        batch = (x, dy) if name == "in place" else (x, dy, residual)
        looked_up.clear()
        ours = step(layer, *batch)
        searches = len(looked_up)
        assert_same(ours, step_as_if_first(first, *batch))
        assert len(looked_up) == searches + 2
    assert searches == 0


def test_repeats_of_evaluation(device, looked_up):
    layer = tribn.BatchNorm2d(4, activation="relu").to(device).eval()
    for x, dy, residual in batches(device):
        looked_up.clear()
        step(layer, x, dy, residual)
    assert looked_up == []
    with torch.no_grad():
        expected = layer(x, residual)
        for _ in range(CALLS):
            looked_up.clear()
            assert torch.equal(layer(x, residual), expected)
    assert looked_up == []
    with torch.inference_mode():
        for _ in range(CALLS):
            y = layer(x, residual)
            assert y.is_inference()
            assert torch.equal(y, expected)


def shifted(t):
    """The same values and strides where no 16 bytes begin."""
    return t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride()).copy_(t)


def of_batch(change):
    return lambda layer, batch: change(*batch)


def of_layer(change):
    def run(layer, batch):
        change(layer)
        return batch

    return run


CHANGES = {
    "dtype": of_batch(lambda *batch: [t.half() for t in batch]),
    "strides": of_batch(lambda *batch: [t.contiguous() for t in batch]),
    "strides of dy": of_batch(lambda x, dy, r: (x, dy.contiguous(), r)),
    "one dy for all": of_batch(lambda x, dy, r: (x, dy[:1, :1, :1, :1].expand_as(x), r)),
    "place": of_batch(lambda *batch: [shifted(t) for t in batch]),
    "place of dy": of_batch(lambda x, dy, r: (x, shifted(dy), r)),
    "shape": of_batch(lambda *batch: [t[:1] for t in batch]),
    "no residual": of_batch(lambda x, dy, r: (x, dy)),
    "activation": of_layer(lambda layer: setattr(layer, "activation", parse("tanh"))),
    "eps": of_layer(lambda layer: setattr(layer, "eps", 1.0)),
    "average": of_layer(lambda layer: setattr(layer, "momentum", None)),
    "weight frozen": of_layer(lambda layer: layer.weight.requires_grad_(False)),
    "no bias": of_layer(lambda layer: setattr(layer, "bias", None)),
    "dtype of the layer": of_layer(lambda layer: layer.double()),
    "strides of a statistic": of_layer(
        lambda layer: setattr(layer, "running_var", layer.running_var.repeat(2)[::2])
    ),
    "strides of the weight": of_layer(
        lambda layer: setattr(layer.weight, "data", layer.weight.data.repeat(2)[::2])
    ),
    "margin": of_layer(lambda layer: tribn.set_sm_margin(1)),
    "mode": of_layer(lambda layer: layer.eval()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_no_repeat(name, device):
    """And what has changed is repeated in turn, and what it was before."""
    layer = tribn.BatchNorm2d(4, activation="relu").to(device)
    for batch in batches(device):
        step(layer, *batch)
    first = copy.deepcopy(layer)
    try:
        changed = CHANGES[name](layer, batch)
        CHANGES[name](first, batch)
        for batch in [changed] * CALLS + [*batches(device)]:
            assert_same(step(layer, *batch), step_as_if_first(first, *batch))
    finally:
        tribn.set_sm_margin(0)


@pytest.mark.parametrize("tensor", ["x", "dy", "residual"])
def test_where_no_16_bytes_begin_is_no_repeat(tensor, device, looked_up):
    """For which kernels are compiled that read wider than the tensors allow."""
    layer, at = tribn.BatchNorm2d(4).to(device), ["x", "dy", "residual"].index(tensor)
    for batch in batches(device):
        step(layer, *batch)
    batch[at] = shifted(batch[at])
    looked_up.clear()
    step(layer, *batch)
    assert len(looked_up) == (2 if tensor == "x" else 1)  # backward has no residual


def test_backward_of_the_input_repeats_none_of_the_output(device):
    """Of which only a weight's values decide."""
    layer = tribn.BatchNorm2d(4, activation="leaky_relu", memory="inplace").to(device)
    for x, dy, _ in batches(device):
        step(layer, x, dy)
    for weight in (0.0, 1.0):
        torch.nn.init.constant_(layer.weight, weight)
        first = copy.deepcopy(layer)
        for _ in range(CALLS):
            assert_same(step(layer, x, dy), step_as_if_first(first, x, dy))


def test_strides_that_change_before_backward(device):
    layer = tribn.BatchNorm2d(4).to(device)
    for x, dy, _ in batches(device):
        step(layer, x, dy)
    x.requires_grad_()
    layer.weight.data = torch.arange(8.0, device=device)[::2]
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    y = layer(x)
    layer.weight.data = torch.arange(0.0, 8.0, 2.0, device=device)
    assert torch.equal(*torch.autograd.grad(y, x, dy), expected)
    layer.weight.data = layer.weight.data.clone()
    for _ in range(CALLS):
        torch.autograd.grad(layer(x), x, dy)
    y = layer(x)
    layer.weight.data = torch.arange(8.0, device=device)[::2]
    assert torch.equal(*torch.autograd.grad(y, x, dy), expected)


def test_a_weight_is_no_bias(device):
    layer = tribn.BatchNorm2d(4, bias=False).to(device)
    for batch in batches(device):
        step(layer, *batch)
    torch.nn.init.constant_(layer.weight, 3.0)
    layer.weight, layer.bias = None, layer.weight
    first = copy.deepcopy(layer)
    for _ in range(CALLS):
        assert_same(step(layer, *batch), step_as_if_first(first, *batch))


def test_repeats_count_as_changes_of_the_statistics(device):
    """Which autograd looks for."""
    layer = tribn.BatchNorm2d(4).to(device)
    for x, dy, _ in batches(device):
        versions = [t._version for t in layer.buffers()]
        step(layer, x, dy)
        assert [t._version for t in layer.buffers()] == [v + 1 for v in versions]


def test_repeats_keep_no_tensors(device):
    layer = tribn.BatchNorm2d(4).to(device)
    given = []
    for batch in batches(device):
        given += [weakref.ref(t) for t in (*batch, *step(layer, *batch))]
    del batch
    gc.collect()
    assert [t() for t in given] == [None] * len(given)


def test_a_repeat_that_is_refused_is_two_launches(device, monkeypatch):
    """From then on without being tried."""
    layer = tribn.BatchNorm2d(4, activation="relu").to(device)
    for batch in batches(device):
        step(layer, *batch)
    monkeypatch.setattr(host, "_refused", set())
    monkeypatch.setattr(host, "_launchers", {})
    start, started = host.start, []

    def refuse(kept, *args):
        started.append(kept.function.__name__.removesuffix("_kernel"))
        if kept.plan.tier is not None:
            raise host.Refused
        start(kept, *args)

    monkeypatch.setattr(host, "start", refuse)
    tried, two = ["forward", "forward"], ["stats", "normalize"]
    back = ["backward_reduce", "backward_dx"]
    first = copy.deepcopy(layer)
    ours = step(layer, *batch)
    assert started == [*tried, *two, "backward", *back]
    assert_same(ours, step_as_if_first(first, *batch))
    started.clear()
    step(layer, *batch)
    assert started == [*two, *back]
