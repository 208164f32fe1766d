"""What bench writes, with times that a test chooses, and how a command ends."""

import json
from dataclasses import asdict

from perf.__main__ import main
from perf.rows import Key

KEY = Key("bn_relu", (8, 64, 56, 56), 1, "channels-first", "bf16", "forward", "cold")


def bench(times, device="NVIDIA H100", cases="resnet50", problems=(), **environment):
    """A result of bench from microseconds by provider and key."""
    return {
        "command": "bench",
        "path": "GPU",
        "environment": {"device": device, "torch": "2.13.0"} | environment,
        "cases": cases,
        "threads": 1,
        "rows": [
            {**asdict(key), "provider": provider, "us": us, "samples": 20}
            for provider, by_key in times.items()
            for key, us in by_key.items()
        ],
        "problems": list(problems),
    }


def save(path, report):
    path.write_text(json.dumps(report))
    return str(path)


def outcome(argv, capsys):
    """Exit code of `python -m perf`, and its output as one line."""
    code, message = 0, ""
    try:
        main(argv)
    except SystemExit as exit:
        code, message = (1, exit.code) if isinstance(exit.code, str) else (exit.code, "")
    out, err = capsys.readouterr()
    return code, " ".join(f"{out} {err} {message}".split())
