"""Kernels that read their input once, on every kind of plan, forced, against torch and float64.

In Triton's interpreter the programs that wait for each other are processes.
"""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F16,
    F64,
    FUSED_LAYOUTS,
    INTERPRET,
    MASKS,
    Case,
    Fused,
    Inputs,
    assert_all_accurate,
    assert_fused_accurate,
    exact,
    least_columns,
    pairwise,
    run,
    torch_batch_norm,
)
from conftest import GPU

from tribn import launch, ops, reference
from tribn.functional import batch_norm
from tribn.launch import MERGED_AT_ONCE, collapse, single_read_plan

if not (INTERPRET or GPU):
    pytest.skip(
        "kernels run on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter",
        allow_module_level=True,
    )

import triton.language as tl

from tribn.kernels import backward, forward, host, scratch, tile

if INTERPRET:
    from cooperative import FORK, concurrently

    from perf.counting import counting
else:
    concurrently = nullcontext

pytestmark = pytest.mark.usefixtures("poisoned")
INTERPRETED = pytest.mark.skipif(not INTERPRET, reason="looks into Triton's interpreter")


@pytest.fixture(scope="module")
def device():
    return "cuda" if GPU else "cpu"


class Path(NamedTuple):
    """What of a plan a test chooses; the rest follows from that and the tensors."""

    block_n: int
    block_c: int
    block_s: int
    G: int  # programs of a group, or fewer where there are fewer tiles
    groups: int = 1  # or fewer where there are fewer slabs
    tier: str = "l2"
    streams: bool = False
    merged_at_once: int = MERGED_AT_ONCE

    def __str__(self):
        return "-".join(map(str, self))

    def plan(self, layout, itemsize, device, inputs=1, bits=False, *held):
        """As `single_read_plan`; bits come in whole bytes of neighbours."""
        plan = single_read_plan(layout, itemsize, device, inputs, bits, *held)
        block_c, block_s = self.block_c, self.block_s
        if bits and layout.channels_last:
            block_c = max(8, block_c)
        elif bits:
            block_s = max(8, block_s)
        tiles = -(-layout.N // self.block_n) * -(-layout.S // block_s)
        block_c = max(block_c, least_columns(layout))
        slabs = -(-layout.C // replace(plan, block_c=block_c).slab)
        tiles_per_split = 1 if self.tier == "registers" else -(-tiles // self.G)
        return replace(
            plan,
            block_n=self.block_n,
            block_c=block_c,
            block_s=block_s,
            tiles_per_split=tiles_per_split,
            splits=-(-tiles // tiles_per_split),
            channel_blocks=slabs,
            tier=self.tier,
            groups=min(self.groups, slabs),
            streams=self.streams,
        )


@pytest.fixture
def force(monkeypatch, device):
    """Makes the launchers take a path. What they allocate, they allocate anew.

    Few elements are enough for short planes to be seen side by side.
    """
    facts = replace(host.device_facts(torch.device(device)), cooperative=True)
    monkeypatch.setattr(host, "device_facts", lambda _: facts)
    monkeypatch.setattr(host, "_launchers", {})
    monkeypatch.setattr(scratch, "_of_streams", {})
    monkeypatch.setattr(launch, "ALONE", 0)

    def force(path):
        host._launchers.clear()
        monkeypatch.setattr(host, "single_read_plan", path.plan)
        monkeypatch.setattr(launch, "MERGED_AT_ONCE", path.merged_at_once)

    with concurrently():
        yield force


def in_two_launches(inputs, **options):
    """What `run` returns where programs cannot wait for each other."""
    with (
        mock.patch.object(host, "_refused", {inputs.x.device}),
        mock.patch.object(host, "_launchers", {}),
    ):
        return run(batch_norm, inputs, True, **options)


def by_reference(inputs, **options):
    with mock.patch.object(ops, "_kernels", return_value=reference):
        return run(batch_norm, inputs, True, **options)


PLAIN = [
    # one program a slab
    (Case((9, 6, 10), F64), Path(4, 4, 8, 1, 2, "memory", True)),
    (Case((3, 5, 9), layout="sliced", dy_layout="transposed"), Path(4, 1, 16, 1, 2, "registers")),
    (Case((3, 5, 7, 8), BF16, "channels_last", "channels_last"), Path(1, 2, 64, 1, 3, "l2", True)),
    # groups of several
    (Case((3, 5, 7, 8)), Path(2, 2, 32, 2, 2)),
    (Case((3, 5, 7, 8), layout="channels_last"), Path(1, 4, 64, 3, 2, "registers")),
    (Case((6, 11, 4), F16, channel_axis=-1), Path(1, 2, 8, 5, 1, "l2", True)),
    (Case((61, 9), BF16), Path(1, 16, 8, 8, 1, "registers")),
    (Case((2, 17, 3, 3, 3)), Path(1, 8, 16, 2, 2, "memory", True)),
    (Case((2, 3, 35), layout="sliced", dy_layout="transposed"), Path(1, 1, 16, 4, 2)),
    (Case((50, 1, 3), F64), Path(1, 1, 64, 3, 1, "registers")),
    # planes side by side: alone, and with others, of which there are more than channels
    (Case((9, 24, 3), BF16), Path(2, 16, 1, 1, 2, "memory", True)),
    (Case((37, 24, 3)), Path(4, 16, 1, 4, 2, "l2")),
    (Case((31, 16, 5, 5), F16), Path(2, 64, 1, 16, 2, "l2", True, 4)),
    (Case((9, 40, 7), F64), Path(4, 16, 1, 3, 3, "registers")),
    # pixels side by side
    (Case((72, 5), BF16), Path(1, 16, 2, 1, 1, "memory", True)),
    (Case((4, 6, 4, 7), layout="channels_last"), Path(1, 16, 4, 4, 1, "l2")),
    (Case((40, 9), F64), Path(1, 16, 1, 5, 1, "registers")),
    (Case((3, 65, 8, 8), F16, "channels_last"), Path(1, 16, 2, 6, 1, "l2", True, 4)),
    # a merge in several steps, and by some of the programs for the others
    (Case((6, 11, 4), channel_axis=-1), Path(1, 4, 32, 3, 1, "registers", False, 4)),
    (Case((3, 5, 24), F16), Path(1, 2, 8, 5, 2, "l2", False, 4)),
    (Case((2, 3, 125), F64), Path(1, 4, 16, 16, 1, "registers", False, 16)),
    # far from zero
    (Case((64, 3, 10), mean=2e3), Path(16, 2, 16, 2, 1)),
    (Case((64, 3, 4, 4), layout="channels_last", mean=-2e4), Path(1, 4, 32, 4, 1, "memory")),
    (Case((16, 3, 10), F64, mean=2e3), Path(4, 1, 16, 4, 1, "registers")),
    (Case((64, 3), BF16, mean=50.0, std=1.0), Path(1, 2, 32, 2, 2, "registers")),
]


def test_paths_are_of_every_kind(force):
    seen = []
    for case, path in PLAIN:
        force(path)
        t = Inputs.of(case)
        layout = collapse(t.x.shape, [torch.empty_like(t.x).stride(), t.x.stride()], t.axis)
        plan = path.plan(layout, t.x.itemsize, host.INTERPRETER)
        seen.append((layout, plan, plan.mergers, plan.splits > plan.block_g(plan.mergers)))
    assert {case.dtype for case, _ in PLAIN} == set(DTYPES)
    assert {plan.splits for _, plan, _, _ in seen} == {1, 2, 3, 4, 5, 6, 8, 16}
    assert len({(plan.tier, plan.channels_last) for _, plan, _, _ in seen if plan.waits}) == 3 * 2
    assert len({plan.tier for _, plan, _, _ in seen if not plan.waits}) == 3
    assert len({plan.policies for _, plan, _, _ in seen}) == 3
    assert {(min(mergers, 2), loops) for _, _, mergers, loops in seen} == {
        *((0, False), (1, False), (1, True), (2, False), (2, True))
    }
    for waits in (True, False):
        of_kind = [(layout, plan) for layout, plan, _, _ in seen if plan.waits == waits]
        assert any(1 < plan.groups < plan.channel_blocks for _, plan in of_kind)
        assert any(plan.channel_blocks % plan.groups for _, plan in of_kind)
        assert any(layout.N % plan.block_n for layout, plan in of_kind)
        assert any(layout.C % plan.block_c for layout, plan in of_kind)
        assert any(layout.S % plan.block_s for layout, plan in of_kind)
    tiles = [-(-layout.N // p.block_n) * -(-layout.S // p.block_s) for layout, p, _, _ in seen]
    assert any(n % plan.tiles_per_split for n, (_, plan, _, _) in zip(tiles, seen, strict=True))


@pytest.mark.parametrize(("case", "path"), PLAIN, ids=str)
def test_training_on_every_path(case, path, device, force):
    """As accurate as torch, as the reference and as the kernels of two launches."""
    force(path)
    inputs, oracle = Inputs.of(case, device), exact(Inputs.of(case), True)
    results = run(batch_norm, inputs, True)
    others = run(torch_batch_norm, inputs, True), by_reference(inputs), in_two_launches(inputs)
    for other in others:
        assert_all_accurate(results, other, oracle)


PATHS = {
    "one": Path(1, 2, 8, 1, 2, "memory", True),
    "one tile": Path(4, 1, 32, 1, 2, "registers"),
    "two": Path(2, 4, 8, 2, 1, "l2", True),
    "uneven": Path(1, 4, 8, 3, 2),
    "merged": Path(2, 2, 8, 4, 1, "registers", False, 2),  # by two for the others
}
FUSED = pairwise(
    {
        "path": tuple(PATHS.values()),
        "layout": tuple(FUSED_LAYOUTS),
        "fused": (  # activation, order, residual: what backward has to see differs
            *((None, "norm_act", "none"), ("relu", "norm_act", "none")),
            *(("relu", "norm_act", "sliced"), ("silu", "norm_act", "transposed")),
            *(("silu", "act_norm", "none"), ("leaky_relu", "act_norm", "wider")),
        ),
        "mask": MASKS,
        "dtype": DTYPES,
    }
)
FUSED = [(row.pop("path"), Fused(True, *row.pop("fused"), **row)) for row in FUSED]


@pytest.mark.parametrize(("path", "case"), FUSED, ids=str)
def test_fused_on_every_path(path, case, device, force):
    force(path)
    inputs, options = case.call(device)
    assert_fused_accurate(inputs, True, options)


@pytest.mark.parametrize("path", [PATHS["one"], PATHS["two"], PATHS["merged"]], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_from_the_output(path, layout, device, force):
    """Those of the reference, which keeps the output as well."""
    force(path)
    t = Inputs.of(replace(FUSED_LAYOUTS[layout], dtype=F64), device)
    t.weight.copy_(t.weight.sign() * (t.weight.abs() + 0.5))
    options = {"activation": torch.nn.LeakyReLU(0.2), "memory": "inplace"}
    results, expected = run(batch_norm, t, True, **options), by_reference(t, **options)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy
@pytest.mark.parametrize("path", [PATHS["two"], PATHS["merged"]], ids=str)
def test_what_is_not_finite_stays_in_its_channel(path, device, force):
    """In whichever member's part it is, the running statistics skip it."""
    force(path)
    t = Inputs.of(FUSED_LAYOUTS["contiguous"], device)
    t.x[2, 1, 2, 3], t.x[0, 3, 0, 0] = torch.nan, torch.inf
    results = run(batch_norm, t, True, nonfinite="skip")
    expected = in_two_launches(t, nonfinite="skip")
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], equal_nan=True, msg=name)
    finite = torch.tensor([True, False, True, False, True], device=device)
    assert torch.equal(results["y"].isfinite().all(-1).all(-1).all(0), finite)
    for name in ("running_mean", "running_var"):
        assert torch.equal(results[name] == getattr(t, name), ~finite)


@pytest.mark.parametrize("path", [PATHS["one"], PATHS["two"]._replace(groups=3)], ids=str)
def test_running_statistics_are_the_mean_of_all_batches(path, device, force, monkeypatch):
    """The counter moves when all groups have read it, even if one has not begun when another ends.

    And not at all where the mask leaves nothing of a batch.
    """
    force(path)
    t = Inputs.of(Case((3, 5, 12), F64), device)
    mean, var = torch.zeros(2, 5, dtype=F64, device=device)
    counter = torch.tensor(0, device=device)
    nothing = torch.zeros(3, 12, dtype=torch.bool, device=device)
    if INTERPRET and path.G > 1:
        ended = FORK.Event()

        def begin(*args):
            if tl.program_id(0) >= path.G:
                assert ended.wait(20)
            return tile.tiles(*args)

        def end(*args):
            forward_write(*args)
            ended.set()

        forward_write = forward.write
        monkeypatch.setattr(forward, "tiles", begin)
        monkeypatch.setattr(forward, "write", end)
    for batch in range(3):
        for mask in (None, nothing):
            batch_norm(
                *(t.x * (batch + 1), mean, var, None, None, True, None),
                num_batches_tracked=counter,
                mask=mask,
            )
            assert counter == batch + 1
    torch.testing.assert_close(mean, 2 * t.x.mean((0, 2)))
    torch.testing.assert_close(var, (1 + 4 + 9) / 3 * t.x.var((0, 2)))


def test_every_group_has_a_counter(device, force):
    """Of its own, and no more are used: those behind them are for other streams."""
    force(PATHS["two"]._replace(block_c=1, groups=5))
    t = Inputs.of(Case((3, 5, 12)), device)
    with torch.no_grad():
        batch_norm(t.x, None, None, training=True)
    ((counters, _),) = scratch._of_streams.values()
    assert counters.tolist() == [0, *[-(2**31)] * 5]
    assert not scratch._left[t.x.device].any()


@pytest.mark.parametrize("path", [PATHS["uneven"], PATHS["merged"]], ids=str)
def test_results_are_the_same_bits_every_time(path, device, force):
    """However many groups there are, which share nothing."""
    t = Inputs.of(Case((3, 5, 12), mean=1e3), device)
    results = []
    for groups in (1, 1, 2):
        force(path._replace(groups=groups))
        results.append(run(batch_norm, t, True, activation="relu"))
    for name, result in results[0].items():
        assert all(torch.equal(result, other[name]) for other in results[1:]), name


@pytest.mark.parametrize(("path", "layout"), [*zip(PATHS.values(), FUSED_LAYOUTS, strict=False)])
def test_nothing_is_written_out_of_bounds(path, layout, device, force, guarded):
    force(path)
    case = Fused(True, "relu", "norm_act", "sliced", "random", layout, BF16)
    inputs, options = case.call(device)
    run(batch_norm, inputs, True, **options)
    assert torch.uint8 in {buffer.dtype for buffer in guarded}


# What only the interpreter shows


@INTERPRETED
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("path", PATHS.values(), ids=str)
def test_every_element_is_read_once_or_visited_twice(path, layout, force):
    """And nothing outside of the launch's tensors is accessed."""
    force(path)
    t, options = Fused(True, "relu", "norm_act", "same", "random", layout, BF16).call()
    with counting() as launches:
        run(batch_norm, t, True, **options)
    forward, backward = (launched.tensors for launched in launches)
    for loads in (forward["x"].loads, *(backward[name].loads for name in ("x", "dy", "bits"))):
        if path.tier == "registers":
            assert (loads == 1).all()
        else:  # the first tile of a part once more, for the shift
            assert (loads - 2 <= (loads is forward["x"].loads)).all()
            assert (loads >= 2).all()
    assert (forward["residual"].loads == 1).all()
    for name in ("y", "bits", "mean", "var", "running_mean", "running_var"):
        assert (forward[name].stores == 1).all(), name
    for name in ("dx", "dresidual", "dweight", "dbias"):
        assert (backward[name].stores == 1).all(), name


STAGES = {
    "forward": (forward, "store_stats", "merge_stats", "y"),
    "backward": (backward, "store_sums", "merge_sums", "dx"),
}


@INTERPRETED
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # of numpy
@pytest.mark.parametrize("direction", STAGES)
@pytest.mark.parametrize("absent", [None, 0, 1])
def test_members_wait_for_the_one_that_is_late(absent, direction, force, monkeypatch):
    """Without the first barrier others merge what it has not stored, without the second they use
    what it has not merged.

    It is late at one of its stores: until another has gone on, or its patience is at an end.
    """
    module, store, merge, result = STAGES[direction]
    reader = merge if absent == 0 else "write"
    stores, barriers = itertools.count(), itertools.count()
    gone_on, patience = FORK.Event(), 0.5 if absent is None else 20

    def late(*args):
        if tl.program_id(0) == 0 and next(stores) == (absent or 0):
            gone_on.wait(patience)
        stage[store](*args)

    def read(*args):
        results = stage[reader](*args)
        if tl.program_id(0) != 0:
            gone_on.set()
        return results

    def barrier(*args):
        if next(barriers) != absent:
            tile.group_barrier(*args)

    stage = {name: getattr(module, name) for name in (store, reader)}
    force(PATHS["merged"])
    monkeypatch.setattr(module, store, late)
    monkeypatch.setattr(module, reader, read)
    monkeypatch.setattr(module, "group_barrier", barrier)
    t = Inputs.of(Case((4, 2, 11)))
    results, expected = run(batch_norm, t, True), by_reference(t)
    assert torch.allclose(results[result], expected[result], atol=1e-5) == (absent is None)


def test_what_the_driver_refuses_is_two_launches(monkeypatch):
    """Of which the device is asked no more, and nothing has changed before."""
    t, start, started = Inputs.of(Case((2, 1, 95, 93)), "cuda" if GPU else "cpu"), host.start, []
    facts = replace(host.INTERPRETER, sms=8, cooperative=True)
    monkeypatch.setattr(host, "device_facts", lambda _: facts)
    monkeypatch.setattr(host, "_launchers", {})
    monkeypatch.setattr(host, "_refused", set())

    def refuse(kept, *args):
        started.append(kept.function.__name__)
        if kept.plan.waits:
            raise host.Refused
        start(kept, *args)

    monkeypatch.setattr(host, "start", refuse)
    ours, theirs = (run(function, t, True) for function in (batch_norm, torch_batch_norm))
    assert_all_accurate(ours, theirs, exact(t, True))
    assert started[:3] == ["forward_kernel", "stats_kernel", "normalize_kernel"]
    assert started[3:] == ["backward_reduce_kernel", "backward_dx_kernel"]
    assert host._refused == {t.x.device}
