"""What counts as a regression, and what is never compared."""

from dataclasses import replace

import pytest
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("rich")

from reports import KEY, bench, outcome, save

BACKWARD = replace(KEY, direction="backward")
SMALL = replace(KEY, shape=(8, 512, 7, 7), count=3)
PROBLEM = {
    "op": "bn",
    "shape": [8, 64, 56, 56],
    "provider": "tribn",
    "problem": "output is off by 1",
}


def result(own, **changes):
    """tribn's microseconds by key; torch.compile takes 200 and torch eager 300."""
    times = {"compile": dict.fromkeys(own, 200.0), "eager": dict.fromkeys(own, 300.0)}
    return bench({"tribn": own, **times}, **changes)


STORED = result({KEY: 100.0, BACKWARD: 100.0})


@pytest.fixture
def regress(tmp_path, capsys):
    """The outcome for a new result and stored ones."""
    stored = tmp_path / "stored"
    stored.mkdir()

    def run(new, *reports):
        for i, report in enumerate(reports):
            save(stored / f"bench-{i}.json", report)
        new = save(tmp_path / "new.json", new)
        return outcome(["regress", new, "--baseline", str(stored)], capsys)

    return run


@pytest.mark.parametrize(("drop", "code"), [(0.11, 1), (0.09, 0), (-0.5, 0)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_more_than_a_tenth_in_any_direction_is_a_regression(drop, code, direction, regress):
    slower = replace(KEY, direction=direction)
    new = result({KEY: 100.0, BACKWARD: 100.0} | {slower: 100 / (1 - drop)})
    found, said = regress(new, STORED)
    assert found == code
    assert f"{-drop:+.1%}" in said
    assert ("more than 10%" in said) == bool(code)


@pytest.mark.parametrize(("small", "code"), [(100 / 0.85, 1), (100 / 0.88, 0)])
def test_layers_count_as_often_as_they_occur(small, code, regress):
    stored = result({KEY: 100.0, SMALL: 100.0})
    new = result({KEY: 100.0, SMALL: small})
    assert regress(new, stored)[0] == code


def test_what_is_not_measured_again_has_no_excuse(regress):
    """Neither a direction nor more than a fifth of the layers of one."""
    code, said = regress(result({KEY: 100.0}), STORED)
    assert code == 1
    assert "backward, cold: 0 of 1 layers were measured again" in said
    layers = [replace(KEY, shape=(8, C, 7, 7)) for C in range(1, 11)]
    stored = result(dict.fromkeys(layers, 100.0))
    assert regress(result(dict.fromkeys(layers[2:], 100.0)), stored)[0] == 0
    code, said = regress(result(dict.fromkeys(layers[3:], 100.0)), stored)
    assert code == 1
    assert "forward, cold: 7 of 10 layers were measured again" in said


def test_one_layer_may_lose_less_than_a_third(regress):
    layers = [replace(KEY, shape=(8, C, 7, 7)) for C in range(1, 11)]
    stored = result(dict.fromkeys(layers, 100.0))
    for us, lost in ((100 / 0.71, False), (100 / 0.69, True)):
        code, said = regress(result(dict.fromkeys(layers, 100.0) | {layers[0]: us}), stored)
        assert code == lost
        assert ("bn_relu 8x1x7x7, bf16, channels-first, forward, cold: 31% slower" in said) == lost


def test_without_times_of_both_there_is_nothing_to_compare(regress):
    code, said = regress(bench({"tribn": {KEY: 100.0}}), STORED)
    assert code == 2
    assert "no time of tribn and torch.compile at the same layer" in said


def test_the_stored_result_with_most_in_common_counts(regress):
    other = result({replace(KEY, dtype="fp16"): 100.0, KEY: 300.0})
    assert regress(result({KEY: 150.0, BACKWARD: 100.0}), other, STORED)[0] == 1


def test_the_ratio_counts_not_the_time(regress):
    faster = {provider: {KEY: us} for provider, us in (("tribn", 90.0), ("compile", 100.0))}
    assert regress(bench(faster), STORED)[0] == 1
    keys = KEY, BACKWARD
    slower = {
        provider: dict.fromkeys(keys, us) for provider, us in (("tribn", 200.0), ("compile", 400.0))
    }
    assert regress(bench(slower), STORED)[0] == 0


@pytest.mark.parametrize(
    "changes",
    [{"device": "NVIDIA A100"}, {"device": "x86_64 CPU"}, {"cases": "mobilenet_v2"}],
    ids=str,
)
def test_other_devices_and_networks_are_no_baseline(changes, regress):
    stored = result({KEY: 1.0}, **changes)
    code, said = regress(STORED, stored)
    assert code == 0
    assert "No other result of resnet50 on NVIDIA H100 is stored" in said
    assert regress(result({KEY: 300.0, BACKWARD: 300.0}), stored, STORED)[0] == 1


def test_a_result_is_not_its_own_baseline(regress):
    assert "No other result" in regress(STORED, STORED)[1]


def test_other_conditions_are_said(regress):
    new = result({KEY: 100.0, BACKWARD: 100.0}, torch="2.14.0", triton="3.8")
    code, said = regress(new, STORED)
    assert code == 0
    assert "torch: 2.13.0 stored, 2.14.0 new" in said
    assert "triton: None stored, 3.8 new" in said


@pytest.mark.parametrize("field", [{"dtype": "fp16"}, {"shape": (4, 64, 56, 56)}], ids=str)
def test_nothing_in_common_is_an_error(field, regress):
    code, said = regress(result({replace(KEY, **field): 100.0}), STORED)
    assert code == 2
    assert "shares no shape" in said


@pytest.mark.parametrize("provider", ["tribn", None])
def test_a_wrong_result_fails_without_a_stored_one(provider, regress):
    code, said = regress(result({KEY: 100.0}, problems=[PROBLEM | {"provider": provider}]))
    assert code == 1
    assert "output is off by 1" in said


def test_a_rival_may_be_wrong(regress):
    new = result({KEY: 99.0, BACKWARD: 99.0}, problems=[PROBLEM | {"provider": "apex"}])
    assert regress(new, STORED)[0] == 0


def test_the_baseline_may_be_a_file(tmp_path, capsys):
    old, new = save(tmp_path / "a.json", STORED), save(tmp_path / "b.json", result({KEY: 150.0}))
    assert outcome(["regress", new, "--baseline", old], capsys)[0] == 1
    assert outcome(["regress", old, "--baseline", new], capsys)[0] == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"command": "bench", "rows": [{"us": 1}]}', '{"command": "demo"}']
)
def test_what_bench_did_not_write_is_refused(text, tmp_path, capsys):
    bad, good = tmp_path / "bad.json", save(tmp_path / "good.json", STORED)
    bad.write_text(text)
    for argv in ([str(bad)], [good, "--baseline", str(bad)], [str(tmp_path / "none")], []):
        code, said = outcome(["regress", *argv], capsys)
        assert code == 2
        assert "usage: python -m perf regress" in said


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [{**STORED["rows"][0], "op": ["a"]}]},
        {"problems": [{"op": "bn", "shape": [1], "problem": "none"}]},
        {"environment": {"device": 3}},
    ],
    ids=str,
)
def test_so_is_what_bench_would_not_write(change, tmp_path, capsys):
    code, said = outcome(["regress", save(tmp_path / "new.json", STORED | change)], capsys)
    assert code == 2
    assert "is not a result of bench" in said


def test_a_time_that_is_none_is_refused(tmp_path, capsys):
    for us in (0, None, "fast"):
        path = save(tmp_path / "new.json", result({KEY: us}))
        assert outcome(["regress", path], capsys)[0] == 2
