"""Training steps as CUDA graphs: what a step launches is launched again, on the same memory.

Without a GPU a stand-in for a graph does so in Triton's interpreter.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from cases import BF16, F64, INTERPRET
from conftest import GPU
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tribn
from tribn import distributed, ops

if not (GPU or INTERPRET):
    pytest.skip("nothing is launched: run it with TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor

DEVICE = "cuda" if GPU else "cpu"
BATCHES = 4


class Recorded(TorchDispatchMode):
    """Notes launches and PyTorch's operators, to run them when asked.

    Meanwhile, as in a capture, no launch runs and nothing is written to what was there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tribn":
            with self:
                return ops.run(function, {}, args)
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            self.calls.append(partial(function, *args, **kwargs))
            return args[0]
        results = function(*args, **kwargs)
        if isinstance(results, torch.Tensor | tuple | list):
            self.calls.append(partial(again, function, args, kwargs, results))
        else:
            tensors = any(isinstance(t, torch.Tensor) for t in tree_leaves(args))
            assert not tensors, f"the host waits for {function}"
        return results

    @property
    def launch(self):
        """In place of GridExecutor.__call__."""
        return lambda *args, **kwargs: self.calls.append(partial(GRID, *args, **kwargs))

    @torch.no_grad()
    def replay(self):
        for call in self.calls:
            call()


GRID = GridExecutor.__call__


def again(function, args, kwargs, results):
    """Computes results anew, where they are; views follow what they are of."""
    for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
        if old is not None and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def captured(step):
    """What a step gives, and a function that replays it."""
    if GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return step(), graph.replay
    recorded = Recorded()
    with mock.patch.object(GridExecutor, "__call__", recorded.launch), recorded:
        return step(), recorded.replay


class Training:
    """Of a model by gradient descent, on a batch that stays where it is."""

    def __init__(self, model, shape, dtype=torch.float32, **given):
        self.model = model.to(DEVICE)
        self.given = {name: t.to(DEVICE) for name, t in given.items()}
        self.x = torch.zeros(shape, dtype=dtype, device=DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)

    def step(self):
        self.optimizer.zero_grad()
        x = self.x.detach().requires_grad_()
        y = self.model(x, **self.given)
        loss = y.to(F64).cos().sum()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), y.detach(), x.grad

    def on(self, batch, run):
        """Copies of what a batch gives, and of the state afterwards."""
        torch.manual_seed(batch)
        self.x.copy_(torch.randn(self.x.shape) * (1 + batch) + batch)
        return [t.clone() for t in (*run(), *self.model.state_dict().values())]


def network():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
            self.norm1 = tribn.BatchNorm2d(6, activation="relu")
            self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
            self.norm2 = tribn.BatchNorm2d(6, activation="silu", momentum=None)

        def forward(self, x):
            y = self.norm1(self.first(x))
            return self.norm2(self.second(y), residual=y).mean((2, 3))

    return Training(Network(), (4, 3, 6, 6))


def layer(cls, shape, dtype=torch.float32, given=None, **options):
    return Training(cls(shape[1], **options), shape, dtype, **(given or {}))


MASK = {"mask": torch.arange(5 * 6).view(5, 6) % 3 > 0}

STEPS = {
    "network": network,
    "rows": partial(layer, tribn.BatchNorm1d, (40, 7), activation="gelu"),
    "images": partial(layer, tribn.BatchNorm2d, (4, 6, 5, 5), BF16, activation="relu"),
    "activation first": partial(layer, tribn.BatchNorm1d, (5, 4, 6), activation="tanh",
                                order="act_norm"),
    "average": partial(layer, tribn.BatchNorm1d, (5, 4, 6), momentum=None),
    "mask": partial(layer, tribn.BatchNorm1d, (5, 4, 6), given=MASK, nonfinite="skip"),
    "nothing counts": partial(layer, tribn.BatchNorm1d, (5, 4, 6),
                              given={"mask": torch.zeros(5, 6, dtype=torch.bool)}),
    "synchronized": partial(layer, tribn.SyncBatchNorm, (5, 4, 6), activation="relu"),
    "synchronized average": partial(layer, tribn.SyncBatchNorm, (5, 4, 6), momentum=None,
                                    given=MASK),
}  # fmt: skip


@pytest.fixture
def ranks(monkeypatch):
    """Three, which have the same batch."""

    def gather(row, ranks, kind):
        return row.expand(ranks.size, -1).clone()

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed.Ranks, "of", lambda group: distributed.Ranks(group, 3))
    monkeypatch.setattr(tribn.SyncBatchNorm, "_group", lambda layer: "all")


@pytest.mark.parametrize("name", STEPS)
def test_replays_are_steps(name, ranks, poisoned):
    """By all bits, on what is in the batch by then; and each moves the statistics."""
    results = []
    for graph in (False, True):
        torch.manual_seed(0)
        training = STEPS[name]()
        run = training.step
        first = training.on(0, run)
        if graph:
            outputs, replay = captured(training.step)

            def run(outputs=outputs, replay=replay):
                replay()
                return outputs

        results.append([first, *(training.on(batch, run) for batch in range(1, BATCHES))])
    for steps in zip(*results, strict=True):
        for found, expected in zip(*steps, strict=True):
            assert expected.isfinite().all()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    counters = [t for t in results[1][-1] if t.dtype == torch.int64]
    assert all(counter == (0 if name == "nothing counts" else BATCHES) for counter in counters)
    assert counters
