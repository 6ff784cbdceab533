"""A DICOM series of thick slices becomes a series of more slices: their positions, and the thickness in use."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_made import PATIENT, classic, enhanced, oblique

from deformmamba.inference.isotropic_files import isotropic_cohort, isotropic_file
from deformmamba.models import DeformMambaSR
from deformmamba.volume import read_volume


@pytest.fixture(scope="module")
def network() -> DeformMambaSR:
    """An untrained network: it changes nothing, so the output is the cubic spline."""
    return DeformMambaSR.from_preset("tiny", scale=1, dims=[16], depths=[1]).eval()


@pytest.mark.parametrize("kind", [classic, enhanced])
def test_a_series_of_more_slices(kind: object, tmp_path: Path, network: DeformMambaSR) -> None:
    affine = oblique(3, (0.8, 0.8, 3.0))
    kind(tmp_path / "in", affine, (20, 18, 9))  # type: ignore[operator]
    done = isotropic_file(tmp_path / "in", tmp_path / "out", model=network, to=0.8)
    assert done.report.thickness_from == "DICOM's SliceThickness"
    assert done.report.thickness == pytest.approx(2.7)  # with a gap: slices are 3 mm apart
    assert done.report.spacing == pytest.approx(3.0, abs=1e-4)
    n = round(9 * 3 / 0.8)
    out = read_volume(tmp_path / "out")
    assert out.array.shape == (20, 18, n)
    assert out.spacing == pytest.approx((0.8, 0.8, 0.8), abs=1e-4)
    # DICOM's decimal strings have about ten digits
    np.testing.assert_allclose(out.affine[:3, 3], affine[:3, 3], atol=1e-4)
    np.testing.assert_allclose(out.affine @ [1, 2, 15, 1], affine @ [1, 2, 15 * 0.8 / 3, 1], atol=1e-3)
    np.testing.assert_allclose(out.array[:, :, 15], read_volume(tmp_path / "in").array[:, :, 4], atol=0.1)
    headers = [pydicom.dcmread(path) for path in sorted((tmp_path / "out").iterdir())]
    assert str(headers[0].PatientName) == PATIENT
    assert all("isotropic to 0.8 mm" in str(header) for header in headers)


def test_the_uncertainty_is_a_series_of_its_own(
    tmp_path: Path, network: DeformMambaSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    # else the spline, which has no uncertainty
    monkeypatch.setattr("deformmamba.inference.isotropic.best_of", lambda network, *_: (network, None, 0))
    classic(tmp_path / "in", oblique(3, (0.8, 0.8, 3.0)), (20, 18, 9))
    isotropic_file(tmp_path / "in", tmp_path / "iso", model=network, to=0.8, uncertainty=tmp_path / "spread")
    image, spread = (pydicom.dcmread(tmp_path / name / "0003.dcm") for name in ("iso", "spread"))
    assert spread.SeriesNumber == image.SeriesNumber + 1000
    assert spread.SeriesDescription == f"{image.SeriesDescription} standard deviation"
    assert spread.WindowWidth < image.WindowWidth


def test_each_series_of_a_folder_is_made_isotropic(tmp_path: Path, network: DeformMambaSR) -> None:
    affine = oblique(3, (0.8, 0.8, 3.0))
    for number in (7, 8):
        classic(tmp_path / str(number), affine, (20, 18, 9), number=number)
    folder = tmp_path / "in" / "visit"
    folder.mkdir(parents=True)
    for number in (7, 8):
        for path in (tmp_path / str(number)).iterdir():
            path.rename(folder / f"{number}-{path.name}")
    made = isotropic_cohort(tmp_path / "in", tmp_path / "out", model=network, to=1.5)
    assert [(outcome.output, outcome.status) for outcome in made] == [
        ("visit_series-0_desc-iso", "made"), ("visit_series-1_desc-iso", "made")
    ]  # fmt: skip
