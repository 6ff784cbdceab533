"""The check of plain values against type annotations."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from deformmamba.annotations import described, fits


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
