"""What all commands share: where a measurement was taken, its JSON file, and arguments."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tribn

Report = dict[str, Any]

RESULTS = Path(__file__).parent / "results"


def environment(device: str) -> dict[str, str | None]:
    """Device, versions and git revision of a measurement on "cpu" or "cuda"."""
    return {
        "device": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "tribn": tribn.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "revision": _output("git", "describe", "--always", "--dirty"),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def write(report: Report, out: Path, name: str) -> Path:
    """Writes `name`.json into the directory `out`, which is made if need be."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name.replace(' ', '-')}.json"
    path.write_text(json.dumps(_jsonable(report), indent=1, allow_nan=False) + "\n")
    return path


def parser_of(name: str, description: str | None, **options: Any) -> ArgumentParser:
    """The parser of a command that writes a result."""
    parser = ArgumentParser(
        prog=f"python -m perf {name}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        **options,
    )
    parser.add_argument(
        "--out",
        type=directory,
        default=RESULTS,
        metavar="DIR",
        help="where the result goes (perf/results)",
    )
    return parser


def device(text: str) -> str:
    """ "cpu", or "cuda" if there is such a device, for argparse."""
    if text not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("there is no CUDA device here")
    return text


def count(text: str) -> int:
    """A positive integer, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def directory(text: str) -> Path:
    """A directory that exists or can be made, for argparse."""
    path = Path(text)
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line a command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0] or None


def _jsonable(value: Any) -> Any:
    """What JSON can say: lists for arrays, six digits of a number, null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | tuple | list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
