"""Figures: radiological orientation, one grey window, one physical field of view, and no incomplete file."""

import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from tolerances import assert_close

from deformmamba.pictures import figures, lettering
from deformmamba.pictures.figures import STATEMENT, before_after, comparison, oriented
from deformmamba.volume import Volume, VolumeError

AXES = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


def picture(n: int = 24, m: int = 32) -> np.ndarray:
    image = np.random.default_rng(0).uniform(0, 50, (n, m))
    image[n // 4 : n // 2, m // 4 : m // 2] += 400
    return image


@pytest.mark.parametrize("order", AXES)
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_slices_are_seen_as_radiologists_see_them(order: tuple[int, ...], signs: tuple[int, ...], tilt: float) -> None:
    """Equal to nibabel's reorientation, for every order and direction of the axes, also for tilted axes."""
    array = np.random.default_rng(0).normal(size=(5, 6, 7))
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs * (1.0, 2.0, 3.0)
    c, s = np.cos(tilt), np.sin(tilt)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ affine[:3, :3]
    volume = Volume(array, affine)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))  # R, A, S
    data, zooms = canonical.get_fdata(), canonical.header.get_zooms()
    for axis in range(3):
        world_axis = order[axis]
        for index in (0, array.shape[axis] - 1):
            seen = oriented(volume, axis, index)
            place = index if signs[axis] > 0 else array.shape[axis] - 1 - index
            plane = np.take(data, place, world_axis)  # (x, y), (x, z) or (y, z), towards R, A and S
            expected = plane[::-1, ::-1].T  # rows from A or S down, columns from R or A to the right
            np.testing.assert_array_equal(seen.image, expected)
            labels = {0: ("A", "P", "S", "I"), 1: ("R", "L", "S", "I"), 2: ("R", "L", "A", "P")}
            assert seen.labels == labels[world_axis]
            across, down = (a for a in range(3) if a != world_axis)
            assert seen.spacing == pytest.approx((zooms[down], zooms[across]))


def test_an_unknown_orientation_gets_no_labels() -> None:
    volume = Volume(np.random.default_rng(0).normal(size=(5, 6, 7)), np.diag([-1.0, 2, 3, 1]), codes=(0, 0))
    seen = oriented(volume, 2, 1)
    assert seen.labels == ("", "", "", "")
    assert seen.spacing == (1, 2)
    np.testing.assert_array_equal(seen.image, volume.array[:, :, 1])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", figures.SUFFIXES)
def test_before_and_after(tmp_path: Path, drawn: list[Any], suffix: str) -> None:
    lr = picture()
    path = tmp_path / f"vorher é{suffix}"
    results = {"plain": lr.repeat(4, 0).repeat(4, 1), "sharp": 2 * lr.repeat(4, 0).repeat(4, 1)}
    before_after(lr, results, path, spacing=(1.5, 0.5), labels=("R", "L", "A", "P"), title="a scan")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size > 5000
    figure = drawn[0]
    texts = [t.get_text() for t in figure.texts] + [t.get_text() for axes in figure.axes for t in axes.texts]
    assert {"a scan", STATEMENT, "input", "plain", "sharp", "R", "L", "A", "P"} <= set(texts)
    assert "32 × 24 px, 0.5 × 1.5 mm" in texts
    assert "128 × 96 px, 0.125 × 0.375 mm" in texts
    windows = {axes.images[0].get_clim() for axes in figure.axes}
    assert len(windows) == 1
    assert windows.pop()[0] == 0
    assert {axes.images[0].get_interpolation() for axes in figure.axes} == {"nearest"}
    whole, detail = figure.axes[:3], figure.axes[3:]
    for row in (whole, detail):
        assert len({(axes.get_xlim(), axes.get_ylim()) for axes in row}) == 1
    assert whole[0].get_xlim() == (-0.25, 15.75)
    assert whole[0].get_ylim() == (35.25, -0.75)
    square = whole[0].patches[0]
    assert detail[0].get_xlim() == pytest.approx((square.get_x(), square.get_x() + square.get_width()))
    assert square.get_width() == square.get_height()


@pytest.mark.parametrize(("grid", "left"), [("origin", -0.5 / 4), ("half-pixel", -0.5)])
def test_the_grid_decides_where_a_result_is_drawn(tmp_path: Path, drawn: list[Any], grid: str, left: float) -> None:
    """On the origin grid the centres of fine and coarse pixel 0 coincide; on the half-pixel grid the outer edges do."""
    lr = picture()
    before_after(lr, {"sharp": lr.repeat(4, 0).repeat(4, 1)}, tmp_path / "a.png", grid=grid)
    extents = [axes.images[0].get_extent() for axes in drawn[0].axes[:2]]
    assert extents[0] == [-0.5, 31.5, 23.5, -0.5]
    assert extents[1] == pytest.approx([left, left + 32, left + 24, left])


def test_the_square_lies_on_the_detail_and_inside_the_image(tmp_path: Path, drawn: list[Any]) -> None:
    lr = np.zeros((64, 64))
    lr[40:52, 20:32] = np.random.default_rng(0).uniform(0, 9, (12, 12))
    fine = lr.repeat(2, 0).repeat(2, 1)
    before_after(lr, {"sharp": fine}, tmp_path / "a.png")
    square = drawn[0].axes[0].patches[0]
    assert abs(square.get_x() + square.get_width() / 2 - 25.5) < 4
    assert abs(square.get_y() + square.get_height() / 2 - 45.5) < 4
    before_after(lr, {"sharp": fine}, tmp_path / "a.png", zoom=(0, 63, 20))
    square = drawn[1].axes[0].patches[0]
    assert (square.get_x(), square.get_y(), square.get_width()) == (43.5, -0.5, 20)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 4), (8, 200), (200, 8)])
def test_small_long_and_empty_images_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    lr = np.full(shape, {3: 0.0, 8: 1.0, 200: -1.0}[shape[0]])
    before_after(lr, {"sharp": lr.repeat(2, 0).repeat(2, 1)}, tmp_path / "a.png")


def test_comparison_with_the_truth(tmp_path: Path, drawn: list[Any]) -> None:
    hr = picture()
    noise = np.random.default_rng(1).normal(size=hr.shape)
    results = {"rough": hr + 20 * noise, "fine": hr + 5 * noise}
    comparison(hr, results, tmp_path / "a.png", spacing=(1, 1), title="figure 2")
    texts = [t.get_text() for axes in drawn[0].axes for t in axes.texts]
    from skimage.metrics import peak_signal_noise_ratio

    for image in results.values():
        expected = peak_signal_noise_ratio(hr, image, data_range=hr.max())
        assert f"{expected:.2f} dB" in texts
    panels = np.array(drawn[0].axes[:9]).reshape(3, 3)
    assert len({axes.images[0].get_clim() for axes in panels[:2].flat}) == 1
    errors = panels[2, 1:]
    assert errors[0].images[0].get_clim() == errors[1].images[0].get_clim()
    assert_close(errors[1].images[0].get_array(), np.abs(5 * noise) / hr.max())
    assert [len(axes.patches) for axes in panels[0]] == [1, 0, 0], "the zoomed square is marked in the truth"
    under = [[t for t in axes.texts if t.get_text() != "/"] for axes in errors]
    assert [{t.get_fontweight() for t in scores} for scores in under] == [{"normal"}, {"bold"}], "the best"
    assert all(t.xyann[1] < 0 for scores in under for t in scores), "under the panel"


def test_a_perfect_result_can_be_compared(tmp_path: Path) -> None:
    comparison(picture(), {"truth again": picture()}, tmp_path / "a.png")


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lr = picture()
    fine = lr.repeat(2, 0).repeat(2, 1)
    with pytest.raises(VolumeError, match=r"\.png, \.pdf, \.svg"):
        before_after(lr, {"sharp": fine}, tmp_path / "a.gif")
    with pytest.raises(VolumeError, match="no folder"):
        comparison(lr, {"sharp": lr}, tmp_path / "no" / "a.png")
    with pytest.raises(ValueError, match="no result"):
        before_after(lr, {}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="size"):
        comparison(lr, {"sharp": fine}, tmp_path / "a.png")

    def half(self: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(VolumeError, match="No space left"):
        before_after(lr, {"sharp": fine}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_no_window_system_and_no_global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before_after(picture(), {"sharp": picture()}, tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("change", "window"),
    [
        (lambda a: a, (0, 897)),
        (lambda a: np.where(a == a.max(), -32768, a), (0, 897)),  # a padding value
        (lambda a: np.where(a == a.max(), 32767, a), (0, 897)),  # a marker
        (lambda a: a + 20000, (20000, 20897)),  # an offset
        (lambda a: np.where(a == a.max(), 0, a + 20000), (20000, 20897)),
        (lambda a: a - 450, (-450, 447)),  # a signed image
        (lambda a: -a, (-897, -3)),
        (lambda a: 0 * a, (0, 1)),
        (lambda a: 0 * a + 5, (5, 6)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ">f4"])
def test_single_voxels_and_an_offset_do_not_grey_the_picture(dtype: Any, change: Any, window: tuple[int, int]) -> None:
    """Half of the image is air; the values of the other half are 0 to 899."""
    image = np.concatenate([np.zeros(1800), np.repeat(np.arange(900), 2)]).reshape(60, 60)
    image[-1, -1] = 900
    assert figures.grey_window(change(image).astype(dtype)) == pytest.approx(window, abs=3)


PROVENANCE = "deformmamba 0.1.0, UNLIKE TRAINING DATA, DeformMambaSR 4x, ixi-4x"
WARNINGS = (
    "the header has two voxel sizes: 0.4 x 0.4 x 5 (sform, used) and 1 x 1 x 5 (pixdim)",
    "1 of 36864 voxels were NaN or infinite and are 0 now",
    "the scan does not look like a magnitude image: 46 % of its voxels are negative, as in a t-map or in a signed or "
    "negated image; the weights were trained on magnitude images only, so check the result before use",
    f"{'/SUBJECTS_WITH_LONG_NAMES' * 9}/scan.nii.gz: a path is longer than the figure is wide. It is a sentence",
    "头部扫描" * 60,
    "the pixels are 0.4 x 0.4 mm, the weights were trained on 2.67 to 15 mm: the result may be worse than reported",
)


def noted(n_warnings: int) -> str:
    """A note as the commands write it."""
    return ". ".join((PROVENANCE, *(f"Warning: {text}" for text in WARNINGS[:n_warnings])))


def check_lettering(figure: Any, title: str, note: str) -> None:
    """Title, note and statement are complete, inside the figure, and neither on each other nor on the panels."""
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.texts), key=lambda box: box.y0)
    assert boxes[0].y0 > 0
    assert boxes[-1].y1 < figure.bbox.y1
    assert all(0 < box.x0 < box.x1 < figure.bbox.x1 for box in boxes)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes)), "lines overlap"
    panels = [axes.get_tightbbox() for axes in figure.axes]
    low, high = min(box.y0 for box in panels), max(box.y1 for box in panels)
    assert all(box.y1 < low or box.y0 > high for box in boxes), "text lies on a panel"
    n_titles = len(lettering.title_lines(title, figure.get_figwidth()))
    assert sum(box.y0 > high for box in boxes) == n_titles
    lines = [text.get_text() for text in figure.texts[n_titles:-1]][::-1]
    assert "".join("".join(lines).split()) == "".join(note.replace(". Warning", "Warning").split())
    assert "".join("".join(text.get_text() for text in figure.texts[:n_titles]).split()) == "".join(title.split())


@pytest.mark.parametrize("n_warnings", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6))])
def test_each_warning_is_legible_below_the_panels(tmp_path: Path, drawn: list[Any], n_warnings: int) -> None:
    lr, note = picture(), noted(n_warnings)
    with lettering.missing_glyphs_allowed():
        before_after(lr, {"sharp": lr}, tmp_path / "a.png", title="a scan", note=note)
        check_lettering(drawn[0], "a scan", note)
    starts = {text.get_text()[:30]: text for text in drawn[0].texts}
    for warning in WARNINGS[:n_warnings]:
        assert starts[f"Warning: {warning}"[:30]].get_color() == figures._INK
    assert starts[PROVENANCE[:30]].get_color() == starts[STATEMENT[:30]].get_color() == figures._MUTED


def test_room_for_the_note_is_added_below_the_panels(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The panels keep their size, and the figure is higher by the lines of the note."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn"))
    lr = picture()
    for note in ("", *map(noted, (0, 1, 2))):
        before_after(lr, {"a": lr, "b": lr}, tmp_path / "a.png", note=note)
    panels = [figure.axes[0].get_window_extent().bounds[2:] for figure in drawn]
    assert panels == [pytest.approx(panels[0])] * 4
    heights = [figure.get_figheight() for figure in drawn]
    assert np.diff(heights) == pytest.approx([0.23, 0.15, 0.15])


def test_a_long_title_has_several_lines(tmp_path: Path, drawn: list[Any]) -> None:
    lr, title = picture(), f"{'sub-01_ses-02_ACQ-HIGHRES_' * 8}T2w.nii.gz, slice 3 of 4, 4×"
    before_after(lr, {"sharp": lr}, tmp_path / "a.png", title=title, note=noted(0))
    check_lettering(drawn[0], title, noted(0))


def test_lines_break_at_spaces_and_inside_long_words_only() -> None:
    width = 3.0
    texts = [line.text for line in lettering.note_lines(noted(4), width)]
    assert len(texts) > 10
    words = set(noted(4).replace(". Warning", " Warning").split())
    path = next(word for word in words if word.startswith("/SUBJECTS"))
    assert all(word in words or word in path for text in texts for word in text.split())
    assert [line.is_warning for line in lettering.note_lines("a. Warning: b. And c. Warning: d\ne", 9)] == [0, 1, 1, 0]
    assert lettering.note_lines("", width) == []
    assert lettering.note_lines("file\udcff\x07", width) == [("file??", False)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", figures.SUFFIXES)
def test_characters_that_no_font_has_are_no_warning(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Names of files and models in any script; every warning of this test run is an error."""
    lr, name = picture(), "头部 患者 뇌 हिन्दी"
    before_after(lr, {name: lr}, tmp_path / f"{name}{suffix}", title=name, note=f"{name}. Warning: {name}")
    comparison(lr, {name: lr}, tmp_path / f"{name}2{suffix}", title=name)
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    assert capfd.readouterr() == ("", "")


def test_other_warnings_pass() -> None:
    with lettering.missing_glyphs_allowed(), pytest.warns(UserWarning, match="a fault"):
        warnings.warn("a fault", stacklevel=1)


def test_an_installed_font_replaces_missing_characters(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fonts that are not installed are not searched: matplotlib would log each of them."""
    monkeypatch.setattr(lettering, "FALLBACKS", ("No Such Font", "STIXGeneral"))
    assert lettering.fallback_fonts("Größe 3 × 4 mm\n→ µ Ω Ж") == []
    assert lettering.fallback_fonts("头部") == ["STIXGeneral"]
    lr = picture()
    before_after(lr, {"头部": lr}, tmp_path / "a.png", title="患者", note="plain")
    found = {text.get_text(): text.get_fontfamily()[1:] for text in drawn[0].texts + drawn[0].axes[1].texts}
    assert found["患者"] == found["头部"] == ["STIXGeneral"]
    assert found["plain"] == found[STATEMENT] == []
    assert not [record for record in caplog.records if "findfont" in record.msg and record.levelname == "WARNING"]
