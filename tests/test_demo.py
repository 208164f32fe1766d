"""The demo end to end, shortened, and what turns its numbers into words."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import tribn
from perf import demo
from perf.__main__ import main

ROOT = Path(tribn.__file__).parents[1]
RATES = np.array([0.01, 0.1, 1.0, 10.0])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What `python -m perf demo --quick` writes, in a directory that it has to make."""
    path = tmp_path_factory.mktemp("demo") / "new"
    command = [sys.executable, "-W", "error", "-m", "perf", "demo", "--quick", "--seeds", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [*command, "--out", path], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in demo.PANELS)
    return path


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "demo.json").read_text())


def test_report_says_under_which_conditions(report):
    assert report["settings"]["seeds"] == 2
    assert report["environment"]["tribn"] == tribn.__version__
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"].keys() >= {"device", "tribn", "torch", "python", "revision"}
    assert 0 < report["seconds"] < 600


def test_report_has_the_numbers_of_every_experiment(report):
    experiments, settings = report["experiments"], report["settings"]
    assert list(experiments) == ["deep", "learning_rates", "standardize", "order", "identity"]
    assert all(result["finding"] and result["detail"] for result in experiments.values())
    for arm in (experiments["deep"]["with"], experiments["order"]["sigmoid"]["after"]):
        assert np.shape(arm["loss"]) == (2, settings["deep_epochs"])
        assert np.isfinite(arm["loss"]).all()
        assert all(0 <= share <= 1 for share in arm["train_accuracy"] + arm["test_accuracy"])
        assert arm["learning_rate"] in arm["tried"]["learning_rates"]
    sweep = experiments["learning_rates"]["without"]
    assert np.shape(sweep["train_accuracy"]) == (2, len(sweep["learning_rates"]))
    curve = experiments["standardize"]["standardized"]["loss"][0]
    assert curve[0] == pytest.approx(math.log(10), rel=1e-4)  # zero weights: ten equal classes
    assert curve[-1] < curve[0]


def test_identity_is_exact_to_a_few_roundings(report):
    errors = report["experiments"]["identity"]["max_error_in_epsilons"]
    assert errors.keys() == {"(1437, 64)", "(1437, 4, 4, 4)"}
    assert all(0 <= error <= 4 for error in errors.values())


def test_figure_has_the_curves_of_every_panel(out):
    image = imread(out / "demo.png")
    assert image.shape[:2] == (1520, 1600)
    colors = dict.fromkeys(demo.PANELS, (demo.BLUE, demo.VERMILION))
    colors["order"] = demo.BLUE, demo.GREEN
    panels = [panel for rows in np.split(image[..., :3], 2) for panel in np.split(rows, 2, axis=1)]
    for panel, name in zip(panels, demo.PANELS, strict=True):
        for color in colors[name]:
            drawn = np.abs(panel - to_rgb(color)).max(2) < 0.01
            assert drawn.sum() > 500, f"{name}: no {color}"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["demo", "more"],
        ["demo", "--fast"],
        ["demo", "--seeds", "0"],
        ["demo", "--seeds", "two"],
        ["demo", "--out", __file__],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "usage: python -m perf" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "text"), [(["-h"], "demo"), (["demo", "-h"], "--seeds N")])
def test_help(argv, text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 0
    assert text in capsys.readouterr().out


def test_split_keeps_every_class():
    data = demo.load("cpu")
    assert (len(data.x), len(data.test_x)) == (len(data.y), len(data.test_y)) == (1437, 360)
    classes = data.y.bincount(), data.test_y.bincount()
    assert ((classes[1] - sum(classes) * 360 / 1797).abs() <= 1).all()
    assert data.x.min() == 0
    assert data.x.max() == 16


@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_networks_side_by_side_train_as_each_would_alone(norm):
    """A hidden layer in torch.nn and torch.optim, against the second rate and second seed."""
    network = demo.Network(torch.nn.Sigmoid, depth=1, gain=1)
    data = demo.load("cpu").map(lambda x: x / 16)
    run = demo.train(network, norm, data, np.array([7.0, 0.5, 2.0]), 2, range(2))

    seed = torch.Generator().manual_seed(1)
    layers = [torch.nn.Linear(64, 64), torch.nn.Sigmoid(), torch.nn.Linear(64, 10)]
    for layer in layers[::2]:
        torch.nn.init.zeros_(layer.bias)
        layer.weight.data = torch.randn(layer.weight.shape, generator=seed) / 8
    if norm != "none":
        layers.insert(1 if norm == "before" else 2, torch.nn.BatchNorm1d(64))
    alone = torch.nn.Sequential(*layers)
    descent = torch.optim.SGD(alone.parameters(), lr=0.5)
    for epoch in range(2):
        losses = []
        for i in torch.randperm(1437, generator=seed)[: 11 * 128].split(128):
            descent.zero_grad()
            loss = torch.nn.functional.cross_entropy(alone(data.x[i]), data.y[i])
            loss.backward()
            descent.step()
            losses.append(loss.item())
        assert run.loss[epoch, 1, 1] == pytest.approx(np.mean(losses), rel=1e-4)
    right = alone.eval()(data.test_x).argmax(1) == data.test_y
    assert run.test_accuracy[1, 1] == pytest.approx(right.double().mean().item(), abs=2 / 360)


@pytest.mark.parametrize(
    ("works", "expected"),
    [
        ([0, 0, 0, 0], []),
        ([1, 1, 1, 1], [0.01, 0.1, 1, 10]),
        ([1, 0, 1, 1], [1, 10]),
        ([1, 1, 0, 1], [0.01, 0.1]),
        ([0, 1, 0, 0], [0.1]),
    ],
)
def test_longest_is_unbroken(works, expected):
    assert list(demo.longest(RATES, np.array(works, dtype=bool))) == expected


@pytest.mark.parametrize(("rates", "width"), [([], 0), ([0.1], 0), ([0.01, 0.1, 10], 3)])
def test_decades(rates, width):
    assert demo.decades(np.array(rates)) == pytest.approx(width)


def test_grid():
    assert demo.grid(-2, 1, 2) == pytest.approx(10 ** np.arange(-2, 1.5, 0.5))


def test_epochs_to():
    assert demo.epochs_to(np.array([2.0, 0.2, 0.1, 0.3]), 0.1) == 2
    assert demo.epochs_to(np.array([2.0, 1.0]), 0.1) is None
    assert demo.epochs_to(np.array([2.0, np.nan]), 0.1) is None


def run_of(accuracy, last_loss=(1.0, 1.0, 1.0, 1.0)):
    """A run of one epoch from two seeds that differ by a thousandth."""
    loss, accuracy = (np.stack([v, np.add(v, 1e-3)], axis=1) for v in (last_loss, accuracy))
    return demo.Run(RATES, loss[None], accuracy, accuracy)


def test_best_is_never_one_that_diverged():
    assert run_of([0.5] * 4, last_loss=[np.nan, 2.0, 1.0, np.inf]).best() == 2


def test_fastest_reaches_the_target_first_and_then_ends_lowest():
    curves = np.array([[2, 1, 0.1], [2, 0.09, 0.08], [2, 0.1, 0.07], [2, np.nan, np.nan]])
    accuracy = np.ones((4, 1))
    best = demo.fastest(demo.Run(RATES, curves.T[..., None], accuracy, accuracy))
    assert (best["learning_rate"], best["epochs"]) == (1.0, 1)
    never = demo.fastest(demo.Run(RATES, curves.T[:1, :, None], accuracy, accuracy))
    assert never["epochs"] is None


HIGH, LOW = run_of([0.95] * 4), run_of([0.1] * 4)
NARROW = run_of([0.1, 0.95, 0.95, 0.1])


@pytest.mark.parametrize(
    ("plain", "normed", "word"),
    [(LOW, HIGH, "higher"), (HIGH, LOW, "lower"), (HIGH, HIGH, "not clearly different")],
)
def test_deep_and_order_say_what_was_measured(plain, normed, word):
    assert f"accuracy is {word} " in demo.deep({"none": plain, "before": normed})["finding"]
    runs = {"before": plain, "after": normed}
    both = demo.order({"a": runs, "b": runs, "c": {"before": HIGH, "after": LOW}})["finding"]
    assert f"{word} with a and b" in both
    assert "lower with" in both


@pytest.mark.parametrize(
    ("plain", "normed", "words"),
    [
        (NARROW, HIGH, "widens the range of learning rates that train: 3.0 decades against 1.0"),
        (HIGH, NARROW, "narrows the range of learning rates that train: 1.0 decades against 3.0"),
        (LOW, LOW, "does not change the range"),
    ],
)
def test_learning_rates_say_what_was_measured(plain, normed, words):
    assert words in demo.learning_rates({"none": plain, "before": normed})["finding"]


def test_every_seed_has_to_train():
    one_fails = run_of([demo.TRAINED - 5e-4] * 4)
    assert demo.sweep(one_fails)["decades"] == 0
    assert demo.sweep(run_of([demo.TRAINED] * 4))["decades"] == pytest.approx(3)


def test_identity_error_sees_a_wrong_variance(monkeypatch):
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert demo.identity_error(x) < 8
    mean, var, count = tribn.functional.batch_stats(x)
    monkeypatch.setattr(tribn.functional, "batch_stats", lambda _: (mean, var * 1.0001, count))
    assert demo.identity_error(x) > 100
