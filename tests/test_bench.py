"""The benchmark: who is timed, what a row says, and that nothing measured is lost."""

import json
import math
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import of_no_kernel
from torch.nn import functional as F

of_no_kernel()
pytest.importorskip("rich")

from rich.console import Console

from perf import bench, clocks
from perf.__main__ import main
from perf.bench import COPY
from perf.cases import DIRECTIONS, OPS, Layer
from perf.gate import Case, Inputs
from perf.providers import PROVIDERS, Provider, unfused

TINY = ["--shape", "3x4x5x6", "--op", "bn_add_relu"]
LAYER = Layer((3, 4, 5, 6), "relu", residual=True)
CASE = Case(LAYER, "channels-first", "fp32")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run(no_gpu, tmp_path):
    """Runs the benchmark on the CPU and returns its report."""

    def run(*arguments, code=None):
        argv = ["bench", *arguments, "--out", str(tmp_path)]
        if code is None:
            main(argv)
        else:
            with pytest.raises(SystemExit) as exit:
                main(argv)
            assert exit.value.code == code
        (path,) = tmp_path.glob("*.json")
        return json.loads(path.read_text())

    return run


def empty():
    return {"rows": [], "kernels": [], "problems": []}


# End to end


def test_report_of_a_shape(run, tmp_path, capsys):
    report = run(*TINY)
    assert report["command"] == "bench"
    assert report["path"] == "CPU path, no GPU"
    assert report["environment"]["device"].endswith("CPU")
    assert [path.name for path in tmp_path.iterdir()] == ["bench-cpu-bn_add_relu-3x4x5x6.json"]
    assert report["problems"] == report["left_out"] == report["kernels"] == []
    timed = {(r["layout"], r["direction"], r["provider"]) for r in report["rows"]}
    layouts = "channels-first", "channels-last"
    assert timed == {(lay, COPY, COPY) for lay in layouts} | {
        (lay, direction, provider)
        for lay in layouts
        for direction in DIRECTIONS
        for provider in ("tribn", "eager")
    }
    for row in report["rows"]:
        assert (row["op"], row["shape"], row["count"]) == ("bn_add_relu", [3, 4, 5, 6], 1)
        assert (row["clock"], row["dtype"], row["samples"]) == ("wall", "fp32", bench.ROUNDS)
        low, high = row["quartiles_us"]
        assert 0 < low <= row["us"] <= high
        assert row["TB/s"] == pytest.approx(row["bytes"] / row["us"] / 1e6, rel=1e-4)
    assert len(report["summary"]) == 16
    shown = capsys.readouterr().out
    assert "CPU path, no GPU" in shown
    assert all(word in shown for word in ("wall", "tribn", "eager", *DIRECTIONS, *layouts))


def test_all_providers_but_those_that_are_missing(run, monkeypatch, capsys):
    for name in ("compile", "max-autotune", "cooperative"):
        monkeypatch.delitem(PROVIDERS, name)
    report = run(*TINY, "--providers", "all", "--layouts", "channels-first")
    assert report["providers"] == ["tribn", "eager"]
    assert report["unavailable"] == dict.fromkeys(
        ("apex", "flag_gems", "attorch"), "needs a CUDA device"
    )
    assert "attorch needs a CUDA device" in capsys.readouterr().out


# Who is timed


@pytest.fixture
def rival(monkeypatch):
    """Puts a rival of a plain batch norm among the providers."""

    def rival(norm):
        monkeypatch.setitem(PROVIDERS, "rival", Provider(lambda layer: unfused(norm, layer)))

    return rival


def wrong(*arguments):
    return F.batch_norm(*arguments, eps=0.01)


def raises(*arguments):
    raise NotImplementedError("not for you\nand more")


def raises_backward(x, *arguments):
    class Raising(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise ValueError("no gradient")

    return F.batch_norm(Raising.apply(x), *arguments)


@pytest.mark.parametrize(
    ("norm", "is_wrong", "text"),
    [
        (wrong, True, "output is off by"),
        (raises, False, "NotImplementedError: not for you"),
        (raises_backward, False, "ValueError: no gradient"),
    ],
)
def test_a_faulty_provider_is_reported_and_not_timed(run, rival, capsys, norm, is_wrong, text):
    rival(norm)
    report = run(*TINY, "--providers", "rival", "tribn")
    assert {row["provider"] for row in report["rows"]} == {"tribn", COPY}
    assert [row["layout"] for row in report["problems"]] == ["channels-first", "channels-last"]
    for problem in report["problems"]:
        assert (problem["provider"], problem["wrong"]) == ("rival", is_wrong)
        assert problem["problem"].startswith(text)
        assert "\n" not in problem["problem"]
        assert problem["shape"] == [3, 4, 5, 6]
    shown = capsys.readouterr().out
    assert text in shown
    assert ": rival: " in shown


def test_a_right_provider_beside_it_is_timed(run, rival):
    rival(F.batch_norm)
    report = run(*TINY, "--providers", "rival", "--layouts", "channels-last")
    assert {row["provider"] for row in report["rows"]} == {"rival", COPY}
    assert all(row["times_tribn"] is None for row in report["rows"])
    assert all("speed_up" not in row for row in report["summary"])


def test_tribn_itself_is_not_exempt(run, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "tribn", Provider(lambda layer: unfused(wrong, layer)))
    report = run(*TINY, code="tribn was timed on nothing")
    assert {row["provider"] for row in report["problems"]} == {"tribn"}
    assert {row["provider"] for row in report["rows"]} == {"eager", COPY}


# Nothing measured is lost


def measuring(monkeypatch, actions):
    """Replaces the measuring of cases by one row each and then an action."""
    left = deque(actions)

    def measure(case, report, names, device):
        yield
        left.popleft()()
        report["rows"] += bench.rows(case, samples())

    monkeypatch.setattr(bench, "measure", measure)


def samples(clock="wall", **seconds):
    """A second each, or what is given."""
    providers = seconds or {"tribn": [1.0] * 4}
    found = {(d, clock, name): times for d in DIRECTIONS for name, times in providers.items()}
    return found | {(COPY, clock, COPY): [1.0] * 4}


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise RuntimeError("out of memory")


def test_an_interrupted_run_is_written(run, monkeypatch, capsys):
    measuring(monkeypatch, [lambda: None, interrupt])
    report = run(*TINY, code="interrupted")
    assert {row["layout"] for row in report["rows"]} == {"channels-first"}
    assert [row["layout"] for row in report["left_out"]] == ["channels-last"]
    assert "not reached in time: bn_add_relu 3x4x5x6 channels-last" in capsys.readouterr().out


def test_a_case_that_fails_does_not_end_the_run(run, monkeypatch, capsys):
    measuring(monkeypatch, [fail, lambda: None])
    report = run(*TINY)
    assert {row["layout"] for row in report["rows"]} == {"channels-last"}
    (problem,) = report["problems"]
    assert (problem["provider"], problem["layout"]) == (None, "channels-first")
    assert problem["problem"] == "RuntimeError: out of memory"
    assert "not timed (1×): inputs: RuntimeError: out of memory" in capsys.readouterr().out


def test_no_case_starts_after_the_time(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def ten_seconds():
        now[0] += 10

    measuring(monkeypatch, [ten_seconds] * 3)
    report = run("--net", "unet2d", "--batch", "1", "--seconds", "25")
    layers = {tuple(row["shape"]) for row in report["rows"]}
    assert layers == {(1, 64, 256, 256), (1, 128, 128, 128)}
    assert len(report["left_out"]) == 2 * 5 - 3
    assert report["left_out"][0] == {
        "op": "bn_relu",
        "shape": [1, 128, 128, 128],
        "count": 4,
        "layout": "channels-last",
        "dtype": "fp32",
    }


def test_jobs_measure_the_same_cases(run):
    report = run(*TINY, "--jobs", "2", "--dtypes", "fp32", "bf16", "fp16")
    assert report["problems"] == report["left_out"] == []
    cases = [(row["dtype"], row["layout"]) for row in report["rows"][:: 2 * len(DIRECTIONS) + 1]]
    layouts = "channels-first", "channels-last"
    assert cases == [(dtype, lay) for lay in layouts for dtype in ("fp32", "bf16", "fp16")]
    assert len(report["summary"]) == 3 * 16


def test_a_process_that_has_ended_is_a_problem_of_its_case(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measuring", lambda *_: nullcontext(lambda cases: [None]))
    report = run(*TINY, code="tribn was timed on nothing")
    assert [problem["layout"] for problem in report["problems"]] == [
        "channels-first",
        "channels-last",
    ]
    assert "inputs: ChildProcessError: the process that" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("free", "together"), [(14, [3, 2]), (13, [2, 2, 1]), (9, [1] * 5), (1, [1] * 5)]
)
def test_as_many_cases_are_prepared_together_as_fit_on_the_device(free, together, monkeypatch):
    """Four sets of 50 MB are 3.4 GB with the graphs of two providers; a process takes 1 GB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 1e9), int(9e12)))
    monkeypatch.setattr(bench, "sets_of_inputs", lambda nbytes, device: 4)
    case = Case(Layer((25, 1000, 1000)), "channels-first", "bf16")
    assert bench.footprint(case, 2, "cuda") == 17 * 4 * 50_000_000
    seen = []

    def measured(cases):
        seen.append(len(cases))
        return [empty()] * len(cases)

    monkeypatch.setattr(bench, "measuring", lambda *_: nullcontext(measured))
    arguments = SimpleNamespace(jobs=3, providers=["tribn"] * 2, seconds=9)
    bench.run(deque([case] * 5), arguments, "cuda", empty(), Console())
    assert seen == together


# Cases


def test_largest_layers_first_in_every_layout_and_dtype():
    layers = [Layer((2, 4, 4)), Layer((2, 4, 9)), Layer((2, 4, 4), "relu", count=3)]
    found = bench.cases(layers, ("channels-first", "channels-last"), ("bf16", "fp16"))
    assert [case.layer for case in found[::4]] == [layers[2], layers[1], layers[0]]
    assert [(case.layout, case.dtype) for case in found[:4]] == [
        ("channels-first", "bf16"),
        ("channels-first", "fp16"),
        ("channels-last", "bf16"),
        ("channels-last", "fp16"),
    ]


def test_tables_have_one_layout():
    found = bench.cases([Layer((9, 4))], ("channels-last", "channels-first"), ("fp32",))
    assert [case.layout for case in found] == ["channels-last"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--net", "resnet51"],
        ["--net", "resnet50", "--set", "hard"],
        ["--net", "resnet50", "--shape", "2x3x4"],
        ["--set", "hard", "--batch", "2"],
        ["--shape", "2x3x4", "--batch", "2"],
        ["--net", "resnet50", "--op", "bn"],
        ["--shape", "2x3x4", "--op", "bn_tanh"],
        ["--shape", "2"],
        ["--shape", "2x-3x4"],
        ["--shape", "2x3xa"],
        ["--shape", "1x64x1x1"],
        ["--batch", "0"],
        ["--seconds", "0"],
        ["--dtypes", "fp64"],
        ["--layouts", "nhwc"],
        ["--providers"],
        ["--providers", "nobody"],
        ["--providers", "tribn", "attorch"],
        ["--out", __file__],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(argv, no_gpu, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *argv])
    assert exit.value.code == 2
    assert "usage: python -m perf bench" in capsys.readouterr().err


def test_the_interpreter_is_not_timed(no_gpu, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit:
        main(["bench", *TINY])
    assert exit.value.code == 2
    assert "unset it" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_defaults(device):
    arguments = bench.parse([], device)
    assert arguments.what == arguments.file == "resnet50"
    assert len(arguments.cases) == 2 * 16
    batch = {case.layer.shape[0] for case in arguments.cases}
    if device == "cuda":
        assert (batch, arguments.cases[0].dtype) == ({128}, "bf16")
        assert arguments.providers == ["tribn", "eager", "compile"]
    else:
        assert (batch, arguments.cases[0].dtype) == ({2}, "fp32")
        assert arguments.providers == ["tribn", "eager"]


def test_help_names_what_can_be_chosen(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("resnet50", "hard", "bn_relu", "cooperative", "bf16"))


# Numbers


def test_samples_are_taken_in_turn_there_and_back():
    taken = []
    keys = [
        (direction, "wall", name)
        for name in ("tribn", "eager", "compile")
        for direction in ("forward", "backward")
    ]

    def sampler(key):
        return lambda: taken.append(key) or float(len(taken))

    found = bench.sample({key: sampler(key) for key in keys})
    there, back = taken[:6], taken[6:12]
    assert back == there[::-1]
    assert [key[0] for key in there] == ["backward"] * 3 + ["forward"] * 3
    assert [key[2] for key in there] == ["tribn", "eager", "compile"] * 2
    assert all(len(seconds) == bench.ROUNDS for seconds in found.values())
    assert found[there[0]][:2] == [1.0, 12.0]


def test_slow_layers_get_fewer_samples(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow():
        now[0] += bench.PATIENCE / 2
        return 1.0

    found = bench.sample({("forward", "wall", "tribn"): slow})
    assert found == {("forward", "wall", "tribn"): [1.0] * bench.FEWEST_ROUNDS}


def test_a_row_has_median_quartiles_bandwidth_and_ratios():
    times = samples("cold", tribn=[4.0, 1.0, 2.0, 3.0, 5.0], eager=[6.0] * 5)
    times[COPY, "cold", COPY] = [0.5, 2.0, 2.0]
    rows = {(r["direction"], r["provider"]): r for r in bench.rows(CASE, times)}
    row = rows["forward", "tribn"]
    assert (row["us"], row["quartiles_us"], row["samples"]) == (3e6, (2e6, 4e6), 5)
    size = 4 * 3 * 4 * 5 * 6
    assert row["bytes"] == pytest.approx((3 + 1 / 32) * size)
    assert row["TB/s"] == pytest.approx(row["bytes"] / 3 / 1e12)
    assert row["share_of_copy"] == pytest.approx((3 + 1 / 32) / 3 / (2 / 2))
    assert row["times_tribn"] == 1
    assert rows["backward", "eager"]["times_tribn"] == 2
    assert rows[COPY, COPY]["bytes"] == 2 * size
    assert rows[COPY, COPY]["share_of_copy"] == 1
    assert {"op", "layout", "dtype", "shape", "count", "clock"} < row.keys()


def test_clocks_are_compared_with_the_copy_of_their_own():
    times = samples("cold", tribn=[2.0] * 3) | samples("hot", tribn=[2.0] * 3)
    times[COPY, "hot", COPY] = [0.25] * 3
    cold, hot = (r for r in bench.rows(CASE, times) if r["direction"] == "eval")
    assert cold["share_of_copy"] == pytest.approx(4 * hot["share_of_copy"])


def test_summary_counts_a_layer_as_often_as_it_occurs():
    rows = []
    for shape, count, eager in (((2, 4, 8), 3, 4.0), ((2, 4, 16), 1, 0.5)):
        case = Case(Layer(shape, count=count), "channels-first", "fp32")
        rows += bench.rows(case, samples(tribn=[1.0] * 3, eager=[eager] * 3))
    summary = {(row["direction"], row["provider"]): row for row in bench.summarize(rows)}
    assert summary.keys() == {(d, p) for d in DIRECTIONS for p in ("tribn", "eager")}
    eager = summary["forward", "eager"]
    assert eager["speed_up"] == pytest.approx((4**3 * 0.5) ** (1 / 4))
    assert (eager["lowest"], eager["highest"], eager["layers"]) == (0.5, 4.0, 4)
    assert eager["us"] == pytest.approx((3 * 4 + 0.5) * 1e6)
    # As bytes of all layers over the time of all, against a copy of all: 4 s of it
    assert eager["share_of_copy"] == pytest.approx(4 / 12.5)
    assert summary["forward", "tribn"]["speed_up"] == 1


def test_summary_keeps_clocks_layouts_and_dtypes_apart():
    rows = []
    for layout, dtype in (("channels-first", "bf16"), ("channels-last", "fp16")):
        for clock in ("cold", "wall"):
            rows += bench.rows(Case(LAYER, layout, dtype), samples(clock))
    assert len(bench.summarize(rows)) == 2 * 2 * len(DIRECTIONS)


@pytest.mark.parametrize(
    ("weighted", "mean"), [([(2.0, 1)], 2), ([(2.0, 1), (8.0, 1)], 4), ([(1.0, 3), (16.0, 1)], 2)]
)
def test_geometric_mean(weighted, mean):
    assert bench.geometric_mean(weighted) == pytest.approx(mean)
    assert math.isclose(bench.geometric_mean([(1 / v, n) for v, n in weighted]), 1 / mean)


# On a GPU


def test_measuring_on_a_gpu_asks_for_every_clock_and_the_kernels(monkeypatch):
    """With stand-ins for the clocks, on tensors that are on the CPU."""
    random = Inputs.random
    monkeypatch.setattr(Inputs, "random", lambda case, device: random(case, "cpu"))
    monkeypatch.setattr(bench, "sets_of_inputs", lambda nbytes, device: 3)
    asked = {}

    def samplers(calls, nbytes, device):
        assert nbytes == LAYER.elements * 4
        assert all(len(sets) == 3 for sets in calls.values())
        for sets in calls.values():
            for call in sets:
                call()
        return {(d, clock): lambda: 1.0 for d in calls for clock in clocks.CLOCKS}

    def launched(calls):
        for call in calls.values():
            call()
        asked.update(calls)
        return {label: {f"kernel of {label}": 1} for label in calls}

    monkeypatch.setattr(bench, "samplers", samplers)
    monkeypatch.setattr(bench, "launched", launched)
    report = empty()
    for _ in bench.measure(CASE, report, ["tribn", "eager"], "cuda"):
        assert not report["rows"]
    assert not report["problems"]
    assert len(report["rows"]) == 3 * (1 + 2 * len(DIRECTIONS))
    assert {row["clock"] for row in report["rows"]} == set(clocks.CLOCKS)
    assert len(asked) == len(report["kernels"]) == 1 + 2 * len(DIRECTIONS)
    named = {(row["provider"], row["direction"]): row for row in report["kernels"]}
    row = named["eager", "backward"]
    assert row["kernels"] == {"kernel of eager backward": 1}
    assert (row["op"], row["layout"], row["shape"]) == (
        "bn_add_relu",
        "channels-first",
        (3, 4, 5, 6),
    )


def test_a_gpu_is_what_is_measured_if_there_is_one(monkeypatch, tmp_path, capsys):
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "Test GPU",
        "mem_get_info": lambda: (10**10, 10**11),
        "Stream": lambda: "a stream",
        "stream": lambda stream: nullcontext(stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    devices = set()

    def measure(case, report, names, device):
        yield
        devices.add(device)
        report["rows"] += bench.rows(case, samples("cold") | samples("wall"))
        report["kernels"].append(bench.labels(case) | {"provider": "tribn", "kernels": {"k": 1}})

    monkeypatch.setattr(bench, "measure", measure)
    main(["bench", "--out", str(tmp_path)])
    assert devices == {"cuda"}
    report = json.loads((tmp_path / "bench-Test-GPU-resnet50.json").read_text())
    assert (report["path"], report["environment"]["device"]) == ("GPU", "Test GPU")
    assert {row["shape"][0] for row in report["rows"]} == {128}
    assert {row["dtype"] for row in report["rows"]} == {"bf16"}
    shown = capsys.readouterr().out
    assert "resnet50: GPU, Test GPU" in shown
    assert "kernels of tribn, bf16, channels-last: k" in shown


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of the compiler, on how to use this GPU
def test_end_to_end_on_a_gpu(tmp_path, capsys):
    main(["bench", "--shape", "16x64x56x56", "--op", "bn_relu", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("bench-*.json")
    assert "cpu" not in path.name
    report = json.loads(path.read_text())
    assert report["path"] == "GPU"
    assert not report["problems"]
    timed = {(row["clock"], row["provider"]) for row in report["rows"]}
    providers = ("tribn", "eager", "compile", COPY)
    assert timed == {(clock, name) for clock in clocks.CLOCKS for name in providers}
    assert all(row["us"] > 0 for row in report["rows"])
    for row in report["kernels"]:
        assert sum(row["kernels"].values()) >= 1, row
    assert "kernels of tribn, bf16, channels-last" in capsys.readouterr().out


def test_every_op_can_be_measured():
    for op, layer in OPS.items():
        report = empty()
        case = Case(Layer((3, 4, 5), layer.activation, layer.residual), "channels-last", "fp32")
        for _ in bench.measure(case, report, ["tribn", "eager"], "cpu"):
            assert not report["rows"]
        assert not report["problems"]
        assert {row["op"] for row in report["rows"]} == {op}
