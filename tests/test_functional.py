"""batch_norm and batch_stats against extended precision, with torch's own error as the measure."""

import gc
import inspect
import weakref
from dataclasses import replace
from functools import partial
from itertools import permutations, product

import pytest
import torch
from cases import (
    BF16,
    CASES,
    DTYPES,
    EPS,
    F16,
    F32,
    F64,
    INTERPRET,
    LAYOUTS,
    MOMENTUM,
    Case,
    Inputs,
    assert_accurate,
    assert_all_accurate,
    assert_matches_torch,
    exact,
    largest,
    params,
    run,
    torch_batch_norm,
    ulp,
    wide,
    without,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tribn.functional import batch_norm, batch_stats

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
SMALL = Case((3, 4, 5, 2))


def equal(a, b):
    """Bitwise, layout aside; NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(*(t.nan_to_num(nan=12345.0) for t in (a, b)))


# The oracle and the signature


@MODES
@pytest.mark.parametrize("case", [replace(SMALL, dtype=F64), Case((3, 2, 4), F64, channel_axis=-1)])
def test_oracle_agrees_with_torch_in_float64(case, training):
    inputs = Inputs.of(case)
    for name, result in run(torch_batch_norm, inputs, training).items():
        torch.testing.assert_close(
            result, torch.from_numpy(exact(inputs, training)[name].values.astype(float)), msg=name
        )


def test_signature_is_torchs_and_then_keywords():
    ours = list(inspect.signature(batch_norm).parameters.values())
    theirs = list(inspect.signature(torch.nn.functional.batch_norm).parameters.values())
    described = [(p.name, p.kind, p.default) for p in theirs]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == described
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


# Accuracy


@MODES
@pytest.mark.parametrize("case", params(CASES))
def test_outputs_gradients_and_running_statistics_are_as_accurate_as_torchs(case, training, device):
    inputs = Inputs.of(case, device)
    x, dy = inputs.x.clone(), inputs.dy.clone()
    assert_matches_torch(inputs, training)
    assert equal(inputs.x, x)
    assert equal(inputs.dy, dy)


@MODES
@pytest.mark.parametrize(
    "absent", [("weight",), ("bias",), ("weight", "bias")], ids=lambda names: "-".join(names)
)
def test_absent_parameters_are_one_and_zero(absent, training, device):
    assert_matches_torch(without(Inputs.of(SMALL, device), *absent), training)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_training_without_running_statistics(dtype, layout, device):
    inputs = Inputs.of(replace(SMALL, dtype=dtype, layout=layout), device)
    x = inputs.x.clone()
    assert_matches_torch(without(inputs, "running_mean", "running_var"), training=True)
    assert equal(inputs.x, x)


def every_third(tensor):
    """The same values, two NaN apart."""
    return tensor.new_full((3 * len(tensor),), torch.nan)[1::3].copy_(tensor)


@MODES
def test_strided_parameters_and_statistics(training, device):
    inputs = Inputs.of(SMALL, device)
    names = ("weight", "bias", "running_mean", "running_var")
    strided = {name: every_third(getattr(inputs, name)) for name in names}
    assert_matches_torch(replace(inputs, **strided), training)
    assert_matches_torch(replace(inputs, weight=inputs.weight[:1].expand(4)), training)


def test_strided_running_statistics_are_updated_in_place_and_nothing_beside_them(device):
    inputs = Inputs.of(SMALL, device)
    stats = [every_third(s) for s in (inputs.running_mean, inputs.running_var)]
    batch_norm(inputs.x, *stats, training=True, momentum=MOMENTUM)
    results = run(batch_norm, inputs, training=True)
    for strided, name in zip(stats, ("running_mean", "running_var"), strict=True):
        assert equal(strided, results[name])
        assert torch.isnan(strided.as_strided((len(strided) * 3 - 1,), (1,), 0)).sum() == 7


@MODES
def test_channel_axis_counts_from_either_end(training, device):
    inputs = Inputs.of(replace(SMALL, channel_axis=2), device)
    assert_matches_torch(inputs, training)
    from_behind = run(batch_norm, replace(inputs, channel_axis=-2), training)
    for name, result in run(batch_norm, inputs, training).items():
        assert equal(result, from_behind[name]), name


@MODES
@pytest.mark.parametrize("eps", [1e-3, 1e-12])
def test_eps(eps, training, device):
    inputs = Inputs.of(Case((6, 3, 5), std=1e-3), device)
    results = [run(f, inputs, training, eps=eps) for f in (batch_norm, torch_batch_norm)]
    assert_all_accurate(*results, exact(inputs, training, eps=eps))


def test_eval_takes_one_value_per_channel_and_eps_zero(device):
    inputs = Inputs.of(Case((1, 7)), device)
    least = run(torch_batch_norm, inputs, False, eps=1e-30)  # torch 2.11 refuses zero
    assert_all_accurate(
        run(batch_norm, inputs, False, eps=0.0), least, exact(inputs, False, eps=0.0)
    )


@st.composite
def strided_inputs(draw):
    """Inputs of any rank, dtype and strides: permuted, sliced with steps, expanded."""
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    dtype, param_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor():
        order = draw(st.permutations(range(len(shape))))
        steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
        repeated = draw(st.sets(st.sampled_from(range(len(shape))), max_size=2))
        sizes = [1 if d in repeated else n for d, n in enumerate(shape)]
        base = torch.full([sizes[d] * steps[d] for d in order], torch.nan, dtype=dtype)
        view = base.permute([order.index(d) for d in range(len(shape))])
        view = view[tuple(slice(step - 1, None, step) for step in steps)]
        return view.copy_(torch.randn(sizes, generator=g, dtype=F64)).expand(shape)

    axis = draw(st.integers(-len(shape), len(shape) - 1))
    statistics = torch.randn((4, shape[axis]), generator=g, dtype=F64)
    statistics[3] = statistics[3].exp()
    return Inputs(tensor(), tensor(), *statistics.to(param_dtype), axis)


@given(inputs=strided_inputs(), training=st.booleans())
def test_any_shape_strides_and_dtypes(inputs, training, device):
    tensors = {name: t.to(device) for name, t in vars(inputs).items() if name != "channel_axis"}
    inputs = replace(inputs, **tensors)
    n = inputs.x.numel() // inputs.x.shape[inputs.axis]
    # A sum of n rounded terms is off by the square root of n roundings, if they are random; with
    # few channels it is luck whether torch's is as well.
    assert_matches_torch(inputs, training and n > 1, roundings=n**0.5)


@pytest.mark.parametrize("case", params(CASES))
def test_batch_stats(case, device):
    inputs = Inputs.of(case, device)
    x, axis = inputs.x.requires_grad_(), inputs.axis
    others = tuple(d for d in range(x.dim()) if d != axis)
    n = x.numel() // x.shape[axis]
    mean, var, count = batch_stats(x, channel_axis=case.channel_axis)
    torch_mean, torch_var = torch.zeros(2, x.shape[axis], dtype=mean.dtype, device=device)
    torch_batch_norm(x, torch_mean, torch_var, None, None, True, 1.0, EPS, axis)
    exact_mean, exact_var = wide(x).mean(others), wide(x).var(others)
    assert_accurate(mean, torch_mean, exact_mean, "mean")
    # Deviations from a mean that is off by d have the variance var + d², and d is up to four ulps.
    slack = (4 * ulp(largest(exact_mean), mean.dtype)) ** 2
    assert_accurate(var, torch_var * ((n - 1) / n), exact_var, "var", slack)
    assert (count.dtype, count.shape) == (torch.int64, ())
    assert count == n
    assert not any(result.requires_grad for result in (mean, var, count))


# Running statistics


@pytest.mark.parametrize("dtype", [F32, F16])
def test_momentum_zero_keeps_running_statistics_bitwise(dtype, device):
    inputs = Inputs.of(replace(SMALL, param_dtype=dtype), device)
    results = run(batch_norm, inputs, training=True, momentum=0.0)
    assert equal(results["running_mean"], inputs.running_mean)
    assert equal(results["running_var"], inputs.running_var)


def test_momentum_one_takes_the_batchs_statistics(device):
    inputs = Inputs.of(SMALL, device)
    results = run(batch_norm, inputs, training=True, momentum=1.0)
    mean, var, _ = batch_stats(inputs.x)
    wanted = exact(inputs, True, momentum=1.0)
    assert_accurate(results["running_mean"], mean, wanted["running_mean"].values)
    unbiased = (var.double() * 30 / 29).float()
    assert_accurate(results["running_var"], unbiased, wanted["running_var"].values)


def test_momentum_none_averages_over_all_batches(device):
    batches = [Inputs.of(replace(SMALL, mean=m), device).x for m in (0.0, 1.0, 5.0)]
    mean, var = torch.full((2, 4), 77.0, device=device)  # forgotten at the first batch
    counter = torch.tensor(0, device=device)
    for x in batches:
        batch_norm(x, mean, var, training=True, momentum=None, num_batches_tracked=counter)
    assert counter == 3
    others = (0, 2, 3)
    running = torch.tensor(0.0)
    for name, mine in (("mean", mean), ("var", var)):
        each = [
            getattr(wide(x), name)(others, **{"ddof": 1} if name == "var" else {}) for x in batches
        ]
        running = torch.zeros(4)
        for k, batch in enumerate(each, 1):  # as torch would, in float32
            running += (torch.from_numpy(batch.astype("float32")) - running) / k
        assert_accurate(mine.cpu(), running, sum(each) / 3, name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_counter_counts_training_batches_only(momentum, device):
    x, mean, var = torch.randn(5, 3, device=device), *torch.ones(2, 3, device=device)
    counter = torch.tensor(41, device=device)
    options = {"momentum": momentum, "num_batches_tracked": counter}
    batch_norm(x, mean, var, training=True, **options)
    assert counter == 42
    batch_norm(x, mean, var, training=False, **options)
    assert counter == 42


class HostReads(TorchDispatchMode):
    """Counts the numbers that are read on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def train_step(device, momentum=None):
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    mean, var = torch.ones(2, 3, device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    y = batch_norm(x, mean, var, training=True, momentum=momentum, num_batches_tracked=counter)
    y.backward(torch.ones_like(y))
    return counter


def test_momentum_none_reads_no_value_in_the_functions(device):
    with HostReads() as reads:
        counter = train_step(device)
    assert reads.count == 0
    assert counter == 1


@pytest.mark.gpu
def test_momentum_none_does_not_synchronize():
    train_step("cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")  # a synchronization raises
        counter = train_step("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counter == 1


# numpy, which the interpreter computes with, warns of inf - inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@MODES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_spread_as_in_torch(value, training, device):
    inputs = Inputs.of(SMALL, device)
    inputs.x[1, 2, 3, 0] = value
    ours, theirs = (run(f, inputs, training) for f in (batch_norm, torch_batch_norm))
    for name, result in ours.items():
        finite = [t.isfinite() for t in (result, theirs[name])]
        assert torch.equal(*finite), name
        where = finite[0]
        torch.testing.assert_close(result[where], theirs[name][where], msg=name)


# Reproducibility, the saved tensors and the gradients asked for


@MODES
@pytest.mark.parametrize(
    "case",
    params(
        [
            Case((3000, 1, 9)),
            Case((33, 65), F16),
            Case((2, 40, 8, 8), BF16, "channels_last"),
            Case((64, 2, 128, 128), large=True),
        ]
    ),
)
def test_two_runs_are_equal_bitwise(case, training, device):
    inputs = Inputs.of(case, device)
    first, second = (run(batch_norm, inputs, training) for _ in range(2))
    for name, result in first.items():
        assert equal(result, second[name]), name


@MODES
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_gradients_only_where_asked(dtype, layout, create_graph, training, device):
    inputs = Inputs.of(replace(SMALL, dtype=dtype, layout=layout, param_dtype=F32), device)
    exact_results = exact(inputs, training)
    torch_results = run(torch_batch_norm, inputs, training)
    names = ("x", "weight", "bias")
    for asked in product([False, True], repeat=3):
        x, weight, bias = leaves = [
            getattr(inputs, name).detach().requires_grad_(ask)
            for name, ask in zip(names, asked, strict=True)
        ]
        y = batch_norm(
            x, inputs.running_mean.clone(), inputs.running_var.clone(), weight, bias, training
        )
        assert y.requires_grad == any(asked)
        if not y.requires_grad:
            continue
        wanted = [name for name, ask in zip(names, asked, strict=True) if ask]
        grads = torch.autograd.grad(
            y, [leaves[names.index(name)] for name in wanted], inputs.dy, create_graph=create_graph
        )
        results = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
        assert_all_accurate(results, torch_results, exact_results)


@pytest.mark.parametrize(
    ("training", "asked", "saved"),
    [
        (True, "x weight bias", 1),
        (True, "x", 1),
        (True, "weight", 1),
        (True, "bias", 0),
        (False, "x weight bias", 1),
        (False, "weight", 1),
        (False, "x bias", 0),
        (False, "x", 0),
        (False, "bias", 0),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_input_is_saved_only_where_a_gradient_depends_on_it(training, asked, saved, layout, device):
    inputs = Inputs.of(Case((8, 3, 4, 5), layout=layout), device)
    x, weight, bias = (
        getattr(inputs, name).requires_grad_(name in asked.split())
        for name in ("x", "weight", "bias")
    )
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_norm(x, inputs.running_mean, inputs.running_var, weight, bias, training)
    assert [size for size in sizes if size > 3] == [x.numel()] * saved


@MODES
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dy_layout", ["contiguous", "expanded_scalar", "transposed"])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3, 4, 5), layout="channels_last"),
        Case((2, 3, 4, 2, 5), layout="channels_last_3d"),
        Case((2, 3, 4, 5), layout="transposed"),
        Case((2, 3, 4)),
    ],
    ids=str,
)
def test_input_gradient_keeps_the_memory_format(case, dy_layout, frozen, training, device):
    inputs = Inputs.of(replace(case, dy_layout=dy_layout), device)
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_(not frozen)
    y = batch_norm(x, inputs.running_mean, inputs.running_var, weight, None, training)
    assert y.stride() == x.stride()
    (dx,) = torch.autograd.grad(y, x, inputs.dy, retain_graph=True)
    assert dx.stride() == x.stride()
    (dx,) = torch.autograd.grad(y, x, inputs.dy, create_graph=True)
    assert dx.stride() == x.stride(), "with create_graph"


@pytest.mark.parametrize("modified", ["running_mean", "running_var", "weight", "x"])
def test_modifying_a_saved_tensor_raises_as_in_torch(modified, device):
    for function in (batch_norm, torch.nn.functional.batch_norm):
        inputs = Inputs.of(SMALL, device)
        weight = inputs.weight.requires_grad_()
        x = inputs.x.requires_grad_()
        y = function(x, inputs.running_mean, inputs.running_var, weight, inputs.bias)
        with torch.no_grad():
            getattr(inputs, modified).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(inputs.dy)


def test_training_again_before_backward_is_no_modification(device):
    inputs = Inputs.of(SMALL, device)
    x, stats = inputs.x.requires_grad_(), (inputs.running_mean, inputs.running_var)
    first, second = (batch_norm(x, *stats, inputs.weight, training=True) for _ in range(2))
    grads = [torch.autograd.grad(y, x, inputs.dy)[0] for y in (first, second)]
    assert equal(*grads)


@MODES
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("absent", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_first_and_second_derivatives(absent, channel_axis, training, device):
    case = Case((3, 2, 2), F64, "transposed", channel_axis=channel_axis)
    inputs = without(Inputs.of(case, device), *absent)
    stats = (None, None) if training else (inputs.running_mean, inputs.running_var)

    def function(x, *affine):
        weight, bias = (dict(zip(given, affine, strict=True)).get(n) for n in ("weight", "bias"))
        return batch_norm(x, *stats, weight, bias, training, channel_axis=channel_axis)

    given = [name for name in ("weight", "bias") if name not in absent]
    leaves = [getattr(inputs, name).requires_grad_() for name in ("x", *given)]
    # The interpreter has time for one random direction only, not for every input.
    assert torch.autograd.gradcheck(function, leaves, fast_mode=INTERPRET)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=INTERPRET)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@MODES
def test_without_autograd(guard, training, device):
    inputs = Inputs.of(SMALL, device)
    with_autograd = run(batch_norm, inputs, training)["y"]
    with guard():
        y = batch_norm(
            inputs.x.requires_grad_(),
            inputs.running_mean,
            inputs.running_var,
            inputs.weight,
            inputs.bias,
            training,
            MOMENTUM,
        )
    assert not y.requires_grad
    assert equal(y, with_autograd)


# Empty batches and errors


def zeros_for(tensors):
    return [torch.zeros_like(t) for t in tensors]


@MODES
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0, 3), 1), ((0, 3, 4), 1), ((4, 3, 0), 1), ((0, 3, 4, 4), 1), ((0, 4, 3), -1),
     ((0, 3, 2, 2, 2), 1), ((4, 0), 1), ((4, 0, 5), 1), ((4, 5, 0), -1), ((0, 0), 1)],
)  # fmt: skip
def test_empty_batch_changes_nothing_and_has_zero_gradients(
    shape, axis, momentum, training, device
):
    C = shape[axis]
    x = torch.ones(shape, device=device, requires_grad=True)
    affine = [torch.ones(C, device=device, requires_grad=True) for _ in range(2)]
    state = [*torch.full((2, C), 3.0, device=device), torch.tensor(5, device=device)]
    mean, var, counter = (s.clone() for s in state)
    y = batch_norm(x, mean, var, *affine, training, momentum,
                   channel_axis=axis, num_batches_tracked=counter)  # fmt: skip
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for tensor, before in zip((mean, var, counter), state, strict=True):
        assert equal(tensor, before)
    for parameter in affine:
        assert equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [F16, F64])
def test_batch_stats_of_an_empty_batch_are_zero(shape, dtype, device):
    mean, var, count = batch_stats(torch.ones(shape, dtype=dtype, device=device))
    assert equal(mean, torch.zeros(3, device=device, dtype=F64 if dtype == F64 else F32))
    assert equal(var, mean)
    assert equal(count, torch.tensor(0, device=device))


@MODES
@pytest.mark.parametrize(
    "shape", [(5, 3, 0), (9, 5, 4, 0), (0, 3, 2, 4), (9, 5, 0, 4), (2, 0, 4, 3)]
)
def test_empty_batch_of_any_strides_keeps_no_bits(shape, training, device):
    for order in permutations(range(len(shape))):
        x = torch.ones([shape[d] for d in order], device=device)
        x = x.permute([order.index(d) for d in range(len(shape))]).requires_grad_()
        C = shape[1]
        running = torch.zeros(C, device=device), torch.ones(C, device=device)
        residual = torch.ones_like(x).requires_grad_()
        y = batch_norm(x, *running, None, None, training, activation="relu", residual=residual)
        for tensor in (y, *torch.autograd.grad(y.sum(), (x, residual))):
            assert tensor.shape == shape


def test_empty_batch_can_be_differentiated_twice(device):
    x = torch.ones(0, 3, device=device, requires_grad=True)
    weight = torch.ones(3, device=device, requires_grad=True)
    y = batch_norm(x, None, None, weight, training=True)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert dx.shape == x.shape


class SubclassedReLU(torch.nn.ReLU):
    """What it does instead of relu nobody knows."""


META = torch.device("meta")
NESTED = torch.nested.nested_tensor([torch.ones(3, 2)] * 5, layout=torch.jagged)
BOTH, TRAIN, EVAL = (True, False), (True,), (False,)

# of a good call with an input of shape (5, 3, 2): what is replaced, the error, what its message
# names, the modes
BAD_CALLS = [
    ({"input": [1.0]}, TypeError, "input", BOTH),
    *[
        ({"input": torch.ones(5, 3, 2).to(dtype)}, TypeError, f"input is {dtype}", BOTH)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ],
    ({"input": torch.ones(3)}, ValueError, r"input has shape \(3,\)", BOTH),
    ({"input": torch.ones(())}, ValueError, r"input has shape \(\)", BOTH),
    *[
        ({"input": torch.ones(shape)}, ValueError, "running_mean has shape", BOTH)
        for shape in ((5, 4, 2), (5, 1), (5, 2, 3), (0, 4, 2), (0, 1), (2, 4, 0))
    ],
    *[
        ({name: torch.ones(shape)}, ValueError, f"{name} has shape", BOTH)
        for name in ("weight", "bias", "running_mean", "running_var")
        for shape in ((4,), (1,), (), (3, 1), (1, 3), (0,))
    ],
    *[
        ({name: torch.ones(3).to(dtype)}, TypeError, f"{name} is {dtype}", BOTH)
        for name in ("weight", "bias", "running_mean", "running_var")
        for dtype in (torch.int64, torch.complex64)
    ],
    *[
        ({name: torch.ones(3, device=META)}, ValueError, f"{name} is on meta", BOTH)
        for name in ("weight", "bias", "running_mean", "running_var")
    ],
    ({"input": torch.ones(5, 3, 2, device=META)}, ValueError, "input on meta", BOTH),
    ({"running_mean": None}, ValueError, "running_var is given without running_mean", BOTH),
    ({"running_var": None}, ValueError, "running_mean is given without running_var", BOTH),
    ({"running_mean": None, "running_var": None}, ValueError, "running_mean", EVAL),
    *[({"input": torch.ones(s)}, ValueError, "one value per channel", TRAIN)
      for s in ((1, 3), (1, 3, 1), (1, 3, 1, 1))],
    *[({"eps": eps}, ValueError, "eps is", TRAIN) for eps in (0.0, -1e-5, torch.nan)],
    *[({"eps": eps}, ValueError, "eps is", EVAL) for eps in (-1e-5, torch.nan)],
    *[({"channel_axis": a}, ValueError, f"channel_axis is {a}", BOTH) for a in (3, -4, 100)],
    ({"channel_axis": 0}, ValueError, "channels in axis 0", BOTH),
    ({"channel_axis": 1.0}, TypeError, "channel_axis is 1.0", BOTH),
    ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight is a list", BOTH),
    ({"momentum": None, "num_batches_tracked": None}, ValueError, "momentum is None", TRAIN),
    *[({"num_batches_tracked": torch.ones((), dtype=d)}, TypeError, f"num_batches_tracked is {d}",
       TRAIN) for d in (torch.float32, torch.int32)],
    ({"num_batches_tracked": torch.tensor([1, 2])}, ValueError, "num_batches_tracked has", TRAIN),
    ({"num_batches_tracked": torch.tensor(1, device=META)}, ValueError, "num_batches_tracked is on",
     TRAIN),
    *[({"activation": a}, ValueError, "activation is .*it must be one of relu, ", BOTH)
      for a in ("swish", "", "ReLU", torch.nn.Softmax(1), torch.nn.SELU(), SubclassedReLU())],
    *[({"activation": a}, TypeError, "activation is a .*: it must be a name, a module", BOTH)
      for a in (torch.nn.ReLU, torch.relu, 1, ["relu"])],
    *[({"order": order}, ValueError, "order is .*'norm_act' or 'act_norm'", BOTH)
      for order in ("act", "", None, 1)],
    *[({"nonfinite": value}, ValueError, "nonfinite is .*'propagate' or 'skip'", BOTH)
      for value in ("ignore", None, True)],
    *[({"correction": value}, ValueError, "correction is .*0 or 1", BOTH)
      for value in (2, -1, 0.5, 1.0, True, None)],
    *[({"memory": value}, ValueError, "memory is .*'input' or 'inplace'", BOTH)
      for value in ("output", None)],
    ({"residual": [1.0]}, TypeError, "residual is a list", BOTH),
    *[({"residual": torch.ones(s)}, ValueError, "residual has shape .*input.*equal", BOTH)
      for s in ((5, 3), (5, 3, 1), (1, 3, 2), (3, 5, 2), (5, 3, 2, 1), ())],
    ({"residual": torch.ones(5, 3, 2, device=META)}, ValueError, "residual is on meta", BOTH),
    *[({"residual": torch.ones(5, 3, 2).to(dtype)}, TypeError, f"residual is {dtype}", BOTH)
      for dtype in (torch.complex64, torch.complex128, torch.float8_e4m3fn)],
    ({"residual": torch.ones(5, 3, 2).to_sparse()}, TypeError, "residual is torch.sparse", BOTH),
    ({"residual": NESTED}, TypeError, "residual is nested", BOTH),
    ({"mask": [True]}, TypeError, "mask is a list", BOTH),
    *[({"mask": torch.ones(5, 2).to(dtype)}, TypeError, f"mask is {dtype}: it must be bool", BOTH)
      for dtype in (torch.uint8, torch.int64, torch.float32)],
    *[({"mask": torch.ones(s).bool()}, ValueError, r"mask has shape .*it must be \(5, 2\)", BOTH)
      for s in ((5,), (5, 3, 2), (5, 1), (1, 2), (2, 5), (5, 1, 2), ())],
    ({"mask": torch.ones(5, 2, device=META).bool()}, ValueError, "mask is on meta", BOTH),
    ({"mask": torch.ones(5, 2).bool().to_sparse()}, TypeError, "mask is torch.sparse_coo", BOTH),
    ({"mask": torch.ones(5, 2).bool(), "lengths": torch.ones(5).int()}, ValueError,
     "mask and lengths are given", BOTH),
    ({"lengths": [1, 2, 1, 2, 1]}, TypeError, "lengths is a list", BOTH),
    *[({"lengths": torch.ones(5).to(dtype)}, TypeError, f"lengths is {dtype}", BOTH)
      for dtype in (torch.float32, torch.bool)],
    *[({"lengths": torch.ones(s).int()}, ValueError, r"lengths has shape .*must be \(N,\)", BOTH)
      for s in ((4,), (3,), (5, 1), ())],
    ({"lengths": torch.ones(5, device=META).int()}, ValueError, "lengths is on meta", BOTH),
    *[({"input": torch.ones(s), "lengths": torch.ones(5).int()}, ValueError,
       "lengths has shape .*give a mask", BOTH) for s in ((5, 3), (5, 3, 2, 2))],
]  # fmt: skip


def test_traced_with_symbolic_sizes():
    """Which cannot be hashed."""
    x = torch.randn(5, 4)
    traced = make_fx(partial(batch_norm, training=True), tracing_mode="symbolic")(x, None, None)
    assert torch.equal(traced(x, None, None), batch_norm(x, None, None, training=True))


def test_calls_that_fail_are_forgotten():
    eps = torch.zeros(1000)
    held = weakref.ref(eps)
    with pytest.raises(TypeError, match="eps is"):
        batch_norm(torch.randn(5, 3), None, None, training=True, eps=eps)
    del eps
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("training", [[True], 1, None])
def test_training_that_is_no_bool(training):
    with pytest.raises(TypeError, match=r"training is .*: it must be True or False"):
        batch_norm(torch.randn(5, 3), None, None, training=training)


@pytest.mark.parametrize(
    ("replaced", "error", "message", "training"),
    [
        pytest.param(replaced, error, message, training, id=f"{message}-{number}-{training}")
        for number, (replaced, error, message, modes) in enumerate(BAD_CALLS)
        for training in modes
    ],
)
def test_bad_arguments_raise_and_change_nothing(replaced, error, message, training, device):
    def move(value):
        return (
            value.to(device) if isinstance(value, torch.Tensor) and value.device != META else value
        )

    names = ("input", "running_mean", "running_var", "weight", "bias")
    tensors = (torch.randn(5, 3, 2), *torch.rand(4, 3))
    call = {name: move(tensor) for name, tensor in zip(names, tensors, strict=True)}
    call |= {"num_batches_tracked": move(torch.tensor(1)), "momentum": 0.1, "eps": EPS}
    call |= {name: move(value) for name, value in replaced.items()} | {"training": training}
    tensors = {
        name: value
        for name, value in call.items()
        if isinstance(value, torch.Tensor)
        and value.device != META
        and value.layout == torch.strided
    }
    before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items()}
    with pytest.raises(error, match=message):
        batch_norm(**call)
    for name, (copy, version) in before.items():
        assert torch.equal(tensors[name], copy), name
        assert tensors[name]._version == version, name


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.requires_grad_(), "requires a gradient"),
        (lambda state: state[:1].expand(3), "is expanded"),
    ],
)
def test_statistics_that_cannot_be_updated_are_refused_in_training(change, message, name, device):
    x = torch.randn(4, 3, device=device)
    states = {n: torch.ones(3, device=device) for n in ("running_mean", "running_var")}
    states[name] = change(states[name])
    with pytest.raises(ValueError, match=f"{name} {message}"):
        batch_norm(x, **states, training=True)
    assert all((state == 1).all() for state in states.values())
    with torch.no_grad():
        batch_norm(x, **states)
    if states[name].requires_grad:
        with pytest.raises(ValueError, match="in evaluation it is a constant; detach it"):
            batch_norm(x, **states)


def test_one_tensor_cannot_be_both_statistics(device):
    state = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="running_mean and running_var are one tensor"):
        batch_norm(torch.randn(4, 3, device=device), state, state, training=True)
    assert (state == 1).all()


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_inference_tensors_are_updated_in_inference_mode_only(name, device):
    x = torch.randn(4, 3, device=device)
    states = {n: torch.ones(3, device=device) for n in ("running_mean", "running_var")}
    states["num_batches_tracked"] = torch.tensor(1, device=device)
    with torch.inference_mode():
        states[name] = states[name].clone()
    with pytest.raises(ValueError, match=f"{name} is an inference tensor"):
        batch_norm(x, training=True, **states)
    with torch.inference_mode():
        batch_norm(x, training=True, **states)
    assert states["num_batches_tracked"] == 2
    batch_norm(x, states["running_mean"], states["running_var"])


@pytest.mark.parametrize(
    ("input", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "input"),
        (torch.ones(5, 3).int(), {}, TypeError, "input is torch.int32"),
        (torch.ones(5), {}, ValueError, "input has shape"),
        (torch.ones(5, 3), {"channel_axis": 2}, ValueError, "channel_axis is 2"),
        (torch.ones(5, 3), {"mask": torch.ones(5, 3).bool()}, ValueError, "mask has shape"),
        (torch.ones(5, 3), {"mask": torch.ones(5)}, TypeError, "mask is torch.float32"),
        (torch.ones(5, 3), {"lengths": torch.ones(5).int()}, ValueError, "lengths has shape"),
    ],
)
def test_batch_stats_refuses_bad_arguments(input, options, error, message):
    with pytest.raises(error, match=message):
        batch_stats(input, **options)


def test_every_layout_keeps_its_promise():
    """The layouts of the table are what they are called, and hold the values they are given."""
    x = torch.randn(3, 4, 5, 2)
    for name, lay_out in LAYOUTS.items():
        if name != "channels_last_3d" and "expanded" not in name:
            assert equal(lay_out(x), x), name
    assert LAYOUTS["transposed"](x).stride() != x.stride()
    assert LAYOUTS["sliced"](x).stride(-1) == 2
    assert LAYOUTS["offset"](x).storage_offset() == 1
    assert 0 in LAYOUTS["expanded_inner"](x).stride()
