"""The command `deformmamba`, also as `python -m deformmamba`.

This file imports nothing slow, so that a signal which arrives while Python imports the rest ends the command with one
line instead of a traceback. Later signals are handled by `cli.stopping`.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def main() -> int:
    """Runs the command that sys.argv states; returns its exit code."""
    early = {
        number: usual
        for name, usual in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL))
        if signal.getsignal(number := getattr(signal, name)) == usual
    }
    for number in early:
        signal.signal(number, _end)
    try:
        from deformmamba.cli import main as command

        for number, usual in early.items():
            signal.signal(number, usual)
        return command()
    except KeyboardInterrupt:  # before or after the block that handles signals
        _end(signal.SIGINT)
    finally:
        for number in early:  # while Python ends
            signal.signal(number, _end)
    return 0


def _end(number: int, _: FrameType | None = None) -> None:
    """Ends the process at once; no file is open yet, or all are complete."""
    with suppress(OSError, ValueError):
        print("deformmamba: interrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
