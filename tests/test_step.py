"""Training steps of whole networks: the gate before the clock, memory, arguments and the figure."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import of_no_kernel
from torch.nn import functional as F

of_no_kernel()
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import tribn
from perf import step
from perf.__main__ import main
from perf.figures import step as figures
from perf.figures.style import save

MLP = (64, 128)  # a batch
ROW = {"net", "shape", "provider", "clock", "ms", "quartiles_ms", "samples", "unit", "per_second"}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Graphs are captured, but not compiled: that would take minutes, and a C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def run(tmp_path, argv):
    main(["step", *argv.split(), "--out", str(tmp_path)])
    (path,) = tmp_path.glob("step-*.json")
    return json.loads(path.read_text())


def test_report_of_all_providers(tmp_path, capsys):
    argv = "--device cpu --net mlp --providers tribn compile --batch 64 --steps 3"
    report = run(tmp_path, argv)
    assert report["command"] == "step"
    assert (report["path"], report["dtype"]) == ("CPU path, no GPU", "float32")
    assert report["environment"]["tribn"] == tribn.__version__
    assert report["problems"] == []
    assert [row["provider"] for row in report["rows"]] == ["eager", "compile", "tribn"]
    for row in report["rows"]:
        assert row.keys() >= ROW
        assert (row["net"], row["shape"], row["samples"]) == ("mlp", [64, 128], 3)
        assert row["per_second"] == pytest.approx(64e3 / row["ms"], rel=1e-4)
        assert row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
        assert row["over_eager"] == pytest.approx(report["rows"][0]["ms"] / row["ms"], rel=1e-4)
        assert row["peak_bytes"] is None
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("mlp 64x128", "compile", "step-cpu-net-mlp", "no GPU"))


def measured(batch_norm, monkeypatch):
    """With a batch norm in place of tribn's."""
    monkeypatch.setitem(step.PROVIDERS, "tribn", SimpleNamespace(BatchNorm1d=batch_norm))
    return step.measure("mlp", MLP, ["eager", "tribn"], 1, "cpu", lambda: None)


class TwiceTheMomentum(torch.nn.BatchNorm1d):
    def __init__(self, channels):
        super().__init__(channels, momentum=0.2)


class BiasedRunningVariance(torch.nn.BatchNorm1d):
    def forward(self, x):
        with torch.no_grad():
            self.running_var -= 0.1 * x.var(0) / len(x)
        return super().forward(x)


class WithoutTheMean(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + x.mean(0)


class NoGradientThroughStatistics(torch.nn.BatchNorm1d):
    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            scale = self.weight / (x.var(0, correction=0) + self.eps).sqrt()
        return y.detach() + (x - x.detach()) * scale


class NotANumber(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * torch.nan


class Fails(torch.nn.BatchNorm1d):
    def forward(self, x):
        raise ImportError("no such kernel\nand more")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (TwiceTheMomentum, "statistics"),
        (BiasedRunningVariance, "statistics"),
        (WithoutTheMean, "weights"),
        (NoGradientThroughStatistics, "weights"),
        (NotANumber, "weights"),
    ],
)
def test_wrong_provider_is_reported_and_not_timed(wrong, what, monkeypatch):
    rows, (problem,) = measured(wrong, monkeypatch)
    assert [row["provider"] for row in rows] == ["eager"]
    assert (problem["provider"], problem["wrong"]) == ("tribn", True)
    assert what in problem["problem"]


def test_right_provider_passes_the_same_gate(monkeypatch):
    rows, problems = measured(torch.nn.BatchNorm1d, monkeypatch)
    assert [row["provider"] for row in rows] == ["eager", "tribn"]
    assert problems == []


def test_provider_that_fails_is_reported_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step.PROVIDERS, "tribn", SimpleNamespace(BatchNorm1d=Fails))
    report = run(tmp_path, "--device cpu --net mlp --batch 4 --steps 1")
    assert [row["provider"] for row in report["rows"]] == ["eager"]
    assert report["problems"] == [
        {
            "net": "mlp",
            "shape": [4, 128],
            "provider": "tribn",
            "wrong": False,
            "problem": "ImportError: no such kernel",
        }
    ]
    assert "mlp tribn: ImportError: no such kernel" in capsys.readouterr().out


def test_networks_before_one_that_fails_are_kept(monkeypatch, tmp_path):
    measure = step.measure

    def out_of_memory(name, *arguments):
        if name == "unet3d":
            raise MemoryError("too large")
        return measure(name, *arguments)

    monkeypatch.setattr(step, "measure", out_of_memory)
    report = run(tmp_path, "--device cpu --net mlp unet3d --batch 2 --steps 1")
    assert {row["net"] for row in report["rows"]} == {"mlp"}
    (problem,) = report["problems"]
    assert (problem["net"], problem["provider"]) == ("unet3d", None)
    assert problem["problem"] == "MemoryError: too large"


def test_all_providers_start_alike():
    eager, ours = (step.Training(step.NETWORKS["mlp"], p, MLP, "cpu") for p in ("eager", "tribn"))
    assert eager.inputs.equal(ours.inputs)
    assert eager.labels.equal(ours.labels)
    state = ours.state()
    assert all(vector.equal(state[name]) for name, vector in eager.state().items())


def test_step_is_one_of_sgd_with_momentum():
    training = step.Training(step.NETWORKS["mlp"], "eager", MLP, "cpu")
    weight = training.model[0].weight
    expected, buffer = weight.detach().clone(), 0
    for _ in range(2):
        loss = F.cross_entropy(training.model(training.inputs), training.labels)
        buffer = 0.9 * buffer + torch.autograd.grad(loss, weight)[0]
        expected -= 0.01 * buffer
        assert training.step(amp=False).item() == pytest.approx(loss.item())
        torch.testing.assert_close(weight, expected)


def test_images_and_weights_are_channels_last():
    training = step.Training(step.NETWORKS["mobilenet_v2"], "tribn", (2, 3, 32, 32), "cpu")
    assert training.inputs.is_contiguous(memory_format=torch.channels_last)
    assert training.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    volumes = step.Training(step.NETWORKS["unet3d"], "tribn", (1, 4, 32, 32, 32), "cpu")
    assert volumes.inputs.is_contiguous(memory_format=torch.channels_last_3d)
    assert volumes.labels.shape == (1, 32, 32, 32)


def test_autocast_step_convolves_in_bfloat16():
    training = step.Training(step.NETWORKS["mlp"], "tribn", MLP, "cpu")
    seen = []
    training.model[1].register_forward_pre_hook(lambda module, x: seen.append(x[0].dtype))
    training.step(amp=True)
    training.step(amp=False)
    assert seen == [torch.bfloat16, torch.float32]


def test_on_a_gpu_steps_run_in_autocast_and_memory_is_the_providers_own(monkeypatch):
    """A stand-in for the GPU: every provider holds 100 bytes, and a step takes 7 more."""
    held, amps = [1000], []

    class Training:
        def __init__(self, network, provider, shape, device):
            held[0] += 100

        def first_step(self):
            return {name: torch.ones(1) for name in step.TOLERANCES}

        def step(self, amp):
            amps.append(amp)

    monkeypatch.setattr(step, "Training", Training)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held[0] + 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: amps.append("synchronized"))
    rows, problems = step.measure("mlp", MLP, ["eager", "tribn"], 2, "cuda", lambda: None)
    assert problems == []
    assert [row["peak_bytes"] for row in rows] == [107, 107]
    prepared = [*[True] * (step.WARM_UP + 1), "synchronized"]
    assert amps == [*prepared * 2, *[True, "synchronized"] * 4]


def test_samples_go_to_and_fro():
    order = []
    calls = {name: partial(order.append, name) for name in "abc"}
    samples = step.sample(calls, 3, "cpu", lambda: None)
    assert "".join(order) == "abccbaabc"
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys("abc", 3)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--net lenet", "invalid choice: 'lenet'"),
        ("--providers eager", "invalid choice: 'eager'"),
        ("--batch 0", "no positive integer"),
        ("--steps none", "no positive integer"),
        ("--device tpu", "'tpu' is neither cpu nor cuda"),
        (f"--out {__file__}", "no directory to write to"),
        ("--net mlp --size 32", "--size: mlp has none"),
        ("--device cpu --net resnet50 --batch 1 --size 32", "more than 1 value per channel"),
        ("--device cpu --net unet3d --size 24", "unet3d cannot train"),
        ("--net mlp --batch 1", "mlp cannot train"),
    ],
)
def test_bad_arguments_exit_with_2(argv, text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["step", *argv.split()])
    assert exit.value.code == 2
    assert text in capsys.readouterr().err


def test_missing_gpu_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main(["step", "--device", "cuda"])
    assert exit.value.code == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


@pytest.mark.gpu
def test_report_of_a_gpu(tmp_path):
    report = run(tmp_path, "--net mlp mobilenet_v2 --batch 32 --steps 2")
    assert report["problems"] == []
    assert (report["path"], report["dtype"]) == ("GPU", "bfloat16 autocast")
    assert len(report["rows"]) == 6
    assert all(row["peak_bytes"] > 0 for row in report["rows"])


def made_up(peaks):
    """A report of two networks; torch.compile is wrong in one and fails in the other."""
    rows = [
        {
            "net": net,
            "shape": [8, 128],
            "provider": provider,
            "ms": 1.0,
            "unit": "rows",
            "per_second": 1000 * ratio,
            "over_eager": ratio,
            "peak_bytes": peaks and 2e9 / ratio,
        }
        for net in ("mlp", "wide")
        for provider, ratio in (("eager", 1.0), ("tribn", 1.25))
    ]
    problems = [
        {"net": net, "provider": "compile", "wrong": net == "mlp", "problem": "why"}
        for net in ("mlp", "wide")
    ]
    return {
        "path": "GPU",
        "environment": {"device": "a device", "tribn": "1", "torch": "2", "triton": "3"},
        "dtype": "bfloat16 autocast",
        "memory_format": "channels_last",
        "steps": 5,
        "rows": rows,
        "problems": problems,
    }


@pytest.mark.parametrize("peaks", [True, None])
def test_figure_has_a_bar_or_a_word_for_every_provider(peaks, tmp_path):
    ((suffix, (figure, caption)),) = figures.draw(made_up(peaks)).items()
    assert suffix == ""
    assert len(figure.axes) == (2 if peaks else 1)
    speed, memory = figure.axes[0], figure.axes[-1]
    widths = [[bar.get_width() for bar in group] for group in speed.containers]
    assert widths == [[1, 1], [0, 0], [1.25, 1.25]]
    texts = [text.get_text() for text in speed.texts]
    assert texts[2:4] == ["wrong", "failed"]
    assert texts[4] == "1.25×, 1,250 rows/s"
    if peaks:
        assert [bar.get_width() for bar in memory.containers[2]] == [0.8, 0.8]
        assert memory.texts[4].get_text() == "1.60 GB"
    assert all(text in caption for text in ("a device", "bfloat16 autocast", "5 steps", "8×128"))
    save(figure, caption, tmp_path / "step.png", tmp_path / "step.svg")
    assert (tmp_path / "step.svg").read_text().count("wrong") == len(figure.axes)
