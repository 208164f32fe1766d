"""Compares a result of bench with the stored one of the same device and network.

What is compared is torch.compile's time over tribn's: its geometric mean over the layers, in each
direction, layout, dtype and clock. Exit code 1 says that one is more than 10 % below the stored
one, or that tribn was wrong or failed; 0 that none is, or that there is no stored result; 2 that a
file is not a result of bench, or shares nothing with the stored one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from perf.report import RESULTS, Report
from perf.rows import Conditions, Key, means, problems, read, times

DROP = 0.1  # of a mean, that is let pass


def ratios(report: Report) -> dict[Key, float]:
    """torch.compile's time over tribn's."""
    own, compiled = (times(report, provider) for provider in ("tribn", "compile"))
    return {key: compiled[key] / own[key] for key in own if key in compiled}


def pairs(stored: Report, new: Report) -> dict[Conditions, tuple[float, float]]:
    """The mean ratios of the layers that are in both results."""
    old, now = ratios(stored), ratios(new)
    old_means, new_means = (means({key: r[key] for key in old if key in now}) for r in (old, now))
    return {conditions: (old_means[conditions], new_means[conditions]) for conditions in old_means}


def dropped(stored: float, new: float) -> bool:
    return new < (1 - DROP) * stored


def comparable(stored: Report, new: Report) -> bool:
    """Whether they are of one device and network, and not the same file."""
    device, other = (report["environment"]["device"] for report in (stored, new))
    return device == other and stored["cases"] == new["cases"] and stored != new


def differences(stored: Report, new: Report) -> list[str]:
    """Versions and whatever else was not the same."""
    old, now = stored["environment"], new["environment"]
    found = [
        f"{name}: {old.get(name)} stored, {now.get(name)} new"
        for name in dict.fromkeys([*old, *now])
        if old.get(name) != now.get(name)
    ]
    if left_out := ratios(stored).keys() - ratios(new).keys():
        found.append(f"not measured again: {len(left_out)} of {len(ratios(stored))} ratios")
    return found


def table(found: Mapping[Conditions, tuple[float, float]]) -> Table:
    shown = Table("layout", "dtype", "direction", "clock", box=SIMPLE_HEAD)
    shown.title = "torch.compile's time over tribn's"
    for column in ("stored", "new", "change"):
        shown.add_column(column, justify="right")
    for conditions, (old, new) in found.items():
        numbers = f"{old:.2f}", f"{new:.2f}", f"{new / old - 1:+.1%}"
        style = "red" if dropped(old, new) else None
        shown.add_row(*astuple(conditions), *numbers, style=style)
    return shown


def baseline(text: str) -> list[Report]:
    """The results in a directory, or that of a file; for argparse."""
    path = Path(text)
    return [read(p) for p in (sorted(path.glob("bench-*.json")) if path.is_dir() else [path])]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf regress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("new", type=read, metavar="NEW", help="a file that bench has written")
    parser.add_argument(
        "--baseline",
        type=baseline,
        default=str(RESULTS),
        metavar="DIR|FILE",
        help="the stored results, or one of them (perf/results)",
    )
    arguments = parser.parse_args(argv)
    console, new = Console(), arguments.new
    if failed := problems(new, "tribn"):
        sys.exit("\n".join(["tribn is wrong or fails:", *failed]))
    what = f"{new['cases']} on {new['environment']['device']}"
    stored = next((old for old in arguments.baseline if comparable(old, new)), None)
    if stored is None:
        console.print(f"No other result of {what} is stored: there is nothing to compare with.")
        return
    for line in differences(stored, new):
        console.print(line)
    found = pairs(stored, new)
    if not found:
        parser.error(f"NEW shares no shape, layout and dtype with the stored result of {what}")
    console.print(table(found))
    if any(dropped(*pair) for pair in found.values()):
        sys.exit(f"{what}: tribn lost more than {DROP:.0%} against torch.compile.")
