"""Synchronized batch norm on several processes against one process with all of their batches."""

from __future__ import annotations

import copy
import inspect
import os
import random
import time
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import (
    BF16,
    F16,
    F32,
    F64,
    INTERPRET,
    OF_NO_KERNEL,
    Case,
    Fused,
    Inputs,
    assert_accurate,
    compose,
    exact,
    fused_exact,
    run,
    ulp,
)
from ranks import Pool, group_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tribn
from tribn import distributed
from tribn.functional import batch_norm
from tribn.reference import kind

RANKS = (2, 3, 4)


@pytest.fixture(scope="module")
def pool():
    pool = Pool(max(RANKS))
    pool(make_groups)
    yield pool
    pool.close()


groups = {}  # of the first ranks, by how many: in every process of the pool


def make_groups(rank):
    for size in RANKS:
        groups[size] = group_of(range(size))


# How N samples are dealt out: the ends of the ranks' shares, as shares of N
DEALS = {
    2: {"even": (0.5,), "uneven": (0.2,), "empty": (0.0,)},
    3: {"even": (1 / 3, 2 / 3), "uneven": (0.1, 0.8), "empty": (0.4, 0.4)},
    4: {"even": (0.25, 0.5, 0.75), "uneven": (0.1, 0.3, 0.4), "empty": (0.0, 0.0, 0.3)},
}


def shares(N, ranks, deal):
    """The samples of every rank."""
    ends = [0, *(round(N * end) for end in DEALS[ranks][deal]), N]
    return [slice(*pair) for pair in pairwise(ends)]


@dataclass(frozen=True)
class Row:
    """A call on the batches of some ranks."""

    call: Case | Fused
    apart: float = 0.0  # between the means of one rank and the next

    def inputs(self, ranks, deal):
        """Those of one process, and the keywords beside them."""
        if isinstance(self.call, Case):
            t, options = Inputs.of(self.call), {}
        else:
            t, options = self.call.call()
        for rank, share in enumerate(shares(len(t.x), ranks, deal)):
            if self.apart:
                t.x[share] += self.apart * rank
        return t, options

    def exact(self, t, options):
        if options:
            return fused_exact(t, True, options)
        return exact(t, True)


def fused(activation="relu", order="norm_act", residual="none", mask="none", layout="contiguous",
          dtype=F32):  # fmt: skip
    return Fused(True, activation, order, residual, mask, layout, dtype)


ROWS = {
    "images": Row(Case((10, 6, 3, 4))),
    "rows": Row(Case((40, 5))),
    "channels last": Row(Case((10, 8, 3, 3), layout="channels_last", dy_layout="channels_last")),
    "channel axis": Row(Case((10, 7, 5), channel_axis=-1)),
    "strided": Row(Case((10, 5, 4, 6), layout="sliced", dy_layout="transposed")),
    "float16": Row(Case((10, 8, 40), F16, mean=50.0, std=1.0)),
    "bfloat16": Row(Case((10, 8, 40), BF16, mean=50.0, std=1.0)),
    "float64": Row(Case((10, 8, 9), F64)),
    "float32 parameters": Row(Case((10, 8, 9), BF16, param_dtype=F32)),
    "no variance": Row(Case((20, 4, 10), mean=1.0, std=1e-9**0.5)),
    "no variance in float64": Row(Case((20, 4, 10), F64, mean=1.0, std=1e-9**0.5)),
    "constant": Row(Case((20, 4, 10), mean=0.1, std=0.0)),
    "far from zero": Row(Case((20, 4, 10), mean=1e4, std=1.0)),
    "means apart": Row(Case((20, 4, 10), std=1.0), apart=1e4),
    "means apart in bfloat16": Row(Case((20, 4, 10), BF16, std=1.0), apart=30.0),
    "many values": Row(Case((80, 2, 28, 28), F16), apart=2.0),
    "relu": Row(fused()),
    "relu and residual": Row(fused(residual="transposed", layout="channels_last")),
    "wider residual": Row(fused("silu", residual="wider")),
    "activation first": Row(fused("sigmoid", "act_norm", layout="NC")),
    "relu first and residual": Row(fused("relu", "act_norm", "same", layout="sliced")),
    "mask": Row(fused(None, mask="random")),
    "lengths": Row(fused("gelu", mask="lengths", layout="NLC")),
    "whole rows masked": Row(fused("relu", residual="same", mask="rows", dtype=BF16)),
    "all masked": Row(fused("relu", mask="nothing")),
    "all": Row(fused("leaky_relu", "norm_act", "bfloat16", "random", "channels_last", F16)),
}


def of_rank(rank, name, ranks, deal):
    """What a rank's share of a row comes to, and the counter afterwards."""
    if rank >= ranks:
        return None
    t, options = ROWS[name].inputs(ranks, deal)
    share = shares(len(t.x), ranks, deal)[rank]
    t = replace(t, x=t.x[share], dy=t.dy[share])
    options |= {k: options[k][share] for k in ("residual", "mask") if k in options}
    options |= {"num_batches_tracked": torch.tensor(4), "process_group": groups[ranks]}
    return run(batch_norm, t, True, **options) | {"counter": options["num_batches_tracked"]}


TALL = ("y", "dx", "dresidual")  # what has samples
SUMS = ("dweight", "dbias")  # what is of a rank's batch alone


# In the interpreter one is enough: it differs only in the stages, which know no other ranks.
DEALT = [(3, "empty")] if INTERPRET else [(w, d) for w in RANKS for d in DEALS[w]]


@pytest.mark.parametrize(("ranks", "deal"), DEALT)
@pytest.mark.parametrize("name", ROWS)
def test_as_accurate_as_one_process(name, ranks, deal, pool):
    t, options = ROWS[name].inputs(ranks, deal)
    results = pool(of_rank, name, ranks, deal)[:ranks]
    expected, values = run(compose, t, True, **options), ROWS[name].exact(t, options)
    empty = options.get("mask") is not None and not options["mask"].any()
    for result in results:
        assert result.pop("counter") == (4 if empty else 5)
    for key, oracle in values.items():
        parts = [result[key] for result in results]
        slack = oracle.slack
        if key in TALL:
            whole = torch.cat(parts)
        elif key in SUMS:
            whole = sum(parts)
            # Each part has been rounded, and each sum of them.
            slack += sum(ulp(part.abs().max().item(), whole.dtype) for part in parts)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), key
            whole = parts[0]
        assert_accurate(whole, expected[key], oracle.values, key, slack)


# Modules


def module_steps(rank, name, options):
    """Three steps of a layer on this rank's batches: outputs and state; None if it takes no part.

    Without a rank the layer sees all batches at once.
    """
    torch.manual_seed(0)
    batches = torch.randn(3, 9, 4, 5)
    cls = tribn.BatchNorm1d
    if rank is not None:
        cls, batches = tribn.SyncBatchNorm, batches[:, shares(9, 4, "empty")[rank]]
    layer = cls(4, **options)
    if name == "frozen":
        tribn.freeze(layer)
    if name == "without statistics, evaluated":
        layer.eval()
    outputs = [layer(batch) for batch in batches]
    return torch.cat(outputs, 1), layer.state_dict()


MODULES = {
    "plain": {},
    "average": {"momentum": None},
    "without affine": {"affine": False},
    "without statistics": {"track_running_stats": False},
    "biased": {"correction": 0},
    "wide statistics": {"stats_dtype": F64},
    "inplace": {"activation": "leaky_relu", "memory": "inplace"},
    "frozen": {},
}


@pytest.mark.parametrize("name", MODULES)
def test_module_equals_one_of_one_process(name, pool):
    expected, state = module_steps(None, name, MODULES[name])
    results = pool(module_steps, name, MODULES[name])
    torch.testing.assert_close(torch.cat([y for y, _ in results], 0), expected, atol=1e-6, rtol=0)
    for _, of_rank in results:
        assert of_rank.keys() == state.keys()
        for key, value in of_rank.items():
            torch.testing.assert_close(value, state[key], atol=1e-6, rtol=1e-6)
            assert torch.equal(value, results[0][1][key]), key


def skipped(rank):
    """A channel in which one rank has infinity leaves its statistics alone, on all ranks."""
    layer = tribn.SyncBatchNorm(3, nonfinite="skip")
    x = torch.randn(4, 3, 5)
    x[0, 1, 0] = torch.inf if rank == 2 else 0
    y = layer(x)
    return y, layer.running_mean, layer.running_var, layer.num_batches_tracked


def test_what_is_not_finite_on_one_rank_moves_nothing_on_any(pool):
    for y, mean, var, counter in pool(skipped):
        assert (mean[1], var[1], counter) == (0, 1, 1)
        assert mean[[0, 2]].all()
        assert (var[[0, 2]] != 1).all()
        assert not y[:, 1].isfinite().any()
        assert y[:, [0, 2]].isfinite().all()


def nothing(rank):
    layer = tribn.SyncBatchNorm(3)
    x = torch.randn(0, 3, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not layer.weight.grad.any()
    assert not layer.num_batches_tracked
    assert torch.equal(layer.running_var, torch.ones(3))


def test_nothing_on_all_ranks_is_no_batch(pool):
    pool(nothing)


@OF_NO_KERNEL
def test_signature_is_torchs_and_then_keywords():
    ours, theirs = (
        list(inspect.signature(cls).parameters.values())
        for cls in (tribn.SyncBatchNorm, torch.nn.SyncBatchNorm)
    )
    positional = [p for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD]
    for our, their in zip(ours, positional, strict=False):
        assert (our.name, our.kind, our.default) == (their.name, their.kind, their.default)
    assert inspect.signature(tribn.BatchNorm1d).parameters.keys() <= {p.name for p in ours}


def test_checkpoints_are_torchs():
    ours, theirs = tribn.SyncBatchNorm(5), torch.nn.SyncBatchNorm(5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_alone_it_is_batch_norm():
    x = torch.randn(6, 3, 4)
    layer, expected = (
        tribn.SyncBatchNorm(3, activation="silu"),
        tribn.BatchNorm1d(3, activation="silu"),
    )
    assert torch.equal(layer(x), expected(x))
    assert torch.equal(layer.running_var, expected.running_var)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.randn(1, 3))


def copied(rank):
    """A copy is of the same process group, and has its own statistics."""
    layer = tribn.SyncBatchNorm(3, process_group=groups[3])
    tribn.convert_sync_batchnorm(layer, groups[4])
    twice = torch.nn.ModuleList([layer, layer])
    first, second = copy.deepcopy(twice)
    assert first is second is not layer
    assert first.process_group is groups[4]
    first(torch.randn(4, 3))
    assert (first.num_batches_tracked, layer.num_batches_tracked) == (1, 0)


@OF_NO_KERNEL
def test_layers_are_copied_but_not_their_process_group(pool):
    pool(copied)


def explained(rank):
    with redirect_stdout(StringIO()) as text:
        tribn.explain(tribn.SyncBatchNorm(3), torch.randn(4, 3, 5))
    return text.getvalue()


def test_explained(pool):
    for text in pool(explained):
        assert ("what all ranks have is gathered in between" in text) == INTERPRET
        assert text.startswith("SyncBatchNorm(3")


class Collectives(TorchDispatchMode):
    """Notes the bytes that this rank gives to each collective."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name == "tribn::gather":
            with self:
                return distributed.gather_and_look(*args)
        if name.startswith(("c10d", "_c10d_functional")) and "wait" not in name:
            assert name == "_c10d_functional::all_gather_into_tensor"
            self.bytes.append(args[0].nbytes)
        return function(*args, **(kwargs or {}))


def never(row):
    return False


@contextmanager
def as_on_a_gpu():
    """What ranks gather is not looked at."""
    with mock.patch.object(distributed, "host_looks", never):
        yield


def bytes_of(rank, C, dtype, gradient, mode, looks):
    """What a rank of a new group gives to the collectives of each direction."""
    group = group_of(range(4))
    layer = tribn.SyncBatchNorm(C, process_group=group, activation="relu", dtype=F32)
    x = torch.randn(3, C, 8).to(dtype).requires_grad_(gradient)
    if mode == "eval":
        layer.eval()
    if mode == "frozen":
        tribn.freeze(layer)
    with nullcontext() if looks else as_on_a_gpu():
        with Collectives() as forward:
            y = layer(x, residual=x.detach(), mask=torch.ones(3, 8, dtype=torch.bool))
        with Collectives() as backward:
            y.backward(torch.ones_like(y))
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_one_collective_in_each_direction(dtype, looks, pool):
    """Of as many bytes as the documentation says, whatever goes along with it."""
    C = 24
    forward, backward = 16 * C + 16, 16 * C + 8
    if looks:
        backward = forward
    assert pool(bytes_of, C, dtype, True, "train", looks) == [([forward], [backward])] * 4
    # Parameters alone need nothing from others.
    assert pool(bytes_of, C, dtype, False, "train", looks) == [([forward], [])] * 4
    for mode in ("eval", "frozen"):
        assert pool(bytes_of, C, dtype, True, mode, looks) == [([], [])] * 4


def checked(rank):
    name = groups[4].group_name
    row = torch.full((12,), kind(F32, 5), dtype=F64)
    torch.library.opcheck(torch.ops.tribn.gather.default, (row, name, 4, kind(F32, 5)))
    torch.library.opcheck(torch.ops.tribn.agree.default, (row, name, kind(F32, 5)))


@OF_NO_KERNEL
def test_operators_are_what_they_say(pool):
    pool(checked)


def late(rank, seed):
    """Results of two layers when ranks arrive in any order."""
    delays = random.Random(10 * seed + rank)
    torch.manual_seed(rank)
    x = torch.randn(5, 6, 7, dtype=F64).requires_grad_()
    torch.manual_seed(0)
    first, second = (tribn.SyncBatchNorm(6, activation=act, dtype=F64) for act in ("tanh", None))
    time.sleep(delays.random() / 20)
    y = first(x)
    time.sleep(delays.random() / 20)
    y = second(y)
    time.sleep(delays.random() / 20)
    y.square().mul(rank + 1).sum().backward()
    return [y.detach(), x.grad, *(s for layer in (first, second) for s in layer.buffers())]


def test_same_bits_on_every_rank_and_in_every_run(pool):
    """In float64, in which another order of sums shows."""
    runs = [pool(late, seed) for seed in range(3)]
    for run_ in runs:
        for rank, results in enumerate(run_):
            assert all(map(torch.equal, results, runs[0][rank]))
            assert all(map(torch.equal, results[2:], run_[0][2:]))


def second_order(rank, name):
    """y, its gradients, and those of a function of these, in float64."""
    options = dict(SECOND[name])
    torch.manual_seed(0)
    x, dy, residual, z = torch.randn(4, 9, 3, 4, dtype=F64)
    mask = torch.rand(9, 4) < 0.6 if options.pop("masked", False) else None
    group = None
    if rank is not None:
        share = shares(9, 4, "uneven")[rank]
        x, dy, residual, z = (t[share] for t in (x, dy, residual, z))
        mask = None if mask is None else mask[share]
        group = dist.group.WORLD
    weight, bias = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual, dy)]
    x, weight, bias, residual, dy = leaves
    if options.pop("residual", False):
        options["residual"] = residual
    y = batch_norm(*(x, None, None, weight, bias, True), mask=mask, process_group=group, **options)
    dx, dweight, dbias = torch.autograd.grad(y, leaves[:3], dy, create_graph=True)
    # Of what is of this rank's batch alone the sum over ranks is linear.
    value = (dx.tanh() * z).sum() + (dweight + dbias * weight).sum()
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (y, dx, dweight, dbias, *grads)]


SECOND = {
    "plain": {},
    "silu": {"activation": "silu"},
    "relu and residual": {"activation": "relu", "residual": True},
    "activation first": {"activation": "tanh", "order": "act_norm"},
    "mask": {"activation": "sigmoid", "masked": True},
}


@pytest.mark.parametrize("name", SECOND)
def test_gradients_of_gradients(name, pool):
    expected, results = second_order(None, name), pool(second_order, name)
    for i, value in enumerate(expected):
        parts = [result[i] for result in results]
        whole = torch.cat(parts) if value.dim() > 1 else sum(parts)
        torch.testing.assert_close(whole, value)


def pushed(rank):
    """Outputs and their tangents: of torch.func.jvp, of several at once, of tangents, backwards."""
    torch.manual_seed(0)
    x, *tangents = torch.randn(5, 9, 3, 4, dtype=F64)
    options = {"activation": "tanh"}
    if rank is not None:
        share = shares(9, 4, "uneven")[rank]
        x, tangents = x[share], [t[share] for t in tangents]
        options["process_group"] = dist.group.WORLD

    def function(x):
        return batch_norm(x, None, None, training=True, **options)

    def push(x, tangent):
        return torch.func.jvp(function, (x,), (tangent,))[1]

    first, *others = tangents
    y, of_first = torch.func.jvp(function, (x,), (first,))
    of_others = torch.func.vmap(partial(push, x))(torch.stack(others))
    of_tangent = torch.func.jvp(lambda x: push(x, first), (x,), (others[0],))[1]
    leaf = x.clone().requires_grad_()
    (backwards,) = torch.autograd.grad(
        function(leaf), leaf, torch.stack(others), is_grads_batched=True
    )
    return y, of_first, of_tangent, *of_others, *backwards


def test_tangents(pool):
    results = pool(pushed)
    for i, expected in enumerate(pushed(None)):
        torch.testing.assert_close(torch.cat([result[i] for result in results]), expected)


def compiled(rank, looks, **options):
    """Steps of a layer, eager and compiled as a whole."""
    results = []
    for compile in (False, True):
        torch.manual_seed(rank)
        layer = tribn.SyncBatchNorm(5, **options)
        function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compile else layer
        found = []
        with nullcontext() if looks else as_on_a_gpu():
            for _ in range(2):
                x = torch.randn(3 + rank, 5, 6, requires_grad=True)
                y = function(x)
                y.backward(torch.randn_like(y))
                found += [y.detach(), x.grad]
        results.append([*found, *(p.grad for p in layer.parameters()), *layer.buffers()])
    return results


@OF_NO_KERNEL
@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_as_a_whole(momentum, looks, pool):
    for eager, found in pool(partial(compiled, momentum=momentum, activation="silu"), looks):
        for ours, expected in zip(found, eager, strict=True):
            torch.testing.assert_close(ours, expected)


def compiled_on_one(rank):
    """One rank compiles what the others do not; then it calls another layer, compiled too."""
    group = group_of([0, 1, 2], 60)
    if group is None:
        return None
    torch.manual_seed(rank)
    first, other = (tribn.SyncBatchNorm(C, process_group=group) for C in (5, 6))
    if rank == 1:
        first, other = (torch.compile(of, fullgraph=True, backend="aot_eager")
                        for of in (first, other))  # fmt: skip
    for _ in range(2):
        for layer in (first, other):
            x = torch.randn(4, layer.num_features, requires_grad=True)
            layer(x).square().sum().backward()
    layer = other if rank == 1 else first
    found = attempt(layer, torch.randn(4, layer.num_features))
    first(torch.randn(4, 5))
    return *found, first.running_mean


@OF_NO_KERNEL
def test_ranks_may_be_compiled_or_not(pool):
    means = []
    for error, text, _, same, mean in pool(compiled_on_one)[:3]:
        assert error is ValueError
        assert "on rank 0, 2; 6 channels of torch.float32 on rank 1" in text
        assert same
        means.append(mean)
    assert all(torch.equal(means[0], mean) for mean in means)


@OF_NO_KERNEL
def test_evaluation_is_exported_without_collectives(pool):
    pool(exported)


def exported(rank):
    layer = tribn.SyncBatchNorm(5, activation="relu")
    layer(torch.randn(3, 5, 6))
    layer.eval()
    x = torch.randn(2, 5, 6)
    program = torch.export.export(layer, (x,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("batch_norm" in call for call in calls)
    assert not any(name in call for call in calls for name in ("c10d", "agree", "gather"))
    torch.testing.assert_close(program.module()(x), layer(x))
    with pytest.raises(Exception, match="export it in evaluation"):
        torch.export.export(layer.train(), (x,))


def accumulated(rank, momentum):
    """State of a layer after two steps in three parts; of all batches at once without a rank."""
    torch.manual_seed(0)
    steps = torch.randn(2, 12, 3, 4)
    if rank is None:
        layer = tribn.BatchNorm1d(3, momentum=momentum)
        for step in steps:
            layer(step)
        return layer.state_dict()
    layer = tribn.SyncBatchNorm(3, momentum=momentum)
    for step in steps:
        with tribn.accumulate_stats(layer):
            for part in step.split((5, 5, 2)):
                layer(part[shares(len(part), 4, "empty")[rank]])
    return layer.state_dict()


def updated(rank):
    """State of a layer after `update_stats` with a rank's share of the data; with all of it."""
    torch.manual_seed(0)
    x = torch.randn(12, 3, 4) * 2 + 5
    x[0, 1, 2] = torch.inf  # that share says nothing of this channel
    parts = [x[share] for share in shares(12, 4, "empty")]
    cls = tribn.BatchNorm1d if rank is None else tribn.SyncBatchNorm
    layer = cls(3, nonfinite="skip")
    tribn.update_stats(layer, parts if rank is None else [parts[rank]])
    return layer.state_dict()


def test_updated_statistics_are_those_of_all_ranks(pool):
    expected, results = updated(None), pool(updated)
    for state in results:
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(state[name], expected[name])
            assert torch.equal(state[name], results[0][name])
        assert state["num_batches_tracked"] == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_accumulated_statistics_are_those_of_all_ranks(momentum, pool):
    expected, results = accumulated(None, momentum), pool(accumulated, momentum)
    for state in results:
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value)
            assert torch.equal(state[name], results[0][name])


# What goes wrong


def attempt(layer, x, call=torch.nn.Module.__call__):
    """What is raised, after how many seconds, and whether the layer's statistics stayed."""
    before, start = [b.clone() for b in layer.buffers()], time.monotonic()
    try:
        call(layer, x)
    except (ValueError, RuntimeError) as error:
        seconds = time.monotonic() - start
        same = all(map(torch.equal, before, layer.buffers()))
        return type(error), str(error), seconds, same
    raise AssertionError("nothing was raised")


TIMEOUT = 2
# A FileStore looks but once a second.
BOUND = TIMEOUT + 3


def disagreeing(rank, what):
    """Rank 1 calls otherwise than the others: with what is new to all ranks, or known to all."""
    group = group_of([0, 1, 2], TIMEOUT)
    if group is None:
        return None
    first, other = (tribn.SyncBatchNorm(C, process_group=group) for C in (5, 6))
    x = torch.randn(4, 5)
    if what != "channels":
        first(x)
    if what == "known channels":
        other(torch.randn(4, 6))
    if what == "known dtype":
        first(x.bfloat16())
    layer = other if rank == 1 and "channels" in what else first
    dtype = BF16 if rank == 1 and "dtype" in what else F32
    return attempt(layer, torch.randn(4, layer.num_features, dtype=dtype))


@pytest.mark.parametrize("what", ["channels", "known channels"])
def test_channels_that_differ_are_named_on_every_rank(what, pool):
    for error, text, _, same in pool(disagreeing, what)[:3]:
        assert error is ValueError
        assert (
            "5 channels of torch.float32 on rank 0, 2; 6 channels of torch.float32 on rank 1"
            in text
        )
        assert same


def test_dtypes_that_differ_are_named_on_every_rank(pool):
    for error, text, _, same in pool(disagreeing, "known dtype")[:3]:
        assert error is ValueError
        assert "on rank 0, 2; 5 channels of torch.bfloat16 on rank 1" in text
        assert same


def out_of_step(rank):
    """Rank 1 goes backward where the others go forward, then all go on together."""
    group = group_of([0, 1, 2], TIMEOUT)
    if group is None:
        return None
    torch.manual_seed(rank)
    x = torch.randn(4, 5, requires_grad=True)
    layer = tribn.SyncBatchNorm(5, process_group=group)
    layer(x).sum().backward()
    loss = layer(x).sum()
    if rank == 1:
        found = attempt(layer, loss, lambda _, loss: loss.backward())
    else:
        found = attempt(layer, x)
    layer(x)
    return *found, layer.running_mean


def test_directions_that_differ_are_named_on_every_rank(pool):
    means = []
    for error, text, _, same, mean in pool(out_of_step)[:3]:
        assert error is ValueError
        assert "float32 on rank 0, 2; 5 channels of torch.float32 in backward on rank 1" in text
        assert same
        means.append(mean)
    assert means[0].any()
    assert torch.equal(means[0], means[1])


@OF_NO_KERNEL
def test_a_dtype_new_to_one_rank_is_named_on_every_rank(pool):
    results = pool(disagreeing, "new dtype")[:3]
    for rank, (error, text, seconds, same) in enumerate(results):
        assert error is RuntimeError
        assert "5 channels of torch.bfloat16" in text
        assert ("for rank 0, 2" if rank == 1 else "rank 1 has come with") in text
        assert seconds < BOUND
        assert same


def left_behind(rank, what):
    """Which of the keys that a first turn has, its store still has when all are done."""
    group = group_of([0, 1, 2], 60)
    if group is None:
        return []
    C = 6 if rank == 1 and what == "different" else 5
    with suppress(ValueError):
        tribn.SyncBatchNorm(C, process_group=group)(torch.randn(4, C))
    dist.barrier(group)
    store = distributed._store(group)
    counts = [f"kind/{kind(F32, channels)}" for channels in (5, 6)]
    keys = ["come", "left", "outcome", *counts, *(f"rank/{r}" for r in range(3))]
    return [key for key in keys if store.check([f"tribn/0/{key}"])]


@OF_NO_KERNEL
@pytest.mark.parametrize("what", ["same", "different"])
def test_agreement_leaves_nothing_for_a_later_group_with_the_same_store(what, pool):
    assert pool(left_behind, what) == [[]] * 4


def missing(rank, first):
    group = group_of([0, 1, 2], TIMEOUT)
    if group is None:
        return None
    layer = tribn.SyncBatchNorm(5, process_group=group)
    if not first:
        layer(torch.randn(4, 5))
    if rank == 1:
        return None
    return attempt(layer, torch.randn(4, 5))


@OF_NO_KERNEL
@pytest.mark.parametrize("first", [True, False])
def test_a_missing_rank_ends_in_an_error(first, pool):
    results = pool(missing, first)
    for error, text, seconds, same in (results[0], results[2]):
        assert error is RuntimeError
        assert ("for rank 1:" if first else "did not come within 0:00:02.") in text
        assert seconds < BOUND
        assert same


class GroupOfTwo:
    def rank(self):
        return 0

    def size(self):
        return 2


class Late(dist.HashStore):
    """In which the other rank comes when this one has just waited too long."""

    def wait(self, keys, timeout):
        self.set("tribn/0/rank/1", "0")
        raise RuntimeError


@OF_NO_KERNEL
def test_a_rank_that_comes_too_late_is_waited_for_in_vain(monkeypatch):
    monkeypatch.setattr(distributed, "_store", lambda group: store)
    store = Late()
    with pytest.raises(RuntimeError, match="batch norm for one that is late: all"):
        distributed._turn(GroupOfTwo(), kind(F32, 5), 2)


def accumulate(layer, batches):
    with tribn.accumulate_stats(layer):
        for x in batches:
            layer(x)


def done_early(rank, call):
    """Rank 1 has a batch less than the others."""
    group = group_of([0, 1, 2], TIMEOUT)
    if group is None:
        return None
    layer = tribn.SyncBatchNorm(5, process_group=group)
    accumulate(layer, [torch.randn(4, 5)])
    return attempt(layer, [torch.randn(4, 5)] * (2 if rank == 1 else 3), call)


@OF_NO_KERNEL
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (tribn.update_stats, "with its last batch done"),
        (accumulate, "on rank 0, 2; 5 channels of torch.float64 in accumulated batches on rank 1"),
    ],
)
def test_a_rank_with_a_batch_less_moves_nothing_on_any(call, said, pool):
    results = pool(done_early, call)[:3]
    assert said in results[1][1]
    for _, _, seconds, same in results:
        assert seconds < BOUND
        assert same


class Two(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.a, self.b = (tribn.SyncBatchNorm(5, process_group=group) for _ in range(2))
        self.used = self.a, self.b

    def forward(self, x):
        for layer in self.used:
            x = layer(x)
        return x


def not_of_every_group(rank, call):
    """Rank 2 is in no group of the layer that it does not use."""
    model = Two(group_of([0, 1], TIMEOUT) or dist.GroupMember.NON_GROUP_MEMBER)
    model.b.process_group = group_of([0, 1, 2], TIMEOUT)
    if rank == 2:
        model.used = (model.b,)
    if rank < 3:
        call(model, [torch.randn(4, 5)] * 2)
    return model.a.running_mean, model.b.running_mean


@OF_NO_KERNEL
@pytest.mark.parametrize("call", [tribn.update_stats, accumulate])
def test_ranks_wait_for_those_of_their_groups_alone(call, pool):
    first, second, third, _ = pool(not_of_every_group, call)
    assert torch.equal(first[0], second[0])
    assert first[0].any()
    assert not third[0].any()
    assert torch.equal(first[1], third[1])
    assert first[1].any()


def using_others(rank, call):
    """Rank 1 calls one layer twice where the others call two."""
    group = group_of([0, 1, 2], TIMEOUT)
    if group is None:
        return None
    model, batches = Two(group), [torch.randn(4, 5)] * 2
    call(model, batches)
    if rank == 1:
        model.used = model.a, model.a
    return attempt(model, batches, call)


@OF_NO_KERNEL
@pytest.mark.parametrize("call", [tribn.update_stats, accumulate])
def test_a_rank_that_uses_other_layers_moves_nothing_on_any(call, pool):
    """Not even on the one that has gathered all that it has seen."""
    results = pool(using_others, call)[:3]
    assert "with its last batch done" in results[1][1]
    for error, _, seconds, same in results:
        assert error is RuntimeError
        assert seconds < BOUND + TIMEOUT
        assert same


def recovering(rank):
    """Rank 1 misses a first call; then all call with another number of channels."""
    group = group_of([0, 1, 2], TIMEOUT)
    if rank in (0, 2):
        error, *_ = attempt(tribn.SyncBatchNorm(5, process_group=group), torch.randn(4, 5))
        assert error is RuntimeError
    dist.barrier()
    if group is None:
        return None
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))
    layer = tribn.SyncBatchNorm(6, process_group=group)
    layer(x)
    return layer.running_mean


@OF_NO_KERNEL
def test_a_turn_that_was_given_up_is_not_waited_for_again(pool):
    first, *others = pool(recovering)[:3]
    assert first.any()
    assert all(torch.equal(first, other) for other in others)


def test_a_group_of_others_is_refused(pool):
    pool(outside)


def outside(rank):
    group = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match="does not belong to"):
            tribn.SyncBatchNorm(5, process_group=group)(torch.randn(4, 5))


def dies(rank):
    """Rank 1 ends in the middle of training."""
    layer = tribn.SyncBatchNorm(5)
    layer(torch.randn(4, 5))
    if rank == 1:
        os._exit(1)
    return attempt(layer, torch.randn(4, 5))


@OF_NO_KERNEL
def test_a_process_that_is_killed_ends_the_others():
    pool = Pool(3, timeout=TIMEOUT)
    results = pool(dies)
    assert results[1] is None
    for error, text, seconds, same in (results[0], results[2]):
        assert error is RuntimeError
        assert "another has died" in text
        assert seconds < BOUND
        assert same
    pool.close()


# Training


def network(norm):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        norm(8, activation="relu"),
        torch.nn.Conv2d(8, 6, 3),
        norm(6, momentum=None),
        torch.nn.Flatten(),
        torch.nn.Linear(96, 5),
    ).double()


STEPS, RATE = 3, 0.1


def trained(rank, wrapped, size=4):
    """Losses of a few steps and the running statistics after them.

    In float64: in float32 steps of gradient descent make roundings grow.
    """
    g = torch.Generator().manual_seed(1)
    batches = torch.randn(1, 8, 3, 8, 8, generator=g, dtype=F64).expand(STEPS, -1, -1, -1, -1)
    targets = torch.randint(5, (1, 8), generator=g).expand(STEPS, -1)
    if rank is None:
        model = network(tribn.BatchNorm2d)
    else:
        model = network(tribn.SyncBatchNorm)
        share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        batches, targets = batches[:, share], targets[:, share]
    state = model
    if wrapped == "DDP":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif wrapped == "FSDP2":
        mesh = init_device_mesh("cpu", (size,))
        for layer in (*model, model):
            if layer is model or any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    losses = []
    for x, y in zip(batches, targets, strict=True):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    buffers = {name: b.clone() for name, b in state.named_buffers()}
    return torch.stack(losses), buffers


@OF_NO_KERNEL
@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2"])
def test_training_equals_that_of_one_process(wrapped, pool):
    expected, state = trained(None, None)
    results = pool(trained, wrapped)
    losses = torch.stack([losses for losses, _ in results]).mean(0)
    torch.testing.assert_close(losses, expected)
    assert expected[-1] < expected[0]
    for _, buffers in results:
        for name, value in state.items():
            torch.testing.assert_close(buffers[name], value)
            assert torch.equal(buffers[name], results[0][1][name])


def sharded(rank, cls, axis):
    """Results of a layer for a DTensor, whose second mesh dimension has replicas, as a whole."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    x, dy, residual = torch.randn(3, 5, 4, 6, 3)
    placements = [Shard(axis), Replicate()]

    def distributed(t):
        return distribute_tensor(t, mesh, placements)

    results = []
    for placed in (False, True):
        layer = (cls if placed else tribn.BatchNorm2d)(4, activation="relu")
        if placed:
            distribute_module(layer, mesh)
        leaves = [(distributed(t) if placed else t.clone()).requires_grad_() for t in (x, residual)]
        y = layer(leaves[0], residual=leaves[1])
        y.backward(distributed(dy) if placed else dy)
        layer.eval()
        outputs = (y, layer(leaves[0], residual=leaves[1]), *(t.grad for t in leaves))
        tensors = [*outputs, *(p.grad for p in layer.parameters()), *layer.buffers()]
        if placed:
            for t in outputs:
                assert t.placements == tuple(placements)
                assert t.to_local().shape != t.shape
                assert t.to_local().stride() == leaves[0].to_local().stride()
            tensors = [t.full_tensor() for t in tensors]
        results.append([t.detach() for t in tensors])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("cls", [tribn.SyncBatchNorm, tribn.BatchNorm2d])
def test_shards_are_one_batch_and_stay_where_they_are(cls, axis, pool):
    pool(sharded, cls, axis)


def replicated(x, mesh):
    return distribute_tensor(x, mesh, [Replicate(), Replicate()])


def misplaced(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    layer, x = tribn.SyncBatchNorm(4), torch.randn(4, 4)
    both = [Shard(0), Shard(0)]
    for placements, text in ((both, "at most"), ([Shard(1), Replicate()], "divides its channels")):
        with pytest.raises(ValueError, match=text):
            layer(distribute_tensor(x, mesh, placements))
    whole = distribute_tensor(x, mesh, [Shard(0), Replicate()])
    for other in (distribute_tensor(x, mesh, [Replicate(), Shard(0)]), replicated(x, mesh)):
        with pytest.raises(ValueError, match=r"residual .*must be \(Shard\(dim=0\), Replicate"):
            layer(whole, residual=other)
    image, mask = torch.randn(4, 4, 8), torch.ones(4, 8, dtype=torch.bool)
    along = distribute_tensor(image, mesh, [Shard(2), Replicate()])
    with pytest.raises(ValueError, match=r"mask .*must be \(Shard\(dim=1\), Replicate"):
        layer(along, mask=distribute_tensor(mask, mesh, [Shard(0), Replicate()]))
    with pytest.raises(ValueError, match="divides the axis that lengths are of"):
        layer(along, lengths=torch.full((4,), 8))
    with pytest.raises(TypeError, match=r"input is a DTensor: functions take local tensors"):
        tribn.functional.batch_norm(whole, None, None, training=True)
    with pytest.raises(TypeError, match=r"residual is a DTensor: functions take local tensors"):
        tribn.BatchNorm1d(4)(x, residual=whole)
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, both))
    with pytest.raises(ValueError, match="must be Replicate"):
        layer(distribute_tensor(x, mesh, [Shard(0), Replicate()]))


def test_other_placements_are_refused(pool):
    pool(misplaced)
