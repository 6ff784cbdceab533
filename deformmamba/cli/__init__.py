"""The command `deformmamba`: scans in, sharper scans out, and what belongs to that.

One file per command, or per family of them; each has `add(commands)`, which declares its arguments, and is listed in
COMMANDS. What a user did wrong ends in one line on stderr and exit code 2, with no output file left behind and an
existing one untouched; ctrl-C ends in exit code 130 on the same terms. Results go to stdout, everything else to
stderr. Nothing here imports torch until a command needs it.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from deformmamba import __version__
from deformmamba.cli import (
    backends,
    benchmark,
    degrade,
    demo,
    evaluate,
    export,
    inspect,
    prepare,
    train,
    upscale,
    weights,
)
from deformmamba.cli.arguments import Parser, printable, refuse
from deformmamba.errors import DeformMambaError

COMMANDS = (upscale, degrade, inspect, prepare, evaluate, benchmark, train, weights, backends, export, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` as in sys.argv[1:]. Returns the exit code, 0 if all went well."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        _complete(parser)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            code = args.run(args)
        except KeyboardInterrupt:
            return refuse("interrupted; no half-written file is left", 130)
        except OSError as error:
            return refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except Exception as error:
            if _out_of_memory(error):
                return refuse("out of memory; try --batch-size 1, --device cpu or a machine with more of it")
            if not isinstance(error, _user_errors()):
                raise
            return refuse(str(error))
    return int(code or 0)


def _complete(parser: argparse.ArgumentParser) -> None:
    with contextlib.suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(parser)


def _user_errors() -> tuple[type[Exception], ...]:
    """What this package raises about its user's arguments and files; anything else is a bug and keeps its traceback."""
    return DeformMambaError, ValueError, FloatingPointError


def _out_of_memory(error: Exception) -> bool:
    # torch has a class of its own for a GPU, and a plain RuntimeError for the CPU
    cuda = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, (MemoryError, cuda)) or "DefaultCPUAllocator" in str(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"deformmamba: warning: {printable(str(message))}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="deformmamba",
        description="MR image super-resolution. Research software, not a medical device.",
        epilog="example: deformmamba upscale scan.nii.gz -o sharper.nii.gz",
    )
    parser.add_argument("--version", action="version", version=f"deformmamba {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
