"""What all commands of perf write, and the arguments they share."""

import json
import math

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
    assert taken["device"].endswith("CPU")
    assert {"driver", "tribn", "torch", "triton", "python", "revision"} <= taken.keys()


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_count_is_a_positive_integer(text):
    assert report.count("12") == 12
    with pytest.raises(ValueError):  # noqa: PT011  argparse words the message
        report.count(text)


def test_directory_is_no_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert report.directory(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(ValueError):  # noqa: PT011  argparse words the message
        report.directory(str(file))
