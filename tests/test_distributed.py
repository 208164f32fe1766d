"""Synchronized batch norm on several processes against one process with all of their batches."""

from __future__ import annotations


from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from cases import (
    BF16,
    EPS,
    F16,
    F32,
    F64,
    INTERPRET,
    MOMENTUM,
    Case,
    Exact,
    Fused,
    Inputs,
    assert_accurate,
    compose,
    exact,
    fused_exact,
    run,
    torch_batch_norm,
    ulp,
    wide,
    without,
)
from ranks import Pool, group_of

import tribn
from tribn import functional
from tribn.functional import batch_norm

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


@pytest.mark.parametrize(("ranks", "deal"), [(w, d) for w in RANKS for d in DEALS[w]])
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
