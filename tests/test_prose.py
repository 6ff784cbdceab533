"""Docstrings, comments, messages and documentation avoid a short list of phrases that readers have to read twice."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# phrase (a regular expression): what to write instead
BANNED = {
    r"whoever|whomsoever": "the user, the caller",
    r"(?:could|can) not be had|cannot be had": "is not available",
    r"(?:is|are|was|were) none(?! (?:of|left)\b)": "there is no ..., or: is missing",
    r"(?<!there )(?:is|are) no (?:number|folder|scan|image|file|regular expression|range|model|DICOM|BIDS|MR)s?": (
        "is not a ..."
    ),
    r"knows": "has, contains, supports",
    r"hears": "is called when",
    r"wants": "needs, takes",
    r"of (?:one|your|their|his|her|our)(?:'s)? own": "your own ..., a separate ...",
    r"as (?:it|they) comes?": "unchanged",
    r"that which": "the ... that",
    r"beside one another": "compared",
    r"goes on": "continues, resumes",
    r"to go on (?:from|with)": "to continue from, to resume",
    r"asked for by": "given by",
    r"brought up to date": "updated",
    r"people's networks": "your own networks",
    r"made-up": "synthetic",
    r"nobody (?:meant|asked)|flatters": "say what happens",
    r"a page to look at": "an HTML report for visual checks",
    r"stands? in|stood in": "replaces, is in",
    r"has no say": "has weight 0, has no effect",
    r"for good": "permanently",
    r"somebody": "a user, another",
    r"says|tells": "states, prints, names, shows",
    r"(?:without (?:a )?|needs? no )network": "offline, internet access (a network is a model)",
    r"without a word": "without a warning",
    r"not unlike": "like",
    r"pass(?:es|ed)? for": "is treated as, is labelled as",
    r"differences? to": "difference from",
    r"say so": "print a warning, state it",
    r"comes? out": "is, becomes",
    r"made anew": "written again",
    r"in a process of its own": "in a separate process",
    r"one (?:list )?a (?:slice|file|level|patient)": "one per ...",
}
ALLOWED = ("if there is none",)
_ANY = re.compile("|".join(rf"\b(?:{phrase})\b" for phrase in BANNED))


FOLDERS = ("deformmamba", "docs", "examples", "benchmarks", "tests", "web", ".github", ".")


def documents(folder: str) -> list[Path]:
    """The files of a folder that people read; of the checkout itself, the pages only."""
    if folder == ".":
        return sorted(ROOT.glob("*.md"))
    return sorted(
        path
        for ending in ("*.py", "*.md", "*.toml", "*.html", "*.yml")
        for path in (ROOT / folder).rglob(ending)
        if not {"node_modules", "build", "__pycache__"} & set(path.parts)
    )


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The sentences of a file with their first line: strings and comments of Python, all text of other files.

    In tests, of all strings only the docstrings count: others quote messages, or are wrong on purpose.
    """
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        yield 1, text
        return
    in_tests = path.is_relative_to(ROOT / "tests")
    for node in ast.walk(ast.parse(text)):
        if in_tests:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (found := ast.get_docstring(node)):
                yield node.body[0].lineno, found
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    # finding the comments is slow; if no line has a banned phrase after its first #, no comment has
    if any(_ANY.search(" ".join(line.partition("#")[2].split())) for line in text.splitlines()):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def faults(text: str) -> list[str]:
    """The banned phrases in `text`, each with the words around it and the advice."""
    words = " ".join(text.split())
    for allowed in ALLOWED:
        words = words.replace(allowed, "")
    if not _ANY.search(words):
        return []
    return [
        f"... {words[max(0, found.start() - 40) : found.end() + 20]} ... write: {advice}"
        for phrase, advice in BANNED.items()
        for found in re.finditer(rf"\b(?:{phrase})\b", words)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_plain_english(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for path in documents(folder)
        for line, text in prose(path)
        for fault in faults(text)
    ]
    assert not found, "\n".join(found)


def test_the_guard_finds_what_it_looks_for() -> None:
    assert faults("A file that\n  knows its shape") == [
        "... A file that knows its shape ... write: has, contains, supports"
    ]
    assert faults("x.nii: is no BIDS data set")
    assert faults("the result as it comes")
    assert not faults("The fallback is known; empty if there is none.")


def test_comments_and_strings_are_read_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('x = "as it"  # no: "#  knows"\ny = 1  # it  knows\nz = "as it " "comes"\n')
    said = ((line, fault) for line, text in prose(tmp_path / "a.py") for fault in faults(text))
    found = [(line, fault.rpartition(" write: ")[0]) for line, fault in said]
    assert found == [(3, "... as it comes ..."), (1, '... # no: "# knows" ...'), (2, "... # it knows ...")]


def test_of_the_strings_in_tests_only_docstrings_count() -> None:
    texts = [text for _, text in prose(ROOT / "tests" / "test_prose.py")]
    assert any(text.startswith("Docstrings, comments, messages") for text in texts)
    assert not set(texts) & set(BANNED)
