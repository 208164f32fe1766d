"""What `tribn.explain` prints, and that it changes nothing."""

import pytest
import torch
from cases import INTERPRET

import tribn
from tribn import launch


@pytest.fixture
def kernels(device):
    """Whether kernels run."""
    return INTERPRET or device == "cuda"


@pytest.fixture
def explained(capsys):
    def run(*args, **options):
        tribn.explain(*args, **options)
        assert launch.launches is None
        return capsys.readouterr().out

    return run


def test_module(explained, device, kernels):
    module = tribn.BatchNorm2d(5, activation="relu").to(device)
    x = torch.randn(8, 5, 10, 10, device=device, requires_grad=True)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    text = explained(module, x)
    assert text.startswith("BatchNorm2d(5, ")
    assert "(8, 5, 10, 10), strides (500, 100, 10, 1), torch.float32" in text
    assert "kept for backward: 16." in text  # KB: the input, and a little
    assert ("forward: 1 launch" in text) == ("backward: 1 launch" in text) == kernels
    assert ("PyTorch's operators" in text) != kernels
    if kernels:
        assert text.count("times the least possible") == 2
        assert "32 KB moved, 1 times" in text
        assert "48 KB moved, 1 times" in text
    after = module.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert x.grad is None
    assert module.weight.grad is None


def test_function(explained, device, kernels):
    x = torch.randn(4, 3, 5, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    text = explained(x, mean, var, activation="silu")
    assert text.startswith("batch_norm of (4, 3, 5)")
    assert not mean.any()
    evaluation = explained(x, mean, var, training=False)
    assert ("normalize: " in evaluation) == kernels
    with torch.no_grad():
        assert "backward" not in explained(x)


def test_two_launches_read_the_input_twice(explained, device, kernels, monkeypatch):
    if not kernels:
        pytest.skip("kernels run in the interpreter or on a GPU")
    from tribn.kernels import host

    monkeypatch.setattr(host, "_refused", {torch.empty(0, device=device).device})
    monkeypatch.setattr(host, "_launchers", {})
    text = explained(torch.randn(4, 3, 500, device=device))
    assert "forward: 2 launches: the device does not run programs at the same time" in text
    assert "1.5 times the least possible" in text
    assert "1.67 times the least possible" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([[1.0]], "call is a list: it must be a module or a tensor"),
        ([tribn.BatchNorm1d(3)], "input is missing: it follows the module"),
        ([torch.nn.LSTM(3, 3), torch.randn(2, 3)], "call gives a tuple: it must give a tensor"),
    ],
)
def test_what_cannot_be_explained(args, message):
    with pytest.raises(TypeError, match=message):
        tribn.explain(*args)
    assert launch.launches is None


def test_launches_are_not_recorded_after_an_error(device):
    with pytest.raises(ValueError, match="eps"):
        tribn.explain(torch.randn(4, 3, device=device), eps=-1.0)
    assert launch.launches is None


@pytest.mark.parametrize(
    ("sms", "error", "text"),
    [(-1, ValueError, "sms is -1: it must not be negative"), (1.0, TypeError, "must be an int")],
)
def test_margin_is_checked(sms, error, text):
    with pytest.raises(error, match=text):
        tribn.set_sm_margin(sms)
    assert launch.sm_margin == 0


def test_margin_leaves_multiprocessors(device, kernels):
    if not kernels:
        pytest.skip("plans are made for kernels, which run in the interpreter or on a GPU")
    from tribn.kernels import host

    x = torch.randn(4, 3, 5, device=device)
    of = [host.prepare(1, x, x.dtype, (x,), None, 1)[0].facts.sms]
    for margin in (1, 10**6):
        tribn.set_sm_margin(margin)
        try:
            of.append(host.prepare(1, x, x.dtype, (x,), None, 1)[0].facts.sms)
        finally:
            tribn.set_sm_margin(0)
    assert of == [of[0], of[0] - 1, 1]
