"""Freezing and unfreezing the batch norm layers of a model."""

import copy
import pickle

import pytest
import torch
from torch import nn

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
    group, seen = object(), []
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
