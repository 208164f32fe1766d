"""Figures of `bench`: share of copy bandwidth, speed-up over each rival, and time against bytes.

One of each for every layout and dtype, by the first clock that was read: cold, if there is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

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
COPY, MEAN = "copy", "geometric mean"


def draw(report: dict[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Figures and captions, by name."""
    clock = next((c for c in CLOCKS for row in report["rows"] if row["clock"] == c), None)
    rows = [row for row in report["rows"] if row["clock"] == clock]
    figures = {}
    for layout, dtype in dict.fromkeys((row["layout"], row["dtype"]) for row in rows):
        chosen = named([row for row in rows if (row["layout"], row["dtype"]) == (layout, dtype)])
        caption = conditions(report, chosen)
        figures[f"copy-{layout}-{dtype}"] = share_of_copy(report, chosen), caption
        figures[f"roofline-{layout}-{dtype}"] = roofline(report, chosen), caption
        if any(row["provider"] != "tribn" and row["times_tribn"] for row in chosen):
            figures[f"speedup-{layout}-{dtype}"] = speedup(report, chosen), caption
    return figures


def share_of_copy(report: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """The share of a copy's bandwidth by layer, with a line from quartile to quartile."""
    layers = names(rows)
    axes = panels(1.5 + 0.22 * len(layers), sharey=True)
    for ax, row in placed(axes, rows):
        y, share = layers.index(row["name"]), 100 * row["share_of_copy"]
        ends = [share * row["us"] / us for us in row["quartiles_us"]]
        mark(ax, row, share, y)
        ax.plot(ends, (y, y), color=style(row)[0], linewidth=1)
    for ax in axes.values():
        ax.axvline(100, color="black", linewidth=1, linestyle=":")
        ax.set_xlim(left=0)
        ax.set_xlabel("share of a copy (%)", fontsize=9)
    label_layers(axes, layers)
    return entitled(axes, report, "fewest possible bytes over time, as share of a copy's bandwidth")


def speedup(report: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Each rival's time over tribn's by layer, and below the geometric mean."""
    means = [
        {**row, "name": MEAN, "times_tribn": row.get("speed_up")}
        for row in report["summary"]
        if all(row[key] == rows[0][key] for key in ("clock", "layout", "dtype"))
    ]
    rivals = [r for r in (*rows, *means) if r["provider"] != "tribn" and r["times_tribn"]]
    layers = names(rivals)
    axes = panels(1.5 + 0.22 * len(layers), sharey=True, sharex=True)
    for ax, row in placed(axes, rivals):
        mark(ax, row, row["times_tribn"], layers.index(row["name"]))
    for ax in axes.values():
        ax.axvline(1, color="black", linewidth=1, linestyle=":")
        ax.axhline(layers.index(MEAN) - 0.5, color="black", linewidth=0.5)
        ax.set_xlabel("speed-up (times)", fontsize=9)
    ax.set_xscale("log")
    ax.set_xlim(min(ax.get_xlim()[0], 0.7), max(ax.get_xlim()[1], 1.5))
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high > 5 * low else (1, 1.5, 2, 3, 5, 7))
    )
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    label_layers(axes, layers)
    return entitled(axes, report, "speed-up of tribn over each rival; right of 1 tribn is faster")


def roofline(report: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Time against the fewest possible bytes, and the line of the best copy's bandwidth."""
    axes = panels(3.6, sharex=True, sharey=True)
    copies = [row for row in rows if row["direction"] == COPY]
    us_per_byte = min(row["us"] / row["bytes"] for row in copies)
    ends = [extreme(row["bytes"] for row in rows) for extreme in (min, max)]
    for ax in axes.values():
        ax.plot(
            [end / 1e6 for end in ends],
            [end * us_per_byte for end in ends],
            color="black",
            linewidth=1,
            label="bandwidth of the best copy",
        )
        ax.set(xscale="log", yscale="log")
        ax.set_xlabel("fewest bytes (MB)", fontsize=9)
    for ax, row in placed(axes, rows):
        mark(ax, row, row["bytes"] / 1e6, row["us"])
    axes[DIRECTIONS[0]].set_ylabel("time (µs)", fontsize=9)
    return entitled(axes, report, "time against the fewest bytes that must move")


def named(rows: Iterable[Row]) -> list[Row]:
    """With `name`, as in "256×56×56 add relu (3)", which occurs three times, at one batch."""
    rows = list(rows)
    start = 1 if len({row["shape"][0] for row in rows}) == 1 else 0
    return [
        row
        | {
            "name": " ".join(
                [
                    "×".join(map(str, row["shape"][start:])),
                    *row["op"].split("_")[1:],
                    *[f"({row['count']})"] * (row["count"] > 1),
                ]
            )
        }
        for row in rows
    ]


def names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def conditions(report: dict[str, Any], rows: Sequence[Row]) -> str:
    taken, first = report["environment"], rows[0]
    batches = {row["shape"][0] for row in rows}
    data = [first["dtype"], first["layout"], *[f"batch {n}" for n in batches if len(batches) == 1]]
    versions = [
        ("tribn", "tribn"),
        ("PyTorch", "torch"),
        ("Triton", "triton"),
        ("driver", "driver"),
    ]
    return " ".join(
        [
            f"{report['path']}: {taken['device']}.",
            f"{', '.join(data)}.",
            f"Clock: {CLOCKS[first['clock']]};",
            f"medians of up to {max(row['samples'] for row in rows)} samples.",
            *["(n): n such layers."] * any(row["count"] > 1 for row in rows),
            f"{', '.join(f'{name} {taken[key]}' for name, key in versions if taken[key])}.",
        ]
    )


def panels(height: float, **options: Any) -> dict[str, Axes]:
    """Axes side by side, by direction."""
    grid = new_figure(height).subplots(1, len(DIRECTIONS), **options)
    axes = dict(zip(DIRECTIONS, grid, strict=True))
    for direction, ax in axes.items():
        ax.set_title(direction, fontsize=10)
        tidy(ax)
    return axes


def placed(axes: dict[str, Axes], rows: Iterable[Row]) -> list[tuple[Axes, Row]]:
    """The panel of each row that has one."""
    return [(axes[row["direction"]], row) for row in rows if row["direction"] in axes]


def style(row: Row) -> tuple[str, str]:
    return STYLES.get(row["provider"], OTHER)


def mark(ax: Axes, row: Row, x: float, y: float) -> None:
    color, marker = style(row)
    on_top = 3 if row["provider"] == "tribn" else 2
    ax.plot(x, y, marker, color=color, label=row["provider"], markersize=5, zorder=on_top)


def label_layers(axes: dict[str, Axes], layers: Sequence[str]) -> None:
    first = axes[DIRECTIONS[0]]
    first.set_yticks(range(len(layers)), layers)
    first.set_ylim(len(layers) - 0.5, -0.5)
    for ax in axes.values():
        ax.grid(axis="y", linewidth=0.4)


def entitled(axes: dict[str, Axes], report: dict[str, Any], text: str) -> Figure:
    """The figure, with a title that says so if there was no GPU, and one legend for all panels."""
    path = "" if report["path"] == "GPU" else f"{report['path']}. "
    handles: dict[str, Any] = {}
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
