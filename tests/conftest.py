"""The devices every test runs on, what is in memory before, and the settings of hypothesis."""

from functools import cache

import hypothesis
import pytest
import torch
from cases import INTERPRET

if INTERPRET:
    from triton.runtime import interpreter

    # A kernel, and each call of a device function, has the interpreter replace Triton's language
    # with its own, which takes longer than what is computed. Once is enough: nothing is compiled.
    interpreter._patch_lang = cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None

GPU = torch.cuda.is_available() and not INTERPRET
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if GPU else ["cpu"]

hypothesis.settings.register_profile(
    "tribn",
    max_examples=30 if INTERPRET else 120,
    deadline=None,
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("tribn")


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def poisoned():
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


GUARD, SENTINEL = 4096, 123


def assert_untouched_around(buffers):
    """The sentinels of what the fixture `guarded` gives are all there."""
    assert buffers
    for buffer in buffers:
        untouched = buffer.new_full((GUARD,), SENTINEL)
        assert torch.equal(buffer[:GUARD], untouched)
        assert torch.equal(buffer[-GUARD:], untouched)


@pytest.fixture
def guarded(monkeypatch):
    """Allocations of the launchers lie between sentinels, which must survive."""
    buffers = []

    def allocate(shape, stride, dtype, device):
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        buffer = torch.full((extent + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
        buffers.append(buffer)
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
    yield buffers
    assert_untouched_around(buffers)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not GPU:
        pytest.skip("checks what only a GPU does, and there is none, or TRITON_INTERPRET=1 is set")
