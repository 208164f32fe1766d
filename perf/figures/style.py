"""What all figures share: colours safe for colour blindness, plain axes, and the caption below."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GRAY = "#56B4E9", "#CC79A7", "#7F7F7F"

INCHES = 8  # wide: shown 700 to 800 pixels wide, a font size of 9 is a README's
CAPTION = 116  # characters that fit that width


def new_figure(height: float) -> Figure:
    return Figure(figsize=(INCHES, height), dpi=200, layout="constrained")


def title(axes: Axes, text: str, characters: int) -> None:
    axes.set_title(textwrap.fill(text, characters), fontsize=10, loc="left")


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def save(figure: Figure, caption: str, *paths: Path) -> None:
    """Writes the figure with its conditions below it, in the format of each path's suffix."""
    figure.supxlabel(textwrap.fill(caption, CAPTION), fontsize=9, x=0.01, ha="left")
    for path in paths:
        # No date and no random ids: the same JSON gives the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with rc_context({"svg.hashsalt": "tribn", "svg.fonttype": "none"}):
            figure.savefig(path, metadata=metadata)
