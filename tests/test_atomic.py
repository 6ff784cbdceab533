"""A folder has its old or its new files, whenever the process is interrupted or killed, and stays the same folder."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deformmamba import atomic
from deformmamba.atomic import remove_temporaries, renamed_folder, sweep

OLD, NEW = {"a": "old", "b": "old"}, {"b": "new", "c": "new", "d": "new"}


def fill(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    """The text of each file, hidden ones too."""
    return {path.name: "" if path.is_dir() else path.read_text() for path in folder.iterdir()}


def stopping(monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool, error: BaseException) -> None:
    """Makes the rename number `at` fail, before or after it is done."""
    replace, calls = os.replace, iter(range(1000))

    def replaced(source: Any, target: Any) -> None:
        now = next(calls) == at
        if not now or after:
            replace(source, target)
        if now:
            raise error

    monkeypatch.setattr(os, "replace", replaced)


def test_a_folder_stays_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill(out, OLD)
    out.chmod(0o2775)
    before = out.stat()
    monkeypatch.chdir(out)
    with renamed_folder(".") as temporary:
        assert temporary.parent == out
        fill(temporary, NEW)
        assert {name: text for name, text in content(out).items() if text} == OLD
    assert content(out) == NEW
    assert os.getcwd() == str(out)
    assert (out.stat().st_ino, stat.S_IMODE(out.stat().st_mode)) == (before.st_ino, 0o2775)
    assert content(tmp_path) == {"out": ""}


def test_a_new_folder_appears_with_its_files(tmp_path: Path) -> None:
    with renamed_folder(tmp_path / "out") as temporary:
        fill(temporary, NEW)
        assert not (tmp_path / "out").exists()
    with renamed_folder(tmp_path / "made meanwhile") as temporary:
        fill(temporary, NEW)
        fill(tmp_path / "made meanwhile", OLD)
    assert content(tmp_path) == {"out": "", "made meanwhile": ""}
    assert content(tmp_path / "out") == content(tmp_path / "made meanwhile") == NEW


def test_files_that_are_not_replaced_stay(tmp_path: Path) -> None:
    fill(tmp_path, {**OLD, "thesis": "mine"})
    with renamed_folder(tmp_path, lambda path: path.read_text() != "mine") as temporary:
        fill(temporary, NEW)
    assert content(tmp_path) == {**NEW, "thesis": "mine"}
    with (
        pytest.raises(FileExistsError, match="the file thesis in it was not written by this program"),
        renamed_folder(tmp_path, lambda path: path.read_text() != "mine") as temporary,
    ):
        fill(temporary, {"thesis": "new"})
    assert content(tmp_path) == {**NEW, "thesis": "mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(6))  # two old files aside, their folder, three new files
def test_old_files_are_back_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool, error: BaseException
) -> None:
    fill(tmp_path, OLD)
    stopping(monkeypatch, at, after=after, error=error)
    with pytest.raises(type(error)), renamed_folder(tmp_path) as temporary:
        fill(temporary, NEW)
    assert content(tmp_path) == OLD


@pytest.mark.parametrize("at", range(6))
def test_a_second_interruption_leaves_old_or_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The files are put back at the end of the process if ctrl-C stops this too."""
    replace = os.replace
    for second in range(1, 8):
        folder = tmp_path / str(second)
        fill(folder, OLD)
        calls = iter(range(1000))

        def replaced(source: Any, target: Any, calls: Any = calls, stops: tuple[int, int] = (at, at + second)) -> None:
            replace(source, target)
            if next(calls) in stops:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", replaced)
        with pytest.raises(KeyboardInterrupt), renamed_folder(folder) as temporary:
            fill(temporary, NEW)
        monkeypatch.setattr(os, "replace", replace)
        remove_temporaries()
        assert content(folder) in (OLD, NEW)


KILLED = """
import os, sys
from pathlib import Path
from deformmamba.atomic import renamed_folder, sweep
top, old, new = Path(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
for at in range(12):
    folder = top / f"{at:02}"
    folder.mkdir()
    for name, text in old.items():
        (folder / name).write_text(text)
    if not (child := os.fork()):
        left = iter(range(at, -1, -1))
        def until(call):
            def called(*args, **kwargs):
                if next(left, 0) == 0:
                    os._exit(9)
                return call(*args, **kwargs)
            return called
        os.replace, os.rmdir, os.unlink = until(os.replace), until(os.rmdir), until(os.unlink)
        with renamed_folder(folder) as temporary:
            for name, text in new.items():
                (temporary / name).write_text(text)
        os._exit(0)
    os.waitpid(child, 0)
    sweep(folder)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it forked")
def test_old_or_new_files_are_there_after_a_process_was_killed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), repr(OLD), repr(NEW)], timeout=120)
    assert done.returncode == 0
    states = [content(folder) for folder in sorted(tmp_path.iterdir())]
    assert len(states) == 12
    assert all(state in (OLD, NEW) for state in states), states
    assert states[0] == OLD
    assert states[-1] == NEW


def test_leftovers_of_another_machine_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with renamed_folder(tmp_path) as temporary:
        name = temporary.name
    other = tmp_path / name.replace(name[1:9], "00000000")
    fill(other, NEW)
    monkeypatch.setattr(atomic, "_is_alive", lambda process: False)
    sweep(tmp_path)
    assert content(other) == NEW
    with renamed_folder(tmp_path) as temporary:
        fill(temporary, OLD)
    assert content(tmp_path) == {**OLD, other.name: ""}


MOUNTED = """
mount -t tmpfs none "$1/out" && exec "$2" -c '
import sys
from deformmamba.atomic import renamed_folder
for text in ("first", "second"):
    with renamed_folder(sys.argv[1] + "/out") as temporary:
        (temporary / "a").write_text(text)
print(open(sys.argv[1] + "/out/a").read())
' "$1"
"""


def test_a_mount_point_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    unshare: Callable[..., Any] = lambda *command: subprocess.run(  # noqa: E731
        ["unshare", "-rm", *command], capture_output=True, text=True, timeout=60
    )
    if shutil.which("unshare") is None or unshare("mount", "-t", "tmpfs", "none", str(tmp_path / "out")).returncode:
        pytest.skip("no unprivileged mounts on this machine")
    done = unshare("sh", "-c", MOUNTED, "sh", str(tmp_path), sys.executable)
    assert (done.returncode, done.stdout, done.stderr) == (0, "second\n", "")
