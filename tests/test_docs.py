"""Docstrings of all that is public, what help() and errors say, and the code in the documents."""

import ast
import inspect
import json
import pydoc
import re
import shlex
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import of_no_kernel
from resnet import resnet18

of_no_kernel()
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import tribn
import tribn.__main__
from perf.__main__ import main as perf

ROOT = Path(tribn.__file__).parents[1]
DOCUMENTS = ["README.md", "perf/README.md", ".github/CONTRIBUTING.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def public():
    """What is public by name: functions, classes, and the methods that tribn gives them."""
    for space in (tribn, tribn.functional):
        for name in space.__all__:
            thing = getattr(space, name)
            if inspect.ismodule(thing):
                continue
            yield name, thing
            if inspect.isclass(thing):
                for method, function in inspect.getmembers(thing, inspect.isfunction):
                    own = function.__module__.startswith("tribn.")
                    if own and (method == "__init__" or not method.startswith("_")):
                        yield f"{name}.{method}", function


PUBLIC = dict(public())
FUNCTIONS = [name for name, thing in PUBLIC.items() if not inspect.isclass(thing)]


def test_what_is_public_is_found():
    found = {"batch_norm", "freeze", "BatchNorm2d.__init__", "BatchNorm2d.forward"}
    assert found | {"StandardScaler.partial_fit"} < {*FUNCTIONS}
    assert set(PUBLIC) - {*FUNCTIONS} == {n for n in tribn.__all__ if n[0].isupper()}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_start_with_a_sentence(name):
    assert re.match(r"[A-Z`].*[.:]$", inspect.getdoc(PUBLIC[name]).split("\n\n")[0], re.DOTALL)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name):
    """Under Args in their order, or where a sentence is enough by name."""
    owner, _, method = name.partition(".")
    doc, signature = inspect.getdoc(PUBLIC[name]), inspect.signature(PUBLIC[name])
    parameters = [parameter for parameter in signature.parameters if parameter != "self"]
    if method == "__init__" and owner.startswith("Lazy"):  # which refers to the layer it becomes
        became = inspect.signature(getattr(tribn, owner.removeprefix("Lazy")))
        assert ["num_features", *parameters] == list(became.parameters)
        assert "`num_features`" in doc
    elif "\nArgs:\n" in doc:
        args = doc.split("\nArgs:\n")[1].split("\n\n")[0]
        listed = re.findall(r"^    (\w[\w, ]*): ", args, re.MULTILINE)
        assert ", ".join(listed).split(", ") == parameters
    else:
        named = [p for p in parameters if p not in ("args", "kwargs")]
        assert len(named) <= 1
        assert all(re.search(rf"\b{p}\b", doc) for p in named)


@pytest.mark.parametrize(
    ("name", "listed"),
    [(f"BatchNorm{d}d", ("num_features: C, the", "residual: tensor of", "mask: ")) for d in "123"]
    + [(f"LazyBatchNorm{d}d", (f"A `BatchNorm{d}d` that", "residual: tensor of")) for d in "123"]
    + [("StandardScaler", ("num_features: C, the", "batch: tensor of", "mean_: ", "z: "))],
)
def test_help_tells_what_a_layer_takes(name, listed):
    text = pydoc.plain(pydoc.render_doc(getattr(tribn, name)))
    assert all(part in text for part in listed)
    # torch.nn's docstrings of methods that these classes have of their own
    assert "Initialize internal Module state" not in text
    assert "Define the computation performed at every call" not in text
    assert "'int'" not in text, "annotations are strings"


def raised():
    """The errors that tribn makes, as they are written."""
    for path in sorted((ROOT / "tribn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            if ast.unparse(node.exc.func) != "Refused":  # which convert catches, for its report
                yield pytest.param(ast.unparse(node.exc), id=f"{path.name}:{node.lineno}")


ERRORS = list(raised())


@pytest.mark.parametrize("text", ERRORS)
def test_errors_say_what_is_wrong_and_behind_a_colon_what_to_do(text):
    assert re.search(r"[^ ]: .", text)


def test_errors_are_found():
    assert len(ERRORS) > 50


def test_python_of_the_readme():
    """Its blocks one after the other, on the CPU, with the tensors that they take for granted."""
    weight, bias, running_mean, running_var = torch.rand(4, 64)
    names = {
        "x": torch.randn(8, 64, 7, 7),
        "shortcut": torch.randn(8, 64, 7, 7),
        "features": torch.randn(16, 13),
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "torchvision": SimpleNamespace(models=SimpleNamespace(resnet18=resnet18)),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block.replace(".cuda()", ""), "README.md", "exec"), names)
    tribn.set_sm_margin(0)
    torch.testing.assert_close(names["z"].mean(0), torch.zeros(13), atol=1e-6, rtol=0)
    assert names["count"] == 8 * 49


def test_report_of_the_readme():
    (text,) = re.findall(
        r"^```\n(\d+ batch norms: .*?)\n```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    lines = str(tribn.convert(resnet18(), report=True)[1]).splitlines()
    shown = text.splitlines()
    assert lines[: len(shown)] == shown
    assert len(lines) - len(shown) == 12  # as it says


def test_traffic_of_the_readme():
    text = (ROOT / "README.md").read_text()
    results = [
        json.loads((ROOT / f"perf/results/traffic-resnet50{layout}.json").read_text())["totals"]
        for layout in ("", "-channels-last")
    ]
    for first, last in zip(*results, strict=True):
        units = [
            f"{of['forward']:.1f} + {of['backward']:.1f} = {of['both']:.1f}"
            for of in (first["units"], last["units"])
        ]
        assert f"| {' | '.join([first['path'], *units])} | {first['saved']:.1f} |" in text


def commands():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        code = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
        code += re.findall(r"`([^`\n]+)`", text)
        for line in "\n".join(code).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"] or words[:2] == ["python", "-m"]:
                yield pytest.param(words, id=f"{document}: {' '.join(words)}")


COMMANDS = list(commands())


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_of_the_documents_are_understood(words, capsys):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*words[1:]} <= {*targets}
        return
    program, command = {"perf": (perf, words[3:4]), "tribn": (tribn.__main__.main, [])}[words[2]]
    options = dropwhile(lambda word: not word.startswith("-"), words[3:])  # no files or revisions
    with pytest.raises(SystemExit) as exit:
        program([*command, *options, "--help"])  # values that stand before it are checked first
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert "usage: python -m " in said
    assert all(re.search(rf" {w}[ \n]", said) for w in words if w.startswith("--"))


def test_commands_are_found():
    assert {"make", "python"} == {words.values[0][0] for words in COMMANDS}
    assert {"perf", "tribn"} == {w.values[0][2] for w in COMMANDS if w.values[0][0] == "python"}


def test_release_notes_are_of_this_version():
    last = (ROOT / "README.md").read_text().split("\n## ")[-1]
    assert last.startswith("Release notes\n")
    assert re.search(r"^\*\*(\S+)\*\*", last, re.MULTILINE)[1] == tribn.__version__
