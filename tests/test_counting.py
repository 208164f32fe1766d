"""The traffic model against the loads and stores of the kernels, counted in the interpreter."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, F64, INTERPRET, Case, Inputs, least_columns

if not INTERPRET:
    pytest.skip(
        "loads are counted in Triton's interpreter: run it with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

import triton
import triton.language as tl
from cooperative import concurrently

import tribn
from perf.cases import OPS, Layer
from perf.counting import counting
from perf.devices import Gpu
from perf.traffic import PATHS, TWICE, Kernel, row, size
from tribn.kernels import host
from tribn.launch import make_plan

LARGE = {"x", "y", "dy", "dx", "residual", "dresidual", "bits"}

CASES = [
    *[Case((3, 5, 7, 8)), Case((6, 3, 11)), Case((37, 9)), Case((2, 17, 3, 3, 3))],
    *[Case((3, 5, 7, 8), layout="channels_last"), Case((6, 11, 4), channel_axis=-1)],
    *[Case((3, 16, 4, 8), BF16), Case((3, 16, 4, 8), F16, "channels_last"), Case((9, 6, 10), F64)],
    *[Case((3, 5, 4, 6), layout="sliced"), Case((3, 5, 4, 6), dy_layout="channels_last")],
    Case((2, 40, 9, 9), BF16, "transposed", "transposed"),
    Case((5, 6, 4, 8), F32, "channels_last", "channels_last"),  # pixels side by side
]


# Those of "l2" differ from "memory" in nothing but hints to the cache.
TIERS = ["registers", "memory"]


@pytest.fixture
def force(monkeypatch):
    """Makes launchers take plans of a tier, or two launches if it is None.

    Tiles are small, or hold all that a program has. So many programs share a slab of channels;
    with a tier they wait for each other, and have to run concurrently.
    """
    monkeypatch.setattr(host, "_launchers", {})

    def force(tier, programs=1):
        def plan(layout, itemsize, device, *_):
            block_n, block_c, block_s = 1, 16, 32
            if tier == "registers":
                block_n = triton.next_power_of_2(layout.N)
                block_s = max(8, triton.next_power_of_2(triton.cdiv(layout.S, programs)))
            tiles = triton.cdiv(layout.N, block_n) * triton.cdiv(layout.S, block_s)
            tiles_per_split = triton.cdiv(tiles, programs)
            block_c = max(block_c, least_columns(layout))
            made = replace(make_plan(layout, itemsize, device), block_c=block_c)
            return replace(
                made,
                block_n=block_n,
                block_s=block_s,
                tiles_per_split=tiles_per_split,
                splits=triton.cdiv(tiles, tiles_per_split),
                channel_blocks=triton.cdiv(layout.C, made.slab),
                tier=tier,
                groups=0 if tier is None else 1,
            )

        if tier is None:
            monkeypatch.setattr(host, "_refused", {torch.device("cpu")})
            monkeypatch.setattr(host, "make_plan", plan)
        else:
            facts = replace(host.INTERPRETER, cooperative=True)
            monkeypatch.setattr(host, "device_facts", lambda _: facts)
            monkeypatch.setattr(host, "single_read_plan", plan)

    return force


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


def assert_agree(launches, kernels, x, tier=None):
    """Every large tensor is read or written as the model says, byte for byte, and no other.

    It is loaded once; what the model reads again where the chip does not hold it is loaded twice,
    unless registers do. For the shift of their sums, programs load their first tile once more.
    """
    assert [launch.kernel for launch in launches] == [kernel.name for kernel in kernels]
    for launched, kernel in zip(launches, kernels, strict=True):
        for name, accesses in launched.tensors.items():
            if name in LARGE:
                whole = size(name, x.itemsize) * x.nbytes
                assert accesses.read == whole * (name in kernel.reads.split()), (kernel, name)
                assert accesses.written == whole * (name in kernel.writes.split()), (kernel, name)
                visits = 2 if tier != "registers" and name in kernel.again.split() else 1
                more = accesses.loaded - visits * accesses.read
                if name == "x" and kernel.name in ("stats", "forward") and tier != "registers":
                    assert 0 < more <= accesses.read
                else:
                    assert more == 0, (kernel, name)
        assert {*kernel.reads.split(), *kernel.writes.split()} <= launched.tensors.keys()


@pytest.mark.parametrize("tier", [None, *TIERS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_and_dtypes(case, tier, force):
    force(tier)
    t = Inputs.of(case)
    model = PATHS["tribn" if tier else "two launches"]["bn"]
    for direction, launches in measure("bn", t).items():
        assert_agree(launches, getattr(model, direction), t.x, tier)


@pytest.mark.parametrize("tier", [None, *TIERS])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operations(op, layout, tier, force):
    force(tier)
    t = Inputs.of(Case((3, 16, 4, 8), BF16, layout, layout))
    model = PATHS["tribn" if tier else "two launches"][op]
    for direction, launches in measure(op, t).items():
        assert_agree(launches, getattr(model, direction), t.x, tier)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_partial_results_that_a_launch_merges(layout, force):
    force(None, programs=18)
    t = Inputs.of(Case((9, 16, 8, 8), F32, layout, layout))
    for direction, launches in measure("bn", t).items():
        kernels = getattr(PATHS["two launches"]["bn"], direction)
        assert len(kernels) == (1 if direction == "eval" else 2)
        assert_agree(launches, kernels, t.x)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_programs_that_wait_for_each_other(layout, tier, force):
    force(tier, programs=3)
    t = Inputs.of(Case((3, 16, 4, 8), BF16, layout, layout))
    with concurrently():
        measured = measure("bn_add_relu", t)
    for direction, launches in measured.items():
        if direction in TWICE:
            assert launches[0].tensors["partials"].read > 0
        assert_agree(launches, getattr(PATHS["tribn"]["bn_add_relu"], direction), t.x, tier)


@pytest.mark.parametrize(
    ("layout", "case", "sms", "l2", "tiers"),
    [
        ("channels-first", Case((2, 1, 128, 128)), 2, 2**20, ["registers", "l2"]),
        ("channels-first", Case((2, 2, 95, 93)), 1, 2**18, ["l2", "memory"]),
        (
            *("channels-last", Case((2, 20, 48, 48), F32, "channels_last", "channels_last")),
            *(1, 2**20, ["l2", "memory"]),
        ),
    ],
)
def test_tiers_of_a_layer_are_those_of_its_row(layout, case, sms, l2, tiers, monkeypatch):
    gpu = Gpu("", bandwidth=1, l2=l2, sms=sms, shared=2**16, source="")
    monkeypatch.setattr(host, "_launchers", {})
    monkeypatch.setattr(host, "device_facts", lambda _: gpu.facts)
    expected = row(Layer(case.shape), layout, case.dtype.itemsize, gpu)["tiers"]
    assert list(expected.values()) == tiers
    t = Inputs.of(case)
    with concurrently():
        measured = measure("bn", t)
    for direction, launches in measured.items():
        kernels = getattr(PATHS["tribn"]["bn"], direction)
        assert_agree(launches, kernels, t.x, expected.get(direction))


def test_backward_of_evaluation():
    """dx needs no sum: it is written in the pass that sums, or alone, where x is not even read."""
    t = Inputs.of(Case((6, 5, 37)))
    y, leaves = apply("bn", t, training=False)
    with counting() as launches:
        torch.autograd.grad(y, leaves, t.dy)
    assert_agree(launches, [Kernel("backward_reduce", "x dy", "dx")], t.x)
    y, leaves = apply("bn", replace(t, weight=None, bias=None), training=False)
    with counting() as launches:
        torch.autograd.grad(y, leaves, t.dy)
    assert [launch.kernel for launch in launches] == ["backward_dx"]
    assert launches[0].tensors["dy"].read == launches[0].tensors["dx"].written == t.x.nbytes
    assert "x" not in launches[0].tensors


def test_backward_without_a_gradient_of_the_input():
    """The parameters' gradients alone: the pass that sums is all."""
    t = Inputs.of(Case((6, 5, 37)))
    weight = t.weight.requires_grad_()
    y = tribn.functional.batch_norm(t.x, None, None, weight, t.bias, True)
    with counting() as launches:
        torch.autograd.grad(y, weight, t.dy)
    assert_agree(launches, [Kernel("backward_reduce", "x dy")], t.x)


def small(launch):
    """Bytes read and written of what has a few numbers per channel."""
    others = [a for name, a in launch.tensors.items() if name not in LARGE]
    return launch.kernel, sum(a.read for a in others), sum(a.written for a in others)


@pytest.mark.parametrize(("tier", "G"), [(None, 2), *((tier, G) for tier in TIERS for G in (1, 2))])
def test_what_is_left_out_does_not_grow_with_the_input(tier, G, force):
    force(tier, programs=G)
    C = 4
    with concurrently():
        few, many = (
            [[small(launch) for launch in of] for of in measure("bn", t).values()]
            for t in (Inputs.of(Case((C, n), channel_axis=0)) for n in (512, 1024))
        )
    assert few == many
    (first, *_), (first_backward, *_), _ = few
    partials = 8 * C * (G if G > 1 else 0)
    # Besides, mean and variance, and both statistics that run; the parameters' gradients, and in
    # two launches the sums.
    sums = 8 * (1 + 2 * C) if tier is None else 0
    names = ("stats", "backward_reduce") if tier is None else ("forward", "backward")
    assert first[::2] == (names[0], 3 * partials + 4 * 4 * C)
    assert first_backward[::2] == (names[1], 2 * partials + 2 * 4 * C + sums)


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
