"""Times tribn in the working tree against tribn at another git revision.

First each has to pass its own tests of what is timed. Then the working tree's benchmark runs on one
and the other, in turn and several times, so that what slows the machine for a while slows both. A
change counts if no round of one overlaps a round of the other, and if it is larger than the spread
of torch eager, which is the same in both, over all rounds. Exit code 1 says that tests fail, or
that tribn is wrong or cannot be timed, in either.

BASE comes first; options that are not listed here are those of bench.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple, NoReturn

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from perf import bench
from perf.report import RESULTS, Report, count, parser_of, write
from perf.rows import Key, key, means, problems, read, times

ROOT = RESULTS.parents[1]
TESTS = ("tests/test_functional.py", "tests/test_kernels.py")
CONTROL = "eager"  # the provider that no revision of tribn changes


class Tree(NamedTuple):
    """A checkout of tribn."""

    name: str
    path: Path

    def python(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs Python on this tribn, in a directory that has no other."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(self.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def commit(revision: str) -> str:
    """The hash of a revision, for argparse."""
    if not (ROOT / ".git").exists():
        raise argparse.ArgumentTypeError(f"{ROOT} is not a git repository")
    found = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    if found.returncode:
        raise argparse.ArgumentTypeError(f"{revision} is no revision: {found.stderr.strip()}")
    return found.stdout.strip()


def refuse(reason: str, output: str = "") -> NoReturn:
    """Exits with code 1, saying why after the last lines of a program's output."""
    raise SystemExit("\n".join([*output.splitlines()[-20:], f"Nothing is compared: {reason}."]))


@contextmanager
def worktree(revision: str, path: Path) -> Iterator[None]:
    """A checkout that is removed afterwards."""
    try:
        added = git("worktree", "add", "--detach", str(path), revision)
        if added.returncode:
            refuse(f"git cannot check out {revision}", added.stderr)
        yield
    finally:
        git("worktree", "remove", "--force", str(path))


# Measuring


def test(tree: Tree) -> None:
    there = [path for path in TESTS if (tree.path / path).exists()]
    done = tree.python("-m", "pytest", "-q", "-x", *(there or TESTS), cwd=tree.path)
    if done.returncode:
        refuse(f"tests fail on {tree.name}", done.stdout)


def measure(tree: Tree, options: Sequence[str], stage: Path, out: Path) -> Report:
    """A result of this benchmark on a tree; `stage` is a directory with this perf and no tribn."""
    done = tree.python("-m", "perf", "bench", *options, "--out", str(out), cwd=stage)
    if done.returncode:
        refuse(f"the benchmark fails on {tree.name}", done.stdout)
    report = read(*out.glob("bench-*.json"))
    if failed := problems(report, "tribn"):
        refuse(f"tribn is wrong or fails on {tree.name}", "\n".join(failed))
    return report


def alternate(base: str, rounds: int, options: Sequence[str], progress: Progress) -> list[Report]:
    """Results on the revision and the working tree, in turn, once both have passed their tests."""
    with TemporaryDirectory(prefix="tribn-") as name, worktree(base, Path(name, "base")):
        stage = Path(name, "stage")
        stage.mkdir()
        (stage / "perf").symlink_to(ROOT / "perf")
        trees = [Tree(base[:8], Path(name, "base")), Tree("the working tree", ROOT)]
        for tree in progress.track(trees, description="tests"):
            test(tree)
        runs = list(enumerate(trees * rounds))
        return [
            measure(tree, options, stage, Path(name, str(i)))
            for i, tree in progress.track(runs, description="benchmark")
        ]


# What the measurements show


def always(reports: Sequence[Report], provider: str) -> dict[Key, list[float]]:
    """A provider's time in each report, of what is timed in all."""
    found = [times(report, provider) for report in reports]
    return {key: [t[key] for t in found] for key in found[0] if all(key in t for t in found)}


def ratio(before: Sequence[float], after: Sequence[float]) -> float:
    return median(after) / median(before)


def change(before: Sequence[float], after: Sequence[float], spread: float) -> str:
    """What the times of some rounds show if that of the control spread by some factor."""
    moved = ratio(before, after)
    if moved > spread and min(after) > max(before):
        return "slower"
    if moved < 1 / spread and max(after) < min(before):
        return "faster"
    return "unclear"


def compare(reports: Sequence[Report]) -> list[Report]:
    """A row for all that every round has timed, from reports before and after in turn."""
    own, control = (always(reports, provider) for provider in ("tribn", CONTROL))
    rows = []
    for case in own:
        if case in control:
            before, after = own[case][::2], own[case][1::2]
            spread = max(control[case]) / min(control[case])
            rows.append(
                {
                    **asdict(case),
                    "before_us": before,
                    "after_us": after,
                    "ratio": ratio(before, after),
                    "control_spread": spread,
                    "change": change(before, after, spread),
                }
            )
    return rows


def tables(report: Report) -> list[Table]:
    """Rows and means, a table for each dtype and layout."""
    ratios = {key(row): row["ratio"] for row in report["rows"]}
    found: dict[str, Table] = {}
    for case, row in zip(ratios, report["rows"], strict=True):
        title = case.conditions.title
        if title not in found:
            found[title] = Table(
                "layer", "direction", "clock", title=f"{title}, µs", box=SIMPLE_HEAD
            )
            for column in (report["base"][:8], "here", "ratio", CONTROL):
                found[title].add_column(column, justify="right", no_wrap=True)
            found[title].add_column("change")
        us = (f"{median(row[side]):.1f}" for side in ("before_us", "after_us"))
        factors = (f"{row[name]:.2f}" for name in ("ratio", "control_spread"))
        found[title].add_row(str(case), case.direction, case.clock, *us, *factors, row["change"])
    for table in found.values():
        table.add_section()
    for group, ratio in means(ratios).items():
        labels = "mean", group.direction, group.clock, "", ""
        found[group.title].add_row(*labels, f"{ratio:.2f}")
    return list(found.values())


# Command line


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the options of bench."""
    usage = "%(prog)s [-h] BASE [--rounds N] [--out DIR] [options of bench]"
    parser = parser_of("compare", __doc__, usage=usage, allow_abbrev=False)
    parser.add_argument("base", type=commit, metavar="BASE", help="a commit, branch or tag")
    parser.add_argument(
        "--rounds",
        type=count,
        default=3,
        metavar="N",
        help="runs of the benchmark on either (%(default)s)",
    )
    arguments, options = parser.parse_known_args(argv)
    if "--providers" in options:
        parser.error(f"--providers: what is compared is tribn, and {CONTROL} shows the spread")
    options += ["--providers", "tribn", CONTROL]
    bench.parse(options, "cuda" if torch.cuda.is_available() else "cpu")  # refuses bad ones
    return arguments, options


def main(argv: Sequence[str] | None = None) -> None:
    arguments, options = parse(argv)
    console = Console()
    with Progress(console=console) as progress:
        reports = alternate(arguments.base, arguments.rounds, options, progress)
    rows = compare(reports)
    if not rows:
        refuse("no layer was timed in every round")
    last = reports[-1]
    report = {
        "command": "compare",
        "base": arguments.base,
        **{name: last[name] for name in ("environment", "path", "cases", "threads")},
        "rounds": arguments.rounds,
        "tests": TESTS,
        "rows": rows,
    }
    where = last["environment"]["device"] if last["path"] == "GPU" else "cpu"
    path = write(report, arguments.out, f"compare-{where}-{last['cases']}")
    for shown in tables(report):
        console.print(shown)
    console.print(
        "ratio: the working tree's median over the other; eager: longest round over shortest"
    )
    console.print(f"{report['path']}, {report['environment']['device']}: {path}", soft_wrap=True)
