"""Run before a release is built: checks the tag, and puts the repository's address into README and metadata.

    python .github/prepare_release.py OWNER/NAME vX.Y.Z

README's links and pictures are relative, so that they work in a checkout; a package index needs whole addresses. No
address is written by hand: each comes from the repository that the workflow runs in, so none can point elsewhere.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown with absolute links to files of the repository at a tag, and to the raw files for pictures."""

    def whole(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}](https://github.com/{repository}/{kind}/{tag}/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", whole, text)


def urls(repository: str, tag: str) -> str:
    """The entry `project_urls` of setup.cfg."""
    home = f"https://github.com/{repository}"
    pages = {"Source": home, "Changelog": f"{home}/blob/{tag}/CHANGELOG.md", "Issues": f"{home}/issues"}
    return "project_urls =\n" + "".join(f"    {name} = {address}\n" for name, address in pages.items())


def main(repository: str, tag: str) -> None:
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "deformmamba/__init__.py").read_text("utf-8"), re.MULTILINE)
    if version is None or tag != f"v{version[1]}" or "dev" in tag:
        sys.exit(f"the tag {tag} is not the version of deformmamba/__init__.py, or that is a development version")
    readme, settings = ROOT / "README.md", ROOT / "setup.cfg"
    readme.write_text(absolute(readme.read_text("utf-8"), repository, tag), "utf-8")
    text = settings.read_text("utf-8")
    settings.write_text(text.replace("classifiers =\n", urls(repository, tag) + "classifiers =\n", 1), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
