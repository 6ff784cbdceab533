"""Behaviour common to all commands: suggestions, threads, --quiet, --verbose, --traceback, warnings, bugs."""

import io
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from deformmamba.cli import _parser, cores, leaves, main
from deformmamba.cli.arguments import is_quiet, say, tell
from deformmamba.errors import InvalidArgument


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the function that `deformmamba backends` runs."""

    def install(run: Any) -> None:
        def add(commands: Any) -> None:
            from deformmamba.cli.arguments import add_command

            add_command(commands, "backends", run, "a test", "backends")

        monkeypatch.setattr("deformmamba.cli.backends.add", add)

    return install


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upscal", "x.nii"], "did you mean upscale?"),
        (["weights", "lst"], "did you mean list?"),
        (
            ["backends", "--jsn"],
            "unrecognized arguments: --jsn (did you mean --json?); see deformmamba backends --help",
        ),
        (["upscale", "a.nii", "-o", "b.nii", "--figur", "x", "--modle=ixi-2x"], "did you mean --model?"),
        (["upscale", "a.nii", "-o", "b.nii", "--consistency", "objct"], "did you mean object?"),
        (["export", "--format", "onnx", "--inputs", "base", "-o", "x"], "did you mean lr,base?"),
        (["backends", "--threads", "0"], "argument --threads: must be a whole number of 1 or more, not 0"),
        (["backends", "--threads", "x"], "argument --threads: must be a whole number of 1 or more, not x"),
        (["export", "--formt", "onnx", "-o", "x.onnx"], "did you mean --format?"),
        (["upscale", "a.nii", "b.nii", "-o", "c.nii"], "two values for output: b.nii and c.nii; give one"),
        (["upscale", "", "-o", "folder"], "INPUT is empty; an unset variable of the shell?"),
        (["evaluate", "", "--data", "scans"], "MODEL is empty"),
        (["prepare", "ixi", "scans", "-o", "x", "--contrast", "t2"], "did you mean T2?"),
        (["train", "fintune", "--data", "scans", "--out", "x"], "did you mean 'finetune'?"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_what_is_mistyped_gets_a_suggestion(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_a_closed_pipe_and_a_narrow_encoding(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    for run, code, said in ((closed, 141, b""), (lambda _: print("0 ± 1 Zoë"), 0, b"0 \\xb1 1 Zo\\xeb\n")):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
        command(run)
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            assert main(["backends"]) == code
            streams["stdout"].flush()
        assert streams["stdout"].buffer.getvalue() == said
        assert streams["stderr"].buffer.getvalue() == b""


def test_every_command_takes_the_common_options_before_and_after_its_name() -> None:
    parser = _parser()
    assert len(leaves(parser)) >= 15
    for leaf in leaves(parser):
        known = {option for action in leaf._actions for option in action.option_strings}
        assert {"--threads", "--quiet", "--verbose", "--traceback"} <= known, leaf.prog
    for words in (["--threads", "2", "--quiet", "backends"], ["backends", "--quiet", "--threads", "2"]):
        args = parser.parse_args(words)
        assert (args.threads, args.quiet, args.verbose) == (2, True, False)
    assert parser.parse_args(["--threads", "2", "backends", "--threads", "3"]).threads == 3


def test_quiet_leaves_results_and_warnings(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Any) -> None:
        assert is_quiet()
        say("no progress bars")
        tell("a result")
        warnings.warn("look out", stacklevel=1)

    command(run)
    assert main(["backends", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == "a result\n"
    assert err == "deformmamba: warning: look out\n"
    assert not is_quiet()


def test_a_warning_names_the_option_of_the_command(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _: warnings.warn("quiet=True (--quiet) or nan=0 (--nan)", stacklevel=1))
    assert main(["backends"]) == 0
    assert capsys.readouterr().err == "deformmamba: warning: --quiet or in Python nan=0\n"


def test_a_warning_is_shown_once_wherever_it_comes_from(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Any) -> None:
        for level in (1, 2, 1):
            warnings.warn("far from the training", stacklevel=level)
        warnings.warn("another one", stacklevel=1)

    command(run)
    assert main(["backends"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "deformmamba: warning: far from the training",
        "deformmamba: warning: another one",
    ]


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), RuntimeError("?"), ZeroDivisionError()])
def test_what_we_did_not_raise_on_purpose_is_a_bug(
    error: Exception, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> None:
        raise error

    command(run)
    with pytest.raises(type(error)):
        main(["backends"])
    assert "this is a bug in deformmamba" in capsys.readouterr().err


@pytest.mark.parametrize("error", [InvalidArgument("a mistake"), OSError(2, "No such file", "x.nii")])
def test_a_traceback_only_on_request(error: Exception, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Any) -> None:
        raise error

    command(run)
    assert main(["backends"]) == 2
    plain = capsys.readouterr().err
    assert plain.count("\n") == 1
    assert main(["backends", "--traceback"]) == 2
    long = capsys.readouterr().err
    assert "Traceback (most recent call last)" in long
    assert long.endswith(plain)


def test_without_a_current_folder_or_stderr(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    def warned(_: Any) -> None:
        warnings.warn("a remark", stacklevel=1)
        raise InvalidArgument("wrong")

    command(warned)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Full())
        assert main(["backends"]) == 2
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["backends"]) == 2
    assert "the current folder no longer exists" in capsys.readouterr().err


def test_verbose_describes_the_machine(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _: None)
    assert main(["backends", "--verbose"]) == 0
    err = capsys.readouterr().err
    for part in (
        f"torch {torch.__version__}",
        f"{torch.get_num_threads()} threads",
        "scan backend eager: yes",
        "s in all",
    ):
        assert part in err


@pytest.mark.slow
def test_threads_are_obeyed(command: Any) -> None:
    seen = []
    command(lambda _: seen.append(torch.get_num_threads()))
    main(["backends", "--threads", "2"])
    torch.set_num_threads(1)
    main(["--threads", "3", "backends"])
    assert seen == [2, 3]
    code = "from deformmamba.cli import main, cores; cores.use_threads(2); import torch; print(torch.get_num_threads())"
    environment = {**os.environ, "OMP_NUM_THREADS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "2", done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "passive"), ({"GOMP_SPINCOUNT": "5"}, None), ({"OMP_WAIT_POLICY": "active"}, "active")],
)
def test_waiting_threads_sleep_soon_unless_the_user_set_it(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    cores.limit_spinning()
    assert dict(os.environ) == before, "torch is loaded here: too late"
    loaded = {name: module for name, module in sys.modules.items() if name != "torch"}
    monkeypatch.setattr(sys, "modules", loaded)
    cores.limit_spinning()
    assert os.environ.get("OMP_WAIT_POLICY") == expected
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_the_default_is_what_the_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cores, "affinity", lambda: 64)
    for limit, threads in ((math.inf, None), (2.0, 2), (1.5, 2), (0.1, 1), (100.0, None)):
        monkeypatch.setattr(cores, "quota", lambda limit=limit: limit)
        assert cores.use_threads(None) == threads
    monkeypatch.setattr(cores, "quota", lambda: 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert cores.use_threads(None) is None, "a user who set it is obeyed"


def test_training_uses_idle_cpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cores.VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    monkeypatch.setattr(cores, "quota", lambda: math.inf)
    monkeypatch.setattr(cores, "affinity", lambda: 4)
    for idle, threads in ((3.9, None), (3.1, 3), (2.9, 3), (0.9, 1), (0.0, 1)):
        monkeypatch.setattr(cores, "idle_cpus", lambda idle=idle: idle)
        assert cores.use_threads(None, idle_only=True) == threads
        assert cores.use_threads(None) is None
        assert os.environ["OMP_NUM_THREADS"] == ("" if threads is None else str(threads))
        monkeypatch.setenv("OMP_NUM_THREADS", "")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts CPUs as Linux does")
def test_idle_cpus_are_counted_among_those_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    tables = iter(
        [
            "cpu  9 0 0 9 0 0 0 0\ncpu0 100 0 0 50 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 5 5 5 100 5 0 0 0\n",
            "cpu  9 0 0 9 0 0 0 0\ncpu0 110 0 0 50 0 0 0 0\ncpu1 0 0 0 9 0 0 0 0\ncpu2 5 5 5 106 7 1 1 0\n",
        ]
    )
    stat = tmp_path / "stat"
    stat.write_text(next(tables))
    monkeypatch.setattr("time.sleep", lambda _: stat.write_text(next(tables)))
    assert cores.idle_cpus(0, stat) == 0.8  # CPU 0 is fully busy, CPU 2 for 2 of 10 ticks; CPU 1 is not ours
    assert cores.idle_cpus(0, tmp_path / "missing") == 2


def test_short_turns_where_the_system_has_them() -> None:
    # in a separate process, because the setting cannot be undone
    code = "from deformmamba.cli import cores; print(cores.take_short_turns(), cores.turn_length())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() in ("True 100000", "False None"), done.stderr


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({}, "0::/", math.inf),
        ({"cpu.max": "max 100000"}, "0::/", math.inf),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 4.0),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b", 0.5),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 2.0),
        ({"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, "4:cpu:/x", math.inf),
        ({"cpu.max": "garbage"}, "0::/", math.inf),
    ],
)
def test_the_quota_of_a_container(files: dict[str, str], own: str, limit: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert cores.quota(tmp_path / "cgroup", tmp_path / "own") == limit
    assert cores.quota(tmp_path / "no", tmp_path / "no") == math.inf
