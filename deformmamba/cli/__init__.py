"""The command `deformmamba`: super-resolution of scans and related tasks.

Each command, or family of commands, has one file with `add(commands)`, which declares its arguments, and is listed in
COMMANDS. A user error (`DeformMambaError`, OSError) gives one line on stderr and exit code 2; no new output file is
left, and an existing one is unchanged. Signals that stop a command treat files in the same way (`cli.stopping`). Any
other exception is a bug: its traceback is printed with a request to report it. Results go to stdout, everything else to
stderr. Torch is imported only when a command needs it.
"""

import argparse
import contextlib
import io
import math
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from deformmamba import __version__
from deformmamba.cli import (
    backends,
    benchmark,
    bids,
    degrade,
    demo,
    evaluate,
    export,
    inspect,
    isotropic,
    prepare,
    train,
    upscale,
    weights,
)
from deformmamba.cli.arguments import Parser, add_common, printable, quiet_if, refuse, with_options
from deformmamba.cli.cores import allowed_threads, limit_spinning, take_short_turns, use_threads
from deformmamba.cli.stopping import INTERRUPTED, Stopping
from deformmamba.errors import DeformMambaError

COMMANDS = (
    upscale,
    bids,
    isotropic,
    degrade,
    inspect,
    prepare,
    evaluate,
    benchmark,
    train,
    weights,
    backends,
    export,
    demo,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` as in sys.argv[1:]. Returns the exit code, 0 if all went well."""
    _print_anything()
    with Stopping() as stopping:
        code = _run(argv, stopping)
    return code if stopping.number is None else refuse(INTERRUPTED, 128 + stopping.number)


def _run(argv: Sequence[str] | None, stopping: Stopping) -> int:
    """`main` within the block of `stopping`, which ends with an exception on a signal."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # shell completion
        _complete(parser)
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # the command's own parser can suggest a correction
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        for action in args.parser._actions:
            value = getattr(args, action.dest, None)
            if value == "" or (isinstance(value, list) and "" in value):
                shown = "/".join(action.option_strings) or action.metavar or action.dest
                args.parser.error(f"{shown} is empty; an unset variable of the shell?")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    start = time.monotonic()
    try:
        os.getcwd()
    except OSError:  # PyTorch's libraries end the process without it
        return refuse("the current folder no longer exists; change to another one")
    limit_spinning()
    take_short_turns()
    threads = use_threads(args.threads, args.idle_only)
    if args.idle_only and not args.threads and not args.quiet and (threads or math.inf) < allowed_threads():
        print(
            f"deformmamba: {threads} of {allowed_threads()} threads, because other programs use the other CPUs; "
            "--threads N changes it",
            file=sys.stderr,
        )
    with warnings.catch_warnings(), quiet_if(args.quiet):
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _ShowOnce(vars(args))
        try:
            if args.verbose:
                _describe_machine()
            code = args.run(args)
        except BrokenPipeError:  # the reader of a pipe has ended, as head does
            with contextlib.suppress(AttributeError, OSError):
                broken = sys.stdout.fileno()
                os.dup2(os.open(os.devnull, os.O_WRONLY), broken)  # else Python complains at its end
            return 128 + getattr(signal, "SIGPIPE", 13)
        except Exception as error:
            if stopping.number is not None:  # the signal's exception, which other code turned into its own
                raise
            if args.traceback:
                traceback.print_exc()
            message = _message(error, vars(args))
            if message is None:
                print(f"deformmamba: {_PLEA}", file=sys.stderr)
                raise
            return refuse(message)
        finally:
            if args.verbose:
                print(f"deformmamba: {time.monotonic() - start:.1f} s in all", file=sys.stderr)
    return int(code or 0)


def _print_anything() -> None:
    """Makes stdout and stderr replace characters that their encoding lacks, as under LC_ALL=C, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_PLEA = (
    f"this is a bug in deformmamba {__version__}; please report it, with the lines below and the first lines that the "
    "same command prints with --verbose"
)


def _message(error: Exception, options: Mapping[str, Any]) -> str | None:
    """One line for an error that a user can fix; None for a bug."""
    if _out_of_memory(error):
        ways = {"batch_size": "--batch-size 1", "accumulate": "--accumulate 4", "device": "--device cpu"}
        advice = [way for name, way in ways.items() if name in options]
        return f"out of memory; try {', '.join(advice)}{' or ' if advice else ''}a machine with more of it"
    if isinstance(error, DeformMambaError):
        for_command = getattr(error, "for_command", None)  # of volume.ChoiceNeeded
        return str(for_command(options)) if for_command else with_options(str(error), options)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def _describe_machine() -> None:
    """Prints versions, threads and the scan's backend on stderr, for a bug report."""
    import torch

    from deformmamba.scan import backend_report

    names = ("numpy", "numba", "nibabel", "pydicom")
    # torch's own version names the build as well, such as 2.14.1+cu130
    versions = ", ".join([f"torch {torch.__version__}", *(f"{name} {metadata.version(name)}" for name in names)])
    lines = [
        f"deformmamba {__version__}, Python {platform.python_version()}, {platform.platform()}",
        versions,
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        *(f"scan backend {name}: {'yes' if usable else f'no, {why}'}" for name, usable, why, _ in backend_report()),
    ]
    print(*(f"deformmamba: {line}" for line in lines), sep="\n", file=sys.stderr)


def _complete(parser: argparse.ArgumentParser) -> None:
    with contextlib.suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(parser)


def _out_of_memory(error: Exception) -> bool:
    # torch has a separate class for a GPU, and raises a plain RuntimeError for the CPU
    cuda = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, (MemoryError, cuda)) or "DefaultCPUAllocator" in str(error)


class _ShowOnce:
    """Shows each warning as one line, once per command, with the command's `options` instead of Python's arguments."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, *_: Any, **__: Any) -> None:
        text = printable(with_options(str(message), self._options))
        if text not in self._shown:
            self._shown.add(text)
            with contextlib.suppress(OSError):
                print(f"deformmamba: warning: {text}", file=sys.stderr)


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
    add_common(parser, listed=True)
    parser.set_defaults(threads=None, quiet=False, verbose=False, traceback=False, idle_only=False)
    for leaf in leaves(parser):
        add_common(leaf, listed=False)
    return parser


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of all commands that run something: those below `parser` without subcommands."""
    families = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    below = [child for family in families for child in family.choices.values()]
    return [leaf for child in below for leaf in (leaves(child) or [child])]
