"""Converting models and back, and freezing the batch norm layers of a model."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import assert_train_alike, train

import tribn

KINDS = [
    (nn.BatchNorm1d, tribn.BatchNorm1d, (4, 3, 5)),
    (nn.BatchNorm2d, tribn.BatchNorm2d, (4, 3, 5, 2)),
    (nn.BatchNorm3d, tribn.BatchNorm3d, (4, 3, 5, 2, 2)),
]


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = norm(4)
        self.again = self.bn  # one layer under two names
        self.rest = nn.Sequential(nn.ReLU(), norm(4, affine=False))

    def forward(self, x):
        return self.rest(self.again(self.bn(self.conv(x))))


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def randomize(model):
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model


@pytest.mark.parametrize(("theirs", "ours", "shape"), KINDS)
@pytest.mark.parametrize("cls", ["theirs", "ours"])
def test_frozen_layers_stay_as_they_are_through_train(theirs, ours, shape, cls):
    x = torch.randn(shape, requires_grad=True)
    layer = randomize({"theirs": theirs, "ours": ours}[cls](3))
    expected = copy.deepcopy(layer).eval()(x)
    before = statistics(layer)
    frozen = tribn.freeze(layer).train()
    assert isinstance(frozen, ours)
    torch.testing.assert_close(frozen(x), expected)
    assert all(torch.equal(b, before[name]) for name, b in frozen.named_buffers())
    assert "frozen=True" in repr(frozen)
    unfrozen = tribn.unfreeze(frozen)
    assert unfrozen(x).mean().abs() < 1e-5
    assert unfrozen.num_batches_tracked == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, tribn.BatchNorm2d])
def test_a_model_keeps_parameters_keys_hooks_and_shared_layers(norm):
    model = randomize(Net(norm)).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    calls = []
    model.bn.register_forward_hook(lambda *_: calls.append(1))
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert tribn.freeze(model.train()) is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.param_groups[0]["params"][2] is model.bn.weight
    assert model.bn is model.again
    assert isinstance(model.rest[1], tribn.BatchNorm2d)
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    del model.bn._forward_hooks[next(iter(model.bn._forward_hooks))]  # a lambda does not pickle
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again.train()(x), expected)


def test_subclasses_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    model = tribn.freeze(nn.Sequential(Own(3)))
    assert type(model[0]) is Own


def test_a_layer_without_statistics_is_an_error_and_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"layer 1 .*track_running_stats=False"):
        tribn.freeze(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_what_cannot_be_frozen_is_said():
    with pytest.raises(ValueError, match="layer 0 is a LazyBatchNorm2d"):
        tribn.freeze(nn.Sequential(nn.LazyBatchNorm2d()))


def test_a_synchronized_layer_is_frozen():
    model = tribn.freeze(nn.Sequential(randomize(nn.SyncBatchNorm(3))))
    assert type(model[0]) is tribn.SyncBatchNorm
    x = torch.randn(4, 3, 2)
    torch.testing.assert_close(model(x), model.eval()(x))


# convert_sync_batchnorm

KEPT = {
    "activation": "relu",
    "order": "act_norm",
    "nonfinite": "skip",
    "correction": 0,
    "stats_dtype": torch.float64,
    "channel_axis": -1,
}


def test_synchronized_layers_keep_all_they_hold_and_do():
    group, seen = torch.distributed.GroupMember.NON_GROUP_MEMBER, []
    layers = [randomize(tribn.BatchNorm1d(3, **KEPT)), randomize(nn.BatchNorm2d(3, momentum=None))]
    layers += [nn.SyncBatchNorm(3), tribn.freeze(tribn.BatchNorm3d(3, bias=False)).eval()]
    layers[0].weight.requires_grad_(False)
    layers[0].register_forward_hook(lambda *_: seen.append("hook"))
    model = nn.Sequential(*layers, layers[0])
    parameters, buffers, keys = list(model.parameters()), list(model.buffers()), model.state_dict()
    x = torch.randn(5, 4, 3)
    expected = model[0](x)
    assert tribn.convert_sync_batchnorm(model, group) is model
    for layer in model:
        assert type(layer) is tribn.SyncBatchNorm
        assert layer.process_group is group
    assert model[0] is model[-1]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert model.state_dict().keys() == keys.keys()
    for name, value in KEPT.items():
        kept = getattr(model[0], name)
        assert (kept.name if name == "activation" else kept) == value
    assert not model[0].weight.requires_grad
    assert model[3].frozen
    assert not model[3].training
    assert model[0].training
    assert torch.equal(model[0](x), expected)
    assert seen == ["hook", "hook"]


def test_synchronized_layers_are_reverted_to_what_they_were():
    group = torch.distributed.GroupMember.NON_GROUP_MEMBER
    theirs, ours = nn.SyncBatchNorm(3, process_group=group), tribn.SyncBatchNorm(3)
    model = nn.Sequential(nn.BatchNorm1d(3), tribn.BatchNorm2d(3), theirs, ours)
    layers, keys = list(model), [set(vars(layer)) for layer in model]
    tribn.convert(model)
    for given in (None, group, None):
        tribn.convert_sync_batchnorm(model, given)
    tribn.revert(model)
    classes = [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert [type(layer) for layer in model] == classes
    assert all(a is b for a, b in zip(layers, model, strict=True))
    assert [set(vars(model[i])) for i in (0, 2)] == [keys[0], keys[2]]
    assert (theirs.process_group, ours.process_group) == (group, None)


def test_what_was_fused_stays_fused_when_it_is_synchronized():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    model, report = tribn.convert(model, report=True)
    assert report.counts["fused"] == 1
    rewritten = type(model)
    tribn.convert_sync_batchnorm(model)
    assert type(model) is rewritten is not nn.Sequential
    assert type(model[1]) is tribn.SyncBatchNorm
    torch.testing.assert_close(model(x), expected)
    tribn.revert(model)
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), expected)


def test_a_single_layer_is_synchronized():
    layer = tribn.convert_sync_batchnorm(nn.BatchNorm1d(3))
    assert type(layer) is tribn.SyncBatchNorm
    assert layer.process_group is None


def test_subclasses_are_not_synchronized():
    class Own(nn.BatchNorm1d):
        pass

    class OwnOfTribn(tribn.BatchNorm1d):
        pass

    model = tribn.convert_sync_batchnorm(nn.Sequential(Own(3), OwnOfTribn(3)))
    assert [type(layer) for layer in model] == [Own, OwnOfTribn]


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm2d, tribn.LazyBatchNorm2d])
def test_lazy_layers_are_synchronized_when_they_know_their_channels(lazy):
    model = nn.Sequential(tribn.BatchNorm2d(3), lazy())
    with pytest.raises(ValueError, match=f"layer 1 is a {lazy.__name__} that has seen no input"):
        tribn.convert_sync_batchnorm(model)
    assert type(model[0]) is tribn.BatchNorm2d
    model(torch.randn(2, 3, 4, 4))
    tribn.convert_sync_batchnorm(model)
    assert {type(layer) for layer in model} == {tribn.SyncBatchNorm}


def saved(layer, x):
    """Bytes kept for backward of tensors as large as a bit for every element of x, or larger."""
    kept = {}

    def pack(tensor):
        if tensor.nbytes >= x.numel() // 8:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_layers_keep_no_activation_unless_the_weight_asks(activation):
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    layer = tribn.freeze(tribn.BatchNorm2d(8, activation=activation)).train()
    assert saved(layer, x) == x.nbytes
    layer.weight.requires_grad_(False)
    assert saved(layer, x) == (0 if activation is None else x.numel() // 8)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_gradients_keep_the_memory_format(memory_format):
    x = torch.randn(2, 8, 6, 6).to(memory_format=memory_format).requires_grad_()
    layer = tribn.freeze(randomize(tribn.BatchNorm2d(8, activation="relu"))).train()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn(2, 8, 6, 6))
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


def test_checkpoints_of_torchvisions_frozen_layer_load():
    class FrozenBatchNorm2d(nn.Module):  # buffers and keys as torchvision has them
        def __init__(self, num_features):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(num_features) + 0.5)

    state = nn.Sequential(FrozenBatchNorm2d(3)).state_dict()
    model = tribn.freeze(nn.Sequential(tribn.BatchNorm2d(3)))
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 4, 4)
    s = {name.removeprefix("0."): t.view(1, 3, 1, 1) for name, t in state.items()}
    scale = s["weight"] * (s["running_var"] + 1e-5).rsqrt()
    torch.testing.assert_close(
        model(x), x * scale + s["bias"] - s["running_mean"] * scale, rtol=1e-5, atol=1e-5
    )


# Converting


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's, in short."""

    def __init__(self, num_features, act):
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's, in short."""

    def __init__(self, num_features, eps=1e-3):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(num_features) + 0.5)

    def forward(self, x):
        w, b, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class Model(nn.Module):
    """A layer of every kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.plain = nn.BatchNorm2d(4, eps=1e-3, momentum=None)
        self.act = BatchNormAct2d(4, nn.LeakyReLU(0.2, inplace=True))
        self.frozen = FrozenBatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.volume = nn.BatchNorm3d(4)
        self.rows = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        x = self.bare(self.frozen(self.act(self.plain(self.conv(x)))))
        x = F.silu(self.volume(x.unsqueeze(2)).squeeze(2))
        return self.linear(self.rows(x.flatten(2)).mean(2))


def model():
    torch.manual_seed(0)
    model = randomize(Model())
    model.rows.weight.requires_grad_(False)
    model.volume.eval()
    model.label = "mine"
    return model


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_model_trains_as_before_with_the_optimizer_it_has():
    mine, plain = model().double(), model()
    optimizer = torch.optim.SGD(mine.parameters(), 1e-2)
    parameters = dict(mine.named_parameters(remove_duplicate=False))
    converted = tribn.convert(mine)
    assert converted is mine
    for name, p in converted.named_parameters():
        assert p is parameters[name]
    assert_train_alike(converted, plain, (IMAGES,), optimizer)


def facts(model):
    """What must stay: keys in their order, and of each entry and module what it is."""
    return {
        "state": [(k, t.dtype, t.device, t.data_ptr()) for k, t in model.state_dict().items()],
        "parameters": [(k, id(p), p.requires_grad) for k, p in model.named_parameters()],
        "buffers": [(k, id(b)) for k, b in model.named_buffers()],
        "modules": [(k, id(m), m.training) for k, m in model.named_modules()],
        "label": model.label,
        "hooks": [len(m._forward_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_everything_else_stays(dtype, device):
    mine = model().to(dtype).to(device)
    mine.plain.register_forward_hook(lambda *_: None)
    before = facts(mine)
    tribn.convert(mine)
    assert facts(mine) == before
    layers = [m for m in mine.modules() if isinstance(m, tribn.nn.Layer)]
    assert [type(m) for m in layers] == [
        *[tribn.BatchNorm2d] * 4,
        *(tribn.BatchNorm3d, tribn.BatchNorm1d),
    ]
    assert mine.plain.eps == 1e-3
    assert mine.plain.momentum is None
    tribn.revert(mine)
    assert facts(mine) == before


def test_checkpoints_go_either_way():
    mine, plain = tribn.convert(model()), model()
    state = {k: torch.rand_like(t) if t.dim() else t + 7 for k, t in plain.state_dict().items()}
    for m in (mine, plain):
        m.load_state_dict(state)
    torch.testing.assert_close(mine.eval()(IMAGES), plain.eval()(IMAGES))
    plain.load_state_dict(mine.state_dict())
    mine.load_state_dict(dict(plain.state_dict()))  # without versions


def test_the_report_says_what_and_why():
    mine, report = tribn.convert(model(), report=True)
    assert isinstance(report, tribn.Report)
    assert isinstance(mine, Model)
    assert [tuple(row) for row in report.rows] == [
        ("plain", "replaced", "", "followed by BatchNorm2d"),
        ("act", "fused", "leaky_relu(negative_slope=0.2)", ""),
        ("frozen", "replaced", "", "followed by BatchNorm2d"),
        ("bare", "replaced", "", "followed by unsqueeze"),
        ("volume", "replaced", "", "followed by squeeze"),
        ("rows", "replaced", "", "followed by mean"),
    ]
    assert report.counts == {"fused": 1, "replaced": 5}
    assert str(report).splitlines()[:3] == [
        "6 batch norms: 1 fused, 5 replaced, 0 left",
        "  plain   replaced  followed by BatchNorm2d",
        "  act     fused     leaky_relu(negative_slope=0.2)",
    ]
    assert str(tribn.convert(nn.ReLU(), report=True)[1]) == (
        "0 batch norms: 0 fused, 0 replaced, 0 left"
    )


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def with_forward():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


def hooked(layer, part):
    getattr(layer, part).register_forward_hook(lambda *_: None)
    return layer


def without_eps():
    layer = FrozenBatchNorm2d(4)
    del layer.eps
    return layer


def dropping():
    layer = BatchNormAct2d(4, nn.ReLU())
    layer.drop = nn.Dropout()
    return layer


def other(layer):
    """A namesake of a layer that computes something else."""
    cls = type(layer)
    layer.__class__ = type(cls.__name__, (cls,), {"forward": lambda m, x: cls.forward(m, x) + 1})
    return layer


def pruned():
    layer = nn.BatchNorm2d(4)
    layer.weight, layer.bias = (nn.Parameter(torch.ones(3)) for _ in range(2))
    layer.running_mean, layer.running_var = torch.zeros(3), torch.ones(3)
    return layer


LEFT = {
    "something else than another FrozenB": lambda: other(FrozenBatchNorm2d(4)),
    "something else than another BatchNormA": lambda: other(BatchNormAct2d(4, nn.ReLU())),
    "num_features is 4, but weight has 3": pruned,
    "a subclass, Subclass": lambda: Subclass(4),
    "tribn's already": lambda: tribn.BatchNorm2d(4),
    "its forward was replaced": with_forward,
    "eps is -1": lambda: nn.BatchNorm2d(4, eps=-1.0),
    "momentum is 2": lambda: nn.BatchNorm2d(4, momentum=2.0),
    "its activation is PReLU": lambda: BatchNormAct2d(4, nn.PReLU()),
    "its activation is ReLU": lambda: hooked(BatchNormAct2d(4, nn.ReLU()), "act"),
    "drops values by Identity": lambda: hooked(BatchNormAct2d(4, nn.ReLU()), "drop"),
    "drops values by Dropout": dropping,
    "without eps": without_eps,
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_is_left_as_it_is(why):
    mine = nn.Sequential(nn.ReLU(), LEFT[why]())
    before = type(mine[1]), dict(vars(mine[1]))
    converted, report = tribn.convert(mine, report=True)
    assert converted is mine
    (row,) = report.rows
    assert (row.name, row.what, row.into) == ("1", "left", "")
    assert why in row.why
    assert (type(mine[1]), dict(vars(mine[1]))) == before


@pytest.mark.parametrize(("theirs", "ours", "shape"), KINDS)
def test_a_model_that_is_one_layer(theirs, ours, shape):
    layer = randomize(theirs(3))
    expected = copy.deepcopy(layer)(torch.ones(shape))
    converted, report = tribn.convert(layer, report=True)
    assert converted is layer
    assert type(layer) is ours
    torch.testing.assert_close(layer(torch.ones(shape)), expected)
    assert str(report).splitlines()[1].split() == [
        "model",
        "replaced",
        "no",
        "call",
        *["of", "it", "was", "found"],
    ]


@pytest.mark.parametrize(("theirs", "ours", "shape"), KINDS)
def test_lazy_layers_stay_lazy(theirs, ours, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's that lazy modules are new
        lazy = getattr(nn, f"Lazy{theirs.__name__}")(eps=1e-2)
    model = tribn.convert(nn.Sequential(lazy, nn.ReLU()))
    assert type(model[0]) is getattr(tribn, f"Lazy{ours.__name__}")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = model(x)
    assert type(model[0]) is ours
    torch.testing.assert_close(y, F.relu(theirs(3, eps=1e-2)(x)))
    torch.testing.assert_close(model(x), y)
    assert type(tribn.revert(model)[0]) is theirs


def test_layers_with_settings_of_their_own_keep_them():
    layers = [tribn.BatchNorm2d(3, activation="tanh"), tribn.BatchNorm2d(3, order="act_norm")]
    mine = nn.Sequential(*layers, nn.ReLU()).eval()
    expected = mine(IMAGES)
    mine, report = tribn.convert(mine, report=True)
    assert [tuple(row) for row in report.rows] == [
        (name, "left", "", "tribn's already") for name in ("0", "1")
    ]
    assert torch.equal(mine(IMAGES), expected)


def test_without_fusing():
    mine = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    converted, report = tribn.convert(mine, fuse=False, report=True)
    assert type(converted) is nn.Sequential
    assert [tuple(row) for row in report.rows] == [("1", "replaced", "", "")]


def test_converting_again_sees_what_has_changed():
    mine = tribn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    cls = type(mine)
    mine, report = tribn.convert(mine, report=True)
    assert type(mine) is cls
    assert [tuple(row) for row in report.rows] == [("1", "fused", "relu", "")]
    mine[2] = nn.Tanh()
    mine, report = tribn.convert(mine, report=True)
    assert report.rows[0].into == "tanh"
    assert type(tribn.convert(mine, fuse=False)) is nn.Sequential


def test_frozen_layers_stay_frozen_and_take_checkpoints_of_both_kinds():
    mine = tribn.convert(nn.Sequential(FrozenBatchNorm2d(4), nn.ReLU())).train()
    assert mine[0].frozen
    assert list(mine.state_dict()) == ["0.weight", "0.bias", "0.running_mean", "0.running_var"]
    assert not list(mine.parameters())
    mine.load_state_dict(nn.Sequential(nn.BatchNorm2d(4)).state_dict())
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine(x), F.relu(x / (1 + 1e-3) ** 0.5))


def test_frozen_layers_with_an_activation():
    class FrozenBatchNormAct2d(FrozenBatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    mine = FrozenBatchNormAct2d()
    plain = copy.deepcopy(mine)
    mine, report = tribn.convert(mine, report=True)
    assert report.rows[0].into == "relu"
    assert isinstance(mine, tribn.BatchNorm2d)
    torch.testing.assert_close(
        mine.train()(IMAGES[:, :1].expand(-1, 4, -1, -1)), plain(IMAGES[:, :1])
    )
    assert type(tribn.revert(mine)) is FrozenBatchNormAct2d


# Back


def test_revert_gives_back_what_there_was():
    mine = model()
    classes = [type(m) for m in mine.modules()]
    attributes = [{*vars(m), *m._buffers} for m in mine.modules()]
    expected = train(copy.deepcopy(mine), (IMAGES,))
    tribn.convert(mine)
    assert [type(m) for m in mine.modules()] != classes
    assert tribn.revert(mine) is mine
    assert [type(m) for m in mine.modules()] == classes
    assert [{*vars(m), *m._buffers} for m in mine.modules()] == attributes
    actual = train(mine, (IMAGES,))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_revert_after_training_gives_equal_outputs():
    mine = tribn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double())
    train(mine, (IMAGES.double(),))
    expected = copy.deepcopy(mine)(IMAGES.double())
    reverted = tribn.revert(mine)
    assert [type(m) for m in reverted.modules()][::2] == [nn.Sequential, nn.BatchNorm2d]
    torch.testing.assert_close(reverted(IMAGES.double()), expected)


@pytest.mark.parametrize(("theirs", "ours", "shape"), KINDS)
def test_layers_made_as_tribns_become_torchs(theirs, ours, shape):
    layer = ours(3, memory="inplace", stats_dtype=torch.float64)
    tribn.revert(layer)
    assert type(layer) is theirs
    assert set(vars(layer)) == set(vars(theirs(3)))


class Own(tribn.BatchNorm2d):
    pass


IRREVERSIBLE = {
    "activation=relu": lambda: tribn.BatchNorm2d(3, activation="relu"),
    "order=act_norm": lambda: tribn.BatchNorm2d(3, order="act_norm"),
    "channel_axis=-1": lambda: tribn.BatchNorm2d(3, channel_axis=-1),
    "nonfinite=skip": lambda: tribn.BatchNorm2d(3, nonfinite="skip"),
    "correction=0": lambda: tribn.BatchNorm2d(3, correction=0),
    r"frozen=True.*tribn.unfreeze\(model\) first": lambda: tribn.freeze(tribn.BatchNorm2d(3)),
    "frozen=False": lambda: tribn.unfreeze(tribn.convert(FrozenBatchNorm2d(3))),
    "is a Own": lambda: Own(3),
}


@pytest.mark.parametrize("what", IRREVERSIBLE)
def test_layers_that_torch_does_not_have_are_said_and_nothing_is_changed(what):
    mine = tribn.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    mine.append(IRREVERSIBLE[what]())
    classes = [type(m) for m in mine.modules()]
    with pytest.raises(ValueError, match=f"layer 3 .*{what}"):
        tribn.revert(mine)
    assert [type(m) for m in mine.modules()] == classes


FUNCTIONS = ("convert", "revert", "freeze", "unfreeze", "convert_sync_batchnorm")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_modules_are_converted(function):
    with pytest.raises(TypeError, match="model is a list: it must be"):
        getattr(tribn, function)([nn.BatchNorm2d(3)])


@pytest.mark.parametrize(
    "make",
    [lambda g: tribn.SyncBatchNorm(3, process_group=g), lambda g: sync(nn.BatchNorm2d(3), g)],
)
def test_what_is_no_process_group_is_said(make):
    with pytest.raises(TypeError, match="process_group is 'all' of type str: give"):
        make("all")


def sync(layer, group):
    try:
        return tribn.convert_sync_batchnorm(layer, group)
    finally:
        assert type(layer) is nn.BatchNorm2d


def test_a_child_of_that_name_is_no_activation_of_torchs_layer():
    layer = nn.BatchNorm2d(3)
    layer.act = nn.Sigmoid()
    assert tribn.convert(layer).activation.name is None
