"""What synchronizing is reckoned and measured to cost: the model, the stages, report and figure."""

import json

import pytest
import torch
import torch.distributed as dist
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import tribn
from perf import plot, sync
from perf.__main__ import main
from perf.cases import layers
from perf.devices import GPUS, NETWORKS
from perf.sync import BATCHES, GROUPS, SHARE, Given, Stages

H100 = NETWORKS["H100"]


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ring_takes_its_steps_and_all_but_one_of_the_parts():
    assert H100.all_gather(1, 1000) == 0
    within = 6.6e-6 + 7 * 0.6e-6 + 7 * 1000 / 141e9
    assert H100.all_gather(8, 1000) == pytest.approx(within)
    between = 6.6e-6 + 14 * 0.6e-6 + 2.7e-6 + 15 * 1000 / 45e9
    assert H100.all_gather(16, 1000) == pytest.approx(between)


def test_a_step_has_two_collectives_a_layer():
    """Of which a ring without latency would leave the bytes."""
    C = sum(layer.count * layer.shape[1] for layer in layers("resnet50", 1))
    assert C == 26560
    seconds = sync.collectives_seconds("resnet50", 8, H100)
    latency = 2 * 53 * (6.6e-6 + 7 * 0.6e-6)
    assert seconds == pytest.approx(latency + 7 * (32 * C + 24 * 53) / 141e9)


def test_layers_take_their_bytes_at_the_datasheets_bandwidth():
    """9.1 tensors read and written in two launches."""
    elements = sum(layer.count * layer.elements for layer in layers("resnet50", 1))
    units = sync.image_seconds("resnet50", GPUS["H100"]) * 3.35e12 / (2 * elements)
    assert units == pytest.approx(9.1, abs=0.05)


def test_enough_is_the_first_batch_below_the_share():
    image = sync.image_seconds("resnet50", GPUS["H100"])
    rows = sync.reckoned("resnet50", GPUS["H100"], H100)
    assert [row["ranks"] for row in rows] == list(GROUPS)
    for row in rows:
        seconds = row["collectives_ms"] / 1e3
        assert seconds <= SHARE * row["enough"] * image
        assert seconds > SHARE * (row["enough"] - 1) * image
        assert row["shares"] == [pytest.approx(seconds / (n * image)) for n in BATCHES]


def test_stages_are_batch_norm(alone):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    results = []
    for module in (Stages(3).double(), torch.nn.BatchNorm2d(3).double()):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bytes_given_to_collectives_are_counted(alone):
    with Given() as given:
        row = torch.zeros(3)
        dist.all_reduce(row)
        dist.all_gather([torch.empty(3)], row)
        collectives = torch.ops._c10d_functional
        rows = collectives.all_gather_into_tensor(row, 1, dist.group.WORLD.group_name)
        collectives.wait_tensor(rows)
    assert given.bytes == 3 * row.nbytes


def test_report_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sync, "WORLDS", (2,))
    monkeypatch.setattr(sync, "SHAPES", ((3, 4, 4),))
    out = ["--out", str(tmp_path)]
    main(["sync", "--device", "cpu", "--batch", "2", "--rounds", "2", *out])
    report = json.loads((tmp_path / "sync-cpu-batch-2.json").read_text())
    assert (report["command"], report["rounds"]) == ("sync", 2)
    assert report["environment"]["tribn"] == tribn.__version__
    rows = {(row["provider"], row["direction"]): row for row in report["rows"]}
    bytes_given = {key: row["bytes"] for key, row in rows.items()}
    assert bytes_given == {
        ("tribn", "forward"): 16 * 3 + 16,
        ("tribn", "backward"): 16 * 3 + 16,
        ("torch's stages", "forward"): 4 * (2 * 3 + 1),
        ("torch's stages", "backward"): 4 * 2 * 3,
    }
    for row in rows.values():
        assert (row["world"], row["shape"]) == (2, [2, 3, 4, 4])
        assert 1 < row["quartiles_us"][0] <= row["us"] <= row["quartiles_us"][1] < 1e7
    assert report["estimate"]["network"]["source"]
    printed = capsys.readouterr().out
    assert all(
        text in printed for text in ("Reckoned, not measured", "no GPU", "sync-cpu-batch-2.json")
    )
    plot.main([str(tmp_path / "sync-cpu-batch-2.json")])
    figures = [tmp_path / f"sync-cpu-batch-2{suffix}" for suffix in (".svg", ".png")]
    assert all(path.stat().st_size > 10_000 for path in figures)
    text = figures[0].read_text()
    assert "not measured" in text
    assert "4,096 GPUs" in text


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--rounds 0", "no positive integer"),
        ("--net lenet", "invalid choice"),
        ("--device tpu", "'tpu' is neither cpu nor cuda"),
    ],
)
def test_bad_arguments_exit_with_2(argv, text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["sync", *argv.split()])
    assert exit.value.code == 2
    assert text in capsys.readouterr().err
