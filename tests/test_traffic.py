"""The traffic model: totals, what is kept for backward, the report and its figure.

tests/test_counting.py holds it to the kernels.
"""

import json

import pytest
import torch
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

import tribn
from perf import traffic
from perf.__main__ import main
from perf.cases import NETS, OPS, SETS, Layer, layers, strides
from perf.devices import GPUS
from perf.figures.traffic import draw
from perf.traffic import PASSES, PATHS

H100 = GPUS["H100"]
m = 1 / 16  # a bit for 16

# Forward, backward and evaluation, in units of N
EXPECTED = {
    "eager": [(3, 5, 2), (5, 8, 4), (6, 5, 5), (8, 8, 7)],
    "torch.compile": [(3, 5, 2), (3, 7, 2), (4, 5, 3), (4, 7.5, 3)],
    "two launches": [(3, 5, 2), (3, 5, 2), (4, 5, 3), (4 + m, 6 + m, 3)],
    "tribn": [(2, 3, 2), (2, 3, 2), (3, 3, 3), (3 + m, 4 + m, 3)],
    "single read": [(2, 3, 2), (2, 3, 2), (3, 3, 3), (3 + m, 4 + m, 3)],
}
OPERATIONS = ["bn", "bn_relu", "bn_add", "bn_add_relu"]


@pytest.mark.parametrize("path", PATHS)
def test_units(path):
    models = [PATHS[path][op] for op in OPERATIONS]
    units = [tuple(model.units(d, itemsize=2) for d in PASSES) for model in models]
    assert units == EXPECTED[path]


def test_what_is_not_held_is_read_again():
    """But for what is added in forward, which only the second visit reads."""
    models = [PATHS["tribn"][op] for op in OPERATIONS]
    units = [tuple(model.units(d, itemsize=2, held=False) for d in PASSES) for model in models]
    assert units == [(3, 5, 2), (3, 5, 2), (4, 5, 3), (4 + m, 6 + 2 * m, 3)]


def test_bits_weigh_less_beside_wider_elements():
    assert PATHS["single read"]["bn_add_relu"].units("forward", itemsize=4) == 3 + 1 / 32


def report(*argv, out):
    main(["traffic", "--out", str(out), *argv])
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("layout", "batch", "tribn", "again"),
    [
        *[("channels-first", batch, 6.1, [0, 0]) for batch in (32, 128, 256)],
        ("channels-last", 32, 7.6, [0.36, 0.58]),
        ("channels-last", 128, 8.6, [0.7, 0.9]),
        ("channels-last", 256, 8.9, [0.9, 0.95]),
    ],
)
def test_resnet50_in_units_of_all_its_tensors(layout, batch, tribn, again, tmp_path, capsys):
    found = report("--batch", str(batch), "--layout", layout, out=tmp_path)
    assert sum(row["count"] for row in found["rows"]) == 53
    totals = {t["path"]: round(t["units"]["both"], 1) for t in found["totals"]}
    assert totals == {
        "eager": 13.8,
        "torch.compile": 10.5,
        "two launches": 9.1,
        "tribn": tribn,
        "single read": 6.1,
    }
    bytes_of = [row["count"] * row["bytes"] for row in found["rows"]]
    for direction, share in zip(("forward", "backward"), again, strict=True):
        twice = [row["tiers"][direction] == "memory" for row in found["rows"]]
        part = sum(n for n, too_large in zip(bytes_of, twice, strict=True) if too_large)
        assert round(part / sum(bytes_of), 2) == share
    forward, backward = again
    printed = f"forward {forward:.0%}, backward {backward:.0%}"
    assert (printed in capsys.readouterr().out) == any(again)


@pytest.mark.parametrize(
    ("layer", "layout", "tiers", "units"),
    [
        (Layer((8, 512, 7, 7)), "channels-first", ("registers", "registers"), (2, 3)),
        (Layer((128, 512, 7, 7)), "channels-last", ("registers", "l2"), (2, 3)),
        (Layer((256, 64, 112, 112), "relu"), "channels-first", ("l2", "l2"), (2, 3)),
        (Layer((128, 1024, 14, 14), "relu"), "channels-last", ("l2", "memory"), (2, 5)),
        (Layer((256, 64, 56, 56)), "channels-last", ("memory", "memory"), (3, 5)),
        (
            *(Layer((256, 256, 56, 56), "relu", residual=True), "channels-last"),
            *(("memory", "memory"), (4 + m, 6 + 2 * m)),
        ),
    ],
)
def test_tribn_reads_again_what_does_not_fit(layer, layout, tiers, units):
    """Half of the L2 cache is 25 MiB; with channels last six slabs of 64 must fit, or all."""
    row = traffic.row(layer, layout, 2, H100)
    assert tuple(row["tiers"].values()) == tiers
    assert tuple(row["units"]["tribn"][d] for d in row["tiers"]) == units


def test_totals_weigh_layers_by_their_bytes_and_number():
    small, large = Layer((8, 4, 2, 2), count=2), Layer((8, 4, 4, 4), "relu")
    rows = [traffic.row(layer, "channels-first", 2, H100) for layer in (small, large)]
    eager, *_ = traffic.totals(rows, H100)
    n = 8 * 4 * 4 * 2  # bytes; twice that, and four times
    assert eager["units"]["forward"] == pytest.approx((2 * 3 + 4 * 5) / 6)
    assert eager["units"]["both"] == pytest.approx((2 * 8 + 4 * 13) / 6)
    assert eager["saved"] == pytest.approx((2 * 1 + 4 * 2) / 6)
    assert eager["floor_ms"] == pytest.approx((2 * 8 + 4 * 13) * n / 3.35e12 * 1e3)


def test_floor_is_the_fewest_bytes_at_the_bandwidth_of_the_datasheet():
    row = traffic.row(Layer((128, 256, 56, 56), "relu"), "channels-last", 2, H100)
    n = 128 * 256 * 56 * 56 * 2
    assert row["floor_us"]["forward"] == pytest.approx(2 * n / 3.35e12 * 1e6)
    assert row["floor_us"]["backward"] == pytest.approx(3 * n / 3.35e12 * 1e6)
    assert not row["fits_l2"]
    assert traffic.row(Layer((8, 256, 56, 56)), "channels-last", 2, H100)["fits_l2"]


@pytest.mark.parametrize("name", [*NETS, *SETS])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_every_layer_has_a_row_and_no_path_beats_the_floor(name, layout):
    for layer in layers(name):
        row = traffic.row(layer, layout, 2, H100)
        for direction in PASSES:
            floor = row["units"]["single read"][direction]
            assert all(units[direction] >= floor > 0 for units in row["units"].values())
            assert floor * row["bytes"] == layer.minimum_bytes(direction, 2)
        for direction, tier in row["tiers"].items():
            assert tier in ("registers", "l2", "memory")
            of = {path: units[direction] for path, units in row["units"].items()}
            assert (of["tribn"] > of["single read"]) == (tier == "memory")


@pytest.mark.parametrize(
    ("shape", "layout", "memory_format"),
    [
        ((2, 3, 4, 5), "channels-first", torch.contiguous_format),
        ((2, 3, 4, 5), "channels-last", torch.channels_last),
        ((2, 3, 4, 5, 6), "channels-last", torch.channels_last_3d),
    ],
)
def test_strides_are_those_of_torch(shape, layout, memory_format):
    assert strides(shape, layout) == torch.empty(shape, memory_format=memory_format).stride()
    assert strides((7, 3), layout) == (3, 1)


def eager(op):
    def apply(x, weight, residual):
        y = F.batch_norm(x, None, None, weight, weight, True)
        if OPS[op].residual:
            y = y + residual
        activation = OPS[op].activation
        return getattr(F, activation)(y) if activation else y

    return apply


def fused(op):
    def apply(x, weight, residual):
        return tribn.functional.batch_norm(
            *(x, None, None, weight, weight, True),
            activation=OPS[op].activation,
            residual=residual if OPS[op].residual else None,
        )

    return apply


def inputs():
    shapes = (4, 8, 16, 16), (8,), (4, 8, 16, 16)
    return [torch.rand(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("path", "operation"), [("eager", eager), ("two launches", fused), ("tribn", fused)]
)
def test_saved_for_backward(path, operation, op):
    x, *others = inputs()
    saved = {}

    def pack(tensor):
        if tensor.numel() > 8:  # neither statistics nor parameters
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        operation(op)(x, *others)
    assert sum(saved.values()) == traffic.size(PATHS[path][op].saved, x.itemsize) * x.nbytes


@pytest.mark.parametrize("op", OPS)
def test_torch_compile_reads_in_backward_what_its_partitioner_saves(op):
    """In a network: what only the convolution that follows reads is not batch norm's."""
    backward = []

    def capture(graph, _):
        backward.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    partitioned = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=capture,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    x, *others = inputs()
    filters, bn = torch.ones(2, 8, 1, 1, requires_grad=True), eager(op)

    @torch.compile(backend=partitioned)
    def network(*args):
        return F.conv2d(bn(*args), filters)

    network(x, *others).sum().backward()
    large = [
        node
        for node in backward[0].find_nodes(op="placeholder")
        if node.meta["val"].numel() == x.numel()
        and any("convolution" not in user.name for user in node.users)
    ]
    model = PATHS["torch.compile"][op]
    assert len(large) == len(model.saved.split())
    reads = set(model.backward[0].reads.split()) - {"dy"}
    assert reads == set(model.saved.split())


def test_report_of_a_set(tmp_path, capsys):
    argv = ["--set", "tabular", "--dtype", "fp32", "--layout", "channels-last", "--device", "L4"]
    found = report(*argv, out=tmp_path)
    assert (found["command"], found["name"]) == ("traffic", "tabular")
    assert found["environment"]["tribn"] == tribn.__version__
    assert found["gpu"]["bandwidth"] == 300e9
    assert found["rows"][0]["bytes"] == 1024 * 256 * 4
    assert [row["tiers"]["forward"] for row in found["rows"]] == [
        "registers",
        *["l2"] * 2,
        *["memory"] * 2,
    ]
    (forward,) = found["kernels"]["tribn"]["bn_relu"]["forward"]
    assert (forward["reads"], forward["again"], forward["writes"]) == ("x", "x", "y")
    stats, normalize = found["kernels"]["two launches"]["bn_relu"]["forward"]
    assert (stats["reads"], stats["writes"], stats["units"]) == ("x", "", 1)
    assert (normalize["reads"], normalize["writes"], normalize["units"]) == ("x", "y", 2)
    printed = capsys.readouterr().out
    assert "not timed" in printed
    assert "NVIDIA L4" in printed


def test_names_tell_results_apart(tmp_path):
    main(["traffic", "--net", "pointnet", "--out", str(tmp_path)])
    options = ["--batch", "8", "--dtype", "fp32", "--layout", "channels-last", "--device", "A100"]
    main(["traffic", "--net", "pointnet", "--out", str(tmp_path), *options])
    assert {path.name for path in tmp_path.iterdir()} == {
        "traffic-pointnet.json",
        "traffic-pointnet-8-fp32-channels-last-A100.json",
    }


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize(("net", "panels"), [("resnet50", 4), ("unet3d", 2)])
def test_figure_says_what_the_report_says(net, panels, layout, tmp_path):
    found = report("--net", net, "--layout", layout, out=tmp_path)
    ((figure, caption),) = draw(found).values()
    for words in ("not timed", layout, "NVIDIA H100 SXM5 80 GB"):
        assert words in caption
    assert len(figure.axes) == panels
    drawn = [path.get_text() for path in figure.axes[0].get_yticklabels()]
    assert drawn == list(PATHS)
    ops = dict.fromkeys(row["op"] for row in found["rows"])
    shown = [found["totals"], *(found["ops"][op] for op in ops)]
    for axes, totals in zip(figure.axes, shown, strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in axes.containers[1]]
        both = [total["units"]["both"] for total in totals]
        assert ends == pytest.approx(both, rel=1e-5)  # JSON has six digits


def test_figure_is_drawn_by_plot(tmp_path):
    found = report("--net", "pointnet", out=tmp_path)
    main(["plot", str(tmp_path / "traffic-pointnet.json")])
    assert (tmp_path / "traffic-pointnet.png").exists()
    text = (tmp_path / "traffic-pointnet.svg").read_text()
    assert all(f"{total['units']['both']:.1f}" in text for total in found["totals"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--net", "alexnet"],
        ["--batch", "0"],
        ["--device", "H1000"],
        ["--set", "hard", "--net", "resnet50"],
        ["--set", "hard", "--batch", "3"],
        ["--out", __file__],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["traffic", *argv])
    assert exit.value.code == 2
    assert "usage: python -m perf traffic" in capsys.readouterr().err
