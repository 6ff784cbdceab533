"""Inserts text from other files when the site is built, so that each fact is stored in one place."""

import re
from pathlib import Path
from typing import Any

from deformmamba.weights import card, list_weights
from deformmamba.weights.cards import pixel_range

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the placeholders of a page by model cards, the table of weights and the benchmark page."""
    if "<!-- model cards -->" in markdown:
        markdown = markdown.replace("<!-- model cards -->", "\n\n".join(map(_card, list_weights())))
    if "<!-- weights table -->" in markdown:
        markdown = markdown.replace("<!-- weights table -->", _table())
    if "<!-- benchmarks -->" in markdown:
        text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
        markdown = markdown.replace("<!-- benchmarks -->", text.split("\n", 1)[1])  # the page has its own title
    # links to files outside docs/ would be broken on the site
    return re.sub(r"\[([^]]+)\]\((?:\.\./|(?:examples|benchmarks|deformmamba|tests)/)[^)]*\)", r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """An empty corner of a table is no heading."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)


def on_post_page(output: str, **_: Any) -> str:
    """Names for a screen reader: of the search, and of the contents' parts, where one is called like a section."""
    output = output.replace(' role="dialog"', ' role="dialog" aria-label="Search"')
    contents = r'(<nav class="md-nav" aria-label="[^"]+)"'
    return re.sub(contents, r'\1, on this page"', output)


def _card(entry: Any) -> str:
    body = card(entry).split("---\n", 2)[2]
    return re.sub(r"^#", "##", body, flags=re.MULTILINE).replace("\n### #", "\n### ")


def _table() -> str:
    """Name, purpose, factor and trained pixel sizes of the weights for `upscale`, and what they were trained on."""
    rows = ["| weights | for | factor | pixels of the input | trained on |", "|---|---|---|---|---|"]
    for entry in list_weights():
        if entry["scale"] == 1:  # for thick slices, see that page
            continue
        low, high = entry["spacings_mm"]
        groups = ", ".join(sorted({source["group"] for source in entry["trained_on"]}))
        cells = (f"`{entry['name']}`", entry["meant_for"], f"{entry['scale']}x", pixel_range(low, high), groups)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
