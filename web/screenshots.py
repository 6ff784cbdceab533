"""Draws pictures of the page before and after an upscale, in headless Chromium, with a synthetic head as the scan.

Run: python web/screenshots.py [--page build/web] [-o build/screenshots] [--slices 20]

Needs a built page (`make web`), Chromium, its driver, selenium and Pillow. Writes NAME-before.png and NAME-after.png
for 1280 pixels in light mode and 400 pixels in dark mode. Prints the time and memory that the page shows, and the
largest difference between its result and that of `upscale` as a share of the range.
"""

import argparse
import base64
import http.server
import io
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

import deformmamba
from deformmamba.inference import coarsen
from deformmamba.physics.degradations import parse
from deformmamba.physics.phantom import head

SHOTS = (("1280-light", 1280, "light"), ("400-dark", 400, "dark"))  # name, width in CSS pixels, colour scheme
SIDE, VOXEL = 64, (3.6, 3.6, 3.0)  # pixels of the scan's slices; mm


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends the two headers that allow shared memory, so that the runtime may use threads."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which a server on this computer serves the folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Headless Chromium under selenium, with its profile in a folder."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync",
        "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # WebGL without a GPU
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Waits until the condition is true; raises TimeoutError after that many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.2)


def words(browser: Any, name: str) -> str:
    """The text of the element with this id."""
    return str(browser.find_element("id", name).text)


def opened(browser: Any, page: str, *files: Path) -> None:
    """Loads the page again and gives it these files."""
    browser.get(page)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes", 60, "page ready")
    browser.find_element("id", "file").send_keys("\n".join(str(file) for file in files))
    until(lambda: words(browser, "status") == "Ready to upscale" or words(browser, "error"), 30, "file read")


def looks(browser: Any, width: int, scheme: str) -> None:
    """Sets the width of the page in CSS pixels and its colour scheme, "light" or "dark"."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def saved(browser: Any, which: str, folder: Path) -> Any:
    """The page's "input" or "result" as an image of nibabel."""
    code = (
        "const done = arguments[0], reader = new FileReader();"
        "reader.onload = () => done(reader.result.split(',')[1]);"
        f"reader.readAsDataURL(new Blob([window.deformmamba.{which}()]));"
    )
    file = folder / f"{which}.nii"
    file.write_bytes(base64.b64decode(browser.execute_async_script(code)))
    return nibabel.load(file)


def phantom(path: Path, slices: int, scale: int) -> None:
    """Saves a synthetic head of SIDE x SIDE pixels as its k-space crop; the slices differ by their noise."""
    truth = np.repeat(1000 * head(scale * SIDE).T[::-1, ::-1, None], slices, axis=2)
    truth += np.random.default_rng(0).normal(0, 10, truth.shape)
    affine = np.diag([VOXEL[0] / scale, VOXEL[1] / scale, VOXEL[2], 1])
    fine = deformmamba.Volume(np.abs(np.ascontiguousarray(truth)), affine)
    deformmamba.write_volume(path, coarsen(fine, parse("k-space", scale=scale), axis=2))


def whole_page(browser: Any, path: Path) -> None:
    """Saves a picture of the page in its whole height, with 64 colours, which halves the file."""
    from PIL import Image

    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("build/web"), help="the built page")
    parser.add_argument("-o", "--out", type=Path, default=Path("build/screenshots"))
    parser.add_argument("--slices", type=int, default=20)
    args = parser.parse_args()
    if not (args.page / "index.html").exists():
        parser.error(f"{args.page} has no index.html; build the page with: make web")
    args.out.mkdir(parents=True, exist_ok=True)
    model = deformmamba.from_pretrained("ixi-4x")
    with tempfile.TemporaryDirectory() as folder, served(args.page) as page, chromium(Path(folder) / "profile") as seen:
        scan = Path(folder) / "synthetic-head.nii.gz"
        phantom(scan, args.slices, model.scale)
        seen.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        for name, width, scheme in SHOTS:
            looks(seen, width, scheme)
            opened(seen, page, scan)
            time.sleep(1)  # the view draws after the status
            whole_page(seen, args.out / f"{name}-before.png")
            seen.find_element("id", "start").click()
            until(lambda: words(seen, "numbers") or words(seen, "error"), 600, "upscaled")
            until(lambda: seen.find_element("id", "compare").is_enabled(), 60, "compared")
            time.sleep(1)
            whole_page(seen, args.out / f"{name}-after.png")
            print(f"{name}: {SIDE}x{SIDE}x{args.slices}: {words(seen, 'numbers')}{words(seen, 'error')}", flush=True)
        got = saved(seen, "result", Path(folder)).get_fdata(dtype=np.float32)
        wanted: Any = deformmamba.upscale(model, nibabel.load(scan))
        expected = wanted.get_fdata(dtype=np.float32)
        share = np.abs(got - expected).max() / np.ptp(expected)
        print(f"largest difference from upscale, as a share of the range: {share:.1e}")


if __name__ == "__main__":
    main()
