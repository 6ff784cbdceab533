"""The page in headless Chromium: it gives the package's numbers and messages, and is accessible.

Skips where Node's npm, Chromium or its driver, selenium or the extra `export` is missing; fails instead if
DEFORMMAMBA_PAGE is set.
"""

import importlib.util
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

import deformmamba

pytestmark = [pytest.mark.long]

ROOT = Path(__file__).parents[2]
WEB = ROOT / "web"
SHARE = 1e-3  # tolerance as a share of the range: float32 in another runtime, after thousands of scan steps
MISSING = [name for name in ("npm", "chromium", "chromedriver") if shutil.which(name) is None]
MISSING += [
    name for name in ("selenium", "onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
]
MISSING += [] if WEB.is_dir() else ["web/"]


def not_tested(reason: str) -> None:
    """Skips the test, or fails if DEFORMMAMBA_PAGE is set."""
    if os.environ.get("DEFORMMAMBA_PAGE"):
        pytest.fail(f"the page has to be tested here: {reason}")
    pytest.skip(f"the page is not tested here: {reason}", allow_module_level=True)


if MISSING:
    not_tested(f"{', '.join(MISSING)} missing")


def loaded(name: str) -> ModuleType:
    """The module web/NAME.py, which no package contains."""
    spec = importlib.util.spec_from_file_location(f"web_{name}", WEB / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, screenshots = loaded("build"), loaded("screenshots")
opened, saved, until, words = screenshots.opened, screenshots.saved, screenshots.until, screenshots.words


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    try:
        build.build(folder, ["ixi-4x"])
    except build.subprocess.CalledProcessError:
        not_tested("npm could not install its packages")
    with screenshots.served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with screenshots.chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64x64x3 voxels of a real brain, from nibabel's test data, with an oblique affine."""
    source = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz")
    array = np.asarray(source.dataobj[32:96, 16:80, 2:5, 0])
    image = nibabel.Nifti1Image(array, source.affine)
    image.header.set_dim_info(slice=2)
    path = tmp_path_factory.mktemp("scan") / "brain.nii.gz"
    nibabel.save(image, path)
    return path


def picture(browser: Any) -> np.ndarray:
    """The grey values of the view, 0 to 1, (rows, columns)."""
    from PIL import Image

    with Image.open(io.BytesIO(browser.find_element("id", "view").screenshot_as_png)) as image:
        return np.asarray(image.convert("L"), np.float32) / 255


def moved(browser: Any, name: str, value: str) -> np.ndarray:
    """The view after the slider or choice `name` is set to `value`."""
    code = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    browser.execute_script(
        code + "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));", name, value
    )
    time.sleep(0.5)
    return picture(browser)


def test_the_page_gives_what_the_package_gives(browser: Any, page: str, scan: Path, tmp_path: Path) -> None:
    """First the numbers are compared, then the views of input and result."""
    opened(browser, page, scan)
    assert "The weights were trained on pixels of" in words(browser, "advice")
    start = time.monotonic()
    browser.find_element("id", "start").click()
    until(lambda: words(browser, "numbers") or words(browser, "error"), 600, "upscaled")
    print(f"64x64x3 in {time.monotonic() - start:.0f} s: {words(browser, 'numbers')}")
    assert not words(browser, "error")
    assert "s a slice" in words(browser, "numbers")
    assert "MiB of memory for the network" in words(browser, "numbers")
    got = saved(browser, "result", tmp_path)
    wanted: Any = deformmamba.upscale(deformmamba.from_pretrained("ixi-4x"), nibabel.load(scan))
    np.testing.assert_allclose(got.affine, wanted.affine, atol=1e-4)
    assert got.shape == wanted.shape == (256, 256, 3)
    expected = wanted.get_fdata(dtype=np.float32)
    np.testing.assert_allclose(got.get_fdata(dtype=np.float32), expected, atol=SHARE * np.ptp(expected), rtol=0)

    until(lambda: browser.find_element("id", "compare").is_enabled(), 60, "compared")
    result, half, before = (moved(browser, "compare", value) for value in ("0", "50", "100"))
    middle = half.shape[1] // 2
    np.testing.assert_array_equal(half[:, : middle - 3], before[:, : middle - 3])
    np.testing.assert_array_equal(half[:, middle + 3 :], result[:, middle + 3 :])
    assert before.max() > 0.5 < result.max()
    # the same slice on the same grid: similar, but not equal
    assert np.corrcoef(before.ravel(), result.ravel())[0, 1] > 0.9
    assert np.abs(before - result).max() > 0.05
    assert np.abs(moved(browser, "slice", "0") - before).max() > 0.05
    # the input interpolated, and in its own pixels: blocks of 4 x 4 equal pixels of the result
    shown = moved(browser, "slice", "1")
    pixels = moved(browser, "input-as", "pixels")
    time.sleep(1)
    pixels = picture(browser)
    assert np.abs(pixels - shown).max() > 0.01
    assert (np.diff(pixels, axis=0) == 0).mean() > (np.diff(shown, axis=0) == 0).mean()
    if browser.find_element("id", "plane-choice").is_displayed():
        assert np.abs(moved(browser, "planes", "three") - before).max() > 0.05
    elsewhere = "return performance.getEntriesByType('resource').map((r) => r.name).filter((n) => /^http/.test(n))"
    assert all(name.startswith(page) for name in browser.execute_script(elsewhere))
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


@contextmanager
def without_webgl(browser: Any) -> Iterator[None]:
    hidden = (
        "const get = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...more) {"
        "  return kind === 'webgl2' ? null : get.call(this, kind, ...more); };"
    )
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hidden})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_without_webgl_the_page_draws_by_itself(browser: Any, page: str, scan: Path) -> None:
    with without_webgl(browser):
        opened(browser, page, scan)
        before = picture(browser)
        assert before.max() > 0.5
        assert np.abs(moved(browser, "slice", "0") - before).max() > 0.05
        assert not browser.find_element("id", "plane-choice").is_displayed()


@pytest.mark.parametrize("webgl", [True, False])
def test_both_views_are_radiological(browser: Any, page: str, tmp_path: Path, webgl: bool) -> None:
    """A bright block on the right, front and top of the patient is at the upper left, in any order of the axes."""
    array = np.full((30, 26, 22), 20, np.int16)
    array[20:26, 16:22, 14:18] = 1000
    upright = nibabel.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1]))
    screenshots.looks(browser, 1280, "light")
    for codes, axis, plane in (("RAS", 2, "axial"), ("LIP", 2, "coronal"), ("SPL", 2, "sagittal"), ("IRA", 0, "axial")):
        turned = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
        )
        image = upright.as_reoriented(turned)
        image.header.set_dim_info(slice=axis)
        nibabel.save(image, path := tmp_path / f"{codes}.nii")
        with nullcontext() if webgl else without_webgl(browser):
            opened(browser, page, path)
        assert f"{plane} slices (along axis {axis})" in words(browser, "facts")
        block = int(np.flatnonzero(np.asarray(image.dataobj).max(tuple({0, 1, 2} - {axis})) > 500)[0])
        y, x = np.nonzero(moved(browser, "slice", str(block)) > 0.9)
        box = browser.find_element("id", "view").size
        assert np.median(x) < 0.5 * box["width"], codes
        assert np.median(y) < 0.5 * box["height"], codes


def test_the_contrast_can_be_changed(browser: Any, page: str, scan: Path) -> None:
    opened(browser, page, scan)
    before, black = picture(browser), words(browser, "black-number")
    brighter = moved(browser, "white", "200")
    assert brighter.mean() > 1.1 * before.mean()
    assert moved(browser, "black", "100").mean() < brighter.mean()
    assert float(words(browser, "black-number")) > float(black)
    moved(browser, "black", "900")  # white stays above black
    assert float(words(browser, "white-number")) >= float(words(browser, "black-number"))


def test_a_dicom_series_lies_where_the_package_puts_it(browser: Any, page: str, tmp_path: Path) -> None:
    """The series is oblique, has a slope, and its files have shuffled names."""
    generator = np.random.default_rng(3)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    normal = np.cross(rotation[:, 0], rotation[:, 1])
    voxels = generator.integers(1, 1000, (7, 6, 5)).astype("<u2")
    series, folder = generate_uid(), tmp_path / "series"
    folder.mkdir()
    for k, place in enumerate(generator.permutation(5)):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, generate_uid()
        ds.Modality, ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.SeriesNumber = "MR", series, generate_uid(), 1
        ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "M"], int(place) + 1
        ds.ImageOrientationPatient = [f"{v:.8f}" for v in rotation[:, :2].T.ravel()]
        ds.ImagePositionPatient = [f"{v:.6f}" for v in 10 + 4 * k * normal]
        ds.PixelSpacing, ds.SliceThickness, ds.SpacingBetweenSlices = ["0.7", "0.9"], "4", "4"
        ds.Columns, ds.Rows, ds.SamplesPerPixel, ds.PhotometricInterpretation = 7, 6, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = "2", "-1"
        ds.PixelData = voxels[:, :, k].T.tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.save_as(folder / f"IM{place}.dcm", enforce_file_format=True)
    opened(browser, page, *sorted(folder.iterdir()))
    assert not words(browser, "error")
    got, wanted = saved(browser, "input", tmp_path), deformmamba.read_volume(folder)
    np.testing.assert_allclose(got.affine, wanted.affine, atol=1e-3)
    np.testing.assert_array_equal(got.get_fdata(dtype=np.float32), wanted.array)
    opened(browser, page, folder / "IM0.dcm", folder / "IM1.dcm", Path(__file__))
    assert words(browser, "error").startswith("1 of 3 files are empty, damaged or not DICOM images (test_web.py)")


def test_cancelling_leaves_the_page_usable(browser: Any, page: str, scan: Path) -> None:
    opened(browser, page, scan)
    browser.find_element("id", "start").click()
    until(lambda: words(browser, "status").startswith(("Slice", "Loading")), 60, "started")
    browser.find_element("id", "cancel").click()
    assert words(browser, "status") == "Cancelled. The input is unchanged."
    assert browser.find_element("id", "start").is_enabled()
    assert not browser.find_element("id", "save").is_enabled()


def test_wrong_files_get_the_sentences_of_the_package(browser: Any, page: str, scan: Path, tmp_path: Path) -> None:
    whole: Any = nibabel.load(scan)
    array = np.asarray(whole.dataobj)
    files = {
        "text.nii": (b"not a scan" * 100, "not a NIfTI file, or a damaged one"),
        "cut.nii": (
            nibabel.Nifti1Image(array, whole.affine).to_bytes()[:5000],
            "truncated: the file is shorter than its header requires",
        ),
        "four.nii": (nibabel.Nifti1Image(np.stack([array] * 2, -1), whole.affine).to_bytes(), "holds 2 volumes"),
        "complex.nii": (
            nibabel.Nifti1Image(array.astype(np.complex64), whole.affine).to_bytes(),
            "voxels are complex numbers; take the magnitude first",
        ),
        "zeros.nii": (
            nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)).to_bytes(),
            "every voxel is zero; the volume is empty",
        ),
        "nan.nii": (
            nibabel.Nifti1Image(np.full((4, 4, 4), np.nan, np.float32), np.eye(4)).to_bytes(),
            "64 of 64 voxels are NaN or infinite",
        ),
    }
    for name, (content, sentence) in files.items():
        (tmp_path / name).write_bytes(content)
        opened(browser, page, tmp_path / name)
        assert words(browser, "error").startswith(f"{name}: {sentence}")


def test_a_file_may_be_dropped_anywhere(browser: Any, page: str) -> None:
    """Without a handler the browser would leave the page and show the file."""
    browser.get(page)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes", 60, "page ready")
    prevented = browser.execute_script(
        "const dataTransfer = new DataTransfer();"
        "dataTransfer.items.add(new File(['not a scan'], 'text.nii'));"
        "const event = new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer });"
        "document.querySelector('footer').dispatchEvent(event);"
        "return event.defaultPrevented;"
    )
    assert prevented
    until(lambda: words(browser, "error").startswith("text.nii: not a NIfTI file"), 30, "sentence")


def test_of_two_scans_the_last_one_stays(browser: Any, page: str, scan: Path, tmp_path: Path) -> None:
    """The first file is read after the second one was opened."""
    held = (
        "const read = File.prototype.arrayBuffer;"
        "const held = new Promise((done) => { window.release = done; });"
        "File.prototype.arrayBuffer = async function () {"
        "  if (this.name === 'slow.nii.gz') await held;"
        "  return read.call(this); };"
    )
    shutil.copyfile(scan, tmp_path / "slow.nii.gz")
    browser.get(page)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes", 60, "page ready")
    browser.execute_script(held)
    for path in (tmp_path / "slow.nii.gz", scan):
        browser.execute_script("document.getElementById('file').value = ''")  # otherwise the files are added up
        browser.find_element("id", "file").send_keys(str(path))
    until(lambda: words(browser, "status") == "Ready to upscale", 30, "file read")
    browser.execute_script("window.release()")
    time.sleep(0.5)
    assert words(browser, "facts").startswith(f"{scan.name}: ")
    assert words(browser, "status") == "Ready to upscale"


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_at_every_width(browser: Any, page: str, scan: Path, width: int, scheme: str) -> None:
    screenshots.looks(browser, width, scheme)
    opened(browser, page, scan)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_script((WEB / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8"))
    found = browser.execute_async_script("axe.run().then((r) => arguments[0](r.violations.map((v) => v.help)))")
    assert found == []


def test_the_keyboard_reaches_everything(browser: Any, page: str, scan: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    opened(browser, page, scan)
    browser.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(12):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.switch_to.active_element.get_attribute("id"))
    assert [name for name in reached if name in {"file", "weights", "start", "slice"}][:4] == [
        "file", "weights", "start", "slice",
    ]  # fmt: skip
    before = words(browser, "slice-number")
    browser.find_element("id", "slice").send_keys(Keys.ARROW_RIGHT)
    assert words(browser, "slice-number") != before


def test_nothing_comes_from_elsewhere() -> None:
    for name in build.PAGE:
        source = (WEB / name).read_text("utf-8")
        assert "://" not in source, name
    assert "connect-src" not in (WEB / "index.html").read_text("utf-8")
