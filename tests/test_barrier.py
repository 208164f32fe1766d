"""How a group's programs meet: the barrier, and what happens without a part of it.

In Triton's interpreter a device function is a function of Python: so are the broken barriers here.
"""

import multiprocessing
import os
import signal

import pytest
import torch
from cases import INTERPRET

if not INTERPRET:
    pytest.skip(
        "programs are processes in Triton's interpreter: run it with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

import triton
import triton.language as tl
from cooperative import concurrently
from triton.runtime.errors import InterpreterError

from tribn.kernels.tile import group_barrier, is_last

TOP = -(2**31)  # the top bit of an int32


@triton.jit
def sums_kernel(
    x_ptr,  # [groups, rounds, G, BLOCK]
    partials_ptr,  # [groups, rounds, G]
    counters_ptr,  # [groups] int32
    y_ptr,  # [groups, rounds, G]
    G,
    rounds,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    barrier: tl.constexpr,
):
    """y = sum of x over the members of a group and BLOCK, for every member; grid (groups * G,)."""
    group = tl.program_id(0) // G
    member = tl.program_id(0) % G
    for r in range(rounds):
        first = (group * rounds + r) * G
        x = tl.load(x_ptr + (first + member) * BLOCK + tl.arange(0, BLOCK))
        tl.store(partials_ptr + first + member, tl.sum(x))
        barrier(counters_ptr + group, G, member)
        g = tl.arange(0, BLOCK_G)
        y = tl.sum(tl.load(partials_ptr + first + g, g < G, other=0.0))
        tl.store(y_ptr + first + member, y)


def assert_sums(counters, G, rounds=1, barrier=group_barrier, timeout=60):
    """Whole numbers: their sums are exact in any order."""
    x = torch.randint(-99, 100, (len(counters), rounds, G, 8)).float()
    partials, y = torch.full((2, *x.shape[:-1]), torch.nan)
    with concurrently(timeout):
        sums_kernel[(len(counters) * G,)](
            *(x, partials, counters, y, G, rounds, x.shape[-1], triton.next_power_of_2(G)),
            barrier=barrier,
            launch_cooperative_grid=True,
        )
    assert torch.equal(y, x.sum((-2, -1))[..., None].expand_as(y))


@pytest.mark.parametrize(
    ("G", "groups", "rounds"), [(2, 4, 3), (3, 2, 3), (5, 3, 2), (8, 2, 4), (16, 1, 3)]
)
def test_sums_of_groups(G, groups, rounds):
    counters = torch.zeros(groups, dtype=torch.int32)
    assert_sums(counters, G, rounds)
    assert counters.tolist() == [TOP if rounds % 2 else 0] * groups


@pytest.mark.parametrize("start", [0, TOP])
@pytest.mark.parametrize("G", [2, 5])
def test_no_one_sets_the_counter_back(G, start):
    counter = torch.tensor([start], dtype=torch.int32)
    for expected in (start ^ TOP, start, start ^ TOP):
        assert_sums(counter, G)
        assert counter.item() == expected


@pytest.mark.parametrize("absent", [0, 2])
def test_without_an_arrival_none_goes_on(absent):
    def barrier(counter_ptr, G, member):
        if member != absent:
            group_barrier(counter_ptr, G, member)

    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InterpreterError, match=r"(?s) in group_barrier\n.*not done in 2 seconds"):
        assert_sums(counter, 3, barrier=barrier, timeout=2)
    assert multiprocessing.active_children() == []


@triton.jit
def late_kernel(
    x_ptr,  # [G]
    copy_ptr,  # [G]
    counter_ptr,  # [1] int32
    readers_ptr,  # [1] int32: how many members have read the copy
    y_ptr,  # [G]
    patience,
    G,
    BLOCK_G: tl.constexpr,
    barrier: tl.constexpr,
):
    """y = sum of x, for every member; grid (G,).

    The last member stores what the others need when they have read it, which is too late, or when
    its patience is at an end.
    """
    member = tl.program_id(0)
    polls = 0
    while (member == G - 1) & (polls < patience) & (tl.atomic_add(readers_ptr, 0) < G - 1):
        polls += 1
    tl.store(copy_ptr + member, tl.load(x_ptr + member))
    barrier(counter_ptr, G, member)
    g = tl.arange(0, BLOCK_G)
    tl.store(y_ptr + member, tl.sum(tl.load(copy_ptr + g, g < G, other=0.0)))
    tl.atomic_add(readers_ptr, 1)


def late_sums(G, patience, barrier):
    """What `late_kernel` returns for a sum that is 1."""
    x = torch.tensor([1.0] + [0.0] * (G - 1))
    copy, y = torch.full((2, G), torch.nan)
    counter, readers = torch.zeros(2, 1, dtype=torch.int32)
    with concurrently():
        late_kernel[(G,)](
            *(x, copy, counter, readers, y, patience, G, triton.next_power_of_2(G)),
            barrier=barrier,
            launch_cooperative_grid=True,
        )
    return y


def arrive(counter_ptr, G, member):
    """The barrier without the wait."""
    tl.atomic_add(counter_ptr, tl.where(member == 0, 2147483647 - (G - 2), 1))


@pytest.mark.parametrize("G", [2, 4])
def test_a_late_member_is_waited_for(G):
    assert late_sums(G, 2000, group_barrier).tolist() == [1.0] * G
    *others, late = late_sums(G, 2**30, arrive)
    assert late == 1.0
    assert torch.tensor(others).isnan().all()


def test_after_an_interruption_the_counter_is_of_no_use():
    """All but one have arrived: the next to arrive, in another launch, would wait for no one.

    A launch that did not end needs a new counter, which zeroing it makes it.
    """
    last = 2**31 - 1  # what is in the counter when only one is missing that adds 1

    def interrupted(counter_ptr, G, member):
        if member == 1:
            while tl.atomic_add(counter_ptr, 0) != last:
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        group_barrier(counter_ptr, G, member)

    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) .* exit code -9"):
        assert_sums(counter, 3, barrier=interrupted)
    assert multiprocessing.active_children() == []
    assert counter.item() == last
    assert_sums(counter.zero_(), 3)


@triton.jit
def last_kernel(
    x_ptr,  # [groups, G]
    partials_ptr,  # [groups, G]
    counters_ptr,  # [groups] int32
    y_ptr,  # [groups]: sums of x
    lasts_ptr,  # [groups] int32: how many programs have found that they are the last
    G,
    BLOCK_G: tl.constexpr,
):
    """Grid (groups * G,)."""
    group = tl.program_id(0) // G
    member = tl.program_id(0) % G
    at = tl.program_id(0)
    tl.store(partials_ptr + at, tl.load(x_ptr + at))
    if is_last(counters_ptr + group, G, member):
        g = tl.arange(0, BLOCK_G)
        partials = tl.load(partials_ptr + group * G + g, g < G, other=0.0)
        tl.store(y_ptr + group, tl.sum(partials))
        tl.atomic_add(lasts_ptr + group, 1)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("G", "groups"), [(2, 3), (5, 2), (16, 1)])
def test_the_last_program_sees_what_all_have_stored(G, groups, at_once):
    """And there is one of them, in every launch on the same counters, also after a barrier's."""
    counters = torch.zeros(groups, dtype=torch.int32)
    assert_sums(counters, G)
    for launches in range(1, 4):
        x = torch.randint(-99, 100, (groups, G)).float()
        partials, y = torch.full((groups, G), torch.nan), torch.full((groups,), torch.nan)
        lasts = torch.zeros(groups, dtype=torch.int32)
        with concurrently():
            last_kernel[(groups * G,)](
                *(x, partials, counters, y, lasts, G, triton.next_power_of_2(G)),
                launch_cooperative_grid=at_once,
            )
        assert torch.equal(y, x.sum(1))
        assert lasts.tolist() == [1] * groups
        assert counters.tolist() == [0 if launches % 2 else TOP] * groups
