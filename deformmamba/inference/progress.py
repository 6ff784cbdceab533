"""Progress of a long computation: a bar on a terminal and in a notebook, else regular lines on stderr."""

import sys
import time
from types import TracebackType
from typing import Any

# seconds between two lines without a terminal
EVERY = 30.0


class Progress:
    """Counts slices.

    Args:
        total: number of slices.
        shown: False: nothing is printed.
    """

    def __init__(self, total: int, *, shown: bool) -> None:
        self.total, self.done = total, 0
        self._start = self._last = time.monotonic()
        self._bar: Any = _bar(total) if shown else None
        self._lines = shown and self._bar is None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: int) -> None:
        """`n` more slices are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        now = time.monotonic()
        first = self.done == n
        if self._lines and self.done < self.total and (first or now - self._last >= EVERY):
            left = (now - self._start) / self.done * (self.total - self.done)
            if first and left < EVERY / 3:
                return
            print(f"{self.done} of {self.total} slices, about {left:.0f} s left", file=sys.stderr, flush=True)
            self._last = now


def _bar(total: int) -> Any:
    """A tqdm bar; None without a terminal on stderr or a notebook."""
    from tqdm.auto import tqdm

    in_notebook = "notebook" in tqdm.__mro__[1].__module__ or "notebook" in tqdm.__module__
    if not in_notebook and not (sys.stderr and sys.stderr.isatty()):  # None: a closed stderr
        return None
    return tqdm(total=total, unit="slice")
