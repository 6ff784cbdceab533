"""Text around the panels of a figure: title and note broken into lines that fit, and fonts for every script."""

import logging
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from deformmamba.volume import PathLike, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
MARGIN, TITLE_LINE, NOTE_LINE = 0.15, 0.2, 0.15  # inches: beside the text, and from one line to the next
TITLE_SIZE, NOTE_SIZE = 12.0, 8.0  # points

# Fonts with characters that matplotlib's font does not have; the installed ones are used.
FALLBACKS = (
    *(f"Noto Sans CJK {region}" for region in ("SC", "TC", "JP", "KR")),
    *(f"Source Han Sans {region}" for region in ("SC", "TC", "JP", "KR")),
    *("Microsoft YaHei", "Hiragino Sans GB", "Arial Unicode MS", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Yu Gothic", "Hiragino Sans", "MS Gothic", "IPAexGothic", "Droid Sans Fallback"),
    *("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Nirmala UI", "Tahoma"),
)


class NoteLine(NamedTuple):
    """A line of the note below the panels."""

    text: str
    is_warning: bool


def title_lines(title: str, figure_width: float) -> list[str]:
    """`title` in lines that fit into a figure of `figure_width` inches."""
    return _wrapped(_printable(title), figure_width, TITLE_SIZE, weight="bold")


def note_lines(note: str, figure_width: float) -> list[NoteLine]:
    """`note` in lines that fit into a figure of `figure_width` inches.

    Each "Warning: " that begins a sentence begins a line, and the following lines of the same warning are indented.
    """
    lines = []
    for part in re.split(r"\.?\s+(?=Warning: )|\n", note):
        is_warning = part.startswith("Warning: ")
        indent = 4 * " " if is_warning else ""
        lines += [
            NoteLine(line, is_warning) for line in _wrapped(_printable(part), figure_width, NOTE_SIZE, indent=indent)
        ]
    return lines


def title_height(title: str, figure_width: float) -> float:
    """Inches by which a title of several lines is higher than a title of one line."""
    return TITLE_LINE * max(len(title_lines(title, figure_width)) - 1, 0)


def note_height(note: str, figure_width: float) -> float:
    """Inches that the note occupies below the panels; 0 without a note."""
    lines = note_lines(note, figure_width)
    return NOTE_LINE * len(lines) + 0.08 if lines else 0.0


def fallback_fonts(text: str) -> list[str]:
    """The installed fonts of `FALLBACKS`; empty if matplotlib's font has all characters of `text`."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    font = get_font(findfont(FontProperties()))
    if all(font.get_char_index(ord(c)) for c in text if not c.isspace()):
        return []
    installed = {entry.name for entry in fontManager.ttflist}
    return [name for name in FALLBACKS if name in installed]


def save_figure(figure: "Figure", path: PathLike, **options: Any) -> None:
    """Writes a figure of matplotlib with fonts for every script; the file appears when it is complete.

    `options` are those of `Figure.savefig`.

    Raises:
        VolumeError: `path` cannot be written.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text) and (names := fallback_fonts(text.get_text())):
            text.set_fontfamily([*text.get_fontfamily(), *names])
    with replacing(path) as temporary, missing_glyphs_allowed():
        figure.savefig(temporary, **options)


@contextmanager
def missing_glyphs_allowed() -> Iterator[None]:
    """Suppresses matplotlib's messages about characters, and about bold faces, that the installed fonts do not have.

    Such a character is drawn as a box. This is not a fault of the scan.
    """

    def other(record: logging.LogRecord) -> bool:
        return "Failed to find font weight" not in str(record.msg)

    logger = logging.getLogger("matplotlib.font_manager")
    logger.addFilter(other)
    try:
        with warnings.catch_warnings():
            missing = r"Glyph \d+ .*missing from|Matplotlib currently does not support .* natively"
            warnings.filterwarnings("ignore", missing, UserWarning)
            yield
    finally:
        logger.removeFilter(other)


def _printable(text: str) -> str:
    """`text` without control characters and lone surrogates, which the name of a file may hold."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _wrapped(text: str, figure_width: float, size: float, *, weight: str = "normal", indent: str = "") -> list[str]:
    """Lines that fit between the margins, broken at spaces; a longer word, such as a path, is broken too."""
    room = figure_width - 2 * MARGIN
    lines: list[str] = []
    with missing_glyphs_allowed():
        width = _ruler(text, size, weight)
        while text := text.strip():
            start = indent if lines else ""
            parts = [start + text[:n] for n in range(1, len(text) + 1)]
            n = max(bisect_right(parts, room, key=width), 1)
            if n < len(text):
                space, mark = text.rfind(" ", 0, n + 1), max(text.rfind(c, 0, n) for c in "/_-") + 1
                n = next((place for place in (space, mark) if place > n / 2), n)
            lines.append(start + text[:n].rstrip())
            text = text[n:]
    return lines


def _ruler(text: str, size: float, weight: str) -> Callable[[str], float]:
    """A function that returns the width in inches of a part of `text`.

    It is the larger of two widths: pixels have whole advances from letter to letter, and PDF and SVG have exact ones.
    """
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    family = [*FontProperties().get_family(), *fallback_fonts(text)]
    font = FontProperties(family=family, size=size, weight=weight)
    pixels = RendererAgg(8, 8, DPI)

    def width(part: str) -> float:
        drawn, exact = (to.get_text_width_height_descent(part, font, False)[0] for to in (pixels, text_to_path))
        return max(drawn / DPI, exact / 72)

    return width
