"""Signals that stop a command: one line on stderr, exit code 128 + the signal's number, no incomplete file."""

import _thread
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from deformmamba.atomic import remove_temporaries
from deformmamba.cli.arguments import refuse

INTERRUPTED = "interrupted; no half-written file is left"


class Stopped(KeyboardInterrupt):
    """A signal that ends a command; raised where the main thread is at that moment."""


class Stopping:
    """Context manager: SIGTERM (a scheduler's time limit) and SIGHUP (a closed terminal) end a command as ctrl-C does.

    The block ends with an exception, so that its clean-up runs. Python cannot raise it out of a destructor or a
    function that C code calls, and other code may catch it. So a signal that did not end the block is repeated: at
    once in the first case, else after `patience`. If this fails too, the process ends without the clean-up of the
    block, but without its temporary files. Ctrl-C is repeated in the first case only.

    An existing handler, or `nohup`, is kept. Signals need the main thread; in another one nothing happens.

    Attributes:
        number: the signal that arrived first; None: no signal.
    """

    def __init__(self, patience: float = 2.0, attempts: int = 5) -> None:
        self.number: int | None = None
        self._patience, self._attempts = patience, attempts
        self._ended = threading.Event()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        self._report = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        for name, usual in (
            ("SIGINT", signal.default_int_handler),
            ("SIGTERM", signal.SIG_DFL),
            ("SIGHUP", signal.SIG_DFL),
        ):
            number = getattr(signal, name, None)
            with suppress(ValueError):  # not the main thread
                if number is not None and signal.getsignal(number) == usual:
                    self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Suppresses the exception that ended the block, if a signal or ctrl-C was the cause."""
        self._ended.set()
        for number, usual in self._handlers.items():
            signal.signal(number, usual)
        sys.unraisablehook = self._report
        if isinstance(error, KeyboardInterrupt) and self.number is None:
            self.number = int(signal.SIGINT)
        if self.number is None:
            return False
        remove_temporaries()
        # other code may have turned the signal's exception into its own, such as a failed import
        return isinstance(error, KeyboardInterrupt | Exception)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._ended.is_set():
            return
        if self.number is None:
            self.number = number
            if number != signal.SIGINT:
                threading.Thread(target=self._insist, daemon=True).start()
        raise Stopped(number)

    def _unraisable(self, found: Any) -> None:
        if isinstance(found.exc_value, Stopped):
            again = threading.Timer(0.02, self._repeat)
            again.daemon = True
            again.start()
        else:
            self._report(found)

    def _repeat(self) -> None:
        if self.number is not None and not self._ended.is_set():
            _thread.interrupt_main(signal.Signals(self.number))

    def _insist(self) -> None:
        for _ in range(self._attempts):
            if self._ended.wait(self._patience):
                return
            self._repeat()
        if not self._ended.wait(self._patience) and self.number is not None:
            remove_temporaries()
            refuse(INTERRUPTED)
            os._exit(128 + self.number)
