"""Compares a result of bench with the stored one of the same device and network.

What is compared is torch.compile's time over tribn's, of each layer and as the geometric mean over
the layers, in each direction, layout, dtype and clock. Exit code 1 says that a mean is more than
10 % below the stored one, or a layer's ratio more than 30 %; that more than a fifth of the stored
ratios of such a mean were not measured again; or that tribn was wrong or failed. 0 says that all is
well, or that there is no stored result; 2 that a file is not a result of bench, or has nothing that
can be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from perf.report import RESULTS, Report
from perf.rows import Conditions, Key, means, problems, read, times

DROP, LAYER_DROP = 0.1, 0.3  # of a mean and of one of its layers, that are let pass
MISSING = 0.2  # of the layers of a mean, that need not be measured again


def ratios(report: Report) -> dict[Key, float]:
    """torch.compile's time over tribn's."""
    own, compiled = (times(report, provider) for provider in ("tribn", "compile"))
    return {key: compiled[key] / own[key] for key in own if key in compiled}


def pairs(stored: Report, new: Report) -> dict[Conditions, tuple[float, float]]:
    """The mean ratios of the layers that are in both results."""
    old, now = ratios(stored), ratios(new)
    old_means, new_means = (means({key: r[key] for key in old if key in now}) for r in (old, now))
    return {conditions: (old_means[conditions], new_means[conditions]) for conditions in old_means}


def dropped(stored: float, new: float, most: float = DROP) -> bool:
    return new < (1 - most) * stored


def losses(stored: Report, new: Report) -> list[str]:
    """Everything that is a regression, in words."""
    old, now = ratios(stored), ratios(new)
    found = [
        f"{conditions}: {-change(*pair):.0%} slower against torch.compile, more than {DROP:.0%}"
        for conditions, pair in pairs(stored, new).items()
        if dropped(*pair)
    ]
    found += [
        f"{key}, {key.conditions}: {-change(old[key], now[key]):.0%} slower against torch.compile"
        for key in old
        if key in now and dropped(old[key], now[key], LAYER_DROP)
    ]
    had, have = (Counter(key.conditions for key in keys) for keys in (old, old.keys() & now.keys()))
    found += [
        f"{conditions}: {have[conditions]} of {layers} layers were measured again"
        for conditions, layers in had.items()
        if have[conditions] < (1 - MISSING) * layers
    ]
    return found


def change(stored: float, new: float) -> float:
    return new / stored - 1


def comparable(stored: Report, new: Report) -> bool:
    """Whether they are of one device and network, and not the same file."""
    device, other = (report["environment"]["device"] for report in (stored, new))
    return device == other and stored["cases"] == new["cases"] and stored != new


def differences(stored: Report, new: Report) -> list[str]:
    """Versions and whatever else was not the same."""
    old, now = stored["environment"], new["environment"]
    return [
        f"{name}: {old.get(name)} stored, {now.get(name)} new"
        for name in dict.fromkeys([*old, *now])
        if old.get(name) != now.get(name)
    ]


def table(found: Mapping[Conditions, tuple[float, float]]) -> Table:
    shown = Table("layout", "dtype", "direction", "clock", box=SIMPLE_HEAD)
    shown.title = "torch.compile's time over tribn's"
    for column in ("stored", "new", "change"):
        shown.add_column(column, justify="right")
    for conditions, (old, new) in found.items():
        numbers = f"{old:.2f}", f"{new:.2f}", f"{change(old, new):+.1%}"
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
    if not ratios(new):
        parser.error("NEW has no time of tribn and torch.compile at the same layer")
    candidates = [old for old in arguments.baseline if comparable(old, new)]
    if not candidates:
        console.print(f"No other result of {what} is stored: there is nothing to compare with.")
        return
    stored = max(candidates, key=lambda old: len(ratios(old).keys() & ratios(new).keys()))
    for line in differences(stored, new):
        console.print(line)
    found = pairs(stored, new)
    if not found:
        parser.error(f"NEW shares no shape, layout and dtype with the stored result of {what}")
    console.print(table(found))
    if lost := losses(stored, new):
        sys.exit("\n".join([f"{what}: tribn has lost ground, or was not measured again.", *lost]))
