"""Host time by layer: what is called, what is left out, and what stays as it was."""

import json
from functools import partial

import pytest
import torch
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("rich")
pytest.importorskip("triton")

import tribn
from perf import host
from perf.__main__ import main
from perf.codegen import absent
from tribn import kernels

FORWARD = ["module", "functional", "autograd", "launch", "launcher"]
BACKWARD = ["autograd", "launch", "launcher"]


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that would have been launched."""
    names = []
    monkeypatch.setattr(host, "nothing", lambda kept, *_: names.append(kept.kernel.name))
    return names


def run(tmp_path, argv, name="host-cpu"):
    main(["host", *argv.split(), "--out", str(tmp_path)])
    return json.loads((tmp_path / f"{name}.json").read_text())


def check(report):
    assert (report["command"], report["shape"]) == ("host", [2, 4, 2, 2])
    assert report["environment"]["tribn"] == tribn.__version__
    keys = [(row["op"], row["direction"], row["provider"], row["layer"]) for row in report["rows"]]
    expected = []
    for op in ("bn", "bn_relu"):
        expected += [(op, "forward", "tribn", layer) for layer in FORWARD]
        expected += [(op, "backward", "tribn", layer) for layer in BACKWARD]
        expected += [(op, "both", "tribn", "module")]
        expected += [(op, "forward", "eager", "module"), (op, "backward", "eager", "autograd")]
        expected += [(op, "both", "eager", "module")]
    assert keys == expected
    for row in report["rows"]:
        assert row["quartiles_us"][0] <= row["us"] <= row["quartiles_us"][1]
        assert 0.1 < row["us"] < 1e5


def test_report_without_a_gpu(tmp_path, capsys):
    report = run(tmp_path, "--device cpu --rounds 3")
    check(report)
    assert report["path"] == "no GPU: launches are no-ops"
    notes = {row["provider"]: row["note"] for row in report["rows"]}
    assert notes == {"tribn": "launches are no-ops", "eager": "CPU operators included"}
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("launcher", "no-ops", "host-cpu.json"))


@pytest.mark.gpu
def test_report_of_a_gpu(tmp_path):
    name = f"host-{torch.cuda.get_device_name().replace(' ', '-')}"
    report = run(tmp_path, "--rounds 20", name)
    check(report)
    assert all(row["note"] is None for row in report["rows"])
    launches = [row["own_us"] for row in report["rows"] if row["layer"] == "launch"]
    assert min(launches) > 1


def test_cpu_tensors_run_the_launchers_and_afterwards_the_reference_again(launched):
    x = torch.randn(host.SHAPE, requires_grad=True)
    start = kernels.host.start
    module = tribn.BatchNorm2d(4)
    with host.kernels_on_cpu():
        module(x).sum().backward()
    assert launched == ["forward_kernel", "backward_kernel"]
    assert kernels.host.start is start
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(module(x), expected)
    assert len(launched) == 2


@pytest.mark.parametrize("op", ["bn", "bn_relu"])
def test_every_layer_launches_what_the_outermost_does(op, launched):
    with host.kernels_on_cpu():
        calls = host.calls(op, "tribn", "cpu")
        kernels = {}
        for key, call in calls.items():
            launched.clear()
            with host.within(key[-1]):
                call()
            kernels[key] = list(launched)
    both = {"forward": ["forward_kernel"], "backward": ["backward_kernel"]}
    both["both"] = both["forward"] + both["backward"]
    assert kernels == {key: both[key[1]] for key in kernels}


def test_launcher_leaves_the_launches_out(monkeypatch):
    monkeypatch.setattr(kernels.host, "start", lambda *args: pytest.fail("launched"))
    x, plain = torch.randn(host.SHAPE), (None, 0.0, 0.0, False, False)
    args = (*(x, x.new_zeros(4), x.new_ones(4)), *(None,) * 4, 1e-5, 1, *plain)
    with absent("sm_90"):
        with host.within("launcher"):
            kernels.batch_norm_eval(*args)
            assert not torch.is_grad_enabled()
        with host.within("launch"), pytest.raises(pytest.fail.Exception, match="launched"):
            kernels.batch_norm_eval(*args)
    with host.within("module"):
        assert torch.is_grad_enabled()


def test_recorded_repeats_the_inner_call():
    class Owner:
        @staticmethod
        def inner(a, b):
            return a + b

    def outer():
        return 10 * Owner.inner(1, b=2)

    assert host.recorded(outer, Owner, "inner")() == 3
    assert outer() == 30


def test_own_time_is_the_difference_to_the_layer_below():
    samples = {
        ("bn", "forward", "tribn", "autograd"): [7.0, 9.0, 50.0],
        ("bn", "forward", "tribn", "launch"): [5.0, 4.0, 6.0],
        ("bn", "forward", "eager", "module"): [3.0, 1.0, 2.0],
    }
    rows = host.rows(samples, "cuda")
    assert [(row["us"], row["own_us"]) for row in rows] == [(9, 4), (5, 5), (2, 2)]
    assert rows[0]["quartiles_us"] == (8, 29.5)


def test_samples_are_single_calls_to_and_fro():
    order = []
    keys = [("bn", "forward", "tribn", layer) for layer in ("autograd", "launch")]
    calls = {key: partial(order.append, key[-1]) for key in keys}
    samples = host.sample(calls, 2, "cpu", lambda: None)
    turns = order[:: host.CALLS + 1]  # the first of a turn is not timed
    assert turns == ["autograd", "launch", "launch", "autograd"]
    assert all(0 < us < 1e4 for of_layer in samples.values() for us in of_layer)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--rounds 0", "no positive integer"),
        ("--device tpu", "'tpu' is neither cpu nor cuda"),
        (f"--out {__file__}", "no directory to write to"),
        ("more", "unrecognized arguments: more"),
    ],
)
def test_bad_arguments_exit_with_2(argv, text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["host", *argv.split()])
    assert exit.value.code == 2
    assert text in capsys.readouterr().err


def test_missing_gpu_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main(["host", "--device", "cuda"])
    assert exit.value.code == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_interpreter_exits_with_2(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit:
        main(["host"])
    assert exit.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
