"""StandardScaler against scikit-learn's."""

import numpy as np
import pytest
import torch
from cases import F32, F64, assert_accurate, largest, ulp, wide
from sklearn.preprocessing import StandardScaler as Reference

from tribn import StandardScaler

SIZES = (5, 1, 40, 2, 17)


def batches(dtype=F64, constant=False, inner=()):
    """Batches of four features of very different means and scales."""
    g = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([[0.0, 1.0, -1e4, 1e-3], [1.0, 1e-3, 3.0, 1e-6]], dtype=F64)
    for size in SIZES:
        x = torch.randn(size, *inner, 4, generator=g, dtype=F64) * std + mean
        if constant:
            x[..., 1] = 0.1
            x[..., 2] = -1e4
            x[..., 3] = 0.0
        yield x.to(dtype).movedim(-1, 1)


def rows(batch):
    """A batch of any rank as scikit-learn wants it: (samples, features)."""
    return batch.movedim(1, -1).reshape(-1, batch.shape[1]).cpu().numpy()


def assert_equal_statistics(scaler, reference, seen):
    """Feature by feature, as accurate as scikit-learn's."""
    for feature, x in enumerate(np.concatenate(seen).astype(np.longdouble).T):
        var = x.var()
        # A mean of n terms is off by up to n roundings, since those of equal terms do not cancel.
        # Deviations from it, those of other batches' means included, are about a standard
        # deviation, and as much off.
        off = len(x) * ulp(largest(x), F64) / 2
        for name, exact, slack in (
            ("mean_", x.mean(), off),
            ("var_", var, off * (2 * np.sqrt(var) + off)),
            ("scale_", np.sqrt(var) if var else np.ones(()), off),
        ):
            actual = getattr(scaler, name)[feature].cpu()
            expected = torch.tensor(getattr(reference, name)[feature])
            assert_accurate(actual, expected, exact, f"{name} of feature {feature}", slack)
    assert scaler.n_samples_seen_ == reference.n_samples_seen_


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("inner", [(), (3, 2)])
def test_statistics_after_every_batch_are_scikit_learns(dtype, constant, inner, device):
    scaler, reference = StandardScaler(4, device=device), Reference()
    seen = []
    for batch in batches(dtype, constant, inner):
        seen.append(rows(batch))
        assert scaler.partial_fit(batch.to(device)) is scaler
        reference.partial_fit(seen[-1])
        assert_equal_statistics(scaler, reference, seen)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("inner", [(), (3, 2)])
def test_transform_and_its_inverse_are_scikit_learns(dtype, constant, inner, device):
    scaler, reference = StandardScaler(4, device=device), Reference()
    for x in batches(dtype, constant, inner):
        scaler.partial_fit(x.to(device))
        reference.partial_fit(rows(x))
    z = scaler(x.to(device))
    back = scaler.inverse(z)
    assert z.shape == back.shape == x.shape
    shape = (-1, *[1] * (x.dim() - 2))
    mean, scale = (wide(t).reshape(shape) for t in (scaler.mean_, scaler.scale_))

    def like(array):
        return torch.from_numpy(array).reshape(x.movedim(1, -1).shape).movedim(-1, 1)

    torch_z = like(reference.transform(rows(x)))
    assert_accurate(z.cpu(), torch_z, (wide(x) - mean) / scale, "forward")
    torch_back = like(reference.inverse_transform(rows(z)))
    assert_accurate(back.cpu(), torch_back, wide(z) * scale + mean, "inverse")


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (5, 4, 0)])
def test_empty_batches_change_nothing(shape, device):
    scaler = StandardScaler(4, device=device)
    before = {name: tensor.clone() for name, tensor in scaler.state_dict().items()}
    empty = torch.ones(shape, device=device)
    scaler.partial_fit(empty)
    assert all(torch.equal(v, before[k]) for k, v in scaler.state_dict().items())
    reference, seen = Reference(), []
    for batch in batches():
        seen.append(rows(batch))
        scaler.partial_fit(batch.to(device)).partial_fit(empty)
        reference.partial_fit(seen[-1])
    assert_equal_statistics(scaler, reference, seen)
    assert scaler(empty).shape == scaler.inverse(empty).shape == shape


def test_identity_before_the_first_batch(device):
    x = torch.randn(5, 4, device=device)
    scaler = StandardScaler(4, device=device)
    assert torch.equal(scaler(x), x)
    assert torch.equal(scaler.inverse(x), x)


def test_state_dict_round_trip(device):
    scaler, twin = StandardScaler(4, device=device), StandardScaler(4, device=device)
    first, second, *_ = (batch.to(device) for batch in batches())
    scaler.partial_fit(first)
    twin.load_state_dict(scaler.state_dict(), strict=True)
    for module in (scaler, twin):
        module.partial_fit(second)
    assert torch.equal(scaler(second), twin(second))
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in scaler.state_dict().items())


def test_statistics_are_float64_buffers_and_the_count_int64(device):
    state = (
        StandardScaler(4, device=device).partial_fit(torch.ones(3, 4, device=device)).state_dict()
    )
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    assert dtypes == {"mean_": F64, "var_": F64, "scale_": F64, "n_samples_seen_": torch.int64}


def test_input_is_differentiable_and_not_modified(device):
    scaler = StandardScaler(4, device=device)
    x, *_ = (batch.to(device) for batch in batches())
    before = x.clone()
    scaler.partial_fit(x.requires_grad_())
    dz = torch.randn_like(x)
    (dx,) = torch.autograd.grad(scaler(x), x, dz)
    assert torch.equal(x, before)
    torch.testing.assert_close(dx, dz / scaler.scale_)
    assert not any(buffer.requires_grad for buffer in scaler.buffers())


@pytest.mark.parametrize(
    ("method", "name"), [("partial_fit", "batch"), ("forward", "x"), ("inverse", "z")]
)
@pytest.mark.parametrize("shape", [(5, 3), (0, 3), (4,), (5, 1), ()])
def test_bad_shapes_raise_and_change_nothing(method, name, shape, device):
    scaler = StandardScaler(4, device=device)
    before = {name: tensor.clone() for name, tensor in scaler.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        getattr(scaler, method)(torch.ones(shape, device=device))
    assert all(torch.equal(v, before[k]) for k, v in scaler.state_dict().items())


def test_integers_become_floating(device):
    x = torch.tensor([[0, 5], [2, 5]], device=device)
    z = StandardScaler(2, device=device).partial_fit(x)(x)
    assert torch.equal(z.cpu(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
