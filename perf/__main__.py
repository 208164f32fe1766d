"""`python -m perf COMMAND`: runs the `main` of the module of that name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

# A module of this package with a `main(argv)` that parses the rest, and its line in --help.
COMMANDS = {
    "bench": "time batch norm layers of tribn and its rivals",
    "codegen": "compile every kernel for GPUs that are not there: registers, spills, accesses",
    "compare": "run the same benchmark on another git revision beside this one",
    "demo": "measure what batch normalization claims, on handwritten digits",
    "host": "microseconds of Python and dispatcher in a call, layer by layer",
    "plot": "draw the results of other commands, from their JSON files",
    "regress": "fail if tribn has lost ground on a stored result of the same device",
    "step": "time training steps of whole networks against torch eager and torch.compile",
    "sync": "time synchronized layers on several processes, and reckon what they take on many GPUs",
    "traffic": "count the bytes that batch norm moves, against torch eager and torch.compile",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="Measurements of tribn on this machine."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    # Only the chosen module is imported: the others may need what is not installed here.
    chosen, rest = parser.parse_known_args(argv)
    import_module(f"perf.{chosen.command}").main(rest)


if __name__ == "__main__":
    main()
