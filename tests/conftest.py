"""The devices every test runs on, and the settings of hypothesis."""

import hypothesis
import pytest
import torch
from cases import INTERPRET

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


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not GPU:
        pytest.skip("checks what only a GPU does, and there is none, or TRITON_INTERPRET=1 is set")
