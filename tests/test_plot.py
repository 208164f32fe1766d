"""Figures of synthetic results: that they show what is in the JSON, and nothing else."""

import json

import pytest
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from matplotlib.colors import to_hex
from matplotlib.image import imread

from perf import bench, plot
from perf.__main__ import main
from perf.cases import DIRECTIONS, layers
from perf.figures import bench as figures
from perf.report import write

# Made up: seconds = (5 µs + bytes at 3 TB/s) times this, more on the clock of the host
SLOWNESS = {"tribn": 1.25, "eager": 3.0, "compile": 1.0}
LAYOUTS = ("channels-first", "channels-last")


def synthetic(
    name="resnet50",
    path="GPU",
    clocks=("cold", "hot", "wall"),
    slowness=SLOWNESS,
    layouts=LAYOUTS,
):
    """A report as `bench` writes it, of made-up times."""
    rows = []
    for case in bench.cases(layers(name), layouts, ["bf16"]):
        samples = {}
        for direction in (bench.COPY, *DIRECTIONS):
            seconds = 5e-6 + bench.moved_by(case, direction) / 3e12
            providers = {bench.COPY: 1.0} if direction == bench.COPY else slowness
            for clock, slower in zip(clocks, (1, 0.8, 2), strict=False):
                for provider, slow in providers.items():
                    samples[direction, clock, provider] = [
                        seconds * slower * slow * jitter for jitter in (0.9, 1.0, 1.2)
                    ]
        rows += bench.rows(case, samples)
    environment = {"device": "test data, no device", "driver": None, "triton": "3.0"}
    return {
        "command": "bench",
        "path": path,
        "environment": environment | {"tribn": "1.0", "torch": "2.0"},
        "cases": name,
        "rows": rows,
        "summary": bench.summarize(rows),
    }


@pytest.fixture(scope="module")
def report():
    return json.loads(json.dumps(synthetic()))


@pytest.fixture(scope="module")
def drawn(report):
    return figures.draw(report)


def marks(figure, direction):
    """The points in a direction's panel, as (provider, x, y), in order."""
    (ax,) = (ax for ax in figure.axes if ax.get_title() == direction)
    points = [line for line in ax.get_lines() if line.get_marker() != "None"]
    return [(p.get_label(), p.get_xdata()[0], p.get_ydata()[0]) for p in points]


def expected(report, direction, x):
    """The same from the JSON's rows of channels-last with a cold cache."""
    return [
        (row["provider"], pytest.approx(x(row)))
        for row in report["rows"]
        if (row["layout"], row["clock"], row["direction"]) == ("channels-last", "cold", direction)
    ]


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def legend(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()


def test_figures_for_every_layout(drawn):
    kinds = "copy", "roofline", "speedup"
    assert drawn.keys() == {f"{kind}-{layout}-bf16" for kind in kinds for layout in LAYOUTS}


@pytest.mark.parametrize("direction", figures.DIRECTIONS)
def test_share_of_copy(report, drawn, direction):
    figure, _ = drawn["copy-channels-last-bf16"]
    found = marks(figure, direction)
    shares = expected(report, direction, lambda row: 100 * row["share_of_copy"])
    assert [(provider, x) for provider, x, _ in found] == shares
    assert [y for _, _, y in found] == [y for y in range(16) for _ in SLOWNESS]
    assert labels(figure)[0] == "256×56×56 add relu (3)"
    assert len(labels(figure)) == 16
    assert legend(figure)[0] == list(SLOWNESS)


@pytest.mark.parametrize("direction", figures.DIRECTIONS)
def test_speedup(report, drawn, direction):
    figure, _ = drawn["speedup-channels-last-bf16"]
    found = marks(figure, direction)
    ratios = expected(report, direction, lambda row: row["times_tribn"])
    rivals = [(provider, ratio) for provider, ratio in ratios if provider != "tribn"]
    assert [(provider, x) for provider, x, _ in found[:-2]] == rivals
    assert labels(figure)[-1] == "geometric mean"
    means = [
        (provider, pytest.approx(SLOWNESS[provider] / 1.25), 16)
        for provider in ("eager", "compile")
    ]
    assert found[-2:] == means
    low, high = figure.axes[0].get_xlim()
    assert low < 0.8 < 2.4 < high


@pytest.mark.parametrize("direction", figures.DIRECTIONS)
def test_roofline(report, drawn, direction):
    figure, _ = drawn["roofline-channels-last-bf16"]
    found = [(provider, (x, y)) for provider, x, y in marks(figure, direction)]
    assert found == expected(report, direction, lambda row: (row["bytes"] / 1e6, row["us"]))
    (line,) = (ln for ln in figure.axes[0].get_lines() if "copy" in str(ln.get_label()))
    (x, *_), (y, *_) = line.get_xdata(), line.get_ydata()
    copies = [row for row in report["rows"] if (row["provider"], row["clock"]) == ("copy", "cold")]
    assert y / x == pytest.approx(min(row["us"] / row["bytes"] for row in copies) * 1e6)


def test_captions_name_the_conditions(drawn):
    for name, (_, caption) in drawn.items():
        for words in (
            *("GPU: test data, no device.", "bf16", "batch 128", "cold L2", "3 samples"),
            *("tribn 1.0", "PyTorch 2.0", "Triton 3.0", "n such layers"),
        ):
            assert words in caption, name
        assert "driver" not in caption
        assert ("channels-last" in name) == ("channels-last" in caption)


def test_without_a_gpu_figure_and_caption_say_so():
    for figure, caption in figures.draw(
        synthetic(path="CPU path, no GPU", clocks=["wall"])
    ).values():
        assert legend(figure)[1].startswith("CPU path, no GPU. ")
        assert caption.startswith("CPU path, no GPU: ")
        assert "host included" in caption
        assert "cold" not in caption


def test_a_set_of_several_batches_shows_them():
    figure, caption = figures.draw(synthetic("hard"))["copy-channels-first-bf16"]
    assert "20×6×65536" in labels(figure)
    assert "batch" not in caption
    assert "n such layers" not in caption


def test_alone_there_is_no_speed_up_to_draw():
    drawn = figures.draw(synthetic("pointnet", slowness={"tribn": 1.0}))
    assert drawn.keys() == {
        f"{kind}-{lay}-bf16" for kind in ("copy", "roofline") for lay in LAYOUTS
    }


def test_a_provider_without_a_colour_is_drawn(report):
    drawn = figures.draw(synthetic("pointnet", slowness={"tribn": 1.0, "newcomer": 2.0}))
    figure, _ = drawn["speedup-channels-first-bf16"]
    assert legend(figure)[0] == ["newcomer"]
    line = next(ln for ln in figure.axes[0].get_lines() if ln.get_label() == "newcomer")
    assert to_hex(line.get_color()) == "#000000"


def test_no_rows_no_figures(report):
    assert figures.draw(report | {"rows": [], "summary": []}) == {}


# The command


def alone():
    """A report with few figures, which take a second each to write."""
    return synthetic("pointnet", slowness={"tribn": 1.0}, layouts=LAYOUTS[:1])


def test_writes_svg_and_png_beside_the_json_or_to_out(report, tmp_path, capsys):
    path = write(alone(), tmp_path, "bench-test data")
    names = {
        f"bench-test-data-{kind}-channels-first-bf16{suffix}"
        for kind in ("copy", "roofline")
        for suffix in (".svg", ".png")
    }
    main(["plot", str(path)])
    assert {p.name for p in tmp_path.iterdir()} == names | {path.name}
    assert sorted(capsys.readouterr().out.split()) == sorted(str(tmp_path / n) for n in names)
    main(["plot", str(path), "--out", str(tmp_path / "new" / "er")])
    for name in names:  # the same JSON gives the same file
        assert (tmp_path / name).read_bytes() == (tmp_path / "new" / "er" / name).read_bytes()
    image = imread(tmp_path / "bench-test-data-copy-channels-first-bf16.png")
    assert image.shape[1] == 1600


def test_without_arguments_all_results_that_have_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    (tmp_path / "demo.json").write_text('{"experiments": {}}')
    write({"command": "codegen", "rows": []}, tmp_path, "codegen")
    write(alone(), tmp_path, "bench-cpu")
    main(["plot"])
    assert {p.name.split("-")[0] for p in tmp_path.glob("*.png")} == {"bench"}


def test_a_result_without_a_time_has_nothing_to_draw(tmp_path, capsys):
    path = write(alone() | {"rows": [], "summary": []}, tmp_path, "bench-cpu")
    with pytest.raises(SystemExit) as exit:
        main(["plot", str(path)])
    assert exit.value.code == 2
    assert "has nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no result"),
        ("{", "is no result"),
        ("[]", "is no result"),
        ("{}", "is no result"),
        ('{"command": "codegen"}', "there are figures"),
        ('{"command": "style"}', "there are figures"),
    ],
)
def test_what_cannot_be_drawn_exits_with_2(text, message, tmp_path, capsys):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["plot", str(path)])
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "usage: python -m perf plot" in shown
    assert message in shown


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        main(["plot"])
    assert exit.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("rest", ['"rows": [{}]', '"rows": 5', '"environment": null'])
@pytest.mark.parametrize("command", ["bench", "step", "traffic"])
def test_a_result_that_is_not_whole_is_an_error(command, rest, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(f'{{"command": "{command}", {rest}}}')
    with pytest.raises(SystemExit) as error:
        main(["plot", str(path)])
    assert error.value.code == 2
    assert f"no whole result of {command}" in capsys.readouterr().err
