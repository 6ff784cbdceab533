"""All exceptions of the package have one base class; a file is written completely or not at all."""

import os
from importlib import import_module
from pathlib import Path

import pytest

import deformmamba
from deformmamba import DeformMambaError
from deformmamba.atomic import renamed, write_bytes
from deformmamba.errors import (
    InvalidArgument,
    InvalidType,
    UnsupportedCall,
    counted,
    did_you_mean,
    innermost,
    one_line,
    shown,
)

PACKAGE = Path(deformmamba.__file__).parent


def test_every_exception_class_derives_from_the_base() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__main__.py" and "(" in (text := path.read_text("utf-8")) and "class " in text:
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name in ("deformmamba.scan.triton_kernels",):  # needs Triton
                continue
            for value in vars(import_module(name)).values():
                own = isinstance(value, type) and value.__module__.startswith("deformmamba")
                if own and issubclass(value, Exception):
                    found.add(value)
    assert {InvalidArgument, InvalidType, UnsupportedCall, deformmamba.WeightsError} <= found
    assert all(issubclass(error, DeformMambaError) for error in found), found


def test_the_usual_classes_catch_them_too() -> None:
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(InvalidType, TypeError)
    assert issubclass(UnsupportedCall, RuntimeError)


def test_text_from_outside_stays_on_one_short_line() -> None:
    assert shown("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(shown("x" * 1000)) == 80
    assert shown(10**5000) == "a int"
    assert one_line(ValueError("a\n  b\u2028ü")) == "a b \\xfc"
    assert len(one_line(ValueError("x" * 1000))) == 300
    assert one_line(ValueError("\x1b[96mstep\x1b[0m 3\x00\x07 \x1b]8;;a://b\x07link\x1b]8;;\x07\x9b")) == "step 3 link"
    assert shown(type("Coloured", (), {"__repr__": lambda self: "\x1b[1mred\x1b[0m\r!"})()) == "red !"


def test_the_first_cause_of_a_chain_is_found() -> None:
    first, alone = KeyError("first"), ValueError("alone")
    second, third = ValueError("second"), ValueError("third")
    second.__cause__, third.__cause__ = first, second
    assert innermost(third) is first
    assert innermost(alone) is alone
    first.__cause__ = third  # a circle
    assert innermost(third) is first


def test_a_file_is_replaced_whole_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    write_bytes(path, b"one")

    def stopped() -> None:
        with renamed(path) as temporary:
            assert temporary.name.endswith(".nii.gz"), "writers choose a format by the ending"
            temporary.write_bytes(b"tw")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert path.read_bytes() == b"one"
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    link = tmp_path / "link"
    link.symlink_to(path)
    write_bytes(link, b"two")
    assert flushed, "the contents are on the disk before the name is"
    assert link.is_symlink()
    assert path.read_bytes() == b"two"
    assert sorted(tmp_path.iterdir()) == [path, link]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("fintune", " (did you mean 'finetune'?)"),
        ("IXI-4X", " (did you mean 'ixi-4x'?)"),
        ("ixi-4x", ""),  # it is known, so another thing is wrong
        ("qqq", ""),
        ("", ""),
    ],
)
def test_suggestions(word: str, said: str) -> None:
    assert did_you_mean(word, ("ixi-4x", "finetune")) == said


def test_one_is_not_a_plural() -> None:
    assert [counted(n, "slice") for n in (0, 1, 2, 1200)] == ["0 slices", "1 slice", "2 slices", "1,200 slices"]
