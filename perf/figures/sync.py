"""What collectives of synchronized batch norm are reckoned to take on many GPUs."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.figures.style import BLUE, GRAY, GREEN, ORANGE, VERMILION, new_figure, tidy, title

COLORS = {8: BLUE, 64: GREEN, 512: ORANGE, 4096: VERMILION}  # by GPUs in a group


def draw(report: dict[str, Any]) -> dict[str, tuple[Figure, str]]:
    """The figure and its caption."""
    figure = new_figure(height=4.2)
    shares, enough = figure.subplots(1, 2)
    draw_shares(shares, report["estimate"])
    draw_enough(enough, report["estimate"])
    return {"": (figure, caption(report))}


def draw_shares(axes: Axes, estimate: dict[str, Any]) -> None:
    for row in estimate["rows"]:
        if row["ranks"] in COLORS:
            color, label = COLORS[row["ranks"]], f"{row['ranks']:,} GPUs"
            axes.plot(estimate["batches"], row["shares"], color=color, label=label)
    axes.axhline(estimate["share"], color=GRAY, linewidth=1, linestyle=":")
    axes.set(xlabel="images per GPU", ylabel="collectives / batch norm's time")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    title(axes, "Estimate: collectives over batch norm's time", 48)
    tidy(axes)


def draw_enough(axes: Axes, estimate: dict[str, Any]) -> None:
    ranks = [row["ranks"] for row in estimate["rows"]]
    batches = [row["enough"] for row in estimate["rows"]]
    axes.plot(ranks, batches, "o-", color=BLUE)
    for x, y in zip(ranks, batches, strict=True):
        axes.annotate(f"{y:,}", (x, y), (7, -9), textcoords="offset points", fontsize=8)
    axes.margins(x=0.2, y=0.1)
    axes.set(xlabel="GPUs synchronized", ylabel="images per GPU")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    title(axes, f"Estimate: batch from which on that is below {estimate['share']}", 48)
    tidy(axes)


def caption(report: dict[str, Any]) -> str:
    estimate, taken = report["estimate"], report["environment"]
    gpu, network = estimate["gpu"], estimate["network"]
    return (
        f"Reckoned on paper, not measured. {estimate['net']}, a training step: two all_gathers a "
        f"layer, of 16 C + 16 and 16 C + 8 bytes a GPU, one after another, over {network['name']}: "
        f"{1e6 * network['start']:.1f} µs each, {1e6 * network['within']:.1f} and "
        f"{1e6 * network['between']:.1f} µs a step of the ring in and between nodes, "
        f"{network['bandwidth'] / 1e9:.0f} and {network['bandwidth_between'] / 1e9:.0f} GB/s "
        f"({network['source']}). Batch norm's time: the bytes of its two launches a direction in "
        f"bf16, at the {gpu['bandwidth'] / 1e12:.3g} TB/s in the datasheet of {gpu['name']}. "
        f"Launches and the host are left out. tribn {taken['tribn']} ({taken['revision']})."
    )
