"""Two revisions timed beside each other: a slower one and a wrong one are caught."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("rich")
if not shutil.which("git"):
    pytest.skip(
        "git is not installed, and revisions are checked out with it", allow_module_level=True
    )

from reports import KEY, bench, outcome, save

import tribn
from perf import compare

TEST = """
import torch
import tribn

def test_output():
    x = torch.randn(4, 3, 8)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(tribn.functional.batch_norm(x, None, None, training=True), expected)
"""
NORMALIZE = "    y: Tensor = aten.native_batch_norm("  # in tribn/reference.py
SLEEP = 0.005


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository of this tribn and perf, and one test. No GPU is seen there."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a git hook's, which name another repository
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "tribn")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "tribn@example.com")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more wait for each other on a busy machine
    root = tmp_path / "repository"
    monkeypatch.setattr(compare, "ROOT", root)
    for package in ("tribn", "perf"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(Path(tribn.__file__).parents[1] / package, root / package, ignore=ignored)
    (root / "tests").mkdir()
    (root / "tests/test_functional.py").write_text(TEST)
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "base")
    yield root
    assert len(git("worktree", "list").splitlines()) == 1  # the repository itself


def git(*arguments):
    done = compare.git(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def insert(line, root):
    """Puts a line in front of what normalizes."""
    path = root / "tribn/reference.py"
    before, after = path.read_text().split(NORMALIZE)
    path.write_text(f"{before}    {line}\n{NORMALIZE}{after}")


def test_a_slower_tree_is_seen(repository, tmp_path, capsys):
    insert(f"__import__('time').sleep({SLEEP})", repository)
    options = ["--shape", "4x3x8x8", "--layouts", "channels-first", "--out", str(tmp_path / "out")]
    code, said = outcome(["compare", "HEAD", "--rounds", "1", *options], capsys)
    assert code == 0, said
    (path,) = (tmp_path / "out").iterdir()
    report = json.loads(path.read_text())
    assert report["base"] == git("rev-parse", "HEAD")
    rows = {row["direction"]: row for row in report["rows"]}
    assert {"forward", "backward", "eval"} <= rows.keys()
    for direction in ("forward", "eval"):
        assert rows[direction]["change"] == "slower"
        assert rows[direction]["before_us"][0] < SLEEP * 1e6 < rows[direction]["after_us"][0]
    assert rows["backward"]["after_us"][0] < SLEEP * 1e6
    assert "slower" in said


def test_a_wrong_revision_is_refused(repository, tmp_path, capsys):
    insert("var = var * 1.1", repository)
    git("commit", "--quiet", "--all", "--message", "wrong")
    git("checkout", "HEAD~", "--", "tribn")
    code, said = outcome(["compare", "HEAD", "--out", str(tmp_path / "out")], capsys)
    assert code == 1
    assert f"tests fail on {git('rev-parse', 'HEAD')[:8]}" in said
    assert "Mismatched elements" in said
    assert not any((tmp_path / "out").iterdir())


class Programs:
    """Stand-ins for pytest and the benchmark: `us` and `broken` say how they end, by tree."""

    def __init__(self):
        self.us = {"base": [100.0], "here": [100.0]}  # of tribn, round by round
        self.key = {"base": KEY, "here": KEY}
        self.problems = {"base": [], "here": []}
        self.broken = ()
        self.ran = []

    def python(self, tree, *arguments, cwd):
        name = "here" if tree.path == compare.ROOT else "base"
        program = "bench" if "bench" in arguments else "pytest"
        turn = self.ran.count((name, program))
        self.ran.append((name, program))
        assert (tree.path / "tribn").is_dir()
        if (name, program) == self.broken:
            return subprocess.CompletedProcess(arguments, 1, stdout="because of this")
        if program == "bench":
            assert os.listdir(cwd) == ["perf"]  # no other tribn
            self.options = " ".join(arguments)
            out = Path(arguments[arguments.index("--out") + 1])
            out.mkdir()
            times = {"tribn": {self.key[name]: self.us[name][turn]}, "eager": {KEY: 100.0}}
            save(out / "bench-x.json", bench(times, problems=self.problems[name]))
        return subprocess.CompletedProcess(arguments, 0, stdout="")


@pytest.fixture
def programs(monkeypatch):
    programs = Programs()
    monkeypatch.setattr(compare.Tree, "python", lambda *a, **k: programs.python(*a, **k))
    return programs


@pytest.fixture
def run(repository, programs, tmp_path, capsys):
    def run(*options):
        return outcome(["compare", "HEAD", "--out", str(tmp_path / "out"), *options], capsys)

    return run


def test_trees_take_turns(run, programs, repository, tmp_path):
    insert("pass", repository)
    programs.us = {"base": [100.0, 103.0, 101.0], "here": [99.0, 50.0, 40.0]}
    code, said = run("--batch", "3")
    assert code == 0
    trees = ["base", "here"]
    assert programs.ran == [(tree, "pytest") for tree in trees] + [
        (tree, "bench") for tree in trees * 3
    ]
    (path,) = (tmp_path / "out").glob("compare-NVIDIA-H100*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["before_us"] == [100, 103, 101]
    assert row["after_us"] == [99, 50, 40]
    assert row["ratio"] == pytest.approx(50 / 101, rel=1e-4)
    assert row["change"] == "faster"
    assert "faster" in said
    assert "perf bench --batch 3 --providers tribn eager" in programs.options


@pytest.mark.parametrize("program", ["pytest", "bench"])
@pytest.mark.parametrize("tree", ["base", "here"])
def test_what_fails_is_not_compared(tree, program, run, programs):
    programs.broken = tree, program
    code, said = run()
    assert code == 1
    assert "because of this" in said
    assert (
        "on the working tree" if tree == "here" else f"on {git('rev-parse', 'HEAD')[:8]}"
    ) in said


@pytest.mark.parametrize("tree", ["base", "here"])
def test_what_the_benchmark_finds_wrong_is_not_compared(tree, run, programs):
    programs.problems[tree] = [
        {"op": "bn", "shape": [2, 3], "provider": "tribn", "problem": "output is off by 1"}
    ]
    code, said = run()
    assert code == 1
    assert "output is off by 1" in said


def test_only_equal_rows_are_compared(run, programs):
    programs.key["here"] = replace(KEY, clock="hot")
    code, said = run("--rounds", "1")
    assert code == 1
    assert "no layer was timed in every round" in said


def test_an_interrupt_leaves_no_worktree(run, programs, monkeypatch):
    def interrupted(tree, *arguments, cwd):
        assert len(git("worktree", "list").splitlines()) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "python", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["HEAD", "--rounds", "0"],
        ["HEAD", "--net", "none"],
        ["HEAD", "--providers", "compile"],
        ["HEAD", "--out", __file__],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(argv, repository, capsys):
    code, said = outcome(["compare", *argv], capsys)
    assert code == 2
    assert "usage: python -m perf" in said


def test_no_repository_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    code, said = outcome(["compare", "HEAD"], capsys)
    assert code == 2
    assert "is not a git repository" in said


@pytest.mark.parametrize(
    ("before", "after", "spread", "expected"),
    [
        ([100, 101], [111, 112], 1.05, "slower"),
        ([111, 112], [100, 101], 1.05, "faster"),
        ([100, 101], [111, 112], 1.2, "unclear"),  # eager was as unsteady
        ([100, 150], [149, 200], 1.05, "unclear"),  # rounds overlap
        ([149, 200], [100, 150], 1.05, "unclear"),
        ([100], [100], 1, "unclear"),
    ],
)
def test_a_change_is_clear_of_rounds_and_control(before, after, spread, expected):
    assert compare.change(before, after, spread) == expected
