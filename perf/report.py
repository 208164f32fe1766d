"""What all commands share: where a measurement was taken, its JSON file, and arguments."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
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
    """The GPU's, or that of a CPU: its model where Linux tells it, else its architecture."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", about.read_text()) if about.exists() else None
    return f"{model[1] if model else platform.machine()} CPU"


def short_name(device: str) -> str:
    """Where something was measured, in the name of its result."""
    return device_name(device) if device == "cuda" else "cpu"


def write(report: Report, out: Path, name: str) -> Path:
    """Writes `name`.json into the directory `out`, which is made if need be."""
    path = out / f"{name.replace(' ', '-')}.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_jsonable(report), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise SystemExit(f"the result cannot be written: {error}") from error
    return path


def name_of(what: str, parser: ArgumentParser, arguments: Namespace, *options: str) -> str:
    """Of a result: what was measured and where, and those of the options that are not the usual."""
    given = {option: getattr(arguments, option) for option in options}
    unusual = [
        f"{option}-{'-'.join(map(str, value if isinstance(value, list) else [value]))}"
        for option, value in given.items()
        if value != parser.get_default(option)
    ]
    return "-".join([what, *unusual])


def refuse_interpreter(parser: ArgumentParser) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 would time Triton's interpreter: unset it")


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
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def directory(text: str) -> Path:
    """A directory to write to, which is made if need be, for argparse."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=text).close()
    except OSError as error:
        raise ArgumentTypeError(f"{text} is no directory to write to: {error.strerror}") from error
    return Path(text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line a command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout.split("\n")[0] or None


def _jsonable(value: Any) -> Any:
    """What JSON can say: lists for arrays, six digits of a number, null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | tuple | list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
