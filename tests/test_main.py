"""`python -m tribn`: that it passes, notices what is wrong, and says why no GPU is used."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import INTERPRET
from conftest import GPU

import tribn
from perf.devices import GPUS
from tribn import __main__ as cli
from tribn import launch, reference

ROOT = Path(tribn.__file__).parents[1]
OPERATORS = ["batch_norm_train", "batch_norm_backward", "batch_norm_eval", "batch_stats"]

once = pytest.mark.skipif(
    INTERPRET,
    reason="takes seconds, and checks the command line: run it without TRITON_INTERPRET=1",
)


@pytest.fixture
def operators():
    """The module whose operators run."""
    if INTERPRET or GPU:
        from tribn import kernels

        return kernels
    return reference


@pytest.fixture
def run(capsys):
    def run():
        code = cli.main([])
        assert launch.launches is None
        return code, capsys.readouterr().out

    return run


def test_passes():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tribn"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, *_ = lines = done.stdout.splitlines()
    assert first.startswith(f"tribn {tribn.__version__}, Python 3.")
    assert f"torch {torch.__version__}, " in first
    assert second.startswith("The GPU path is not used: ") != GPU
    assert ("TRITON_INTERPRET=1 is set" in second) == INTERPRET
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0] in OPERATORS]
    assert [row[0] for row in rows] == OPERATORS * len(cli.CASES) * (1 + GPU)
    assert all(float(row[-2]) <= float(row[-1]) <= 1e-3 for row in rows)
    of_cpu = [row[1] == "PyTorch" for row in rows[: len(OPERATORS) * len(cli.CASES)]]
    assert all(of_cpu) != INTERPRET
    assert re.fullmatch(r"Everything is right, in \d+\.\d s", lines[-1])


@once
@pytest.mark.parametrize(
    ("operator", "index", "result"),
    [
        ("batch_norm_train", 0, "y"),
        ("batch_norm_backward", 0, "gradient of x"),
        ("batch_norm_backward", 1, "gradient of weight"),
        ("batch_norm_backward", 2, "gradient of bias"),
        ("batch_norm_eval", 0, "y"),
        ("batch_stats", 0, "mean"),
        ("batch_stats", 1, "var"),
    ],
)
def test_small_errors_are_found(operator, index, result, operators, monkeypatch, run):
    right = getattr(operators, operator)

    def wrong(*args):
        results = right(*args)
        results[index].mul_(1 + 1e-5)
        return results

    monkeypatch.setattr(operators, operator, wrong)
    code, text = run()
    assert code == 1
    table, failed = text.split("FAILED, in ")
    off = r"(1\.0e-05|9\.\de-06), 1\.0e-06 is allowed"
    assert re.search(rf"float32: {operator}: {result} is off by {off}\n", failed)
    rows = [line for line in table.splitlines() if line.endswith("  FAILED")]
    assert any(row.startswith(f"  {operator}  ") and f"  {result}  " in row for row in rows)


@once
@pytest.mark.parametrize("result", ["x", "weight", "bias", "residual"])
def test_a_wrong_element_with_a_residual_is_found(result, operators, monkeypatch, run):
    right = operators.batch_norm_backward

    def wrong(*args):
        gradients = right(*args)
        if gradients[3] is not None:
            gradient = gradients[["x", "weight", "bias", "residual"].index(result)]
            gradient.masked_fill_(gradient == gradient.max(), 0)
        return gradients

    monkeypatch.setattr(operators, "batch_norm_backward", wrong)
    code, text = run()
    assert code == 1
    (failed,) = text.split("FAILED, in ")[1].splitlines()[1:]
    assert f"residual): batch_norm_backward: gradient of {result} is off by " in failed


@once
def test_statistics_that_do_not_move_are_found(operators, monkeypatch, run):
    right = operators.batch_norm_train
    monkeypatch.setattr(
        operators, "batch_norm_train", lambda *args: right(*args[:5], None, None, None, *args[8:])
    )
    code, text = run()
    assert code == 1
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert f"batch_norm_train: {name} is off by " in text


@once
def test_results_that_change_are_found(operators, monkeypatch, run):
    right, calls = operators.batch_norm_eval, []

    def changing(*args):
        calls.append(args)
        y, bits = right(*args)
        return y.add_(1e-7 * len(calls)), bits

    monkeypatch.setattr(operators, "batch_norm_eval", changing)
    code, text = run()
    assert code == 1
    assert "float32: batch_norm_eval: y is not the same bits again" in text
    assert "off by 1e" not in text[text.index("FAILED, in") :]


@once
def test_nan_is_found(operators, monkeypatch, run):
    right = operators.batch_stats

    def nan(*args):
        mean, var, count = right(*args)
        return mean.fill_(torch.nan), var, count

    monkeypatch.setattr(operators, "batch_stats", nan)
    code, text = run()
    assert code == 1
    assert "float32: batch_stats: mean is off by nan, " in text


def test_an_operator_that_raises_is_told_in_one_line(operators, monkeypatch, run):
    def broken(*args):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(operators, "batch_norm_eval", broken)
    code, text = run()
    assert code == 1
    assert text.splitlines()[-1].endswith("residual): RuntimeError: no kernel image is available")
    assert "for execution" not in text


# Why there is no GPU path: what torch and the import of the kernels have to say


@pytest.fixture
def machine(monkeypatch, run):
    """Runs where torch is built with a CUDA, and initializing it or importing the kernels fails."""

    def machine(cuda="13.0", init=None, kernels=None, triton=None):
        def fails(error):
            def function(*args):
                if error is not None:
                    raise error

            return function

        monkeypatch.setattr(cli.ops, "_INTERPRET", False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "init", fails(init))
        monkeypatch.setattr(cli, "import_module", fails(kernels))
        monkeypatch.setitem(sys.modules, "triton", triton and SimpleNamespace(__version__=triton))
        monkeypatch.setattr(cli, "check", lambda case, device: [f"no {case}"] * (device == "cuda"))
        monkeypatch.setattr(cli, "title", str)
        code, text = run()
        first, second, *_ = text.splitlines()
        return code, first, second.removeprefix("The GPU path is not used: ")

    return machine


def test_torch_without_cuda(machine):
    code, first, why = machine(cuda=None, triton="3.7.1")
    assert code == 0
    assert ", no CUDA, " in first
    assert first.endswith(", Triton 3.7.1")
    assert why == "this torch is built without CUDA: install a build with it"


def test_no_device(machine):
    code, first, why = machine(init=RuntimeError("Found no NVIDIA driver.\nIt is"), triton="3.7.1")
    assert code == 0
    assert ", CUDA 13.0, " in first
    assert why == "RuntimeError: Found no NVIDIA driver."


@pytest.mark.parametrize(
    ("error", "version", "said", "why"),
    [
        (
            ModuleNotFoundError("No module named 'triton'", name="triton"),
            None,
            "no Triton",
            "Triton is not installed: pip install triton",
        ),
        (
            ImportError("cannot import name 'knobs'"),
            "3.5.1+git",
            "Triton 3.5.1+git",
            "Triton 3.5.1+git is older than 3.6: pip install --upgrade triton",
        ),
        (
            ImportError("libtriton.so: undefined symbol"),
            None,
            "a broken Triton",
            "importing Triton fails with ImportError: libtriton.so: undefined symbol",
        ),
        (
            AttributeError("no attribute 'driver'"),
            "3.10.0",
            "Triton 3.10.0",
            "AttributeError: no attribute 'driver'",
        ),
    ],
    ids=["missing", "old", "broken", "changed"],
)
def test_kernels_that_cannot_be_imported_fail_on_a_gpu(machine, error, version, said, why):
    assert machine(kernels=error, triton=version)[::2] == (1, why)
    code, first, _ = machine(kernels=error, triton=version, init=RuntimeError("No CUDA GPUs"))
    assert code == 0
    assert first.endswith(f", {said}")


def test_a_gpu_that_is_used(machine):
    code, first, second = machine(triton="3.7.1")
    assert code == 1  # as the fixture has it
    assert ", CUDA 13.0, " in first
    assert not second


def test_oldest_triton_is_the_one_that_is_required():
    oldest = ".".join(map(str, cli.OLDEST_TRITON))
    assert f'"triton>={oldest};' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("case", cli.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("gpu", GPUS)
def test_programs_wait_for_each_other_on_a_gpu(gpu, case):
    x = torch.empty(case.shape).to(memory_format=case.memory_format)
    for tensors in (1, 3 + case.fused):  # forward, backward
        layout = launch.collapse(x.shape, [x.stride()] * tensors, 1)
        plan = launch.single_read_plan(
            layout, case.dtype.itemsize, GPUS[gpu].facts, min(tensors, 2), case.fused
        )
        assert plan.waits


@pytest.mark.parametrize("argv", [["more"], ["--fast"]], ids=" ".join)
def test_bad_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage: python -m tribn" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    assert "1 if something is not" in capsys.readouterr().out
