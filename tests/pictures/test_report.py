"""The report: provenance, no patient data, small size, no network requests, interaction."""

import re
import time
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deformmamba.inference import upscale
from deformmamba.models import ZeroFill
from deformmamba.pictures.figures import STATEMENT
from deformmamba.pictures.report import _interpolated, write_report
from deformmamba.volume import Volume, VolumeError

FACTS = {"model": "ixi-2x", "file": 'scan <script>alert("x")</script> $statement.nii', "sha256": "0" * 64}
RAS = np.diag([-1.0, -1.5, 4.0, 1.0])


@pytest.fixture
def scans(phantom: np.ndarray) -> tuple[Volume, Volume, Volume]:
    before = Volume(phantom, RAS)
    after = upscale(ZeroFill(scale=2), before)
    return before, after, replace(after, array=np.abs(after.array) * 0.1)


def write(path: Path, scans: tuple[Volume, Volume, Volume], **given: Any) -> str:
    before, after, uncertainty = scans
    settings: dict[str, Any] = {"axis": 2, "grid": "origin", "facts": FACTS, "uncertainty": uncertainty} | given
    write_report(path, before, after, **settings)
    return path.read_text("utf-8")


def test_it_says_what_ran(tmp_path: Path, scans: tuple[Volume, Volume, Volume]) -> None:
    page = write(tmp_path / "r.html", scans)
    assert STATEMENT in page
    for text in ("ixi-2x", "0" * 64, "48 × 40 × 6 voxels of 1 × 1.5 × 4 mm", "96 × 80 × 6", "origin-aligned", "All 6"):
        assert text in page
    assert "scan &lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; $statement.nii" in page
    assert page.count("<script") == 2  # the data and the code: no text in the report became a script

    class Well(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                assert name not in ("src", "href") or str(value).startswith("data:")
            if tag not in ("meta", "link", "input", "img", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Well()
    parser.feed(page)
    assert parser.open == []


def test_without_uncertainty_and_orientation(tmp_path: Path, scans: tuple[Volume, Volume, Volume]) -> None:
    before, after, _ = (replace(scan, codes=(0, 0)) for scan in scans)
    page = write(tmp_path / "r.html", (before, after, after), uncertainty=None)
    assert '"title": "Uncertainty"' not in page
    assert '"edges": []' in page


@pytest.mark.parametrize(("axis", "shown"), [(0, "40 of 48 slices"), (1, "All 40 slices")])
def test_slices_across_any_axis(tmp_path: Path, phantom: np.ndarray, axis: int, shown: str) -> None:
    before = Volume(phantom, RAS)
    after = upscale(ZeroFill(scale=2), before, axis=axis)
    assert shown in write(tmp_path / "r.html", (before, after, after), axis=axis)


def test_the_input_is_drawn_where_it_lies(phantom: np.ndarray) -> None:
    before = Volume(phantom, RAS)
    for grid, at in (("origin", slice(None, None, 3)), ("half-pixel", slice(1, None, 3))):
        fine = before.resampled(np.zeros((144, 120, 6), np.float32), 3, (0, 1), grid)
        drawn = _interpolated(before, fine, 2, 4)
        assert drawn.shape == (144, 120)
        np.testing.assert_allclose(drawn[at, at], phantom[:, :, 4], atol=0.05)


@pytest.mark.slow
def test_the_page_is_bounded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((64, 64, 300), np.float32)
    before = Volume(noise, np.eye(4))
    after = before.resampled(np.tile(noise, (8, 8, 1)).astype(np.float32)[:, :, :300], 8, (0, 1), "origin")
    page = write(tmp_path / "r.html", (before, after, after))
    assert len(page) < 20e6
    shown = re.search(r"(\d+) of 300 slices", page)
    assert shown
    assert 3 <= int(shown[1]) <= 40
    from PIL import Image

    picture = re.search(r'"pictures": \["([^"]+)"', page)
    assert picture
    assert Image.open(BytesIO(b64decode(picture[1]))).size == (512, 512)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, scans: tuple[Volume, Volume, Volume]) -> None:
    before, after, _ = scans
    with pytest.raises(VolumeError, match="5 slices across axis 2, the input 6"):
        write(tmp_path / "r.html", (before, replace(after, array=after.array[:, :, :5]), after))
    with pytest.raises(VolumeError, match=r"uncertainty .* must have the shape"):
        write(tmp_path / "r.html", (before, after, before))
    with pytest.raises(VolumeError, match=r"file name ending in \.html"):
        write(tmp_path / "r.txt", scans)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- in a browser


def opened(browser: Any, path: Path, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    deadline = time.monotonic() + 60
    while not browser.execute_script("return document.body.dataset.ready"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)


def pixels(browser: Any, panel: int = 0) -> str:
    """The content of a panel after all pending drawing has finished."""
    script = """
        const done = arguments[arguments.length - 1];
        render().then(() => done(document.querySelectorAll("canvas")[arguments[0]].toDataURL()));
    """
    return str(browser.execute_async_script(script, panel))


def moved(browser: Any, name: str, value: float) -> None:
    script = (
        "const c = document.getElementById(arguments[0]); c.value = arguments[1]; c.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(tmp_path: Path, scans: tuple[Volume, Volume, Volume], browser: Any, width: int) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    write(tmp_path / "r.html", scans)
    opened(browser, tmp_path / "r.html", width)
    assert browser.get_log("browser") == []
    requests = re.findall(
        r'"method":"Network.requestWillBeSent".*?"url":"([^"]{0,60})', str(browser.get_log("performance"))
    )
    assert not [url for url in requests if url.startswith(("http", "ws"))]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    controls = browser.find_elements("css selector", "input, button, canvas")
    assert all(element.accessible_name for element in controls if element.is_displayed())

    first = [pixels(browser, panel) for panel in range(4)]
    assert len(set(first)) == 4
    panels = browser.find_element("id", "panels")
    panels.send_keys("\ue015")  # arrow down
    WebDriverWait(browser, 10).until(lambda page: "slice 5 of 6" in page.find_element("id", "where").text)
    assert all(pixels(browser, panel) != first[panel] for panel in range(4))
    moved(browser, "slice", 3)
    assert pixels(browser) == first[0]
    browser.execute_script(
        "arguments[0].querySelector('canvas').dispatchEvent(new WheelEvent('wheel', {deltaY: -1, bubbles: true}))",
        panels,
    )
    assert browser.find_element("id", "slice").get_attribute("value") == "2"
    moved(browser, "slice", 3)
    moved(browser, "zoom", 2)
    assert pixels(browser) != first[0]
    browser.execute_script("document.getElementById('reset').click()")
    assert pixels(browser) == first[0]

    browser.execute_script("document.querySelector('input[value=slider]').click()")
    moved(browser, "split", 0.25)
    quarter = pixels(browser)
    moved(browser, "split", 0.75)
    assert pixels(browser) != quarter
    assert not browser.find_elements("css selector", "figure")[1].is_displayed()
    assert browser.get_log("browser") == []
