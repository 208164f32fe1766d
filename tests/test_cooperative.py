"""The processes that cooperative kernels run in, in Triton's interpreter."""

import multiprocessing
from pathlib import Path

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

from perf.counting import counting


@triton.jit
def where_kernel(out_ptr):
    """out = the program's index and the size of the grid, for every program of the grid."""
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny, nz = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    at = out_ptr + ((x * ny + y) * nz + z) * 6
    tl.store(at, x)
    tl.store(at + 1, y)
    tl.store(at + 2, z)
    tl.store(at + 3, nx)
    tl.store(at + 4, ny)
    tl.store(at + 5, nz)


@pytest.mark.parametrize("grid", [(3,), (2, 3), (2, 1, 3)], ids=str)
def test_each_program_has_its_index_in_the_whole_grid(grid):
    out = torch.full((*grid, 6), -1)
    with concurrently():
        where_kernel[grid](out, launch_cooperative_grid=True)
    sizes = torch.tensor((*grid, 1, 1)[:3])
    index = torch.cartesian_prod(*map(torch.arange, sizes)).view(*grid, 3)
    assert torch.equal(out, torch.cat([index, sizes.expand_as(index)], -1))


@triton.jit
def move_kernel(y_ptr, x_ptr, stride_y, stride_x, call: tl.constexpr):
    """y[i] = x[i] for program i, which calls what it is given with its index."""
    i = tl.program_id(0)
    tl.store(y_ptr + i * stride_y, tl.load(x_ptr + i * stride_x))
    call(i)


def nothing(i):
    pass


def test_views_of_one_storage():
    base = torch.arange(8.0)
    y, x = base[1::2], base[4:]
    address = base.data_ptr()
    with concurrently():
        move_kernel[(2,)](
            y, x_ptr=x, stride_y=2, stride_x=1, call=nothing, launch_cooperative_grid=True
        )
    assert base.tolist() == [0, 4, 2, 5, 4, 5, 6, 7]
    assert base.data_ptr() == address == y.data_ptr() - 4


def test_other_launches_stay_in_this_process():
    x, y, calls = torch.arange(2), torch.full((2,), -1), []
    with concurrently():
        move_kernel[(2,)](y, x, 1, 1, calls.append)
        assert len(calls) == 2
        move_kernel[(2,)](y, x, 1, 1, calls.append, launch_cooperative_grid=True)
        assert len(calls) == 2
    move_kernel[(2,)](y, x, 1, 1, calls.append, launch_cooperative_grid=True)
    assert len(calls) == 4


def test_a_program_that_raises():
    def odd(i):
        assert i % 2 == 0, "an odd program"

    x, y = torch.arange(2), torch.full((2,), -1)
    with concurrently(), pytest.raises(InterpreterError) as error:
        move_kernel[(2,)](y, x, 1, 1, odd, launch_cooperative_grid=True)
    message = str(error.value)
    assert message.startswith("program (1, 0, 0) of move_kernel ended with exit code 1\n")
    assert 'assert i % 2 == 0, "an odd program"' in message
    assert multiprocessing.active_children() == []
    assert y[1] == 1, "what it had stored"


def test_shared_memory_is_freed():
    def regions():
        return Path("/proc/self/maps").read_text().count("/dev/zero")

    before = regions()
    with concurrently():
        x, y = torch.arange(2), torch.full((2,), -1)
        move_kernel[(2,)](y, x, 1, 1, nothing, launch_cooperative_grid=True)
    assert torch.equal(x, y)
    assert regions() <= before


@pytest.mark.parametrize("order", [(concurrently, counting), (counting, concurrently)])
def test_accesses_of_all_programs_are_counted(order):
    """All of them read the first element of x."""
    x, y = torch.ones(3), torch.zeros(8)
    with order[0]() as first, order[1]() as second:
        move_kernel[(8,)](y, x, 1, 0, nothing, launch_cooperative_grid=True)
    assert torch.equal(y, torch.ones(8))
    (launch,) = first or second
    assert launch.kernel == "move"
    assert (launch.tensors["x"].read, launch.tensors["x"].loaded) == (4, 8 * 4)
    assert (launch.tensors["y"].loaded, launch.tensors["y"].written) == (0, 8 * 4)
