"""Figures of `bench`: share of copy bandwidth, speed-up over each rival, and time against bytes.

One of each for every layout and dtype, by the first clock that was read: cold, if there is a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.figures.style import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_figure,
    tidy,
)

Row = dict[str, Any]

DIRECTIONS = ("forward", "backward", "eval")
CLOCKS = {
    "cold": "kernels with a cold L2 cache (CUDA graph over several times its size of inputs)",
    "hot": "kernels with a hot L2 cache (CUDA graph of calls on the same input)",
    "wall": "the call in Python, host included",
}
STYLES = {
    "tribn": (BLUE, "o"),
    "eager": (VERMILION, "s"),
    "compile": (GREEN, "^"),
    "max-autotune": (ORANGE, "D"),
    "cooperative": (SKY, "v"),
    "apex": (PURPLE, "P"),
    "flag_gems": (GRAY, "X"),
}
OTHER = ("black", "*")
MEAN = "geometric mean"


def draw(report: dict[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Figures and captions, by name."""
    clock = next((c for c in CLOCKS for row in report["rows"] if row["clock"] == c), None)
    rows = [row for row in report["rows"] if row["clock"] == clock]
    figures = {}
    for layout, dtype in dict.fromkeys((row["layout"], row["dtype"]) for row in rows):
        chosen = [row for row in rows if (row["layout"], row["dtype"]) == (layout, dtype)]
        caption = conditions(report, chosen[0])
        for name, paint in (("copy", copy), ("speedup", speedup), ("roofline", roofline)):
            figures[f"{name}-{layout}-{dtype}"] = paint(report, chosen), caption
    return figures


def conditions(report: dict[str, Any], row: Row) -> str:
    taken = report["environment"]
    software = [f"tribn {taken['tribn']}", f"PyTorch {taken['torch']}"]
    software += [f"Triton {taken['triton']}"] * bool(taken["triton"])
    software += [f"driver {taken['driver']}"] * bool(taken["driver"])
    return (
        f"{report['path']}: {taken['device']}. {row['dtype']}, {row['layout']}, batch "
        f"{row['shape'][0]}. Clock: {CLOCKS[row['clock']]}; medians of up to "
        f"{row['samples']} samples. {', '.join(software)}."
    )


def copy(report: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """The share of the bandwidth of a copy, by layer: the line is from quartile to quartile."""
    layers = names(rows)
    axes = panels(1.5 + 0.22 * len(layers), sharey=True)
    for ax, row in placed(axes, rows):
        color, marker = STYLES.get(row["provider"], OTHER)
        y, share = layers.index(name(row)), 100 * row["share_of_copy"]
        low, high = (share * row["us"] / us for us in reversed(row["quartiles_us"]))
        ax.plot((low, high), (y, y), color=color, linewidth=1)
        ax.plot(share, y, marker, color=color, label=row["provider"], markersize=5)
    for ax in axes.values():
        ax.axvline(100, color="black", linewidth=1, linestyle=":")
        ax.set_xlim(left=0)
        ax.set_xlabel("share of a copy (%)", fontsize=9)
    label_layers(axes, layers)
    return entitled(axes, report, "fewest possible bytes over time, as share of a copy's bandwidth")


def speedup(report: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Each rival's time over tribn's, by layer, and the geometric mean below."""
    layers = [*names(rows), MEAN]
    axes = panels(1.5 + 0.22 * len(layers), sharey=True, sharex=True)
    means = [
        {**row, "times_tribn": row["speed_up"], "name": MEAN}
        for row in report["summary"]
        if "speed_up" in row
        and all(row[key] == rows[0][key] for key in ("clock", "layout", "dtype"))
    ]
    for ax, row in placed(axes, [*rows, *means]):
        if row["provider"] != "tribn" and row["times_tribn"]:
            color, marker = STYLES.get(row["provider"], OTHER)
            y = layers.index(row.get("name") or name(row))
            ax.plot(row["times_tribn"], y, marker, color=color, label=row["provider"], markersize=5)
    for ax in axes.values():
        ax.axvline(1, color="black", linewidth=1, linestyle=":")
        ax.axhline(len(layers) - 1.5, color="black", linewidth=0.5)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("speed-up (times)", fontsize=9)
    label_layers(axes, layers)
    return entitled(axes, report, "speed-up of tribn over each rival; right of 1 tribn is faster")


def roofline(report: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Time against the fewest possible bytes; the line is a copy."""
    axes = panels(3.6, sharex=True, sharey=True)
    copies = sorted((row["bytes"] / 1e6, row["us"]) for row in rows if row["direction"] == "copy")
    for ax in axes.values():
        ax.plot(*zip(*copies, strict=True), color="black", linewidth=1, label="copy")
        ax.set(xscale="log", yscale="log")
        ax.set_xlabel("fewest bytes (MB)", fontsize=9)
    for ax, row in placed(axes, rows):
        color, marker = STYLES.get(row["provider"], OTHER)
        x = row["bytes"] / 1e6
        ax.plot(x, row["us"], marker, color=color, label=row["provider"], markersize=4)
    axes[DIRECTIONS[0]].set_ylabel("time (µs)", fontsize=9)
    return entitled(axes, report, "time against the fewest bytes that must move")


def name(row: Row) -> str:
    """As in "256×56×56 add relu (3)", which occurs three times."""
    text = " ".join(["×".join(map(str, row["shape"][1:])), *row["op"].split("_")[1:]])
    return f"{text} ({row['count']})" if row["count"] > 1 else text


def names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(map(name, rows)))


def panels(height: float, **options: Any) -> dict[str, Axes]:
    """Axes side by side, by direction."""
    grid = new_figure(height).subplots(1, len(DIRECTIONS), **options)
    axes = dict(zip(DIRECTIONS, grid, strict=True))
    for direction, ax in axes.items():
        ax.set_title(direction, fontsize=10)
        tidy(ax)
    return axes


def placed(axes: dict[str, Axes], rows: Sequence[Row]) -> list[tuple[Axes, Row]]:
    """The panel of each row that has one."""
    return [(axes[row["direction"]], row) for row in rows if row["direction"] in axes]


def label_layers(axes: dict[str, Axes], layers: Sequence[str]) -> None:
    ax = axes[DIRECTIONS[0]]
    ax.set_yticks(range(len(layers)), layers)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    for ax in axes.values():
        ax.grid(axis="y", linewidth=0.4)


def entitled(axes: dict[str, Axes], report: dict[str, Any], text: str) -> Figure:
    """The figure, with a title that says so if there was no GPU, and the legend of all panels."""
    path = "" if report["path"] == "GPU" else f"{report['path']}. "
    handles = {}
    for ax in axes.values():
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure = axes[DIRECTIONS[0]].figure
    figure.legend(
        handles.values(),
        handles.keys(),
        title=f"{path}{report['cases']}: {text}",
        title_fontsize=10,
        alignment="left",
        loc="outside upper left",
        ncols=5,
        fontsize=9,
        frameon=False,
    )
    return figure
