"""Figures of synthetic results: that they show what is in the JSON, and nothing else."""

import json
from importlib.util import find_spec

import pytest
from cases import INTERPRET

if INTERPRET:
    pytest.skip("figures have nothing to do with the interpreter", allow_module_level=True)
if missing := [name for name in ("matplotlib", "rich") if not find_spec(name)]:
    pytest.skip(f"plots need {', '.join(missing)}", allow_module_level=True)

from perf import bench, plot
from perf.__main__ import main
from perf.cases import DIRECTIONS, layers
from perf.figures import bench as figures
from perf.gate import Case
from perf.report import write

# Made up: seconds = 5 µs and bytes at 3 TB/s, times this
SLOWNESS = {"tribn": 1.25, "eager": 3.0, "compile": 2.0}


def synthetic(name="resnet50", path="GPU", clocks=("cold", "hot", "wall"), slowness=SLOWNESS):
    """A report as `bench` writes it, of made-up times."""
    rows = []
    for case in bench.cases(layers(name), ("channels-first", "channels-last"), ["bf16"]):
        samples = {
            (direction, clock, provider): [
                (5e-6 + bench.moved_by(case, direction) / 3e12) * slow * jitter
                for jitter in (0.9, 1.0, 1.2)
            ]
            for direction in (bench.COPY, *DIRECTIONS)
            for clock in clocks
            for provider, slow in ({bench.COPY: 1} if direction == bench.COPY else slowness).items()
        }
        rows += bench.rows(case, samples)
    return {
        "command": "bench",
        "path": path,
        "environment": {
            "device": "made-up times, no device",
            "driver": None,
            "tribn": "0",
            "torch": "0",
            "triton": "0",
        },
        "cases": name,
        "rows": rows,
        "summary": bench.summarize(rows),
    }
