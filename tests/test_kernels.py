"""Every kernel on every launch path, forced by its plan, against the reference and float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    INTERPRET,
    PLAIN,
    Case,
    Inputs,
    assert_all_accurate,
    exact,
    wide,
)
from conftest import GPU

from tribn import reference
from tribn.launch import MERGE, collapse, make_plan, vector

if not (INTERPRET or GPU):
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from tribn import kernels
from tribn.kernels import host

MOMENTUM, EPS = 0.3, 1e-5
STATS = ("running_mean", "running_var")


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def device():
    return "cuda" if GPU else "cpu"


def forced(axis, *tensors, **changes):
    """The plan for the tensors, changed, and the numbers that depend on the changes set right."""
    layout = collapse(tensors[0].shape, [t.stride() for t in tensors], axis)
    itemsize = tensors[0].element_size()
    plan = replace(make_plan(layout, itemsize, host.INTERPRETER), **changes)
    tiles = -(-layout.N // plan.block_n) * -(-layout.S // plan.block_s)
    tiles_per_split = -(-tiles // plan.splits)
    return replace(
        plan,
        tiles_per_split=tiles_per_split,
        splits=-(-tiles // tiles_per_split),
        channel_blocks=-(-layout.C // plan.block_c),
        vec=vector(layout, plan.channels_last, 16 // itemsize),
    )


def forward_plan(t, **changes):
    return forced(t.axis, t.x, torch.empty_like(t.x), **changes)


def backward_plan(t, **changes):
    return forced(t.axis, t.x, t.dy, torch.empty_like(t.x), **changes)


def forward(module, t, running_mean, running_var, counter, *plan):
    statistics = (running_mean, running_var, counter, MOMENTUM, 1, False)
    return module.batch_norm_train(
        *(t.x, t.weight, t.bias, None, None, *statistics, EPS, t.axis, *PLAIN, False, *plan)
    )


def evaluate(module, t, mean, var, *plan):
    args = (t.x, mean, var, t.weight, t.bias, None, None, EPS, t.axis, *PLAIN, False)
    return module.batch_norm_eval(*args, *plan)[0]


def backward(module, t, mean, var, training, wanted, *plan, x=True):
    return module.batch_norm_backward(
        *(t.dy, t.x if x else None, mean, var, t.weight, None, None, None, None, None),
        *(EPS, training, t.axis, *PLAIN, False, t.x.dtype, None, [*wanted, False], *plan),
    )


def train(module, inputs, *plans):
    """Forward and backward in training by the kernels with their plans, or by the reference."""
    t = inputs
    running = [t.running_mean.clone(), t.running_var.clone()]
    counter = torch.tensor(4, device=t.x.device)
    y, mean, var, _, _ = forward(module, t, *running, counter, *plans[:1])
    assert counter == 5
    dx, dweight, dbias, _ = backward(module, t, mean, var, True, [True] * 3, *plans[1:])
    names = ("y", "dx", "dweight", "dbias", *STATS)
    return dict(zip(names, (y, dx, dweight, dbias, *running), strict=True))


TILE = ("block_n", "block_c", "block_s", "splits")
PATHS = [  # few programs: the interpreter takes milliseconds for each
    *[(1, 1, 64, 1), (4, 1, 16, 2), (1, 8, 16, 3), (2, 8, 8, MERGE), (16, 8, 4, 2)],
    *[(1, 16, 4, 1000), (1, 16, 128, 1000)],  # one tile a split
]
SHAPES = [
    *[Case((3, 5, 7, 8)), Case((6, 3, 11)), Case((37, 9)), Case((2, 17, 3, 3, 3))],
    *[Case((3, 5, 7, 8), layout="channels_last"), Case((6, 11, 4), channel_axis=-1)],
    *[Case((3, 16, 4, 8), BF16), Case((3, 16, 4, 8), F16, "channels_last"), Case((9, 6, 10), F64)],
]


def test_paths_merge_partials_everywhere():
    """In the programs that read them, and in a launch of its own that loops over them."""
    t = Inputs.of(SHAPES[0])
    plans = [forward_plan(t, **dict(zip(TILE, path, strict=True))) for path in PATHS]
    assert {plan.combine for plan in plans} == {False, True}
    assert any(1 < plan.splits <= MERGE for plan in plans)
    assert any(plan.splits == 1 for plan in plans)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_training_on_every_path(case, path, device):
    inputs = Inputs.of(case, device)
    expected, oracle = train(reference, inputs), exact(inputs, True, MOMENTUM, EPS)
    for channels_last in (False, True):
        changes = dict(zip(TILE, path, strict=True), channels_last=channels_last)
        plans = forward_plan(inputs, **changes), backward_plan(inputs, **changes)
        assert_all_accurate(train(kernels, inputs, *plans), expected, oracle)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_evaluation_on_every_path(case, path, device):
    t = Inputs.of(case, device)
    oracle = exact(t, False, MOMENTUM, EPS)
    changes = dict(zip(TILE, path, strict=True))
    plan = forward_plan(t, **changes)
    statistics = (t.running_mean, t.running_var)
    results = {"y": evaluate(kernels, t, *statistics, plan)}
    expected = {"y": evaluate(reference, t, *statistics)}
    for module, into in ((kernels, results), (reference, expected)):
        extra = () if module is reference else (backward_plan(t, **changes),)
        *grads, _ = backward(module, t, *statistics, False, [True] * 3, *extra)
        into |= dict(zip(("dx", "dweight", "dbias"), grads, strict=True))
    assert_all_accurate(results, expected, oracle)


@pytest.mark.parametrize("splits", [1, 2, 7, 1000])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_batch_stats_on_every_path(splits, dtype, device):
    t = Inputs.of(Case((20, 3, 40), dtype, mean=1e3, std=1.0), device)
    plan = forced(1, t.x, block_n=1, block_c=2, block_s=16, splits=splits)
    mean, var, count = kernels.batch_stats(t.x, None, 1, plan)
    x = wide(t.x)
    assert count == 800
    rounding = torch.finfo(dtype).eps + 4 * torch.finfo(F64).eps  # of the result, and of the sums
    assert abs(wide(mean) - x.mean((0, 2))).max() <= 1e3 * rounding
    # The parts' means are float64: their distances are off by eps(float64) * |mean|, and with them
    # the variance by twice that, in units of the standard deviation.
    merging = 2 * 1e3 * torch.finfo(F64).eps
    assert abs(wide(var) / x.var((0, 2)) - 1).max() <= 8 * torch.finfo(dtype).eps + merging


SUBSETS = [mask for mask in itertools.product([True, False], repeat=3) if any(mask)]


@pytest.mark.parametrize("mask", SUBSETS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("splits", [1, 1000])
def test_gradients_asked_for_equal_those_of_all(mask, training, splits, device):
    t = Inputs.of(Case((6, 5, 37)), device)
    plan = backward_plan(t, block_n=1, block_c=2, block_s=8, splits=splits)
    mean, var, _ = kernels.batch_stats(t.x, None, t.axis)
    *full, _ = backward(kernels, t, mean, var, training, [True] * 3, plan)
    needs_x = mask[1] or (training and mask[0])
    *some, _ = backward(kernels, t, mean, var, training, mask, plan, x=needs_x)
    for wanted, one, all_of_them in zip(mask, some, full, strict=True):
        assert (one is not None) == wanted
        if wanted:
            torch.testing.assert_close(one, all_of_them, rtol=1e-6, atol=1e-6)


GUARD, SENTINEL = 4096, 12345.0


@pytest.fixture
def guarded(monkeypatch):
    """Allocations of the launchers lie between sentinels, which must survive."""
    buffers = []

    def allocate(shape, stride, dtype, device):
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        buffer = torch.full((extent + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
        buffers.append((buffer, extent))
        return buffer.as_strided(shape, stride, GUARD)

    def empty_like(x, dtype=None, device=None):
        if device == "meta":
            return real(x, dtype=dtype, device=device)
        return allocate(x.shape, real(x).stride(), dtype or x.dtype, x.device)

    def new_empty(x, shape, dtype=None, **others):
        if others:  # the interpreter's own
            return real_new_empty(x, shape, dtype=dtype, **others)
        stride = real(torch.empty(shape, device="meta")).stride()
        return allocate(shape, stride, dtype or x.dtype, x.device)

    real_new_empty = torch.Tensor.new_empty
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return buffers


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_nothing_is_written_out_of_bounds(case, device, guarded):
    inputs = Inputs.of(case, device)
    changes = {"block_n": 2, "block_c": 16, "block_s": 32, "splits": 3}
    plans = forward_plan(inputs, **changes), backward_plan(inputs, **changes)
    train(kernels, inputs, *plans)
    for buffer, extent in guarded:
        assert (buffer[:GUARD] == SENTINEL).all()
        assert (buffer[GUARD + extent :] == SENTINEL).all()


def test_more_than_2_31_elements_apart(device):
    """Offsets beyond 32 bits, in memory of which only the ends are ever touched."""
    base = torch.zeros(2**31 + 2**20, dtype=BF16, device=device)
    x = base.as_strided((2, 3, 50), (2**31 + 7, 50, 1))
    t = Inputs.of(Case((2, 3, 50), BF16), device)
    x.copy_(t.x)
    mean, var, _ = kernels.batch_stats(x, None, 1)
    expected = kernels.batch_stats(t.x, None, 1)
    assert torch.equal(mean, expected[0])
    assert torch.equal(var, expected[1])
    y = evaluate(kernels, replace(t, x=x), mean, var)
    assert torch.equal(y, evaluate(kernels, t, mean, var))


def test_what_no_strides_can_express_is_copied(device):
    t = Inputs.of(Case((3, 5, 8, 6)), device)
    x = t.x[:, :, ::2, ::2]
    y, mean, *_ = forward(kernels, replace(t, x=x), None, None, None)
    expected, expected_mean, *_ = forward(kernels, replace(t, x=x.contiguous()), None, None, None)
    assert torch.equal(y, expected)
    assert torch.equal(mean, expected_mean)
