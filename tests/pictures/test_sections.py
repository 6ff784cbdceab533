"""Sections across the slices: each voxel is drawn at its position in the world, in every panel of a row."""

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_figures import check_lettering, noted

from deformmamba.pictures import lettering, sections
from deformmamba.pictures.sections import section_figure
from deformmamba.volume import Volume, VolumeError


def scans(affine: np.ndarray | None = None, shift: float = 0.0) -> dict[str, Volume]:
    """6 slices of 4 mm across the last axis, and the same made 24 slices of 1 mm, the first centre `shift` mm later.

    The intensity is linear in the world, with another slope along each axis of the world.
    """
    thick = np.diag([1.0, 1.5, 4.0, 1.0]) if affine is None else affine
    fine = thick.copy()
    fine[:3, 2] /= 4
    fine[:3, 3] += shift * fine[:3, 2]
    volumes = {}
    for name, matrix, n in (("input", thick, 6), ("cubic spline", fine, 24)):
        shape = (8, 10, n)
        world = matrix[:3, :3] @ np.indices(shape).reshape(3, -1) + matrix[:3, 3:]
        volumes[name] = Volume((np.array([1.0, 10.0, 100.0]) @ world).reshape(shape), matrix)
    return volumes


def test_first_voxels_have_a_common_centre(tmp_path: Path, drawn: list[Any]) -> None:
    """A slice of 4 mm reaches 2 mm to both sides of its centre, a slice of 1 mm 0.5 mm."""
    section_figure(scans(), tmp_path / "a.png", axis=2)
    panels = np.array(drawn[0].axes).reshape(2, 2)
    # sagittal: A to P across; coronal: R to L across, x grows towards R; both S to I down
    assert [axes.images[0].get_extent() for axes in panels[:, 0]] == [[14.25, -0.75, -2, 22], [7.5, -0.5, -2, 22]]
    assert [axes.images[0].get_extent() for axes in panels[:, 1]] == [
        [14.25, -0.75, -0.5, 23.5],
        [7.5, -0.5, -0.5, 23.5],
    ]
    assert {axes.get_ylim() for axes in panels.flat} == {(-2, 23.5)}
    assert [axes.get_xlim() for axes in panels.flat] == [(14.25, -0.75)] * 2 + [(7.5, -0.5)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (1, -1, 1), (-1, -1, -1)])
def test_a_point_of_the_world_has_one_place_in_a_row(
    tmp_path: Path,
    drawn: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, ...],
    signs: tuple[int, ...],
) -> None:
    """For every order and direction of tilted axes the intensity is the same function of the place, in all panels."""
    monkeypatch.setattr(sections, "grey_window", lambda image: (image.min() - 999, image.max() + 999))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn"))
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs * (1.0, 1.5, 4.0)
    affine[:3, 3] = 5, -7, 11
    c, s = np.cos(0.4), np.sin(0.4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ affine[:3, :3]
    section_figure(scans(affine, shift=1.0), tmp_path / "a.png", axis=2)
    for row in np.array(drawn[0].axes).reshape(2, 2):
        fits = []
        for axes in row:
            image, (left, right, bottom, top) = np.array(axes.images[0].get_array()), axes.images[0].get_extent()
            h, w = image.shape
            x = left + (right - left) * (np.arange(w) + 0.5) / w
            y = top + (bottom - top) * (np.arange(h) + 0.5) / h
            terms = np.stack([np.ones(h * w), np.tile(x, h), np.repeat(y, w)], axis=1)
            fit, *_ = np.linalg.lstsq(terms, image.ravel(), rcond=None)
            assert terms @ fit == pytest.approx(image.ravel())
            fits.append(fit)
            span = axes.get_xlim()[1] - axes.get_xlim()[0], axes.get_ylim()[1] - axes.get_ylim()[0]
            assert np.sign(span).tolist() == np.sign([right - left, top - bottom]).tolist(), "not mirrored"
        assert fits[0] == pytest.approx(fits[1])
        assert row[0].get_xlim() == row[1].get_xlim()
        assert row[0].get_ylim() == row[1].get_ylim()


@pytest.mark.slow
@pytest.mark.parametrize("n_warnings", [0, 1, 3, 6])
def test_each_warning_is_legible_below_the_panels(tmp_path: Path, drawn: list[Any], n_warnings: int) -> None:
    with lettering.missing_glyphs_allowed():
        section_figure(scans(), tmp_path / "a.png", axis=2, title="a scan", note=noted(n_warnings))
        check_lettering(drawn[0], "a scan", noted(n_warnings))


def test_names_that_no_font_has_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model file may have a name in any script; every warning of this test run is an error."""
    section_figure({"输入": scans()["input"]}, tmp_path / "头.png", axis=2, title="头部")
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


def test_a_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="no volume to draw"):
        section_figure({}, tmp_path / "a.png", axis=2)
