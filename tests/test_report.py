"""What all commands of perf write, and the arguments they share."""

import json
import math
from argparse import ArgumentTypeError

import numpy as np
import pytest

from perf import report


def test_json_says_what_json_can_say(tmp_path):
    value = {"a": np.array([[1.0, np.nan]]), "b": (1, None, "c"), "d": math.inf, "e": 1 / 3}
    path = report.write(value, tmp_path / "new", "bench NVIDIA H100")
    assert path == tmp_path / "new" / "bench-NVIDIA-H100.json"
    expected = {"a": [[1.0, None]], "b": [1, None, "c"], "d": None, "e": 0.333333}
    assert json.loads(path.read_text()) == expected


def test_environment_names_device_and_revision():
    taken = report.environment("cpu")
    assert taken["device"].endswith(" CPU")
    assert {"driver", "tribn", "torch", "triton", "python", "revision"} <= taken.keys()


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_count_is_a_positive_integer(text):
    assert report.count("12") == 12
    with pytest.raises(ArgumentTypeError, match="no positive integer"):
        report.count(text)


def test_directory_is_no_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert report.directory(str(tmp_path / "new")) == tmp_path / "new"
    for path in (file, file / "below", "/proc/none", tmp_path / ("x" * 300)):
        with pytest.raises(ArgumentTypeError, match="no directory to write to"):
            report.directory(str(path))


def test_a_result_that_cannot_be_written_is_said_in_a_line(tmp_path):
    with pytest.raises(SystemExit, match="cannot be written"):
        report.write({}, tmp_path, "x" * 300)


def test_names_have_the_unusual_options():
    parser = report.parser_of("bench", None)
    parser.add_argument("--dtypes", nargs="+", default=["fp32"])
    parser.add_argument("--batch", type=report.count)

    def name(*argv):
        return report.name_of("a", parser, parser.parse_args(argv), "dtypes", "batch")

    assert name() == name("--dtypes", "fp32") == "a"
    assert name("--dtypes", "bf16", "fp16", "--batch", "4") == "a-dtypes-bf16-fp16-batch-4"


def test_a_command_that_fails_has_no_output():
    assert report._output("sh", "-c", "echo failed; exit 9") is None
    assert report._output("no such command") is None
    assert report._output("sh", "-c", "echo first; echo second") == "first"
