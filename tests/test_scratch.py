"""Memory in which programs meet: whose it is, and what runs at the same time on a GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from cases import BF16, F64, Case, Inputs, assert_matches_torch

pytest.importorskip("triton")

import tribn
from tribn.functional import batch_norm
from tribn.kernels import host, scratch
from tribn.kernels.scratch import PAGE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No memory yet, and no launchers."""
    monkeypatch.setattr(host, "_launchers", {})
    for name in ("_left", "_of_streams"):
        monkeypatch.setattr(scratch, name, {})
    monkeypatch.setattr(scratch, "_captured", [])
    monkeypatch.setattr(scratch, "_short", set())


@pytest.fixture
def cuda(monkeypatch):
    """CUDA streams and graphs, which a test chooses, over memory of the CPU."""

    def allocate(function):
        return lambda *args, device, **kwargs: function(*args, **kwargs)

    def synchronize():
        assert not state.capturing, "is not allowed"
        state.synchronized += 1

    state = SimpleNamespace(
        device=torch.device("cuda", 0), stream=lambda: 1, capturing=False, synchronized=0
    )
    stream = SimpleNamespace(synchronize=synchronize)
    fake = SimpleNamespace(
        empty=allocate(torch.empty),
        zeros=allocate(torch.zeros),
        float64=F64,
        int32=torch.int32,
        cuda=SimpleNamespace(
            is_current_stream_capturing=lambda: state.capturing, current_stream=lambda _: stream
        ),
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda _: state.stream()),
    )
    monkeypatch.setattr(scratch, "torch", fake)
    return state


def assert_apart(tensors):
    """No two of them share a byte."""
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


def assert_zeros(counters, at_least):
    assert counters.dtype == torch.int32
    assert len(counters) >= at_least
    assert not counters.any()


def counters_of(device, count):
    return scratch.scratch(device, 0, count)[1]


def test_launches_on_one_stream_share_counters():
    """Which are as the last launch left them; results are each launch's own."""
    results, counters = scratch.scratch(CPU, 10, 3)
    assert (results.dtype, len(results)) == (F64, 10)
    assert_zeros(counters, 3)
    counters[1] = -(2**31)
    for doubles, count in ((10, 3), (0, 1), (4, 2)):
        again = scratch.scratch(CPU, doubles, count)
        assert (again[0] is None) == (doubles == 0)
        assert again[1] is counters
    assert counters.tolist() == [0, -(2**31), 0]


def test_they_grow():
    """To others: what is in the old ones may be of a launch that runs yet."""
    first = counters_of(CPU, 3)
    first.fill_(5)
    counters = counters_of(CPU, 4)
    assert_zeros(counters, 4)
    assert_apart([first, counters])
    assert counters_of(CPU, 4) is counters


@pytest.mark.parametrize("count", [1, 1000, PAGE // 3, PAGE // 2, PAGE, PAGE + 1])
def test_no_counter_is_handed_out_twice(count, cuda):
    """Not when a page is used up either, and they have all been zero."""
    taken = []
    for stream in range(20):
        cuda.stream = lambda stream=stream: stream
        counters = counters_of(cuda.device, count)
        assert_zeros(counters, count)
        counters.fill_(1)
        taken.append(counters)
    assert_apart(taken)


def test_streams_have_counters_of_their_own(cuda):
    of_stream = {}
    for stream in (1, 2, 3, 2, 1):
        cuda.stream = lambda stream=stream: stream
        counters = counters_of(cuda.device, 3)
        assert of_stream.setdefault(stream, counters) is counters
    assert_apart(of_stream.values())
    assert cuda.synchronized == 1, "zeros are there for all streams, before another takes them"


def test_zeros_are_made_by_another_thread(cuda, monkeypatch):
    """Compiled graphs keep what this thread allocates while they warm up, and use it again."""
    makers, zeros = [], scratch.torch.zeros

    def made(*args, **kwargs):
        makers.append(threading.get_ident())
        return zeros(*args, **kwargs)

    monkeypatch.setattr(scratch.torch, "zeros", made)
    counters_of(cuda.device, 3)
    assert len(makers) == 1
    assert makers[0] != threading.get_ident()


def test_threads_take_counters_one_after_another(cuda, monkeypatch):
    """Even if both would at the same time."""

    def split(tensor, sizes):
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return real(tensor, sizes)

    both, real = threading.Barrier(2), torch.Tensor.split
    cuda.stream = threading.get_ident
    scratch.scratch(cuda.device, 10, 3)
    monkeypatch.setattr(torch.Tensor, "split", split)
    with ThreadPoolExecutor(2) as threads:
        taken = list(threads.map(lambda _: scratch.scratch(cuda.device, 10, 3)[1], range(2)))
    assert_apart(taken)


def test_what_is_captured_has_memory_of_its_own(cuda):
    """Of graphs any number may run at a time, and beside them what their stream runs."""
    eager = counters_of(cuda.device, 3)
    cuda.capturing = True
    captured = [scratch.scratch(cuda.device, 10, 3) for _ in range(5)]
    cuda.capturing = False
    for results, counters in captured:
        assert len(results) == 10
        assert_zeros(counters, 3)
    assert counters_of(cuda.device, 3) is eager
    assert_apart([eager, *(tensor for memory in captured for tensor in memory)])


def test_captured_counters_stay_with_the_graph(cuda):
    """Which no one asks whether it is still there; nothing else gets them."""
    scratch.scratch(cuda.device, 10, 3)
    cuda.capturing = True
    addresses = [scratch.scratch(cuda.device, 10, 3)[1].data_ptr() for _ in range(5)]
    assert [counters.data_ptr() for counters in scratch._captured] == addresses


@pytest.mark.parametrize("warm", [True, False])
def test_a_capture_waits_for_nothing(cuda, warm):
    """Where there are too few counters left, the graph sets its own to zero."""
    if warm:
        scratch.scratch(cuda.device, 10, 3)
    cuda.capturing = True
    pages = scratch._left.copy()
    taken = [scratch.scratch(cuda.device, 10, PAGE // 5 + 1)[1] for _ in range(7)]
    for counters in taken:
        assert_zeros(counters, PAGE // 5 + 1)
    assert_apart(taken)
    assert len(scratch._captured) == (4 if warm else 0)
    assert scratch._left.keys() == pages.keys()
    cuda.capturing = False
    eager = counters_of(cuda.device, 3)
    cuda.capturing = True
    scratch.scratch(cuda.device, 10, PAGE // 3)
    assert len(scratch._captured) == (5 if warm else 1), "the next call has made new ones"
    cuda.capturing = False
    assert counters_of(cuda.device, 3) is eager


# Worker processes, of a parent that has used tribn


def normalized(index, device):
    x = torch.arange(24.0, device=device).view(4, 3, 2)
    return batch_norm(x * (index + 1), None, None, training=True, activation="relu").cpu()


class Normalized(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return normalized(index, "cpu")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_takes_tensors_of_the_cpu(method, device):
    expected = torch.stack([normalized(index, device) for index in range(2)])
    loader = torch.utils.data.DataLoader(
        Normalized(), batch_size=2, num_workers=1, multiprocessing_context=method, timeout=60
    )
    (batch,) = loader
    torch.testing.assert_close(batch, expected)


# What runs at the same time on a GPU

WAIT = [(20, 6, 4096), (256, 10, 56, 56), (4096, 256)]  # few slabs: groups of many programs
SHAPES = [*WAIT, (8, 512, 7, 7)]


class Step:
    """Forward and backward of a layer on static tensors."""

    def __init__(self, shape, seed=0, device="cuda", **options):
        torch.manual_seed(seed)
        of_dim = {2: tribn.BatchNorm1d, 3: tribn.BatchNorm1d, 4: tribn.BatchNorm2d}
        self.layer = of_dim[len(shape)](shape[1], activation="relu", device=device, **options)
        x, residual, dy = torch.randn(3, *shape, device=device, dtype=BF16) + 3
        self.x, self.residual, self.dy = x.requires_grad_(), residual.requires_grad_(), dy
        self.leaves = (self.x, self.residual, *self.layer.parameters())

    def __call__(self):
        y = self.layer(self.x, residual=self.residual)
        return y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)

    def first(self, run):
        """What `run` makes of a layer that has not been trained, beside it."""
        self.layer.reset_running_stats()
        return self.next(run)

    def next(self, run):
        return [t.clone() for t in (*run(), *self.layer.buffers())]

    def captured(self):
        """The step as a graph to be replayed."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self()

        def replay():
            graph.replay()
            return outputs

        return replay


def assert_same(results, expected):
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def plans():
    return [kept.plan for launcher in host._launchers.values() for kept in launcher.kept.values()]


@pytest.fixture
def margin():
    yield tribn.set_sm_margin
    tribn.set_sm_margin(0)


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replays_are_steps(shape, momentum):
    """On what is in the input by then, and each moves the running statistics."""
    step = Step(shape, momentum=momentum)
    results = []
    for run in (step, step.captured()):
        step.layer.reset_running_stats()
        for batch in range(4):
            with torch.no_grad():
                step.x.copy_(step.dy.roll(batch, 0) * (batch + 1))
            results.append(step.next(run))
        assert step.layer.num_batches_tracked == 4
    for eager, replayed in zip(results[:4], results[4:], strict=True):
        assert_same(replayed, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("shapes", [WAIT[:2], WAIT[1:], WAIT[1:2] * 2], ids=str)
def test_two_streams_at_once(shapes, captured):
    """Also of graphs that were captured on one stream."""
    steps = [Step(shape, seed) for seed, shape in enumerate(shapes)]
    expected = [step.first(step) for step in steps]
    assert all(plan.waits for plan in plans())
    runs = [step.captured() if captured else step for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for step, run, stream in zip(steps, runs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(step.first(run))
    torch.cuda.synchronize()
    for found, once in zip(results, expected * 20, strict=True):
        assert_same(found, once)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_launches_in_a_row(shape):
    """Without a pause: each finds the counters as the last one left them."""
    step = Step(shape)
    expected = step.first(step)
    for _ in range(500):
        step()
    assert_same(step.first(step), expected)


@pytest.mark.gpu
def test_a_busy_gpu():
    """Programs that wait have their places together, whatever else runs."""
    step, busy = Step(WAIT[1]), torch.cuda.Stream()
    expected = step.first(step)
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        for _ in range(50):
            matrix = (matrix @ matrix).clamp(-1, 1)
    for _ in range(20):
        assert_same(step.first(step), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("left", [1, 14])
@pytest.mark.parametrize("case", [Case((20, 6, 4096)), Case((8, 64, 56, 56), BF16)], ids=str)
def test_fewer_multiprocessors(case, left, margin):
    margin(torch.cuda.get_device_properties(0).multi_processor_count - left)
    assert_matches_torch(Inputs.of(case, "cuda"), training=True)
    assert all(plan.grid[0] <= 4 * left for plan in plans() if plan.tier)


def test_a_margin_of_multiprocessors(margin, monkeypatch):
    """There is one left at least."""
    facts = host.Device(16, l2=2**20, registers=2**18, shared=2**16, threads=2048)
    monkeypatch.setattr(host, "device_facts", lambda _: facts)
    x = torch.empty(64, 10, 56, 56, device="meta")
    for sms, left in ((0, 16), (10, 6), (15, 1), (16, 1), (132, 1)):
        margin(sms)
        launcher, *_ = host.prepare(1, x, x.dtype, (x,), None, reads=1)
        assert all(
            plan.grid[0] <= programs * left
            for programs, plan in zip((4, 3, 2, 3, 2, 1), launcher.plans, strict=True)
        )
        assert launcher.facts.sms == left


def test_plans_over_neighbouring_channels(monkeypatch):
    """One program to a multiprocessor comes before smaller tiles."""
    facts = host.Device(132, l2=50 * 2**20, registers=2**18, shared=2**18, threads=2048)
    monkeypatch.setattr(host, "device_facts", lambda _: facts)
    like = torch.empty(128, 256, 56, 56, dtype=torch.bfloat16, device="meta")
    x = like.to(memory_format=torch.channels_last)
    launcher, *_ = host.prepare(1, x, x.dtype, (x,), None, reads=1)
    tiles = [plan.block_c * plan.block_s for plan in launcher.plans]
    assert tiles == [8192] * 4 + [4096] * 3
    assert launcher.plans[3].grid[0] <= 132
    launcher, *_ = host.prepare(1, like, x.dtype, (like,), None, reads=1)
    assert [plan.block_n * plan.block_s for plan in launcher.plans] == [8192] * 3 + [4096] * 3
    # Narrow accesses: no program alone, and a quarter of the elements.
    x = like[:, :129].contiguous(memory_format=torch.channels_last)
    launcher, *_ = host.prepare(1, x, x.dtype, (x,), None, reads=1)
    tiles = [plan.block_c * plan.block_s for plan in launcher.plans]
    assert tiles == [2048] * 3 + [1024] * 3


@pytest.mark.parametrize(
    ("reads", "bits", "plane"), [(None, False, 196), (None, True, 1), (0, False, 1), (1, False, 1)]
)
def test_planes_of_14_are_side_by_side_where_nothing_is_summed(reads, bits, plane):
    x = torch.empty(8, 4, 14, 14, dtype=torch.bfloat16, device="meta")
    launcher, *_ = host.prepare(1, x, x.dtype, (x,), None, reads=reads, bits=bits)
    assert launcher.layout.plane == plane


@pytest.mark.parametrize("batch", [32, 33])
@pytest.mark.parametrize(
    ("reads", "bits", "alone"),
    [(1, False, 32), (2, True, 32), (0, False, 32), (None, True, 32), (None, False, 0)],
)
def test_planes_of_few_elements_are_one_by_one_where_they_are_summed(batch, reads, bits, alone):
    """Then one program has all of some channels, and waits for none; bits lie as these see them."""
    x = torch.empty(batch, 8, 7, 7, dtype=torch.bfloat16, device="meta")
    launcher, *_ = host.prepare(1, x, x.dtype, (x,), None, reads=reads, bits=bits)
    assert launcher.layout.plane == (1 if batch <= alone else 49)


@pytest.mark.parametrize(
    ("message", "waits", "error"),
    [
        ("Triton Error [CUDA]: too many blocks in cooperative launch", True, host.Refused),
        ("Triton Error [CUDA]: operation not supported", True, host.Refused),
        ("Triton Error [CUDA]: operation not supported", False, RuntimeError),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True, RuntimeError),
    ],
)
def test_what_counts_as_refused(message, waits, error, monkeypatch):
    def launch(*args):
        raise RuntimeError(message)

    monkeypatch.setattr(host, "INTERPRETED", False)
    monkeypatch.setattr(host, "driver", Mock())
    kernel = SimpleNamespace(run=launch, function=None, packed_metadata=None)
    plan = SimpleNamespace(grid=(7, 1, 1), waits=waits)
    kept = SimpleNamespace(kernel=kernel, plan=plan, constants=())
    with pytest.raises(RuntimeError) as raised:
        host.start(kept, (), (), ())
    assert type(raised.value) is error
