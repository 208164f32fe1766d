"""Every kernel on every launch path, forced by its plan, against the reference and float64."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    FUSED_LAYOUTS,
    INTERPRET,
    ONE_BIT,
    ORDERS,
    PLAIN,
    Case,
    Fused,
    Inputs,
    assert_all_accurate,
    assert_fused_accurate,
    exact,
    least_columns,
    pairwise,
    wide,
)
from conftest import GPU, assert_untouched_around
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import interpreter_builder as builder

from tribn import launch, reference
from tribn.launch import collapse, make_plan, vector
from tribn.reference import accumulator

if not (INTERPRET or GPU):
    pytest.skip(
        "kernels run on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter",
        allow_module_level=True,
    )

from tribn import kernels
from tribn.functional import batch_norm
from tribn.kernels import host
from tribn.kernels.sync import MERGE

MOMENTUM, EPS = 0.3, 1e-5
STATS = ("running_mean", "running_var")


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def device():
    return "cuda" if GPU else "cpu"


def cut(layout, itemsize, **changes):
    """The plan for a layout, changed, and the numbers that depend on the changes set right."""
    plan = replace(make_plan(layout, itemsize, host.INTERPRETER), **changes)
    if layout.columns > 1:  # a block has whole channels, and no others are neighbours
        plan = replace(plan, block_c=max(plan.block_c, least_columns(layout)), channels_last=True)
    tiles = -(-layout.N // plan.block_n) * -(-layout.S // plan.block_s)
    tiles_per_split = -(-tiles // plan.splits)
    return replace(
        plan,
        tiles_per_split=tiles_per_split,
        splits=-(-tiles // tiles_per_split),
        channel_blocks=-(-layout.C // plan.slab),
        vec=vector(layout, plan.channels_last, 16 // itemsize),
    )


def forced(axis, *tensors, mask=None, sums=True, **changes):
    """The plan for tensors of one shape, and a mask of it, changed."""
    around = None if mask is None else mask.unsqueeze(axis).stride()
    layout = collapse(tensors[0].shape, [t.stride() for t in tensors], axis, around, sums)
    return cut(layout, tensors[0].element_size(), **changes)


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
    *[(1, 1, 64, 1), (4, 1, 16, 2), (1, 8, 16, 3), (2, 8, 8, 16), (16, 8, 4, 2)],
    *[(1, 16, 4, 1000), (1, 16, 128, 1000)],  # one tile a split
]
SHAPES = [
    *[Case((3, 5, 7, 8)), Case((6, 3, 11)), Case((37, 9)), Case((2, 17, 3, 3, 3))],
    *[Case((3, 5, 7, 8), layout="channels_last"), Case((6, 11, 4), channel_axis=-1)],
    *[Case((3, 16, 4, 8), BF16), Case((3, 16, 4, 8), F16, "channels_last"), Case((9, 6, 10), F64)],
    *[Case((37, 24, 3)), Case((3, 16, 5, 5), BF16)],  # planes side by side
    *[Case((32, 5), BF16), Case((2, 6, 4, 7), F64, "channels_last")],  # pixels side by side
]


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    """To be merged in several steps, and for their planes to be seen side by side."""
    monkeypatch.setattr(launch, "MERGED_AT_ONCE", 128)
    monkeypatch.setattr(launch, "ALONE", 0)
    monkeypatch.setattr(host, "_launchers", {})  # those kept have been made for others


def test_paths_merge_partials_in_every_way():
    """None, all at once, and one part of them after another."""
    t = Inputs.of(SHAPES[0])
    plans = [forward_plan(t, **dict(zip(TILE, path, strict=True))) for path in PATHS]
    assert any(plan.splits == 1 for plan in plans)
    assert any(1 < plan.splits <= plan.block_g(1) for plan in plans)
    assert any(plan.splits > plan.block_g(1) for plan in plans)


@pytest.mark.parametrize(
    ("path", "case", "channels_last"),
    [
        (path, case, channels_last)
        for (i, path), (j, case), channels_last in itertools.product(
            enumerate(PATHS), enumerate(SHAPES), (False, True)
        )
        if (i + j) % 2 == channels_last or not INTERPRET  # which has time for one of either
    ],
    ids=str,
)
def test_training_on_every_path(path, case, channels_last, device):
    inputs = Inputs.of(case, device)
    expected, oracle = train(reference, inputs), exact(inputs, True, MOMENTUM, EPS)
    changes = dict(zip(TILE, path, strict=True), channels_last=channels_last)
    plans = forward_plan(inputs, **changes), backward_plan(inputs, **changes)
    assert_all_accurate(train(kernels, inputs, *plans), expected, oracle)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_evaluation_on_every_path(case, path, device):
    t = Inputs.of(case, device)
    oracle = exact(t, False, MOMENTUM, EPS)
    changes = dict(zip(TILE, path, strict=True))
    plan = forward_plan(t, sums=False, **changes)
    statistics = (t.running_mean, t.running_var)
    results = {"y": evaluate(kernels, t, *statistics, plan)}
    expected = {"y": evaluate(reference, t, *statistics)}
    for module, into in ((kernels, results), (reference, expected)):
        extra = () if module is reference else (backward_plan(t, **changes),)
        *grads, _ = backward(module, t, *statistics, False, [True] * 3, *extra)
        into |= dict(zip(("dx", "dweight", "dbias"), grads, strict=True))
    assert_all_accurate(results, expected, oracle)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 7, 1000])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_batch_stats_on_every_path(splits, dtype, masked, device):
    """With a mask that leaves out the first tiles of most splits."""
    t = Inputs.of(Case((20, 3, 40), dtype, mean=1e3, std=1.0), device)
    mask = torch.ones(20, 40, dtype=torch.bool, device=device)
    if masked:
        mask[:7], mask[:, :18], mask[12:14, :38] = False, False, False
    x = wide(t.x.movedim(1, -1)[mask])
    t.x.movedim(1, -1)[~mask] = torch.nan
    mask = mask if masked else None
    plan = forced(1, t.x, mask=mask, block_n=1, block_c=2, block_s=16, splits=splits)
    mean, var, count = kernels.batch_stats(t.x, mask, 1, plan)
    assert count == len(x)
    rounding = torch.finfo(dtype).eps + 4 * torch.finfo(F64).eps  # of the result, and of the sums
    assert abs(wide(mean) - x.mean(0)).max() <= 1e3 * rounding
    # The parts' means are float64: their distances are off by eps(float64) * |mean|, and with them
    # the variance by twice that, in units of the standard deviation.
    merging = 2 * 1e3 * torch.finfo(F64).eps
    assert abs(wide(var) / x.var(0) - 1).max() <= 8 * torch.finfo(dtype).eps + merging


SUBSETS = [mask for mask in itertools.product([True, False], repeat=3) if any(mask)]


@pytest.mark.parametrize("mask", SUBSETS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("splits", [1, 1000])
def test_gradients_asked_for_equal_those_of_all(mask, training, splits, device):
    t = Inputs.of(Case((3, 5, 17)), device)
    plan = backward_plan(t, block_n=1, block_c=2, block_s=8, splits=splits)
    mean, var, _ = kernels.batch_stats(t.x, None, t.axis)
    *full, _ = backward(kernels, t, mean, var, training, [True] * 3, plan)
    needs_x = mask[1] or (training and mask[0])
    *some, _ = backward(kernels, t, mean, var, training, mask, plan, x=needs_x)
    for wanted, one, all_of_them in zip(mask, some, full, strict=True):
        assert (one is not None) == wanted
        if wanted:
            torch.testing.assert_close(one, all_of_them, rtol=1e-6, atol=1e-6)


def synchronized(module, inputs, **changes):
    """Training of three ranks, whose rows are gathered here, of which one may have no batch."""
    t, names = inputs, ("y", "dx", "dweight", "dbias", *STATS)
    parts = zip(t.x.tensor_split(3), t.dy.tensor_split(3), strict=True)
    parts = [replace(t, x=x, dy=dy) for x, dy in parts]
    running = [t.running_mean.clone(), t.running_var.clone()]
    counter = torch.tensor(4, device=t.x.device)
    dtype = accumulator(t.x.dtype)

    def plan(part, *tensors, sums=True):
        forced_one = module is kernels and part.x.numel()
        return (forced(t.axis, *tensors, sums=sums, **changes),) if forced_one else ()

    rows = [module.sync_stats(p.x, None, dtype, t.axis, *PLAIN, *plan(p, p.x, p.x)) for p in parts]
    statistics = module.sync_combine(
        torch.stack(rows), *running, counter, MOMENTUM, 1, False, dtype
    )
    mean, var, count = statistics
    assert (counter, count) == (5, t.x.numel() // t.x.shape[t.axis])
    tensors = [(p.dy, p.x, mean, var, t.weight, None, None, None, None) for p in parts]
    like = [torch.empty_like(p.x) for p in parts]
    y = torch.cat([evaluate(module, p, mean, var) for p in parts])
    reduced = [
        module.sync_backward_reduce(
            *(*of, EPS, t.axis, *PLAIN, False, None, [True, True, False]),
            *plan(p, p.x, p.dy, out),
        )
        for p, of, out in zip(parts, tensors, like, strict=True)
    ]
    rows, *parts_of_grads = list(zip(*reduced, strict=True))[:3]
    sums, grads = module.sync_sum(torch.stack(rows)), map(sum, parts_of_grads)
    dx = torch.cat(
        [
            module.sync_backward_dx(
                *(*of, count, sums, EPS, t.axis, *PLAIN, False, t.x.dtype),
                *plan(p, p.x, p.dy, out, sums=False),
            )
            for p, of, out in zip(parts, tensors, like, strict=True)
        ]
    )
    return dict(zip(names, (y, dx, *grads, *running), strict=True))


@pytest.mark.parametrize(("case", "path"), [*zip(SHAPES, itertools.cycle(PATHS), strict=False)])
def test_synchronized_on_every_path(case, path, device):
    inputs = Inputs.of(case, device)
    changes = dict(zip(TILE, path, strict=True))
    results = synchronized(kernels, inputs, **changes)
    # The parts' gradients have been rounded before they are added up.
    parts = 3 * torch.finfo(accumulator(case.dtype)).eps
    oracle = exact(inputs, True, MOMENTUM, EPS)
    for name in ("dweight", "dbias"):
        values, slack = oracle[name]
        oracle[name] = oracle[name]._replace(slack=slack + parts * abs(values).max())
    assert_all_accurate(results, train(reference, inputs), oracle)


DIFFER = "process group differ: all must call the same layers"


# Which differs: also one beyond those that are merged at once
@pytest.mark.parametrize("rank", [0, 1, MERGE, MERGE + 2])
@pytest.mark.skipif(not INTERPRET, reason="on a GPU it ends the process: see the next test")
def test_ranks_that_differ_fail_and_move_nothing(rank, monkeypatch):
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
    rows = torch.rand(MERGE + 3, 2 + 2 * 20, dtype=F64)
    rows[:, 0] = reference.kind(F32, 20)
    rows[rank, 0] += 1
    running, counter = torch.rand(2, 20), torch.tensor(4)
    before = running.clone()
    with pytest.raises(InterpreterError, match=DIFFER):
        kernels.sync_combine(rows, *running, counter, None, 1, False, F32)
    with pytest.raises(InterpreterError, match=DIFFER):
        kernels.sync_sum(rows)
    assert torch.equal(running, before)
    assert counter == 4


@pytest.mark.parametrize(
    "merge", ["sync_sum(rows)", "sync_combine(rows, *[None] * 3, 0.1, 1, 0, F32)"]
)
@pytest.mark.skipif(not GPU, reason="needs a GPU: see the test above for the interpreter")
def test_ranks_that_differ_fail_on_a_gpu(merge):
    code = f"""
import torch
from torch import float32 as F32
from tribn import kernels
rows = torch.zeros(2, 42, dtype=torch.float64, device="cuda")
kernels.{merge}
torch.cuda.synchronize()
print("alike")
rows[1, 0] = 1
kernels.{merge}
torch.cuda.synchronize()
print("unnoticed")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "alike\n"
    assert DIFFER in ended.stderr
    assert ended.returncode != 0


@pytest.mark.parametrize("mean", [0.0, 1e8])
def test_variance_of_parts_of_which_the_first_is_small_and_away(mean, device):
    """What is merged first has one value, and a mean that is far from that of all others."""
    n = 10**6
    rows = torch.zeros(2 * MERGE, 4, dtype=F64, device=device)
    rows[:, 0] = reference.kind(F64, 1)
    rows[0, 1:3] = torch.tensor([1.0, mean + 1.0], dtype=F64)
    rows[-1, 1:3] = torch.tensor([n, mean], dtype=F64)
    _, var, _ = kernels.sync_combine(rows, None, None, None, 0.1, 1, False, F64)
    # It is what is left of n squares when the square of their sum is taken away.
    assert abs(var.item() / (n / (n + 1) ** 2) - 1) <= n * torch.finfo(F64).eps


@pytest.mark.parametrize("ranks", [1, MERGE, 2 * MERGE + 3])
def test_rows_of_many_ranks_are_added_up_as_the_reference_does(ranks, device):
    rows = torch.randn(ranks, 1 + 2 * 20, dtype=F64, device=device)
    rows[:, 0] = reference.kind(F16, 20, "backward")
    torch.testing.assert_close(kernels.sync_sum(rows), reference.sync_sum(rows))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("momentum", [MOMENTUM, None])
@pytest.mark.parametrize("ranks", [1, MERGE, 2 * MERGE + 3])
def test_rows_of_many_ranks_are_merged_as_the_reference_does(ranks, momentum, skip, device):
    """Of which one is empty and one is infinite in some channels; and all of them empty."""
    rows = torch.rand(ranks, 2 + 2 * 20, dtype=F64, device=device)
    rows[:, 0] = reference.kind(F16, 20)
    rows[:, 1] = torch.arange(1, ranks + 1)
    rows[ranks // 2, 1:] = 0
    rows[-1, 2:5] = torch.inf
    for batch in (rows, torch.cat((rows[:, :1], 0 * rows[:, 1:].nan_to_num(0, 0, 0)), 1)):
        results = []
        for module in (kernels, reference):
            states = torch.ones(20, device=device), torch.ones(20, device=device)
            states += (torch.tensor(4, device=device),)
            found = module.sync_combine(batch, *states, momentum, 1, skip, F32)
            results.append((*found, *states))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, equal_nan=True)


class NoReading(TorchDispatchMode):
    """The host must not wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 5, 7)], ids=str)
def test_the_host_reads_nothing_between_the_ranks(shape, device):
    x, mask = torch.randn(shape, device=device), torch.ones(shape[::2], device=device) > 0
    mean, var = torch.randn(5, device=device), torch.ones(5, device=device)
    counter, rest = torch.tensor(4, device=device), (EPS, 1, *PLAIN, False)
    tensors = (x, x, mean, var, None, None, None, None, mask)
    with NoReading():
        rows = kernels.sync_stats(x, mask, F32, 1, *PLAIN).expand(3, -1)
        *_, count = kernels.sync_combine(rows, mean, var, counter, None, 1, False, F32)
        sums, *_ = kernels.sync_backward_reduce(*tensors, *rest, None, [True, True, False])
        sums = kernels.sync_sum(sums.expand(3, -1))
        kernels.sync_backward_dx(*tensors, count, sums, *rest, F32)
    assert counter == (5 if x.numel() else 4)
    assert count == 3 * x.numel() // 5


# What is fused


@pytest.fixture
def force(monkeypatch):
    """Makes all launchers take one path."""

    def force(path):
        def plan(layout, itemsize, device, bits=False, *_):
            changes = dict(zip(TILE, path, strict=True))
            if bits:  # whole bytes of neighbours
                neighbours = "block_c" if layout.channels_last else "block_s"
                changes[neighbours] = max(8, changes[neighbours])
            return cut(layout, itemsize, **changes)

        monkeypatch.setattr(host, "make_plan", plan)
        monkeypatch.setattr(host, "_launchers", {})  # those kept have another

    return force


FUSED = pairwise(
    {
        "path": PATHS,
        "layout": tuple(FUSED_LAYOUTS),
        "activation": ("relu", "leaky_relu", "softplus"),
        "order": ORDERS,
        "residual": ("transposed", "sliced"),
        "mask": ("none", "random", "lengths"),
        "dtype": (F32, BF16),
        "training": (True, False),
    }
)
FUSED = [(row.pop("path"), Fused(**row)) for row in FUSED]


@pytest.mark.parametrize(("path", "case"), FUSED, ids=str)
def test_fused_on_every_path(path, case, device, force):
    force(path)
    inputs, options = case.call(device)
    assert_fused_accurate(inputs, case.training, options)


BITS = [*itertools.product(ONE_BIT, ORDERS, (False, True), list(FUSED_LAYOUTS)[:6])]


@pytest.mark.parametrize(("activation", "order", "masked", "layout"), BITS)
def test_bits_are_the_references(activation, order, masked, layout, device):
    """Of whole numbers, which both compute exactly; kinks, both zeros and NaN are among them."""
    case = FUSED_LAYOUTS[layout]
    t = Inputs.of(case, device)
    g = torch.Generator().manual_seed(0)
    x, residual = (t.x.copy_(torch.randint(-4, 8, case.shape, generator=g)).clone() for _ in "xr")
    special = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf], device=device)
    x.as_strided(special.shape, (1,)).copy_(special)
    zero, one = torch.zeros(2, x.shape[t.axis], device=device)
    one += 1
    mask = torch.rand(x.select(t.axis, 0).shape, generator=g).to(device) < 0.6 if masked else None
    p = 0.25 if activation == "leaky_relu" else 0.0
    arguments = (x, zero, one, None, None, residual, mask, 0.0, t.axis)
    arguments = (*arguments, activation, p, 0.0, order == "act_norm", True)
    (y, bits), (expected, expected_bits) = (
        module.batch_norm_eval(*arguments) for module in (kernels, reference)
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    layout = launch.runs(y.shape, y.stride(), t.axis, masked)
    used = y.numel() // 8 if layout.columns > 1 else bits.numel()  # side by side there are no gaps
    assert torch.equal(bits.flatten()[:used], expected_bits.flatten()[:used])
    signs = reference.unpack(bits, y, t.axis, masked)
    z = x if order == "act_norm" else x + residual
    on = (z > 0) & (z < 6) if activation == "relu6" else z > 0
    on |= z.isnan() & (activation != "leaky_relu")
    assert torch.equal(signs > 0, on if mask is None else on & mask.unsqueeze(t.axis))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_nothing_is_written_out_of_bounds(case, device, guarded):
    inputs = Inputs.of(case, device)
    changes = {"block_n": 2, "block_c": 16, "block_s": 32, "splits": 3}
    plans = forward_plan(inputs, **changes), backward_plan(inputs, **changes)
    train(kernels, inputs, *plans)
    assert_untouched_around(guarded)


@pytest.mark.parametrize("layout", FUSED_LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_fused_is_written_out_of_bounds(layout, order, training, device, force, guarded):
    force((2, 16, 32, 3))
    case = Fused(training, "relu", order, "sliced", "random", layout, BF16)
    inputs, options = case.call(device)
    x, residual = inputs.x.requires_grad_(), options["residual"].requires_grad_()
    stats = (inputs.running_mean, inputs.running_var)
    y = batch_norm(x, *stats, training=training, channel_axis=inputs.channel_axis, **options)
    torch.autograd.grad(y, (x, residual), inputs.dy)
    assert torch.uint8 in {buffer.dtype for buffer in guarded} or order == "act_norm"


def test_more_than_2_31_elements_apart(device):
    """Offsets beyond 32 bits, in memory of which only the ends are ever touched."""
    base = torch.zeros(2**31 + 2**20, dtype=BF16, device=device)
    x = base.as_strided((2, 3, 50), (2**31 + 7, 50, 1))
    t = Inputs.of(Case((2, 3, 50), BF16), device)
    x.copy_(t.x)
    mean, var, _ = kernels.batch_stats(x, None, 1)
    expected = kernels.batch_stats(t.x, None, 1)
    # Odd strides make for narrow accesses, and these for sums in another order.
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(var, expected[1])
    y = evaluate(kernels, replace(t, x=x), mean, var)
    assert torch.equal(y, evaluate(kernels, t, mean, var))


def test_what_no_strides_can_express_is_copied(device):
    t = Inputs.of(Case((3, 5, 8, 6)), device)
    x = t.x[:, :, ::2, ::2]
    y, mean, *_ = forward(kernels, replace(t, x=x), None, None, None)
    expected, expected_mean, *_ = forward(kernels, replace(t, x=x.contiguous()), None, None, None)
    assert torch.equal(y, expected)
    assert torch.equal(mean, expected_mean)


@pytest.mark.parametrize("training", [True, False])
def test_what_would_cut_rows_of_bits_is_copied(training, device, guarded):
    """One image, whose rows lie apart in the residual, or in dy: they would be rows of bits."""
    t = Inputs.of(Case((1, 5, 6, 9)), device)
    apart = [tensor.new_full((1, 5, 6, 12), torch.nan) for tensor in (t.x, t.dy)]
    residual, dy = (a[..., :9].copy_(b) for a, b in zip(apart, (t.dy.flip(2), t.dy), strict=True))
    options = {"activation": "relu", "order": "norm_act"}
    assert_fused_accurate(t, training, options | {"residual": residual})
    assert_fused_accurate(replace(t, dy=dy), training, options | {"residual": t.dy.flip(2)})
