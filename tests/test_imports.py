"""Which module imports which, what importing tribn brings along, and how long it takes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import of_no_kernel

of_no_kernel()

import tribn

ROOT = Path(tribn.__file__).parent

# A module imports only from those behind it.
ORDER = [
    "__main__",
    "explain",
    "convert",
    "fuse",
    "trace",
    "bytecode",
    "statistics",
    "nn",
    "functional",
    "export",
    "transforms",
    "autograd",
    "vmap",
    "formula",
    "distributed",
    "ops",
    "kernels",
    "reference",
    "activation",
    "launch",
]
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imports(path, lazy=True):
    """The modules a file of tribn imports; without `lazy`, those it imports as it is loaded."""
    names = []
    queue = [ast.parse((ROOT / path).read_text())]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: a relative import"
            if node.module == "tribn":
                names += [f"tribn.{alias.name}" for alias in node.names]
            else:
                names.append(node.module)
        if lazy or not isinstance(node, ast.FunctionDef):
            queue += ast.iter_child_nodes(node)
    return set(names)


def layer(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) != "__init__"], ids=str)
def test_imports_point_one_way(path):
    behind = ORDER[ORDER.index(layer(path)) + (layer(path) != "kernels") :]
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("tribn.")}
    assert inside <= set(behind)


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) != "kernels"], ids=str)
def test_triton_is_imported_by_the_kernels_alone_and_they_when_they_are_needed(path):
    assert not {name for name in imports(path) if name.split(".")[0] == "triton"}
    loaded = {name for name in imports(path, lazy=False) if name.startswith("tribn.kernels")}
    assert not loaded


def test_launch_needs_the_standard_library_only():
    assert {name.split(".")[0] for name in imports("launch.py")} <= sys.stdlib_module_names


def python(code, *flags, interpret="0"):
    """Runs code in a fresh interpreter, warnings being errors; returns what is on stderr."""
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_import_brings_no_triton_along(interpret):
    new = python(
        "import sys, torch; before = set(sys.modules); import tribn, tribn.__main__;"
        "print(*set(sys.modules) - before, file=sys.stderr)",
        interpret=interpret,
    ).split()
    assert "tribn" in new
    assert not [name for name in new if name.split(".")[0] == "triton"]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, tribn
x = torch.randn(4, 3, 5, requires_grad=True)
module = tribn.BatchNorm1d(3)
"""


def test_cpu_needs_no_triton():
    steps = "module(x).sum().backward(); module.eval()(x).sum().backward();"
    shapes = python(f"{WITHOUT_TRITON}{steps} print(*x.grad.shape, file=sys.stderr)")
    assert shapes.split() == ["4", "3", "5"]


def test_kernels_without_triton_say_what_to_install():
    said = python(
        WITHOUT_TRITON + "try: module(x)\n"
        "except ImportError as error: print(error, file=sys.stderr)",
        interpret="1",
    )
    assert "pip install triton" in said


def test_import_takes_at_most_50_ms_over_torch(monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    code = "import sys, time, torch; start = time.process_time(); import tribn;"
    code += "print(time.process_time() - start, file=sys.stderr)"
    # Of the processor's time: other processes take their own. The first time compiles.
    assert min(float(python(code)) for _ in range(3)) <= 0.05
