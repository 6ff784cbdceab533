"""The built documentation, opened from a folder without an internet connection, in both colour schemes."""

import html
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCHEMES = ("light", "dark")
AXE = "axe-core@4.14.1"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(page for page in site.glob("*.html") if page.name != "404.html")  # 404.html needs a server


def until(condition: Any, what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def test_every_page_is_built_and_takes_nothing_from_elsewhere(site: Path) -> None:
    written = {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")}
    assert written <= {page.name for page in pages(site)}
    for page in pages(site):
        text = page.read_text("utf-8")
        assert not re.search(r"<!-- (model cards|weights table|benchmarks) -->", text)
        for source in re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text):
            assert "//" not in source, f"{page.name} asks for {source}"


def test_signatures_wrap(site: Path) -> None:
    """A formatter wraps signatures: a line of code in the reference has at most 88 characters."""
    text = (site / "api.html").read_text("utf-8")
    signatures = re.findall(r'<div class="[^"]*doc-signature[^"]*">(.*?)</div>', text, re.DOTALL)
    assert len(signatures) > 40
    code = "\n".join(html.unescape(re.sub("<[^>]+>", "", signature)) for signature in signatures)
    assert max(map(len, code.splitlines())) <= 88


def test_the_home_page_shows_a_picture(site: Path, browser: Any) -> None:
    browser.get((site / "index.html").as_uri())
    widths = browser.execute_script("return [...document.querySelectorAll('article img')].map(i => i.naturalWidth)")
    assert widths
    assert min(widths) > 300


def test_search_works_from_a_folder(site: Path, browser: Any) -> None:
    browser.get((site / "index.html").as_uri())
    query = browser.find_element("css selector", "input.md-search__input")
    focused = (
        "arguments[0].blur(); arguments[0].focus(); return document.querySelector('.md-search-result__meta').innerText"
    )
    until(lambda: "Type to start" in browser.execute_script(focused, query), "index loaded")
    query.send_keys("fine-tune on my scans")
    results = "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    until(lambda: browser.execute_script(results), "search results")
    found = browser.execute_script(results)
    assert any("finetune.html" in link for link in found)
    assert all((site / link.partition("?")[0].partition("#")[0].rsplit("/")[-1]).is_file() for link in found)
    log = str(browser.get_log("performance"))
    requests = re.findall(r'"method":"Network.requestWillBeSent".*?"request":.*?"url":"([^"]*)', log)
    assert any(url.endswith("search_index.js") for url in requests)
    assert not [url for url in requests if url.startswith(("http", "ws"))]


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source code of axe-core, which checks a page against the accessibility guidelines (WCAG)."""
    if shutil.which("npm") is None:
        pytest.skip("axe-core needs npm")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), AXE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm could not install {AXE}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_page_breaks_a_rule_of_accessibility(site: Path, browser: Any, axe: str, scheme: str) -> None:
    emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    browser.get((site / "index.html").as_uri())
    browser.execute_script("localStorage.clear()")  # the theme stores the scheme of the first visit
    wrong = []
    for page in pages(site):
        browser.get(page.as_uri())
        shown = browser.execute_script("return document.body.getAttribute('data-md-color-scheme')")
        assert shown == {"light": "default", "dark": "slate"}[scheme]
        browser.execute_script(axe)
        result = browser.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
        assert len(result["passes"]) > 10
        for violation in result["violations"]:
            for node in violation["nodes"][:3]:
                wrong.append(f"{page.name}: {violation['id']}: {node['html'][:120]}: {node['failureSummary'][:200]}")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert not wrong, f"{len(wrong)} violations\n" + "\n".join(wrong[:40])
