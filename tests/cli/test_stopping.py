"""A signal ends a command with one line and its exit code, wherever Python is at that moment."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deformmamba import atomic, cli
from deformmamba.cli import main
from deformmamba.cli.stopping import INTERRUPTED, Stopping

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


def run(work: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that calls `work`."""
    monkeypatch.setattr(cli.backends, "_backends", work)
    return main(["backends"])


def send(number: int = signal.SIGTERM) -> None:
    signal.raise_signal(number)
    for _ in range(100):  # the handler runs soon after
        pass


def wait(seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


class Destroyed:
    """Receives a signal while it is destroyed, when Python cannot raise an exception."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        send(self.number)


def in_a_destructor(number: int) -> None:
    Destroyed(number)
    wait()
    pytest.fail("the command went on")


def swallowed(number: int) -> None:
    with suppress(BaseException):
        send(number)
    wait()
    pytest.fail("the command went on")


def converted(number: int) -> None:
    try:
        send(number)
    except BaseException:
        raise ImportError("a library could not be loaded") from None


def twice(number: int) -> None:
    try:
        send(number)
    finally:
        send(number)


def ignored(number: int) -> None:
    with suppress(BaseException):
        send(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("work", [send, in_a_destructor, swallowed, converted, twice, ignored])
def test_a_signal_ends_a_command_in_every_state(
    work: Any, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if work is swallowed and number == signal.SIGINT:
        return  # ctrl-C is for a person, who presses it again
    # only `swallowed` waits for a repetition; a second one could come, on a busy machine, while the command ends
    monkeypatch.setattr(Stopping.__init__, "__defaults__", (0.25, 40) if work is swallowed else (60, 1))
    before = signal.getsignal(number), sys.unraisablehook
    assert run(lambda _: work(number), monkeypatch) == 128 + number
    assert capsys.readouterr().err == f"deformmamba: {INTERRUPTED}\n"
    assert (signal.getsignal(number), sys.unraisablehook) == before


def test_another_failure_of_a_destructor_is_reported_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(found.exc_value))
    assert run(lambda _: Broken() and None, monkeypatch) == 0
    assert [str(error) for error in seen] == ["broken"]


def test_a_process_that_never_gives_way_is_ended_and_its_temporary_files_are_removed(tmp_path: Path) -> None:
    script = f"""
import signal, time
from pathlib import Path
from deformmamba.atomic import renamed
from deformmamba.cli.stopping import Stopping

class Busy:
    def __del__(self):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(1)

with Stopping(patience=0.05, attempts=2):
    with renamed({str(tmp_path / "a.txt")!r}) as temporary:
        temporary.write_text("half")
        busy = [Busy() for _ in range(60)]
        del busy  # a list destroys its items one after the other; an exception ends at most the destructor of one
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, f"deformmamba: {INTERRUPTED}\n")
    assert not list(tmp_path.iterdir())


def test_handlers_of_others_are_kept() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with Stopping() as stopping:
            send()
        assert (seen, stopping.number) == ([signal.SIGTERM], None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_folder_is_old_or_new_whenever_a_signal_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "series"
    target.mkdir()
    (target / "old").touch()
    replace = os.replace

    def interrupted(source: Any, destination: Any) -> None:
        replace(source, destination)
        if str(destination).endswith(".before"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic.renamed_folder(target) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["series"]
    assert [path.name for path in target.iterdir()] == ["old"]


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, "cli"), (signal.SIGTERM, "cli"), (signal.SIGINT, "errors")])
def test_a_signal_during_the_imports_of_a_command_gives_one_line(number: int, at: str) -> None:
    script = f"""
import signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "deformmamba.{at}":
            signal.raise_signal({int(number)})
sys.meta_path.insert(0, Finder())
from deformmamba.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", script, "backends"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "deformmamba: interrupted\n")
