"""What batch normalization claims, measured on handwritten digits with tribn's layers.

Five experiments on scikit-learn's bundled digits, 1,797 images of 8x8 pixels, that end in
`demo.json` (every number), `demo.png` (the curves) and a table. What they say is worded from the
numbers, favourable or not.

    deep            a network of ten hidden sigmoid layers, with and without batch normalization
    learning_rates  the range of learning rates at which a ReLU network trains, with and without
    standardize     logistic regression on raw and on standardized pixels
    order           batch normalization before and after the activation
    identity        weight = sqrt(var + eps) and bias = mean give the input back
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import tribn
from perf.figures.style import BLUE, GREEN, VERMILION, new_figure, save, tidy, title
from perf.report import count, environment, parser_of, write

Array = NDArray[np.float64]
Results = dict[str, Any]

PIXELS, CLASSES, WIDTH, BATCH = 64, 10, 64, 128
TEST_IMAGES = 360
TRAINED = 0.9  # a network has trained when every seed classifies this share of the training set
TARGET_LOSS = 0.1  # of logistic regression
EPS = 1e-5
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Settings:
    """How much to train; learning rates are per decade."""

    seeds: int = 5
    deep_epochs: int = 30
    deep_rates: int = 2
    sweep_epochs: int = 15
    sweep_rates: int = 6
    logistic_epochs: int = 100
    logistic_rates: int = 5


QUICK = Settings(
    deep_epochs=2, deep_rates=1, sweep_epochs=2, sweep_rates=2, logistic_epochs=20, logistic_rates=1
)


# Data


class Digits(NamedTuple):
    x: Tensor  # [1437, 64] to train on, pixels from 0 to 16
    y: Tensor  # [1437] classes
    test_x: Tensor  # [360, 64]
    test_y: Tensor  # [360]

    def map(self, transform: Callable[[Tensor], Tensor]) -> Digits:
        return self._replace(x=transform(self.x), test_x=transform(self.test_x))


def load(device: str) -> Digits:
    """The digits in a fixed split that keeps the share of every class."""
    images, classes = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        images, classes, test_size=TEST_IMAGES, stratify=classes, random_state=0
    )
    pixels = {"dtype": torch.float32, "device": device}
    return Digits(
        torch.tensor(x, **pixels),
        torch.tensor(y, device=device),
        torch.tensor(test_x, **pixels),
        torch.tensor(test_y, device=device),
    )


# Networks. All learning rates and seeds train side by side: `copies` networks are one, whose layers
# take (copies, features, N) tensors.


@dataclass(frozen=True)
class Network:
    activation: type[nn.Module]
    depth: int  # hidden layers
    gain: float  # weights start with a standard deviation of gain / sqrt(inputs)

    @property
    def name(self) -> str:
        return f"{self.depth} hidden layers of {WIDTH} {self.activation.__name__} units"


DEEP = Network(nn.Sigmoid, depth=10, gain=1)
SHALLOW = Network(nn.ReLU, depth=4, gain=math.sqrt(2))
LOGISTIC = Network(nn.Identity, depth=0, gain=0)


class Linear(nn.Module):
    """A linear layer per network: those of one seed start alike at every learning rate."""

    def __init__(
        self,
        rates: int,
        generators: Sequence[torch.Generator],
        inputs: int,
        outputs: int,
        gain: float,
    ) -> None:
        super().__init__()
        weights = [torch.randn(outputs, inputs, generator=g) for g in generators]
        weight = torch.stack(weights).repeat(rates, 1, 1) * gain / math.sqrt(inputs)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight), outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, self.weight, x)


class BatchNorm(nn.Module):
    """One tribn layer, activation included, that sees the features of all networks as channels."""

    def __init__(self, channels: int, activation: nn.Module, order: str) -> None:
        super().__init__()
        self.norm = tribn.BatchNorm1d(channels, eps=EPS, activation=activation, order=order)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(1, -1, x.shape[2])).view(x.shape)


def hidden(network: Network, norm: str, channels: int) -> nn.Module:
    """The activation, with batch normalization "before" or "after" it, or with "none"."""
    activation = network.activation()
    if norm == "none":
        return activation
    return BatchNorm(channels, activation, "norm_act" if norm == "before" else "act_norm")


def build(
    network: Network, norm: str, rates: int, generators: Sequence[torch.Generator]
) -> nn.Sequential:
    """The network once per learning rate and seed, from (copies, 64, N) to (copies, 10, N)."""
    layers: list[nn.Module] = []
    sizes = [PIXELS] + [WIDTH] * network.depth
    for inputs, outputs in pairwise(sizes):
        layers.append(Linear(rates, generators, inputs, outputs, network.gain))
        layers.append(hidden(network, norm, rates * len(generators) * outputs))
    layers.append(Linear(rates, generators, sizes[-1], CLASSES, network.gain))
    return nn.Sequential(*layers)


# Training


@dataclass(frozen=True)
class Run:
    """One network trained for E epochs at R learning rates from S seeds."""

    rates: Array  # [R]
    loss: Array  # [E, R, S] mean over the epoch, each batch before its step
    train_accuracy: Array  # [R, S] in evaluation mode, after the last epoch
    test_accuracy: Array  # [R, S]

    def best(self) -> int:
        """The learning rate of the lowest loss in the last epoch, averaged over seeds."""
        return int(np.nan_to_num(self.loss[-1].mean(1), nan=np.inf).argmin())

    def at(self, k: int) -> Results:
        return {
            "learning_rate": self.rates[k],
            "loss": self.loss[:, k].T,
            "train_accuracy": self.train_accuracy[k],
            "test_accuracy": self.test_accuracy[k],
            "tried": {"learning_rates": self.rates, "last_loss": self.loss[-1].mean(1)},
        }


def grid(low: int, high: int, per_decade: int) -> Array:
    """Learning rates from 10**low to 10**high."""
    return np.logspace(low, high, (high - low) * per_decade + 1)


def descend(model: nn.Module, x: Tensor, y: Tensor, rate: Tensor) -> Tensor:
    """A step of gradient descent for every network: x (copies, 64, N), y (copies, N).

    `rate` is (copies, 1). Returns the losses before the step, (copies,).
    """
    loss = F.cross_entropy(model(x), y, reduction="none").mean(1)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss.sum(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.view(len(rate), -1).sub_(rate * gradient.reshape(len(rate), -1))
    return loss.detach()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, copies: int) -> Tensor:
    """The share of (N, 64) images that every network classifies right, (copies,)."""
    guess = model(x.T.expand(copies, -1, -1)).argmax(1)
    return (guess == y).double().mean(1)


def train(
    network: Network,
    norm: str,
    data: Digits,
    rates: Array,
    seeds: int,
    epochs: Iterable[int],
    batch: int = BATCH,
) -> Run:
    """Plain gradient descent on shuffled batches; the last, smaller one of an epoch is left out."""
    device = data.x.device
    shape = len(rates), seeds
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    model = build(network, norm, len(rates), generators).to(device)
    rate = torch.tensor(rates, dtype=torch.float32, device=device)
    rate = rate.repeat_interleave(seeds)[:, None]
    losses = []
    for _ in epochs:
        shuffled = torch.stack([torch.randperm(len(data.y), generator=g) for g in generators])
        batches = shuffled.to(device).repeat(len(rates), 1).unfold(1, batch, batch).unbind(1)
        steps = [descend(model, data.x[i].mT, data.y[i], rate) for i in batches]
        losses.append(torch.stack(steps).double().mean(0).view(shape))
    model.eval()
    train_accuracy = accuracy(model, data.x, data.y, len(rate)).view(shape)
    test_accuracy = accuracy(model, data.test_x, data.test_y, len(rate)).view(shape)
    return Run(
        rates,
        torch.stack(losses).cpu().numpy(),
        train_accuracy.cpu().numpy(),
        test_accuracy.cpu().numpy(),
    )


# Experiments: numbers, a `finding` in words and the `detail` behind it


def percent(accuracies: Array) -> str:
    low, mean, high = 100 * accuracies.min(), 100 * accuracies.mean(), 100 * accuracies.max()
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def compare(a: Array, b: Array) -> str:
    """How b stands to a, both over seeds: a difference counts if the ranges do not overlap."""
    if b.min() > a.max():
        return "higher"
    if b.max() < a.min():
        return "lower"
    return "not clearly different"


def deep(runs: dict[str, Run]) -> Results:
    """Does a deep network train better with batch normalization?"""
    plain, normed = (runs[norm].at(runs[norm].best()) for norm in ("none", "before"))
    a, b = plain["test_accuracy"], normed["test_accuracy"]
    return {
        "finding": f"{DEEP.depth} hidden sigmoid layers: test accuracy is {compare(a, b)} "
        f"with batch norm, {100 * b.mean():.0f} % against {100 * a.mean():.0f} %",
        "detail": f"with {percent(b)}, without {percent(a)}",
        "network": DEEP.name,
        "without": plain,
        "with": normed,
    }


def longest(rates: Array, works: NDArray[np.bool_]) -> Array:
    """The longest unbroken stretch of learning rates that work; empty if none does."""
    stretches = np.split(rates, np.flatnonzero(~works))
    # Each stretch but the first starts with the rate that did not work.
    return max([stretches[0], *(stretch[1:] for stretch in stretches[1:])], key=len)


def decades(stretch: Array) -> float:
    return math.log10(stretch[-1] / stretch[0]) if len(stretch) else 0.0


def sweep(run: Run) -> Results:
    stretch = longest(run.rates, (run.train_accuracy >= TRAINED).all(1))
    return {
        "learning_rates": run.rates,
        "train_accuracy": run.train_accuracy.T,
        "test_accuracy": run.test_accuracy.T,
        "trains_at": stretch,
        "decades": decades(stretch),
    }


def learning_rates(runs: dict[str, Run]) -> Results:
    """Does batch normalization widen the range of learning rates that train?"""
    arms = {"without": sweep(runs["none"]), "with": sweep(runs["before"])}
    a, b = (len(arm["trains_at"]) for arm in arms.values())
    verb = "widens" if b > a else "narrows" if b < a else "does not change"
    ranges = [
        f"{name} " + (f"{at[0]:.2g} to {at[-1]:.2g}" if len(at := arm["trains_at"]) else "none")
        for name, arm in arms.items()
    ]
    return {
        "finding": f"Batch norm {verb} the range of learning rates that train: "
        f"{arms['with']['decades']:.1f} decades against {arms['without']['decades']:.1f}",
        "detail": ", ".join(ranges),
        "trains": f"every seed's training accuracy, in evaluation mode after the last epoch, is at "
        f"least {TRAINED:.0%}; the longest unbroken stretch of the grid counts",
        "network": SHALLOW.name,
        **arms,
    }


def epochs_to(losses: Array, target: float) -> int | None:
    """Epochs until the loss, which is that before each epoch, reaches the target; None: never."""
    reached = np.flatnonzero(losses <= target)
    return int(reached[0]) if len(reached) else None


def fastest(run: Run) -> Results:
    """The learning rate that reaches the target first, and among equals ends lowest."""

    def score(k: int) -> tuple[float, float]:
        epochs = epochs_to(run.loss[:, k, 0], TARGET_LOSS)
        last = float(run.loss[-1, k, 0])
        return math.inf if epochs is None else epochs, math.inf if math.isnan(last) else last

    best = min(range(len(run.rates)), key=score)
    return {**run.at(best), "epochs": epochs_to(run.loss[:, best, 0], TARGET_LOSS)}


def standardize(data: Digits, settings: Settings, progress: Progress) -> Results:
    """Does logistic regression learn faster from standardized features?"""
    scaler = tribn.StandardScaler(PIXELS).to(data.x.device)
    for batch in data.x.split(BATCH):
        scaler.partial_fit(batch)
    rates = grid(-4, 2, settings.logistic_rates)
    arms, reached = {}, {}
    for name, features in (("raw", data), ("standardized", data.map(scaler))):
        epochs = progress.track(
            range(settings.logistic_epochs), description=f"logistic regression, {name} pixels"
        )
        # From zero weights and on the whole training set nothing is random: one seed is all.
        arms[name] = fastest(train(LOGISTIC, "none", features, rates, 1, epochs, len(data.y)))
        reached[name] = arms[name]["epochs"] or f"over {settings.logistic_epochs}"
    return {
        "finding": f"Logistic regression reaches a loss of {TARGET_LOSS} in "
        f"{reached['standardized']} epochs from standardized pixels, in {reached['raw']} from raw "
        "ones",
        "detail": ", ".join(
            f"{name} at learning rate {arm['learning_rate']:.2g}" for name, arm in arms.items()
        ),
        "target_loss": TARGET_LOSS,
        **arms,
    }


def order(networks: dict[str, dict[str, Run]]) -> Results:
    """Is it better to normalize before the activation, or after it?"""
    arms: Results = {}
    verdicts, details = defaultdict(list), []
    for name, runs in networks.items():
        arms[name] = {norm: runs[norm].at(runs[norm].best()) for norm in ("before", "after")}
        before, after = (arm["test_accuracy"] for arm in arms[name].values())
        verdicts[compare(before, after)].append(name)
        details.append(f"{name} {percent(after)} against {percent(before)}")
    verdict = ", ".join(f"{word} with {' and '.join(names)}" for word, names in verdicts.items())
    return {
        "finding": f"Batch norm after instead of before the activation: test accuracy {verdict}",
        "detail": ", ".join(details),
        **arms,
    }


def identity_error(x: Tensor) -> float:
    """The largest error of weight = sqrt(var + eps), bias = mean, in epsilons of max |x|."""
    mean, var, _ = tribn.functional.batch_stats(x)
    weight = (var + EPS).sqrt()
    y = tribn.functional.batch_norm(x, None, None, weight, mean, training=True, eps=EPS)
    return ((y - x).abs().max() / (EPSILON * x.abs().max())).item()


def identity(data: Digits) -> Results:
    """Do the right weight and bias undo the normalization?"""
    images = F.pixel_unshuffle(data.x.view(-1, 1, 8, 8), 2)  # four channels of 4x4 pixels
    errors = {str(tuple(x.shape)): identity_error(x) for x in (data.x, images)}
    return {
        "finding": "weight = sqrt(var + eps), bias = mean give the input back within "
        f"{max(errors.values()):.1f} float32 epsilons of its largest value",
        "detail": ", ".join(f"{shape}: {error:.1f}" for shape, error in errors.items()),
        "max_error_in_epsilons": errors,
    }


def measure(data: Digits, settings: Settings, progress: Progress) -> Results:
    scaled = data.map(lambda x: x / 16)

    def arms(network: Network, rates: Array, epochs: int) -> dict[str, Run]:
        runs = {}
        for norm in ("none", "before", "after"):
            track = progress.track(range(epochs), description=f"{network.name}, batch norm: {norm}")
            runs[norm] = train(network, norm, scaled, rates, settings.seeds, track)
        return runs

    sigmoid = arms(DEEP, grid(-2, 1, settings.deep_rates), settings.deep_epochs)
    relu = arms(SHALLOW, grid(-4, 2, settings.sweep_rates), settings.sweep_epochs)
    return {
        "deep": deep(sigmoid),
        "learning_rates": learning_rates(relu),
        "standardize": standardize(data, settings, progress),
        "order": order({"sigmoid": sigmoid, "ReLU": relu}),
        "identity": identity(data),
    }


# Report


def band(axes: Axes, x: Array, values: Array, color: str, label: str, style: str = "-") -> None:
    """The mean over seeds as a line, minimum to maximum as a band: values [S, len(x)]."""
    axes.plot(x, values.mean(0), style, color=color, label=label)
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def draw_losses(axes: Axes, arms: Sequence[tuple[Results, str, str, str]]) -> None:
    for arm, label, color, style in arms:
        epochs = np.arange(1, arm["loss"].shape[1] + 1)
        band(axes, epochs, arm["loss"], color, label, style)
    axes.set(yscale="log", ylabel="training loss (nats)", xlabel="epoch")


def draw_deep(axes: Axes, result: Results) -> None:
    arms = (("without", VERMILION, "--"), ("with", BLUE, "-"))
    draw_losses(axes, [(result[name], name, color, style) for name, color, style in arms])


def draw_learning_rates(axes: Axes, result: Results) -> None:
    for name, color, style, height in (("without", VERMILION, "--", 105), ("with", BLUE, "-", 112)):
        arm = result[name]
        band(axes, arm["learning_rates"], 100 * arm["train_accuracy"], color, name, style)
        trains_at = arm["trains_at"]
        axes.plot(trains_at, np.full(len(trains_at), height), color=color, linewidth=4)
    axes.axhline(100 * TRAINED, color="gray", linewidth=1, linestyle=":")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training accuracy (%)", ylim=(0, 116))


def draw_standardize(axes: Axes, result: Results) -> None:
    for name, color, style in (("raw", VERMILION, "--"), ("standardized", BLUE, "-")):
        arm = result[name]
        label = f"{name}, learning rate {arm['learning_rate']:.2g}"
        axes.plot(arm["loss"][0], style, color=color, label=label)
    axes.axhline(result["target_loss"], color="gray", linewidth=1, linestyle=":")
    axes.set(yscale="log", xlabel="epoch (one step on all images)", ylabel="training loss (nats)")


def draw_order(axes: Axes, result: Results) -> None:
    arms = []
    for name, style in (("sigmoid", "-"), ("ReLU", "--")):
        for norm, color in (("before", BLUE), ("after", GREEN)):
            arm = result[name][norm]
            label = f"{name}, {norm}: {100 * arm['test_accuracy'].mean():.1f} %"
            arms.append((arm, label, color, style))
    draw_losses(axes, arms)


PANELS = {
    "deep": draw_deep,
    "learning_rates": draw_learning_rates,
    "standardize": draw_standardize,
    "order": draw_order,
}


def caption(report: Results) -> str:
    settings, taken = report["settings"], report["environment"]
    return (
        f"Identity: {report['experiments']['identity']['finding']}. "
        f"Data: 1,797 digits of 8x8 pixels, {TEST_IMAGES} of them to test on. Training: gradient "
        f"descent without momentum in batches of {BATCH}; loss curves at the best learning rate "
        f"of a grid; lines and bands are mean and range over {settings['seeds']} seeds, "
        "clearly different if the ranges do not overlap. Bars at the top right: "
        f"every seed reaches {TRAINED:.0%} training accuracy in "
        f"{settings['sweep_epochs']} epochs ({SHALLOW.name}). "
        f"tribn {taken['tribn']}, PyTorch {taken['torch']}, {taken['device']}."
    )


def draw(report: Results, path: Path) -> None:
    figure = new_figure(7.6)
    panels = figure.subplots(2, 2)
    for axes, (name, paint) in zip(panels.flat, PANELS.items(), strict=True):
        result = report["experiments"][name]
        paint(axes, result)
        title(axes, result["finding"], 44)
        tidy(axes)
        axes.legend(fontsize=9, edgecolor="none", framealpha=0.8)
    save(figure, caption(report), path)


def table(experiments: Results) -> Table:
    rows = Table("experiment", "finding", "numbers, with the range over seeds", show_lines=True)
    for name, result in experiments.items():
        rows.add_row(name, result["finding"], result["detail"])
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("demo", __doc__)
    parser.add_argument(
        "--seeds",
        type=count,
        default=Settings.seeds,
        metavar="N",
        help="how often every network is trained (%(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, too little to conclude anything"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    arguments = parse(argv)
    settings = replace(QUICK if arguments.quick else Settings(), seeds=arguments.seeds)
    torch.set_num_threads(1)  # no number may depend on how many cores there are
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    with Progress(console=console) as progress:
        experiments = measure(load(device), settings, progress)
    report = {
        "environment": environment(device),
        "settings": asdict(settings),
        "seconds": time.perf_counter() - started,
        "experiments": experiments,
    }
    write(report, arguments.out, "demo")
    draw(report, arguments.out / "demo.png")
    console.print(table(experiments))
    console.print(f"{report['seconds']:.0f} s; {arguments.out / 'demo.json'} and demo.png")
