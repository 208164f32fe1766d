"""Draws the figures of results, from their JSON alone, as SVG and PNG.

Results of `bench`, `step`, `sync` and `traffic` have figures. Without a JSON, draws all in
perf/results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from perf.report import RESULTS, Report, directory

# Commands whose results have figures: perf.figures.<command>.draw(report) gives, by name, a figure
# and its caption. An only one needs no name.
COMMANDS = ("bench", "step", "sync", "traffic")


def load(path: Path) -> Report:
    """A result that has figures, or ValueError."""
    try:
        report = json.loads(path.read_text())
        command = report["command"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result: {error!r}") from error
    if command not in COMMANDS:
        raise ValueError(f"{path} is of {command!r}: of {', '.join(COMMANDS)} there are figures")
    return report


def draw(report: Report, out: Path, stem: str) -> list[Path]:
    """Writes a report's figures, each as SVG and PNG."""
    from perf.figures.style import save

    written = []
    figures = import_module(f"perf.figures.{report['command']}").draw(report)
    for name, (figure, caption) in figures.items():
        file = "-".join(filter(None, (stem, name)))
        paths = [out / f"{file}{suffix}" for suffix in (".svg", ".png")]
        save(figure, caption, *paths)
        written += paths
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, nargs="*", metavar="JSON", help="results to draw")
    parser.add_argument(
        "--out", type=directory, metavar="DIR", help="where figures go (beside their JSON)"
    )
    arguments = parser.parse_args(argv)
    if not find_spec("matplotlib"):
        parser.error("matplotlib is missing: pip install matplotlib")
    reports = {}
    for path in arguments.json or sorted(RESULTS.glob("*.json")):
        try:
            reports[path] = load(path)
        except ValueError as error:
            if arguments.json:  # otherwise it is one of those without figures
                parser.error(str(error))
    for path, report in reports.items():
        out = arguments.out or path.parent
        try:
            figures = draw(report, out, path.stem)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            parser.error(f"{path} is no whole result of {report['command']}: {error!r}")
        if not figures:
            parser.error(f"{path} has nothing to draw: no layer was timed")
        for figure in figures:
            print(figure)
