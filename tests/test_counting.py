"""The traffic model against the loads and stores of the kernels, counted in the interpreter."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, F64, INTERPRET, Case, Inputs

if not INTERPRET:
    pytest.skip(
        "loads are counted in Triton's interpreter: run it with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

import triton
import triton.language as tl

import tribn
from perf.cases import OPS, Layer
from perf.counting import counting
from perf.devices import Gpu
from perf.traffic import PATHS, Kernel, row, size
from tribn.kernels import host
from tribn.launch import Device

MODELS = PATHS["tribn"]
LARGE = {"x", "y", "dy", "dx", "residual", "dresidual", "bits"}

CASES = [
    *[Case((3, 5, 7, 8)), Case((6, 3, 11)), Case((37, 9)), Case((2, 17, 3, 3, 3))],
    *[Case((3, 5, 7, 8), layout="channels_last"), Case((6, 11, 4), channel_axis=-1)],
    *[Case((3, 16, 4, 8), BF16), Case((3, 16, 4, 8), F16, "channels_last"), Case((9, 6, 10), F64)],
    *[Case((3, 5, 4, 6), layout="sliced"), Case((3, 5, 4, 6), dy_layout="channels_last")],
    Case((2, 40, 9, 9), BF16, "transposed", "transposed"),
]


def apply(op, t, training, grad=True):
    """The operation, and the tensors that may want gradients."""
    residual = torch.zeros_like(t.x) if OPS[op].residual else None
    tensors = [None if v is None else v.detach() for v in (t.x, t.weight, t.bias, residual)]
    leaves = [v.requires_grad_(grad) for v in tensors if v is not None]
    x, weight, bias, residual = tensors
    y = tribn.functional.batch_norm(
        *(x, t.running_mean, t.running_var, weight, bias, training),
        channel_axis=t.channel_axis,
        activation=OPS[op].activation,
        residual=residual,
    )
    return y, leaves


def measure(op, t):
    """What is launched, by direction."""
    with counting() as forward:
        y, leaves = apply(op, t, training=True)
    with counting() as backward:
        torch.autograd.grad(y, leaves, t.dy)
    with counting() as evaluation:
        apply(op, t, training=False, grad=False)
    return {"forward": forward, "backward": backward, "eval": evaluation}


def assert_agree(launches, kernels, x):
    """Every large tensor is read or written as the model says, byte for byte, and no other."""
    assert [launch.kernel for launch in launches] == [kernel.name for kernel in kernels]
    for launched, kernel in zip(launches, kernels, strict=True):
        for name, accesses in launched.tensors.items():
            if name in LARGE:
                whole = size(name, x.itemsize) * x.nbytes
                assert accesses.read == whole * (name in kernel.reads.split()), (kernel, name)
                assert accesses.written == whole * (name in kernel.writes.split()), (kernel, name)
        assert {*kernel.reads.split(), *kernel.writes.split()} <= launched.tensors.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_and_dtypes(case):
    t = Inputs.of(case)
    for direction, launches in measure("bn", t).items():
        assert_agree(launches, MODELS["bn"].kernels(direction, combine=False), t.x)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operations(op, layout):
    t = Inputs.of(Case((3, 16, 4, 8), BF16, layout, layout))
    for direction, launches in measure(op, t).items():
        assert_agree(launches, MODELS[op].kernels(direction, combine=False), t.x)


@pytest.fixture
def short_splits(monkeypatch):
    """A split a tile, so that small tensors have many."""
    monkeypatch.setattr("tribn.launch.TILES_PER_SPLIT", 1)


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("channels-first", Case((2, 1, 95, 93))),
        ("channels-last", Case((2, 3, 48, 48), F32, "channels_last", "channels_last")),
    ],
)
def test_launches_of_a_layer_are_those_of_its_row(layout, case, short_splits, monkeypatch):
    """On a device with enough multiprocessors for so many partials that a launch merges them."""
    gpu = Gpu("", bandwidth=1, l2=0, sms=5, source="")
    monkeypatch.setattr(host, "device_facts", lambda _: Device(gpu.sms))
    expected = row(Layer(case.shape), layout, case.dtype.itemsize, gpu)["tribn_launches"]
    assert expected == {"forward": 3, "backward": 3, "eval": 1}
    t = Inputs.of(case)
    for direction, launches in measure("bn", t).items():
        assert len(launches) == expected[direction]
        assert_agree(launches, MODELS["bn"].kernels(direction, combine=True), t.x)


def test_backward_of_evaluation():
    """dx needs no sum: it is written in the pass that sums, or alone, where x is not even read."""
    t = Inputs.of(Case((6, 5, 37)))
    y, leaves = apply("bn", t, training=False)
    with counting() as launches:
        torch.autograd.grad(y, leaves, t.dy)
    kernels = [Kernel("backward_reduce", "x dy", "dx"), Kernel("backward_combine")]
    assert_agree(launches, kernels, t.x)
    y, leaves = apply("bn", replace(t, weight=None, bias=None), training=False)
    with counting() as launches:
        torch.autograd.grad(y, leaves, t.dy)
    assert [launch.kernel for launch in launches] == ["backward_dx"]
    assert launches[0].tensors["dy"].read == launches[0].tensors["dx"].written == t.x.nbytes
    assert "x" not in launches[0].tensors


def small(launch):
    """Bytes read and written of what has a few numbers per channel."""
    others = [a for name, a in launch.tensors.items() if name not in LARGE]
    return launch.kernel, sum(a.read for a in others), sum(a.written for a in others)


def test_what_is_left_out_does_not_grow_with_the_input(short_splits):
    C, G = 4, 2  # eight programs in all
    few, many = (
        [[small(launch) for launch in of] for of in measure("bn", t).values()]
        for t in (Inputs.of(Case((C, n), channel_axis=0)) for n in (4096, 8192))
    )
    assert few == many
    (stats, *_), (reduce, *_), _ = few
    assert stats == ("stats", 0, 3 * 8 * G * C)
    assert reduce[2] == 2 * 8 * G * C


def test_reads_of_the_same_bytes_count_once():
    """The statistics' first tile is read for the shift and again for the sums."""
    t = Inputs.of(Case((3, 5, 7, 8)))
    with counting() as launches:
        tribn.functional.batch_stats(t.x)
    x = launches[0].tensors["x"]
    assert x.read == t.x.nbytes
    assert t.x.nbytes < x.loaded <= 2 * t.x.nbytes


@triton.jit
def shifted_copy(y_ptr, x_ptr, shift, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at + shift, at < n, other=0.0))


def test_masked_elements_are_not_accessed():
    x, y = torch.ones(8), torch.empty(16)
    with counting() as launches:
        shifted_copy[(1,)](y, x, 0, 6, BLOCK=16)
    (launch,) = launches
    assert launch.kernel == "shifted_copy"
    assert (launch.tensors["x"].read, launch.tensors["x"].written) == (6 * 4, 0)
    assert (launch.tensors["y"].read, launch.tensors["y"].written) == (0, 16 * 4)


def test_an_access_outside_all_tensors_is_an_error():
    x, y = torch.ones(8), torch.empty(16)
    with counting(), pytest.raises(triton.runtime.errors.InterpreterError, match="outside"):
        shifted_copy[(1,)](y, x, 3, 6, BLOCK=16)
