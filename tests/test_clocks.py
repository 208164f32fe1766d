"""The clocks: on a stand-in for CUDA, which counts what would run, and on the CPU."""

import itertools
from collections import namedtuple
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from perf import clocks

MB = 10**6
L2 = 50 * MB
MILLISECONDS = 6.0  # what any two events of the stand-in are apart


class Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


class Event:
    def __init__(self, enable_timing):
        assert enable_timing
        self.recorded = self.done = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        self.done = True

    def elapsed_time(self, end):
        assert self.recorded
        assert end.done
        return MILLISECONDS


@pytest.fixture
def cuda(monkeypatch):
    """Stands in for what the clocks use of torch.cuda; `captured` has the pool of each graph."""
    modes = ["default"]
    stand_in = SimpleNamespace(captured=[], synchronized=0, graphs=[], modes=modes)

    @contextmanager
    def graph(graph, pool, stream):
        assert stream == "a stream"
        assert modes[-1] == "default"
        stand_in.captured.append(pool)
        stand_in.graphs.append(graph)
        yield

    def synchronize():
        stand_in.synchronized += 1

    pools = itertools.count()
    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": graph,
        "graph_pool_handle": lambda: next(pools),
        "current_stream": lambda: "a stream",
        "current_device": lambda: 0,
        "synchronize": synchronize,
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": modes.append,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=L2),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return stand_in


@pytest.mark.parametrize(
    ("nbytes", "sets"),
    [
        (205 * MB, 2),
        (150 * MB, 2),
        (100 * MB, 3),
        (13 * MB, 13),
        (147_000, 1022),
        (54_000, 1),
        (2, 1),
    ],
)
def test_cold_inputs_are_three_l2_caches_beyond_the_one_in_use(cuda, nbytes, sets):
    found = clocks.sets_of_inputs(nbytes, "cuda")
    assert found == sets
    assert found == 1 or (found - 1) * nbytes >= 3 * L2
    assert clocks.sets_of_inputs(nbytes, "cpu") == 1


def test_replay_goes_round_all_inputs(cuda):
    calls, live, most = [], set(), 0

    class Result:
        def __init__(self):
            nonlocal most
            live.add(id(self))
            most = max(most, len(live))

        def __del__(self):
            live.discard(id(self))

    def call(number):
        calls.append(number)
        return Result()

    replay = clocks.Replay([lambda n=n: call(n) for n in range(3)], rounds=4, pool="a pool")
    assert calls == [0, 0] + [0, 1, 2] * 4  # twice before the capture
    assert most in (3, 4)  # a round's results, so that no two calls of it write the same memory
    assert not live, "results are kept beyond the capture"
    assert cuda.captured == ["a pool"]
    assert replay() == pytest.approx(MILLISECONDS / 1e3 / 12)
    assert cuda.graphs[0].replays == 2  # the first of which is not timed
    assert len(calls) == 14


def test_what_waits_for_the_device_is_not_captured(cuda):
    """The second call is made where waiting raises, and the mode is put back."""

    def wait():
        if cuda.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        clocks.Replay([wait], rounds=4, pool="a pool")
    assert not cuda.captured
    assert cuda.modes == ["default", "error", "default"]


@pytest.mark.parametrize(
    ("nbytes", "sets", "cold", "hot"),
    [
        (205 * MB, 2, 6, 5),
        (13 * MB, 13, 52, 40),
        (MB, 151, 302, 200),
        (1000, 1, None, 200),
    ],
)
def test_samplers_on_a_gpu(cuda, nbytes, sets, cold, hot):
    count = [0] * sets

    def call(number):
        count[number] += 1

    calls = {"forward": [lambda n=n: call(n) for n in range(sets)]}
    found = clocks.samplers(calls, nbytes, "cuda")
    expected = {"cold": cold, "hot": hot}
    for clock, number in expected.items():
        assert (("forward", clock) in found) == (number is not None)
        if number:
            assert found["forward", clock].count == number
    ran_first = 2 * len(cuda.captured)
    assert count[0] == ran_first + (cold or 0) // sets + hot
    assert all(n == (cold or 0) // sets for n in count[1:])
    assert len(set(cuda.captured)) == 1, "graphs of a provider do not share memory"
    assert found["forward", "wall"].count == clocks.WALL_CALLS


def test_wall_waits_for_the_gpu(cuda, monkeypatch):
    times = iter((10.0, 13.0))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(times))
    ran = []
    wall = clocks.Wall(lambda: ran.append(cuda.synchronized), "cuda")
    assert wall() == pytest.approx(3.0 / clocks.WALL_CALLS)
    assert ran == [0] + [1] * clocks.WALL_CALLS  # the untimed call, a wait, the timed ones
    assert cuda.synchronized == 2


def test_wall_on_a_cpu_times_one_call(monkeypatch):
    times = iter((10.0, 13.0))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(times))
    ran = []
    found = clocks.samplers({"forward": [lambda: ran.append(0)]}, 100, "cpu")
    assert found.keys() == {("forward", "wall")}
    assert found["forward", "wall"]() == 3.0
    assert len(ran) == 2


Range = namedtuple("Range", ["start", "end"])
Profiled = namedtuple("Profiled", ["name", "device_type", "time_range"])


def test_kernels_by_label():
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    kernel = "void at::native::(anonymous namespace)::reduce<float, 4>(float*, int)"
    events = [
        Profiled(kernel, gpu, Range(13, 14)),
        Profiled("a backward", cpu, Range(20, 30)),
        Profiled("a forward", cpu, Range(10, 19)),
        Profiled("a forward", gpu, Range(11, 14)),  # as the profiler shows a label on the GPU
        Profiled("_stats_kernel", gpu, Range(11, 12)),
        Profiled("aten::batch_norm", cpu, Range(10, 12)),
        Profiled(kernel, gpu, Range(15, 16)),
        Profiled("Memcpy DtoD (Device -> Device)", gpu, Range(25, 26)),
        Profiled("between", gpu, Range(19.5, 19.6)),
    ]
    assert clocks.by_label(events, ["a forward", "a backward", "nothing"]) == {
        "a forward": {"_stats_kernel": 1, "at::native::reduce": 2},
        "a backward": {"Memcpy DtoD": 1},
        "nothing": {},
    }


@pytest.mark.gpu
def test_kernels_of_a_gpu():
    x = torch.ones(1000, device="cuda")
    found = clocks.launched(
        {"copy": x.clone, "relu": lambda: x.relu().relu(), "none": lambda: None}
    )
    assert sum(found["copy"].values()) == 1
    assert list(found["relu"].values()) == [2]
    assert found["none"] == {}


@pytest.mark.gpu
def test_clocks_of_a_gpu_agree_on_a_slow_call():
    x = torch.ones(64 * MB, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        found = clocks.samplers({"copy": [x.clone, x.clone]}, x.nbytes, "cuda")
        seconds = {clock: min(sampler() for _ in range(5)) for (_, clock), sampler in found.items()}
    assert seconds.keys() == {"cold", "hot", "wall"}
    assert max(seconds.values()) < 1.5 * min(seconds.values())
