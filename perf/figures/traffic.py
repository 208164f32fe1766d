"""Bars of the bytes that each path moves: over all layers, and for each operation."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.figures.style import BLUE, ORANGE, new_figure, tidy, title

COLORS = {"forward": BLUE, "backward": ORANGE}
NAMES = {"bn": "BN", "relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU"}
BOUND = "single read"  # drawn paler than what runs


def draw(report: dict[str, Any]) -> dict[str, tuple[Figure, str]]:
    """The figure and its caption, by the suffix of its file."""
    rows = report["rows"]
    of_ops = shares(rows)
    ops = list(of_ops)
    figure = new_figure(height=5.6)
    panels = figure.subplot_mosaic([["all"] * len(ops), ops], height_ratios=(1.3, 1), sharey=True)
    layers = sum(row["count"] for row in rows)
    bars(panels["all"], report["totals"], f"{report['name']}, {layers} layers", characters=80)
    panels["all"].legend(frameon=False, fontsize=9, loc="lower right")
    for op, share in of_ops.items():
        name = "+".join(NAMES.get(part, part) for part in op.split("_"))
        bars(panels[op], report["ops"][op], f"{name}, {share:.0%} of bytes", characters=40)
    for op in ops[1:]:
        panels[op].tick_params(labelleft=False)
    limit = max(axes.get_xlim()[1] for axes in panels.values())
    for axes in panels.values():
        axes.set_xlim(0, limit)
    return {"": (figure, caption(report))}


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of all layers' bytes, by operation."""
    found: dict[str, float] = {}
    for row in rows:
        found[row["op"]] = found.get(row["op"], 0) + row["count"] * row["bytes"]
    return {op: size / sum(found.values()) for op, size in found.items()}


def bars(axes: Axes, totals: list[dict[str, Any]], text: str, characters: int) -> None:
    """One for each path: forward, then backward."""
    title(axes, text, characters)
    paths = [total["path"] for total in totals]
    left = [0.0] * len(paths)
    for direction, color in COLORS.items():
        widths = [total["units"][direction] for total in totals]
        drawn = axes.barh(paths, widths, left=left, color=color, label=direction)
        for path, bar in zip(paths, drawn, strict=True):
            bar.set_alpha(0.5 if path == BOUND else 1)
        left = [sum(pair) for pair in zip(left, widths, strict=True)]
    axes.bar_label(drawn, [f"{end:.1f}" for end in left], padding=3, fontsize=9)
    axes.margins(x=0.15)
    axes.set_xlabel("tensors read and written", fontsize=9)
    axes.yaxis.set_inverted(True)
    tidy(axes)


def caption(report: dict[str, Any]) -> str:
    taken = report["environment"]
    batch = f", batch {report['batch']}" if report["batch"] else ""
    return (
        "Bytes counted, not timed: tensors of the activation's size read and written, weighted by "
        f"size ({report['dtype']}, {report['layout']}{batch}). Holds for tensors larger than the "
        "L2 cache. tribn: checked against its kernels' loads and stores in Triton's interpreter; "
        f"what its plans for {report['gpu']['name']} keep in registers or half of the L2 cache "
        "counts as read once. Two launches: tribn where programs cannot wait for each other. "
        "eager, torch.compile: a model of their kernels. Pale: the least possible. "
        f"tribn {taken['tribn']} ({taken['revision']})."
    )
