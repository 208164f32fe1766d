"""What is packaged, how it works where nothing else is installed, and its types."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("hatchling")

import tribn

ROOT = Path(tribn.__file__).parents[1]
NAME = f"tribn-{tribn.__version__}"


def python(*command, cwd, **environment):
    """Runs Python without what is installed in place; returns what is on stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source, target):
    """Makes sdist and wheel of a source tree, without a network."""
    python("-m", "hatchling", "build", "-d", target, "-t", "sdist", "-t", "wheel", cwd=source)
    return target / f"{NAME}.tar.gz", target / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """A directory with tribn's wheel installed and nothing else."""
    path = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    python("-m", "pip", "install", *options, "--target", path, built[1], cwd=path)
    return path


def test_wheel_has_the_package_and_nothing_else(built):
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tribn").rglob("*.py")}
    info = {f"{NAME}.dist-info/{n}" for n in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert set(zipfile.ZipFile(built[1]).namelist()) == sources | info | {"tribn/py.typed"}


def test_metadata(site):
    (path,) = site.glob("*.dist-info")
    metadata = Distribution.at(path).metadata
    assert (metadata["Name"], metadata["Version"]) == ("tribn", tribn.__version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    always = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert [r.split(">=")[0] for r in always] == ["torch", "triton"]
    assert always[1].endswith("; sys_platform == 'linux'")


def test_sdist_builds_the_same_wheel(built, tmp_path):
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # as of Python 3.11.4
        archive.extractall(tmp_path)
    source = tmp_path / NAME
    again = build(source, tmp_path / "dist")
    assert again[1].read_bytes() == wheel.read_bytes()
    names = {p.relative_to(source).as_posix() for p in source.rglob("*")}
    assert names >= {"LICENSE", "Makefile", "README.md", "tests/cases.py", "perf/__main__.py"}
    assert names >= {"perf/README.md", ".github/CONTRIBUTING.md"}


def test_runs_without_triton_and_without_a_gpu(site):
    """As installed, not as it lies here."""
    code = (
        "import runpy, sys; sys.modules['triton'] = None; import tribn; print(tribn.__file__);"
        "runpy.run_module('tribn', run_name='__main__', alter_sys=True)"
    )
    options = {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    path, versions, *_, last = python("-W", "error", "-c", code, cwd=site, **options).splitlines()
    assert Path(path).parent == site / "tribn"
    assert versions.startswith(f"tribn {tribn.__version__}, ")
    assert versions.endswith(", no Triton")
    assert last.startswith("Everything is right")


def test_a_users_program_names_all_that_is_public():
    nodes = list(ast.walk(ast.parse((ROOT / "tests" / "user.py").read_text())))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert named >= {*tribn.__all__, *tribn.functional.__all__, "partial_fit", "inverse"}


def test_types_of_a_users_program(site, tmp_path, pytestconfig):
    """By the annotations of what is installed, and as it runs."""
    pytest.importorskip("mypy")
    shutil.copy(ROOT / "tests" / "user.py", tmp_path)
    cache = pytestconfig.cache.mkdir("mypy")  # PyTorch takes long
    options = ("--strict", "--python-version", "3.10", "--config-file=", "--cache-dir", cache)
    environment = {"PYTHONPATH": str(site)}
    python("-m", "mypy", *options, "user.py", cwd=tmp_path, **environment)
    said = python("-W", "error", "user.py", cwd=tmp_path, **environment)
    assert said.splitlines()[-1] == tribn.__version__
