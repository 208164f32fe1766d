"""The modules against torch.nn's: constructors, state, training and errors."""

import copy
import inspect
import io
import pickle
from functools import partial

import pytest
import torch
from cases import F16, F32, F64, assert_accurate, wide
from torch.nn.parameter import UninitializedParameter

import tribn
from tribn.functional import batch_norm

RANKS = {"1d": (2, 3), "2d": (4,), "3d": (5,)}
KINDS = pytest.mark.parametrize("kind", RANKS)
SHAPES = [("1d", (6, 3)), ("1d", (4, 3, 5)), ("2d", (2, 3, 4, 5)), ("3d", (2, 3, 2, 3, 4))]
OPTIONS = [
    {},
    {"eps": 1e-2},
    {"momentum": 0.7},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None, "track_running_stats": False},
    {"dtype": F64},  # the last: float64 torch is no oracle for itself
]
ids = {"ids": str}


def ours(kind, lazy=False):
    return getattr(tribn, f"{'Lazy' * lazy}BatchNorm{kind}")


def theirs(kind, lazy=False):
    return getattr(torch.nn, f"{'Lazy' * lazy}BatchNorm{kind}")


def pair(kind, C, device="cpu", **options):
    """Our module and torch's with the same random parameters and running statistics."""
    modules = ours(kind)(C, device=device, **options), theirs(kind)(C, device=device, **options)
    g = torch.Generator().manual_seed(0)
    state = {
        name: (torch.rand(C, generator=g) + 0.5 if tensor.dim() else torch.tensor(3)).to(tensor)
        for name, tensor in modules[0].state_dict().items()
    }
    for module in modules:
        module.load_state_dict(state, strict=True)
    return modules


def randn(shape, device="cpu", dtype=F32, seed=1):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (values * 2 + 1).to(device, dtype)


def observe(module, batches, dys, channel_axis=1):
    """What a module does in two training steps and an evaluation, by name, moved to axis 1."""
    seen = {}
    for step, (x, dy) in enumerate(zip(batches, dys, strict=True)):
        module.train(step + 1 < len(batches))
        module.zero_grad()
        x, dy = (t.movedim(1, channel_axis) for t in (x.detach(), dy))
        x.requires_grad_()
        y = module(x)
        y.backward(dy)
        seen[f"y{step}"] = y.detach().movedim(channel_axis, 1)
        seen[f"dx{step}"] = x.grad.movedim(channel_axis, 1)
        seen |= {f"d{name}{step}": p.grad.clone() for name, p in module.named_parameters()}
        seen |= {f"{name}{step}": b.clone() for name, b in module.named_buffers()}
    return seen


def assert_same_behaviour(module, torch_module, shape, device="cpu", dtype=F32, channel_axis=1):
    """Outputs, gradients and buffers are as accurate as torch's, against torch in float64."""
    batches, dys = ([randn(shape, device, dtype, seed + i) for i in range(3)] for seed in (1, 5))
    doubled = copy.deepcopy(torch_module).double()
    expected = observe(doubled, [x.double() for x in batches], [dy.double() for dy in dys])
    torch_seen = observe(torch_module, batches, dys)
    seen = observe(module, batches, dys, channel_axis)
    assert seen.keys() == torch_seen.keys()
    for name, tensor in seen.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(tensor, torch_seen[name]), name
        else:
            # Float64 torch is itself off by an ulp or so, and statistics in half precision
            # differ from those in float64 by their rounding, in both modules alike.
            assert_accurate(tensor, torch_seen[name], wide(expected[name]), name)


# Constructor, state and representation


@KINDS
@pytest.mark.parametrize("lazy", [False, True])
def test_subclass_of_torchs_with_its_signature(kind, lazy):
    cls, base = ours(kind, lazy), theirs(kind, lazy)
    assert issubclass(cls, base)
    mine, torchs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(c).parameters.values()]
        for c in (cls, base)
    )
    keywords = {  # torch has had `bias` since 2.12
        "bias": True,
        "channel_axis": 1,
        "activation": None,
        "order": "norm_act",
        "nonfinite": "propagate",
        "correction": 1,
        "stats_dtype": None,
        "memory": "input",
    }
    torchs = [parameter for parameter in torchs if parameter[0] not in keywords]
    assert mine[: len(torchs)] == torchs
    assert {name: default for name, _, default in mine[len(torchs) :]} == keywords
    assert {how for _, how, _ in mine[len(torchs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@KINDS
@pytest.mark.parametrize("options", OPTIONS, **ids)
def test_constructor_sets_torchs_attributes_and_state(kind, options):
    module, torch_module = ours(kind)(3, **options), theirs(kind)(3, **options)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(module, name) == getattr(torch_module, name), name
    state, torch_state = module.state_dict(), torch_module.state_dict()
    assert list(state) == list(torch_state)
    for name, tensor in state.items():
        assert tensor.dtype == torch_state[name].dtype, name
        assert torch.equal(tensor, torch_state[name]), name


def test_positional_arguments_are_torchs():
    module = tribn.BatchNorm2d(3, 1e-3, 0.2, True, False, "cpu", F64)
    assert (module.eps, module.momentum, module.track_running_stats) == (1e-3, 0.2, False)
    assert module.weight.dtype == F64


@KINDS
@pytest.mark.parametrize("options", OPTIONS, **ids)
def test_state_dict_loads_both_ways(kind, options):
    module, torch_module = ours(kind)(3, **options), theirs(kind)(3, **options)
    for source, target in ((module, torch_module), (torch_module, module)):
        state = {k: torch.full_like(v, 7) for k, v in source.state_dict().items()}
        target.load_state_dict(state, strict=True)
        assert all(torch.equal(v, state[k]) for k, v in target.state_dict().items())


@KINDS
@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[4:7], **ids)
@pytest.mark.parametrize("lazy", [False, True])
def test_repr_is_torchs(kind, options, lazy):
    arguments = () if lazy else (3,)
    assert repr(ours(kind, lazy)(*arguments, **options)) == repr(
        theirs(kind, lazy)(*arguments, **options)
    )
    assert "channel_axis=-1" in repr(ours(kind, lazy)(*arguments, channel_axis=-1))


@KINDS
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"eps": eps}, "eps is") for eps in (0.0, -1e-5, torch.nan)],
        *[({"momentum": m}, "momentum is") for m in (-0.1, 1.1, torch.nan, torch.inf)],
        *[({"channel_axis": axis}, f"channel_axis is {axis}") for axis in (0, 2, -2)],
        *[({"activation": a}, "activation is") for a in ("swish", torch.nn.Softmax(1))],
        *[({"order": order}, "order is") for order in ("act", None)],
        ({"nonfinite": "ignore"}, "nonfinite is"),
        *[({"correction": correction}, "correction is") for correction in (2, True)],
        *[({"stats_dtype": dtype}, "stats_dtype is") for dtype in (F16, torch.int32, "float32")],
    ],
    **ids,
)
def test_constructor_refuses_bad_options(kind, lazy, options, message):
    with pytest.raises(ValueError, match=message):
        ours(kind, lazy)(*() if lazy else (3,), **options)


@KINDS
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({"dtype": dtype}, f"dtype is {dtype}: it must be float16, bfloat16, float32 or ")
            for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, "float32")
        ],
        ({"bias": 1}, "bias is 1: it must be True or False"),
        ({"affine": None}, "affine is None: it must be True or False"),
        ({"eps": "1e-5"}, "eps is '1e-5': it must be a number"),
    ],
    **ids,
)
def test_constructor_refuses_other_types(kind, lazy, options, message):
    with pytest.raises(TypeError, match=message):
        ours(kind, lazy)(*() if lazy else (3,), **options)


@KINDS
@pytest.mark.parametrize("lazy", [False, True])
def test_other_ranks_are_refused(kind, lazy, device):
    ranks = {"1d": (2, 3), "2d": (4,), "3d": (5,)}[kind]
    layer = ours(kind, lazy)(*() if lazy else (4,), device=device)
    taken = " or ".join(map(str, ranks))
    for rank in {2, 3, 4, 5, 6} - {*ranks}:
        message = rf"input has shape \(4, .*\): {type(layer).__name__} takes {taken} axes"
        with pytest.raises(ValueError, match=message):
            layer(torch.randn([4] * rank, device=device))
    for rank in ranks:
        assert layer(torch.randn([4] * rank, device=device)).dim() == rank


# Behaviour


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("options", OPTIONS[:-1], **ids)
def test_training_and_evaluation_are_torchs(kind, shape, options, device):
    assert_same_behaviour(*pair(kind, 3, device, **options), shape, device)


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], **ids)
def test_channels_in_the_last_axis(kind, shape, options, device):
    module = ours(kind)(3, channel_axis=-1, device=device, **options)
    torch_module = theirs(kind)(3, device=device, **options)
    assert_same_behaviour(module, torch_module, shape, device, channel_axis=-1)


@pytest.mark.parametrize("lazy", [False, True])
def test_bias_false_learns_a_weight_only(lazy, device):
    module = ours("2d", lazy)(*() if lazy else (3,), bias=False, device=device)
    torch_module = theirs("2d")(3, device=device)
    torch_module.register_parameter("bias", None)
    if lazy:
        module(randn((2, 3, 1, 1), device))
        module.reset_running_stats()
    assert module.bias is None
    assert list(module.state_dict()) == list(torch_module.state_dict())
    assert_same_behaviour(module, torch_module, (2, 3, 4, 5), device)


def switch_tracking_off(module):
    module.track_running_stats = False


def drop_statistics(module):
    module.running_mean = module.running_var = module.num_batches_tracked = None


@pytest.mark.parametrize(
    "change", [switch_tracking_off, drop_statistics, lambda module: module.half()]
)
def test_changes_after_construction_act_as_in_torch(change, device):
    modules = pair("2d", 3, device)
    for module in modules:
        change(module)
    dtype = modules[0].weight.dtype
    assert_same_behaviour(*modules, (2, 3, 4, 5), device, dtype)


@pytest.mark.parametrize("half", [F16, torch.bfloat16], **ids)
def test_half_input_with_float32_parameters(half, device):
    assert_same_behaviour(*pair("2d", 3, device), (4, 3, 5, 6), device, half)


def test_no_statistics_move_in_evaluation(device):
    module = pair("1d", 3, device)[0].eval()
    before = copy.deepcopy(module.state_dict())
    module(randn((5, 3), device))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_changes_nothing_and_has_zero_gradients(shape, training, device):
    module = pair("1d", 3, device)[0].train(training)
    before = copy.deepcopy(module.state_dict())
    y = module(torch.ones(shape, device=device))
    y.sum().backward()
    assert y.shape == shape
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


def test_no_features(device):
    module = tribn.BatchNorm1d(0, device=device)
    assert module(torch.ones(4, 0, device=device)).shape == (4, 0)
    assert module.eval()(torch.ones(4, 0, device=device)).shape == (4, 0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_called_twice_before_backward(momentum, device):
    modules = pair("2d", 3, device, momentum=momentum)
    doubled = copy.deepcopy(modules[1]).double()
    inputs = [randn((2, 3, 4, 5), device, seed=seed) for seed in (1, 2)]
    dys = [randn((2, 3, 4, 5), device, seed=seed) for seed in (3, 4)]

    def train(module, dtype):
        xs = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        ys = [module(x) for x in xs]
        torch.autograd.backward(ys, [dy.to(dtype) for dy in dys])
        return [*ys, *(x.grad for x in xs), *(p.grad for p in module.parameters()),
                module.running_mean, module.running_var]  # fmt: skip

    results = (train(*args) for args in ((modules[0], F32), (modules[1], F32), (doubled, F64)))
    for result, torch_result, expected in zip(*results, strict=True):
        assert_accurate(result, torch_result, wide(expected))


# What is fused


FUSED = [
    {"activation": "relu"},
    {"activation": torch.nn.LeakyReLU(0.2), "order": "act_norm"},
    {"activation": torch.nn.GELU("tanh"), "nonfinite": "skip", "correction": 0},
    {"stats_dtype": F64},
]


@pytest.mark.parametrize("options", FUSED, **ids)
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_options_are_those_of_the_function(options, channel_axis, lazy, training, device):
    cls, arguments = ours("1d", lazy), () if lazy else (3,)
    module = cls(*arguments, channel_axis=channel_axis, device=device, **options).train(training)
    x, residual = (randn((4, 3, 5), device, seed=s).movedim(1, channel_axis) for s in (1, 2))
    mask = torch.arange(5, device=device) < torch.tensor([[5], [2], [0], [4]], device=device)
    dtype = options.get("stats_dtype", F32)
    for keywords in ({"mask": mask}, {"lengths": mask.sum(1)}, {}):
        stats = torch.zeros(2, 3, dtype=dtype, device=device).unbind()
        stats[1].fill_(1)
        fused = {name: value for name, value in options.items() if name != "stats_dtype"}
        affine = torch.ones(3, device=device), torch.zeros(3, device=device)
        expected = batch_norm(
            *(x, *stats, *affine, training), **fused, **keywords,
            residual=residual, channel_axis=channel_axis,
        )  # fmt: skip
        if not (lazy and isinstance(module, cls)):
            module.reset_running_stats()
        assert torch.equal(module(x, residual, **keywords), expected)
        for name, statistic in zip(("running_mean", "running_var"), stats, strict=True):
            assert getattr(module, name).dtype == dtype
            assert torch.equal(getattr(module, name), statistic)


@pytest.mark.parametrize("activation", ["tanh", torch.nn.LeakyReLU(0.3)])
def test_a_call_may_have_an_activation_of_its_own(activation, device):
    x = torch.randn(4, 3, 5, device=device)
    layer = tribn.BatchNorm1d(3, activation="relu", device=device).eval()
    own = tribn.BatchNorm1d(3, activation=activation, device=device).eval()
    assert torch.equal(layer(x, activation=activation), own(x))
    assert torch.equal(layer(x), torch.relu(layer(x, activation=torch.nn.Identity())))


@pytest.mark.parametrize("options", FUSED, **ids)
def test_repr_tells_what_is_not_torchs(options):
    text = repr(tribn.BatchNorm2d(3, **options))
    for name, value in options.items():
        assert f"{name}=" in text, value
    assert "negative_slope=0.2" in repr(tribn.BatchNorm2d(3, activation=torch.nn.LeakyReLU(0.2)))
    assert "gelu_tanh" in repr(tribn.BatchNorm2d(3, activation=torch.nn.GELU("tanh")))


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(F16),
    "to device and dtype": lambda module: module.to(module.weight.device, torch.bfloat16),
    "double": lambda module: module.double(),
    "in a model": lambda module: torch.nn.Sequential(module).half()[0],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("stats_dtype", [F32, F64])
def test_statistics_keep_their_dtype_bit_for_bit(cast, stats_dtype, device):
    module = tribn.BatchNorm2d(3, stats_dtype=stats_dtype, device=device)
    module(randn((2, 3, 4, 5), device))
    kept = module.running_mean.clone(), module.running_var.clone()
    CASTS[cast](module)
    assert module.weight.dtype != F32
    for name, before in zip(("running_mean", "running_var"), kept, strict=True):
        after = getattr(module, name)
        assert after.dtype == stats_dtype
        assert torch.equal(after, before)
    y = module(randn((2, 3, 4, 5), device, module.weight.dtype))
    assert y.dtype == module.weight.dtype
    assert module.running_mean.dtype == stats_dtype
    assert module.state_dict()["running_mean"].data_ptr() == module.running_mean.data_ptr()
    assert module.to("meta").running_var.is_meta


@pytest.mark.parametrize("half", [F16, torch.bfloat16], **ids)
def test_checkpoints_in_half_precision_load_both_ways(half, device):
    module = tribn.BatchNorm2d(3, stats_dtype=F32, device=device).to(half)
    torch_module = theirs("2d")(3, device=device).to(half)
    torch_module(randn((2, 3, 4, 5), device, half))
    module.load_state_dict(torch_module.state_dict(), strict=True)
    assert module.running_mean.dtype == F32
    assert torch.equal(module.running_mean, torch_module.running_mean.float())
    module(randn((2, 3, 4, 5), device, half))
    torch_module.load_state_dict(module.state_dict(), strict=True)
    assert torch_module.running_mean.dtype == half
    assert torch.equal(torch_module.running_mean, module.running_mean.to(half))


@pytest.mark.parametrize("made", [
    lambda device: tribn.LazyBatchNorm2d(stats_dtype=F32, device=device, dtype=F16),
    lambda device: tribn.LazyBatchNorm2d(stats_dtype=F32, device=device).half(),
    lambda device: torch.nn.Sequential(tribn.LazyBatchNorm2d(stats_dtype=F32)).half().to(device)[0],
])  # fmt: skip
@pytest.mark.parametrize("loaded", [False, True])
def test_lazy_statistics_have_their_dtype(made, loaded, device):
    lazy = made(device)
    if loaded:
        state = theirs("2d")(3, device=device, dtype=F16)
        state(randn((2, 3, 4, 5), device, F16))
        lazy.load_state_dict(state.state_dict(), strict=True)
        assert lazy.running_mean.dtype == F32
        assert torch.equal(lazy.running_mean, state.running_mean.float())
    lazy(randn((2, 3, 4, 5), device, F16))
    assert (lazy.weight.dtype, lazy.running_mean.dtype, lazy.running_var.dtype) == (F16, F32, F32)
    assert lazy.num_batches_tracked == 1 + loaded


# Copies, lazy modules, compilation


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_copies_behave_like_the_original(copied, channel_axis, device):
    module = ours("1d")(3, momentum=None, eps=1e-2, channel_axis=channel_axis, device=device)
    module(randn((6, 3, 3), device))
    twin = copied(module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    x = randn((4, 3, 3), device)
    assert torch.equal(twin(x), module(x))
    assert twin.num_batches_tracked == 2
    assert twin.running_mean.data_ptr() != module.running_mean.data_ptr()
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in module.state_dict().items())


def test_to_converts_parameters_and_statistics_but_not_the_counter(device):
    module = tribn.BatchNorm2d(3).to(device)
    for convert, dtype in (
        (module.half, F16),
        (module.double, F64),
        (module.bfloat16, torch.bfloat16),
    ):
        convert()
        assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype, torch.int64}
        y = module(randn((2, 3, 4, 4), device, dtype))
        assert y.dtype == dtype
    assert module.num_batches_tracked == 3
    assert {tensor.device.type for tensor in module.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("options", OPTIONS, **ids)
def test_lazy_module_becomes_the_module_of_its_first_input(
    kind, shape, channel_axis, options, device
):
    lazy = ours(kind, lazy=True)(channel_axis=channel_axis, device=device, **options)
    eager = ours(kind)(3, channel_axis=channel_axis, device=device, **options)
    x = randn(shape, device, options.get("dtype", F32)).movedim(1, channel_axis)
    assert torch.equal(lazy(x), eager(x))
    assert type(lazy) is type(eager)
    assert repr(lazy) == repr(eager)
    assert list(lazy.state_dict()) == list(eager.state_dict())
    assert all(torch.equal(v, eager.state_dict()[k]) for k, v in lazy.state_dict().items())


BAD_INPUTS = [
    (torch.ones(4), ValueError, "input"),
    (torch.ones(2, 3, 4, 5, 6, 7), ValueError, "input"),
    (torch.ones(1, 3, 1, 1), ValueError, "input"),
    (torch.ones(2, 3, 4, 5).int(), TypeError, "input is torch.int32"),
    (torch.ones(2, 3, 4, 5).cfloat(), TypeError, "input is torch.complex64"),
    ([1.0], TypeError, "input is a list"),
    (torch.ones(2, 3, 4, 5).to_sparse(), TypeError, "input is torch.sparse_coo"),
]


def on(device, x):
    """x on the device, unless it is on meta or no tensor at all."""
    return x.to(device) if isinstance(x, torch.Tensor) and not x.is_meta else x


@pytest.mark.parametrize(("x", "error", "message"), BAD_INPUTS)
def test_bad_first_input_leaves_a_lazy_module_unmaterialized(x, error, message, device):
    lazy = tribn.LazyBatchNorm2d(device=device)
    with pytest.raises(error, match=message):
        lazy(on(device, x))
    assert type(lazy) is tribn.LazyBatchNorm2d
    assert isinstance(lazy.weight, UninitializedParameter)
    assert lazy(torch.randn(2, 7, 4, 5, device=device)).shape == (2, 7, 4, 5)
    assert lazy.num_features == 7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        *BAD_INPUTS[:2],
        *BAD_INPUTS[3:],
        (torch.ones(2, 4, 4, 4), ValueError, "num_features=3"),
        (torch.ones(2, 1, 4, 4), ValueError, "num_features=3"),
        (torch.ones(0, 4, 4, 4), ValueError, "num_features=3"),
        (torch.ones(2, 4, 0, 4), ValueError, "num_features=3"),
        (torch.ones(2, 3, 4, 4).to(torch.float8_e4m3fn), TypeError, "input is torch.float8"),
        (torch.ones(2, 3, 4, 4, device="meta"), ValueError, "input on meta"),
    ],
)
def test_bad_input_raises_and_changes_nothing(x, error, message, training, device):
    module = pair("2d", 3, device)[0].train(training)
    assert_refused(module, on(device, x), error, message)


def assert_refused(module, x, error, message):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        module(x)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_one_value_per_channel_cannot_be_trained_on(shape, device):
    module = pair("1d", 3, device)[0]
    assert_refused(module, torch.ones(shape, device=device), ValueError, "one value per channel")
    assert module.eval()(torch.ones(shape, device=device)).shape == shape


def test_last_channel_axis_checks_the_last_axis(device):
    module = tribn.BatchNorm1d(3, channel_axis=-1, device=device)
    x = torch.ones(4, 3, 5, device=device)
    assert_refused(module, x, ValueError, "channels in axis -1.*num_features=3")


def test_momentum_none_needs_the_counter(device):
    module = pair("1d", 3, device, momentum=None)[0]
    module.num_batches_tracked = None
    assert_refused(module, randn((4, 3), device), ValueError, "num_batches_tracked")


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_one_statistic_without_the_other(missing, training, device):
    module = pair("1d", 3, device)[0].train(training)
    setattr(module, missing, None)
    assert_refused(module, randn((4, 3), device), ValueError, f"without {missing}")


# Dynamo itself makes an instance of every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_compiled_without_graph_breaks_equals_eager(momentum, channel_axis, device):
    torch._dynamo.reset()
    eager = tribn.BatchNorm1d(3, momentum=momentum, channel_axis=channel_axis, device=device)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    batches, dys = ([randn((4, 3, 5), device, seed=i + s) for i in range(3)] for s in (1, 5))
    expected = observe(eager, batches, dys, channel_axis)
    seen = observe(compiled, batches, dys, channel_axis)
    assert len(seen) == len(expected)
    for (name, tensor), result in zip(expected.items(), seen.values(), strict=True):
        # The compiler may lay out dy anew, and then sums are taken in another order.
        torch.testing.assert_close(result, tensor, msg=name)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_the_dtype_of_statistics(lazy, assign):
    cls = tribn.LazyBatchNorm2d if lazy else partial(tribn.BatchNorm2d, 3)
    module = cls(stats_dtype=torch.float32).half()
    state = torch.nn.BatchNorm2d(3).half().state_dict()
    module.load_state_dict(state, assign=assign)
    assert module.running_mean.dtype == module.running_var.dtype == torch.float32
    assert module.weight.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", FUSED[:3], **ids)
def test_compiled_with_all_that_is_fused_equals_eager(options, device):
    torch._dynamo.reset()
    eager = tribn.BatchNorm1d(3, device=device, **options)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    mask = torch.arange(5, device=device) < torch.tensor([[5], [2], [0], [4]], device=device)

    def train(module):
        seen = []
        for seed in (1, 2):
            x, residual, dy = (randn((4, 3, 5), device, seed=seed + s) for s in (0, 10, 20))
            x, residual = x.requires_grad_(), residual.requires_grad_()
            y = module(x, residual, mask=mask)
            y.backward(dy)
            seen += [y.detach(), x.grad, residual.grad]
        return [*seen, *(p.grad for p in module.parameters()), *module.buffers()]

    for result, expected in zip(train(compiled), train(eager), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_with_another_momentum_and_other_sizes_equals_eager(device):
    torch._dynamo.reset()
    eager = tribn.BatchNorm1d(3, device=device)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for i, momentum in enumerate((0.1, 0.2, 0.3)):  # from the second on as a variable
        eager.momentum = compiled.momentum = momentum
        x = randn((4 + i, 3, 5), device, seed=i)
        assert torch.equal(compiled(x), eager(x))
        assert torch.equal(compiled.running_var, eager.running_var)
