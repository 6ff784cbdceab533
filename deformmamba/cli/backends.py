"""backends: lists the scan kernels that run here, and PyTorch's thread settings."""

import argparse
import json
import math
from typing import Any

from deformmamba.cli.arguments import add_command, tell
from deformmamba.cli.cores import affinity, quota, turn_length


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "backends",
        _backends,
        "list the scan kernels, whether they run on this machine, and why not",
        "backends --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _backends(args: argparse.Namespace) -> None:
    import torch

    from deformmamba.scan import backend_report
    from deformmamba.scan.cpu import compiled_for
    from deformmamba.threads import environment_warnings, waiting_policy

    rows = backend_report()
    if args.json:
        keys = ("name", "usable", "why", "cure")
        tell(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    for name, usable, why, cure in rows:
        tell(f"{name:12} {'yes' if usable else 'no':4} {why}{f'; {cure}' if cure else ''}")
    if any(name == "cpu" and usable for name, usable, *_ in rows):
        tell(f"CPU kernels: for {compiled_for()}")
    allowed = affinity() if quota() == math.inf else f"{quota():g} of {affinity()}"
    turns = "the system's" if turn_length() is None else f"{(turn_length() or 0) / 1e6:g} ms"
    settings = f"between operations: {waiting_policy()}; time slices on a busy CPU: {turns}"
    tell(f"threads: {torch.get_num_threads()}, CPUs allowed: {allowed}; {settings}")
    for line in environment_warnings():
        tell(f"warning: {line}")
