"""The time between the volumes of a series over time reaches pixdim[4] of a 4-D NIfTI file, in seconds."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_made import classic, enhanced, item, oblique
from pydicom.dataset import Dataset

from deformmamba.inference.files import upscale_file
from deformmamba.models import ZeroFill
from deformmamba.volume import Volume, read_volume, writing
from deformmamba.volume.timing import UNKNOWN

N_VOLUMES = 4


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600 % 24:02}{int(seconds) // 60 % 60:02}{seconds % 60:09.6f}"


def series(folder: Path, change: Callable[[Dataset, int], None]) -> Path:
    """A classic series of several volumes; `change` gets the data set of a slice, and the number of its volume."""
    classic(folder, oblique(0), (8, 8, 3), echoes=(30.0,) * N_VOLUMES)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        volume = int(ds.EchoNumbers) - 1
        ds.EchoNumbers, ds.AcquisitionNumber = 1, volume + 1
        change(ds, volume)
        ds.save_as(path)
    return folder


def epi(ds: Dataset, volume: int) -> None:
    ds.ScanningSequence, ds.RepetitionTime = ["EP", "GR"], 2500


def written(source: Path, tmp_path: Path) -> tuple[float, str, list[str]]:
    """pixdim[4] and the unit of time of the upscaled file, and the warnings about the time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        upscale_file(ZeroFill(scale=2), source, tmp_path / "out.nii.gz", sidecar=False)
    header = nibabel.load(tmp_path / "out.nii.gz").header
    assert header["dim"][0] == 4
    assert header.get_xyzt_units()[0] == "mm"
    return float(header["pixdim"][4]), header.get_xyzt_units()[1], [str(w.message) for w in caught if "time" in str(w)]


def times(
    field: str, of: Callable[[int], Any], *more: Callable[[Dataset, int], None]
) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, volume: int) -> None:
        for each in more:
            each(ds, volume)
        setattr(ds, field, of(volume))

    return change


def resolution(ds: Dataset, volume: int) -> None:
    ds.TemporalResolution = "2512.5"


KNOWN: dict[str, tuple[Callable[[Dataset, int], None], float]] = {
    "acquisition times, not the repetition time": (times("AcquisitionTime", lambda n: clock(36000 + 6.25 * n)), 6.25),
    "over midnight": (times("AcquisitionTime", lambda n: clock(86397 + 2.5 * n)), 2.5),
    "rounded times": (times("AcquisitionTime", lambda n: clock(36000 + 2.5 * n + (0, 0.0075, 0, 0.005)[n]), epi), 2.5),
    "whole seconds, and a stated value": (
        times("AcquisitionTime", lambda n: clock(36000 + int(2.5 * n))[:6], epi),
        2.5,
    ),
    "date and time": (times("AcquisitionDateTime", lambda n: f"20200102{clock(36000 + 3 * n)}+0100"), 3.0),
    "GE": (
        lambda ds, n: (times("AcquisitionTime", lambda n: "101112")(ds, n), setattr(ds, "TriggerTime", 1500 * n))[1],
        1.5,
    ),
    "temporal resolution": (times("AcquisitionTime", lambda n: "101112", epi, resolution), 2.5125),
    "EPI": (epi, 2.5),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_time_series_from_dicom(name: str, tmp_path: Path) -> None:
    change, seconds = KNOWN[name]
    found, unit, told = written(series(tmp_path / "series", change), tmp_path)
    assert found == pytest.approx(seconds, abs=1e-6)
    assert (unit, told) == ("sec", [])


UNKNOWN_TIMES: dict[str, Callable[[Dataset, int], None]] = {
    "a repetition of another sequence": lambda ds, volume: None,
    "3-D EPI": times("MRAcquisitionType", lambda n: "3D", epi),
    "a pause": times("AcquisitionTime", lambda n: clock(36000 + 2.5 * n + 60 * (n > 1)), epi),
    "backwards": times("AcquisitionTime", lambda n: clock(36000 - 2.5 * n), epi),
    "no numbers": times("TemporalResolution", lambda n: "0", times("TriggerTime", lambda n: "")),
}


@pytest.mark.parametrize("name", list(UNKNOWN_TIMES))
def test_an_unknown_time_is_0_with_a_note(name: str, tmp_path: Path) -> None:
    found, unit, told = written(series(tmp_path / "series", UNKNOWN_TIMES[name]), tmp_path)
    assert (found, unit) == (0, "unknown")
    assert told == [f"{tmp_path / 'series'}: {UNKNOWN}"]


NO_TIMES: dict[str, Callable[[Dataset, int], None]] = {
    "echoes": times("EchoTime", lambda n: 10 * (n + 1), epi),
    "b-values": times("DiffusionBValue", lambda n: 500.0 * n, epi),
    "directions": times("DiffusionBValue", lambda n: 1000.0, epi),
    "directions, private b-values": times("ImageType", lambda n: ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"], epi),
    "inversion times": times("InversionTime", lambda n: 100 * (n + 1), epi),
    "flip angles": times("FlipAngle", lambda n: 5 * (n + 1), epi),
}


@pytest.mark.parametrize("name", list(NO_TIMES))
def test_volumes_that_are_no_time_series_have_no_time(name: str, tmp_path: Path) -> None:
    assert written(series(tmp_path / "series", NO_TIMES[name]), tmp_path) == (0, "unknown", [])


@pytest.mark.parametrize("field", ["FrameAcquisitionDateTime", "TemporalPositionTimeOffset"])
def test_an_enhanced_time_series(field: str, tmp_path: Path) -> None:
    enhanced(tmp_path / "a.dcm", oblique(0), (8, 8, 3), echoes=(30.0,) * N_VOLUMES)
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    for group in ds.PerFrameFunctionalGroupsSequence:
        content = group.FrameContentSequence[0]
        volume = content.DimensionIndexValues[2] - 1
        content.TemporalPositionIndex = volume + 1
        if field.startswith("Frame"):
            content.FrameAcquisitionDateTime = f"20200102{clock(36000 + 7.5 * volume)}"
        else:
            group.TemporalPositionSequence = [item(TemporalPositionTimeOffset=7.5 * volume)]
    ds.save_as(tmp_path / "a.dcm")
    assert written(tmp_path / "a.dcm", tmp_path) == (7.5, "sec", [])


@pytest.mark.parametrize("milliseconds", [2200.0, 0.0])
def test_a_time_series_from_mgh(milliseconds: float, tmp_path: Path) -> None:
    array = np.random.default_rng(0).uniform(1, 900, (8, 8, 3, 4)).astype(np.float32)
    image = nibabel.MGHImage(array, np.diag([1.0, 1, 4, 1]))
    image.header["tr"] = milliseconds
    nibabel.save(image, tmp_path / "in.mgz")
    found, unit, told = written(tmp_path / "in.mgz", tmp_path)
    assert found == pytest.approx(milliseconds / 1000)
    assert (unit, told) == (("sec", []) if milliseconds else ("unknown", [f"{tmp_path / 'in.mgz'}: {UNKNOWN}"]))
    read_volume(tmp_path / "in.mgz", volume=1)  # one volume needs no time: no warning


@pytest.mark.parametrize(("zoom", "unit"), [(2.5, "sec"), (2500, "msec"), (0, "unknown")])
def test_nifti_keeps_its_own(zoom: float, unit: str, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).uniform(1, 900, (8, 8, 3, 4)).astype(np.float32), np.eye(4))
    image.header["pixdim"][4] = zoom
    image.header.set_xyzt_units("mm", unit)
    nibabel.save(image, tmp_path / "in.nii")
    assert written(tmp_path / "in.nii", tmp_path) == (zoom, unit, [])


def test_volumes_without_a_header_have_no_time(tmp_path: Path) -> None:
    like = Volume(np.ones((8, 8, 3), np.float32), np.eye(4))
    with writing(tmp_path / "out.nii", like, (8, 8, 3, 2)) as write:
        for _ in range(6):
            write(like.array[:, :, 0])
    image = nibabel.load(tmp_path / "out.nii")
    assert image.header["pixdim"][4] == 0
    sitk = pytest.importorskip("SimpleITK")
    assert sitk.ReadImage(str(tmp_path / "out.nii")).GetSize() == (8, 8, 3, 2)  # a step of 0 is no error there
