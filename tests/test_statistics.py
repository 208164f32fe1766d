"""Running statistics of a whole data set."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tribn


def batches(sizes=(5, 2, 9), shape=(3, 4, 4)):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, *shape, generator=g) * (i + 1) + i for i, n in enumerate(sizes)]


def expected(values, correction=1):
    values = torch.cat([v.double() for v in values])
    axes = [0, *range(2, values.dim())]
    return values.mean(axes), values.var(axes, correction=correction)


def assert_statistics(layer, values, correction=1):
    mean, var = expected(values, correction)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("pairs", [False, True])
def test_every_value_counts_the_same(correction, pairs):
    data = batches()
    model = nn.Sequential(tribn.BatchNorm2d(3, correction=correction), nn.Dropout()).eval()
    model[1].train()
    tribn.update_stats(model, [(x, None) for x in data] if pairs else data)
    assert_statistics(model[0], data, correction)
    assert model[0].num_batches_tracked == 3
    assert [m.training for m in model] == [False, True]
    assert not model[0]._forward_hooks


def test_a_layer_used_twice_sees_both_inputs():
    layer = tribn.BatchNorm2d(3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = layer

        def forward(self, x):
            self.bn(x)
            return self.bn(input=2 * x + 1)

    data = batches()
    tribn.update_stats(Twice(), data)
    assert_statistics(layer, [*data, *(2 * x + 1 for x in data)])
    assert layer.num_batches_tracked == 6


def test_masks_and_the_order_are_respected():
    layer = tribn.BatchNorm1d(3, activation="sigmoid", order="act_norm")

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = layer

        def forward(self, x):
            return self.bn(x, lengths=torch.full((len(x),), 2))

    data = batches(shape=(3, 5))
    tribn.update_stats(Masked(), data)
    assert_statistics(layer, [x[:, :, :2].sigmoid() for x in data])


def test_deeper_layers_see_what_training_gives_them():
    model = nn.Sequential(tribn.BatchNorm2d(3), tribn.BatchNorm2d(3))
    data = batches()
    tribn.update_stats(model, data)
    normalized = [nn.functional.batch_norm(x, None, None, training=True) for x in data]
    assert_statistics(model[1], normalized)


def test_what_is_frozen_unused_or_without_statistics_stays():
    model = nn.Sequential(
        tribn.freeze(tribn.BatchNorm2d(3)), tribn.BatchNorm2d(3, track_running_stats=False)
    )
    model.unused = tribn.BatchNorm2d(3)
    model.unused.num_batches_tracked.fill_(7)
    model.forward = lambda x: model[1](model[0](x))
    before = copy.deepcopy(model.state_dict())
    tribn.update_stats(model, batches())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("data", [[], [*batches(), torch.randn(2, 5, 4, 4)]])
def test_a_failure_leaves_everything_as_it_was(data):
    model = nn.Sequential(tribn.BatchNorm2d(3)).eval()
    model(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"loader is empty|5 channels"):
        tribn.update_stats(model, data)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not model[0].training
    assert not model[0]._forward_hooks


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_models_are_seen():
    model = nn.Sequential(tribn.BatchNorm2d(3))
    compiled = torch.compile(model, backend="eager")
    data = batches()
    compiled(data[0])
    tribn.update_stats(compiled, data)
    assert_statistics(model[0], data)


def test_batches_that_are_not_finite_are_left_out():
    layer = tribn.BatchNorm2d(3, nonfinite="skip")
    data = batches()
    bad = torch.randn(4, 3, 4, 4)
    bad[0, 1] = torch.nan
    tribn.update_stats(layer, [*data, bad])
    good = [*data, bad]
    mean, var = expected(good)
    few_mean, few_var = expected(data)
    mean[1], var[1] = few_mean[1], few_var[1]
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_spoil_the_variance():
    layer = tribn.BatchNorm2d(3)
    data = [x + 1e4 for x in batches()]
    tribn.update_stats(layer, data)
    assert_statistics(layer, data)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "model is a ReLU without a tribn layer .*: put one in"),
        (nn.BatchNorm2d(3), "model is a BatchNorm2d without a tribn layer .*: put one in"),
        (tribn.freeze(tribn.BatchNorm2d(3)), "model is .*, or unfreeze the model"),
        (tribn.LazyBatchNorm2d(), "layer itself is lazy: call the model once"),
        (nn.Sequential(tribn.BatchNorm2d(3), nn.LazyBatchNorm2d()), "layer 1 is lazy"),
    ],
)
def test_nothing_to_set_is_an_error(model, message):
    with pytest.raises(ValueError, match=message):
        tribn.update_stats(model, batches())


def test_torchs_layers_are_restored_after_a_failure():
    model = nn.Sequential(nn.BatchNorm2d(3), tribn.BatchNorm2d(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"5 channels|expected"):
        tribn.update_stats(model, [*batches(), torch.randn(2, 5, 4)])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Stream(torch.utils.data.IterableDataset):
    """Has no length, and so has no loader of it."""

    def __iter__(self):
        return iter(batches())


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    model = nn.Sequential(tribn.BatchNorm2d(3))
    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)

    def shown(loader, **options):
        tribn.update_stats(model, loader, **options)
        return capsys.readouterr().err

    assert not shown(batches())
    assert not shown(stream)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert not shown(batches(), progress=False)
    bars = [f"\rupdate_stats [{'#' * 10 * n:<30}] {n}/3 batches" for n in range(4)]
    assert shown(batches()) == "".join(bars) + "\n"
    assert shown(stream) == "".join(f"\rupdate_stats {n} batches" for n in range(4)) + "\n"
    with pytest.raises(ValueError, match="5 channels"):
        tribn.update_stats(model, [torch.randn(2, 5, 4, 4)])
    assert capsys.readouterr().err.endswith("0/1 batches\n")


# accumulate_stats


def parts():
    torch.manual_seed(0)
    return torch.randn(9, 3, 5, dtype=torch.float64).split((4, 1, 0, 4))


ACCUMULATED = {
    "plain": {},
    "average": {"momentum": None},
    "activation first": {"activation": "relu", "order": "act_norm"},
    "biased": {"correction": 0},
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulated_is_one_batch(name):
    """Of parts that differ in size, one of them empty."""
    layer, whole = (tribn.BatchNorm1d(3, **ACCUMULATED[name]).double() for _ in range(2))
    for _ in range(2):
        with tribn.accumulate_stats(layer):
            for part in parts():
                layer(part)
            assert layer.num_batches_tracked == whole.num_batches_tracked
        whole(torch.cat(parts()))
        for buffer, expected in zip(layer.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected)


def test_accumulated_respects_masks_and_counts_infinity_out():
    layer = tribn.BatchNorm1d(3, nonfinite="skip").double()
    whole = tribn.BatchNorm1d(3, nonfinite="skip").double()
    x, lengths = torch.cat(parts()).clone(), torch.arange(9) % 6
    x[5, 1, 0] = torch.inf
    mask = torch.arange(5) < lengths[:, None]
    with tribn.accumulate_stats(layer):
        layer(x[:4], mask=mask[:4])
        layer(input=x[4:], lengths=lengths[4:])
    whole(x, lengths=lengths)
    for buffer, expected in zip(layer.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    assert layer.running_var.isfinite().all()


def test_nothing_moves_when_accumulating_fails_and_afterwards_all_is_as_before():
    layer = tribn.BatchNorm1d(3)
    before = [b.clone() for b in layer.buffers()]

    def fail():
        with tribn.accumulate_stats(layer):
            layer(torch.randn(4, 3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(map(torch.equal, before, layer.buffers()))
    assert not layer._forward_hooks
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1


def test_vmap_is_not_accumulated():
    layer = tribn.BatchNorm1d(3)
    met = pytest.raises(TypeError, match=r"met torch\.func\.vmap.*: leave it out")
    with met, tribn.accumulate_stats(layer):
        torch.func.vmap(layer)(torch.randn(2, 4, 3))
    assert layer.track_running_stats
    assert layer.num_batches_tracked == 0


def test_only_what_is_in_training_and_used_is_accumulated():
    layers = {
        "used": tribn.BatchNorm1d(3),
        "unused": tribn.BatchNorm1d(3),
        "evaluated": tribn.BatchNorm1d(3).eval(),
        "frozen": tribn.freeze(tribn.BatchNorm1d(3)),
        "without": tribn.BatchNorm1d(3, track_running_stats=False),
    }
    with tribn.accumulate_stats(torch.nn.ModuleDict(layers)):
        for name, layer in layers.items():
            if name != "unused":
                layer(torch.randn(4, 3))
    counts = [layer.num_batches_tracked for layer in layers.values()]
    assert counts == [1, 0, 0, 0, None]
    assert not layers["without"].track_running_stats


def test_checkpointed_layers_are_accumulated_once():
    layer, whole = tribn.BatchNorm1d(3), tribn.BatchNorm1d(3)
    x = torch.randn(6, 3, requires_grad=True)
    with tribn.accumulate_stats(layer):
        for part in x.split(3):
            checkpoint(layer, part, use_reentrant=False).sum().backward()
    whole(x)
    torch.testing.assert_close(layer.running_var, whole.running_var)


class Given(nn.Module):
    """A layer that normalizes what the activation of the call gives it."""

    def __init__(self):
        super().__init__()
        self.bn = tribn.BatchNorm2d(3, order="act_norm")

    def forward(self, x):
        return self.bn(x, activation="relu")


def test_the_activation_of_a_call_is_respected():
    data = batches()
    model, once = Given(), Given()
    tribn.update_stats(model, data)
    assert_statistics(model.bn, [x.relu() for x in data])
    model = Given()
    with tribn.accumulate_stats(model):
        for x in data:
            model(x)
    once(torch.cat(data))
    torch.testing.assert_close(model.state_dict(), once.state_dict())


def test_calls_of_several_dtypes_are_accumulated():
    x = batches()[0]
    layer, once = tribn.BatchNorm2d(3), tribn.BatchNorm2d(3)
    with tribn.accumulate_stats(layer):
        layer(x)
        layer(x.bfloat16())
    once(torch.cat((x, x.bfloat16())))
    torch.testing.assert_close(layer.state_dict(), once.state_dict())


def test_a_layer_frozen_meanwhile_stays():
    x = batches()[0]
    for before in (False, True):
        layer = tribn.BatchNorm2d(3)
        with tribn.accumulate_stats(layer):
            if before:
                layer(x)
            tribn.freeze(layer)
            layer(x)
        assert layer.num_batches_tracked == 0
        assert not layer.running_mean.any()


def test_what_is_no_module_is_said():
    message = r"model is a int: it must be a torch\.nn\.Module"
    with pytest.raises(TypeError, match=message):
        tribn.update_stats(3, [])
    with pytest.raises(TypeError, match=message), tribn.accumulate_stats(3):
        pass
