"""Figures that stay open after they are saved, for tests of what is in them."""

from pathlib import Path
from typing import Any

import pytest

from deformmamba.pictures import figures, sections


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The saved figures, still open."""
    kept: list[Any] = []
    save = figures.save

    def keep(figure: Any, path: Path, title: str, note: str = "") -> None:
        save(figure, path, title, note)
        kept.append(figure)

    for module in (figures, sections):
        monkeypatch.setattr(module, "save", keep)
    return kept
