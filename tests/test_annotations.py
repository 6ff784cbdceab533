"""The check of plain values against type annotations."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pytest

from deformmamba.annotations import check_types, described, fits
from deformmamba.errors import InvalidType


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [1, -3], [True, 1.0, "1", None]),
        (float, [1, 0.5], [True, "0.5", None]),
        (bool, [True], [1, 0, "yes"]),
        (str, ["a"], [1, None]),
        (int | None, [3, None], ["3", False]),
        (Sequence[int], [[], [1, 2]], [(1, 2), [1.5], [True], "12", 1]),
        (Sequence[str | int], [["a", 1]], [[None]]),
        (tuple[float, float], [[1, 2.5]], [[1], [1, 2, 3], ["a", 1]]),
        (tuple[int, ...], [[], [1, 2, 3]], [["a"]]),
        (Mapping[str, float], [{}, {"a": 1}], [{"a": "b"}, [], 1]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0, None]),
        (Any, [1, None, []], []),
    ],
)
def test_a_value_fits_or_not(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


def test_annotations_in_words() -> None:
    assert described(Sequence[int] | None) == "a list of int"
    assert described(Literal["a", "b"]) == "'a' or 'b'"
    assert described(Mapping[str, float]) == "a table of float"
    assert described(tuple[int, ...]) == "a list of int"
    assert described(bool) == "bool"


def sample(
    path: str | os.PathLike[str],
    n: int = 1,
    *,
    share: float | None = None,
    names: Sequence[str] = (),
    table: Mapping[str, int] | None = None,
    work: Callable[[int], int] | None = None,
    choice: Literal["a", "b"] = "a",
    flag: bool = False,
    other: "NotImported | None" = None,  # type: ignore[name-defined]  # noqa: F821
) -> None:
    check_types(sample, locals())


def test_arguments_of_the_annotated_types_are_taken() -> None:
    sample("a")
    sample(Path("a"), np.int64(3), share=1, names=("a",), table={}, work=len, choice="b", flag=np.True_, other=3)
    sample("a", names=["a"])
    sample("a", names=range(3))
    sample("a", share=np.float32(0.5), names=np.array(["a"]), table=MappingProxyType({}), choice="not in the list")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": 3}, "sample: path must be a text or a path, not 3"),
        ({"path": None}, "path must be a text or a path, not None"),
        ({"n": "1"}, "n must be an integer, not '1'"),
        ({"n": True}, "n must be an integer, not True"),
        ({"n": 1.5}, "n must be an integer, not 1.5"),
        ({"share": "x"}, "share must be a number or None, not 'x'"),
        ({"names": "abc"}, "names must be a list, not 'abc'"),
        ({"names": iter(["a"])}, "names must be a list, not a list_iterator"),
        ({"names": (x for x in "a")}, "names must be a list, not a generator"),
        ({"names": {"a"}}, "names must be a list, not a set"),
        ({"names": {"a": 1}}, "names must be a list, not a dict"),
        ({"table": [1]}, "table must be a dictionary or None, not a list"),
        ({"work": 3}, "work must be a function or None, not 3"),
        ({"choice": 3}, "choice must be one of 'a', 'b', not 3"),
        ({"flag": 1}, "flag must be True or False, not 1"),
    ],
)
def test_another_type_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidType, match=re.escape(said)) as caught:
        sample(**{"path": "a", **arguments})
    assert "\n" not in str(caught.value)
