"""Bars of `python -m perf step`: throughput and peak memory of each network, over torch eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.figures.style import BLUE, GRAY, ORANGE, new_figure, tidy, title

Row = dict[str, Any]

COLORS = {"eager": GRAY, "compile": ORANGE, "tribn": BLUE}
NAMES = {"eager": "torch eager", "compile": "torch.compile", "tribn": "tribn"}
HEIGHT = 0.26  # of a bar; networks are 1 apart


def draw(report: Row) -> dict[str, tuple[Figure, str]]:
    """By suffix of the file's name, the figure and its caption."""
    return {"": (figure(report), caption(report))}


def figure(report: Row) -> Figure:
    rows = report["rows"] + report["problems"]
    nets = list(dict.fromkeys(row["net"] for row in rows))
    panels: list[tuple[str, Callable[[Row], float], Callable[[Row], str]]] = [
        (
            "Training throughput: longer is faster",
            lambda row: row["over_eager"],
            lambda row: f"{row['over_eager']:.2f}×, {number(row['per_second'])} {row['unit']}/s",
        )
    ]
    eager = {row["net"]: row["peak_bytes"] for row in report["rows"] if row["provider"] == "eager"}
    if any(eager.values()):
        panels.append(
            (
                "Peak memory: shorter is less",
                lambda row: row["peak_bytes"] / eager[row["net"]],
                lambda row: f"{row['peak_bytes'] / 1e9:.2f} GB",
            )
        )
    drawn = new_figure(1.2 + len(nets))
    axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (text, value, label) in zip(axes, panels, strict=True):
        bars(panel, nets, rows, value, label)
        title(panel, text, 80 // len(panels))
        tidy(panel)
        panel.margins(x=0.35 * len(panels))  # for the labels
        panel.set_xlabel("times torch eager", fontsize=9)
    axes[0].set_yticks(range(len(nets)), nets)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, fontsize=9, frameon=False, ncols=3, loc="outside upper left")
    return drawn


def bars(
    axes: Axes,
    nets: list[str],
    rows: list[Row],
    value: Callable[[Row], float],
    label: Callable[[Row], str],
) -> None:
    """A bar of each provider; where one was not timed, why."""
    providers = [name for name in COLORS if any(row["provider"] == name for row in rows)]
    for place, provider in enumerate(providers):
        own = [row for row in rows if row["provider"] == provider]
        heights = [
            nets.index(row["net"]) + (place - (len(providers) - 1) / 2) * HEIGHT for row in own
        ]
        values = [value(row) if "ms" in row else 0.0 for row in own]
        texts = [
            label(row) if "ms" in row else "wrong" if row["wrong"] else "failed" for row in own
        ]
        drawn = axes.barh(heights, values, HEIGHT, color=COLORS[provider], label=NAMES[provider])
        axes.bar_label(drawn, texts, padding=3, fontsize=8)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def caption(report: Row) -> str:
    taken = report["environment"]
    inputs = {row["net"]: "×".join(map(str, row["shape"])) for row in report["rows"]}
    return (
        f"{report['path']}: {taken['device']}, tribn {taken['tribn']}, PyTorch {taken['torch']}, "
        f"Triton {taken['triton']}. Forward, loss, backward and SGD step in {report['dtype']}, "
        f"{report['memory_format']}; wall clock, median of {report['steps']} steps. Inputs: "
        + ", ".join(f"{net} {shape}" for net, shape in inputs.items())
        + "."
    )
