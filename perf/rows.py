"""The rows of bench's results: which of them time the same thing, and their means over layers."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from perf.bench import geometric_mean
from perf.report import Report


@dataclass(frozen=True)
class Conditions:
    """What the rows of a network's layers have in common."""

    layout: str
    dtype: str
    direction: str
    clock: str

    @property
    def title(self) -> str:
        return f"{self.dtype}, {self.layout}"

    def __str__(self) -> str:
        return f"{self.title}, {self.direction}, {self.clock}"


@dataclass(frozen=True)
class Key:
    """What a row says of the thing it times; everything else in it was measured."""

    op: str
    shape: tuple[int, ...]
    count: int  # of such layers in the network
    layout: str
    dtype: str
    direction: str
    clock: str

    @property
    def conditions(self) -> Conditions:
        return Conditions(self.layout, self.dtype, self.direction, self.clock)

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))}"


def key(row: Report) -> Key:
    values = {field.name: row[field.name] for field in fields(Key)}
    return Key(**values | {"shape": tuple(row["shape"])})


def times(report: Report, provider: str) -> dict[Key, float]:
    """Microseconds of a provider, of all that it was timed at."""
    return {key(row): row["us"] for row in report["rows"] if row["provider"] == provider}


def problems(report: Report, provider: str) -> list[str]:
    """Why a provider was not timed everywhere; provider None stands for all of them."""
    found = (row for row in report["problems"] if row["provider"] in (provider, None))
    return [f"{row['op']} {row['shape']}: {row['problem']}" for row in found]


def means(ratios: Mapping[Key, float]) -> dict[Conditions, float]:
    """Geometric means over layers, each as often as it occurs."""
    weighted = defaultdict(list)
    for key, ratio in ratios.items():
        weighted[key.conditions].append((ratio, key.count))
    return {conditions: geometric_mean(pairs) for conditions, pairs in weighted.items()}


def read(path: str | Path) -> Report:
    """A result of bench; a type of argument for argparse."""
    try:
        report: Report = json.loads(Path(path).read_text())
    except OSError as error:
        raise ArgumentTypeError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ArgumentTypeError(f"{path} is not JSON: {error}") from error
    if not _of_bench(report):
        raise ArgumentTypeError(f"{path} is not a result of bench")
    return report


def _of_bench(report: Report) -> bool:
    try:
        return (
            report["command"] == "bench"
            and all({key(row)} and row["provider"] and row["us"] > 0 for row in report["rows"])
            and all(row["op"] and row["problem"] for row in report["problems"])
            and all("provider" in row for row in report["problems"])
            and bool(report["cases"] and isinstance(report["environment"]["device"], str))
        )
    except (LookupError, TypeError):
        return False
