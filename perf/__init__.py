"""What tribn does on this machine: `python -m perf --help`."""
