"""Which files are scans: masks, labels, phase images and own outputs are skipped, each with the reason."""

import copy
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_made import classic, enhanced, oblique
from pydicom import dcmread
from pydicom.data import get_testdata_file

from deformmamba.inference import upscale_file
from deformmamba.inference.cohort import upscale_cohort
from deformmamba.models import ZeroFill
from deformmamba.volume import VolumeError, no_scan, not_a_scan, read_volume, scans_below

CASES = Path(__file__).parents[1] / "cases"
DICOM = CASES / "dicom" / "rect_eq_thick"


def image(values: np.ndarray, path: Path, **fields: object) -> Path:
    made = nibabel.Nifti1Image(values, np.diag([1.5, 1.5, 5, 1]))
    for name, value in fields.items():
        made.header[name] = value
    nibabel.save(made, path)
    return path


def anatomy(shape: tuple[int, ...] = (20, 16, 5), top: float = 1000) -> np.ndarray:
    noise = np.random.default_rng(0).uniform(0, top, shape)
    noise[:4] = 0
    return noise


def regions(dtype: str = "uint8") -> np.ndarray:
    """An image of 40 labels in blocks."""
    return np.kron(np.arange(40).reshape(5, 4, 2), np.ones((6, 6, 4))).astype(dtype)


def test_anatomy_of_any_type_is_a_scan(tmp_path: Path) -> None:
    for dtype in ("uint8", "int16", "uint16", "float32", "float64"):
        values = anatomy(top=200).astype(dtype)
        assert not_a_scan(image(values, tmp_path / f"{dtype}.nii.gz")) == ""
    assert not_a_scan(image(anatomy(top=200).astype("int16") - 50, tmp_path / "signed.nii")) == ""
    masked = anatomy(top=200) * (anatomy(top=200) > 50)
    for offset in (100, -1024):  # the background is stored as another number than 0
        assert not_a_scan(image(masked.astype("int16") + offset, tmp_path / f"{offset}.nii")) == ""
    nibabel.save(nibabel.MGHImage(anatomy().astype("float32"), np.eye(4)), tmp_path / "T1.mgz")
    assert not_a_scan(tmp_path / "T1.mgz") == ""
    assert not_a_scan(DICOM / "000.dcm") == ""
    # a name alone does not mark a file as a mask or an output
    assert not_a_scan(image(anatomy(), tmp_path / "sub-1_desc-sr_T2w.nii")) == ""
    assert not_a_scan(image(anatomy(), tmp_path / "mask_of_gre.nii")) == ""
    (tmp_path / "broken.nii").write_bytes(b"nothing")
    assert not_a_scan(tmp_path / "broken.nii") == "", "the reader says what is wrong"


@pytest.mark.parametrize(
    "name",
    ["sub-1_dseg.nii.gz", "sub-1_desc-brain_mask.nii.gz", "sub-1_label-GM_probseg.nii", "lesion_seg.nii", "aseg.mgz"],
)
def test_a_mask_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "mask or label image" in not_a_scan(tmp_path / name)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_a_label_image_is_known_by_its_voxels(tmp_path: Path, dtype: str) -> None:
    assert "few integers" in not_a_scan(image(regions(dtype), tmp_path / "a.nii.gz"))
    assert "few integers" in not_a_scan(image(regions(dtype) + np.ones((), dtype), tmp_path / "d.nii"))
    two = (anatomy() > 500).astype(dtype)
    assert "mask (its voxels have two values)" in not_a_scan(image(two, tmp_path / "b.nii"))
    four = np.random.default_rng(0).integers(0, 4, (20, 16, 5)).astype(dtype)
    assert "few integers" in not_a_scan(image(four, tmp_path / "c.nii"))
    if dtype != "float64" and dtype != "int16":
        nibabel.save(nibabel.MGHImage(regions(dtype), np.eye(4)), tmp_path / "regions.mgz")
        assert "few integers" in not_a_scan(tmp_path / "regions.mgz")


def test_headers_and_files_beside_tell(tmp_path: Path) -> None:
    shutil.copy(CASES / "nifti" / "label.nii.gz", tmp_path / "t2.nii.gz")
    assert "intent LABEL" in not_a_scan(tmp_path / "t2.nii.gz")
    for code in (3, 1007, 2006, 3006):  # a t-map, vectors, a deformation of FSL, a CIFTI file
        assert f"intent code {code}" in not_a_scan(image(anatomy(), tmp_path / "t.nii", intent_code=code))
    for code in (0, 1001, 2001):  # none, an estimate, a time series
        assert not_a_scan(image(anatomy(), tmp_path / "t.nii", intent_code=code)) == ""
    assert "its header" in not_a_scan(
        image(anatomy(), tmp_path / "o.nii", descrip=b"deformmamba 0.1.0, ZeroFill 2x, sha256 ab")
    )
    for name, said, reason in (
        ("made", {"GeneratedBy": [{"Name": "deformmamba"}]}, "an output of this package"),
        ("angle", {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, "a phase image"),
        ("fine", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"], "GeneratedBy": [{"Name": "fmriprep"}]}, ""),
        ("odd", ["no dictionary"], ""),
    ):
        path = image(anatomy(), tmp_path / f"{name}.nii.gz")
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
        assert not_a_scan(path).startswith(reason)
        assert bool(not_a_scan(path)) == bool(reason)


def test_phase_images(tmp_path: Path) -> None:
    angle = np.random.default_rng(0).uniform(-np.pi, np.pi, (40, 40, 8)).astype("float32")
    angle.flat[:2] = -np.pi, np.pi
    assert "-pi to pi" in not_a_scan(image(angle, tmp_path / "a.nii.gz"))
    siemens = np.random.default_rng(0).integers(-4096, 4095, (40, 40, 8)).astype("int16")
    siemens.flat[:2] = -4096, 4094
    assert "-4096" in not_a_scan(image(siemens, tmp_path / "b.nii.gz"))
    for slope, intercept, raw, said in (
        (2, -4096, (0, 4095), "-4096"),  # 12 bits of a scanner
        (np.pi / 4096, 0, (-4096, 4096), "-pi to pi"),
        (np.pi / 2048, -np.pi, (0, 4096), "-pi to pi"),
    ):
        values = np.random.default_rng(0).integers(*raw, (40, 40, 8)).astype("int16")
        values.flat[:2] = raw
        made = nibabel.Nifti1Image(values, np.eye(4))
        made.header.set_slope_inter(slope, intercept)
        nibabel.save(made, tmp_path / "c.nii.gz")
        assert nibabel.load(tmp_path / "c.nii.gz").dataobj.slope == pytest.approx(slope)
        assert said in not_a_scan(tmp_path / "c.nii.gz")
    for name in ("sub-1_part-phase_bold", "sub-1_phasediff", "gre_e1_ph"):  # the last as dcm2niix names it
        assert "phase image" in not_a_scan(image(anatomy(), tmp_path / f"{name}.nii.gz"))


def test_the_phase_of_an_enhanced_series_is_known_by_its_frames(tmp_path: Path) -> None:
    """Its ImageType is MIXED, because it holds magnitude and phase."""
    path = tmp_path / "both.dcm"
    enhanced(path, oblique(0), echoes=(90.0, 91.0))
    dataset = dcmread(path)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "MIXED", "NONE"]
    kinds = dataset.SharedFunctionalGroupsSequence[0].MRImageFrameTypeSequence
    del dataset.SharedFunctionalGroupsSequence[0].MRImageFrameTypeSequence
    for group in dataset.PerFrameFunctionalGroupsSequence:
        group.MRImageFrameTypeSequence = copy.deepcopy(kinds)
        is_phase = float(group.MREchoSequence[0].EffectiveEchoTime) == 91.0
        group.MRImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "P" if is_phase else "M", "NONE"]
    dataset.save_as(path)
    assert no_scan(path, read_volume(path, volume=0)) == ""
    assert no_scan(path, read_volume(path, volume=1)) == "a phase image (by its ImageType)"
    with pytest.raises(VolumeError, match=r"a phase image .*as_image=True"):
        upscale_file(ZeroFill(scale=2), path, tmp_path / "out.nii", volume=1)


def test_a_series_of_magnitude_and_phase_is_a_scan(tmp_path: Path) -> None:
    """Whichever comes first by name; in a folder of scans too, the phase of it is refused."""
    series = tmp_path / "scans" / "gre"
    series.parent.mkdir()
    classic(series, oblique(0), echoes=(90.0, 90.0))
    files = sorted(series.iterdir())
    for path in files:
        dataset = dcmread(path)
        is_phase = dataset.EchoNumbers == dcmread(files[0]).EchoNumbers
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "P" if is_phase else "M"]
        dataset.AcquisitionNumber = int(is_phase) + 1
        dataset.save_as(path)
    assert [found.reason for found in scans_below(series.parent)] == [""]
    reasons = {
        volume: upscale_cohort(ZeroFill(scale=2), series.parent, tmp_path / f"{volume}", volume=volume)[0].reason
        for volume in (None, 0, 1)
    }
    assert "holds 2 volumes" in reasons[None]
    assert reasons[0] == ""
    assert "a phase image (by its ImageType)" in reasons[1]


def test_stored_values_of_a_phase_do_not_make_a_scaled_scan_one(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-4096, 4095, (40, 40, 8)).astype("int16")
    values.flat[:2] = -4096, 4095
    made = nibabel.Nifti1Image(values, np.eye(4))
    made.header.set_slope_inter(0.1, 409.6)
    nibabel.save(made, tmp_path / "scan.nii")
    assert not_a_scan(tmp_path / "scan.nii") == ""


def test_a_tree_is_walked_once_and_each_file_that_is_passed_over_is_named(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in ("b", "derivatives/fsl", ".git", "series", "two"):
        (tree / folder).mkdir(parents=True)
    image(anatomy(), tree / "a_T2w.NII.GZ")
    image(regions(), tree / "b" / "atlas.nii.gz")
    image(anatomy(), tree / "derivatives" / "fsl" / "bet.nii.gz")
    image(anatomy(), tree / ".git" / "hidden.nii.gz")
    (tree / "b" / "notes.txt").write_text("no scan")
    (tree / "b" / "again").symlink_to(tree)
    (tree / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    image(anatomy(), tmp_path / "other" / "x.mgh.nii")
    shutil.copytree(DICOM, tree / "series", dirs_exist_ok=True)
    shutil.copy(str(get_testdata_file("DICOMDIR", download=False)), tree / "DICOMDIR")
    shutil.copy(DICOM / "000.dcm", tree / "two" / "0.dcm")
    shutil.copy(CASES / "dicom" / "localiser" / "0_000.dcm", tree / "two" / "1.dcm")
    found = {(str(c.path.relative_to(tree)), c.series is not None): c.reason for c in scans_below(tree)}
    assert {name for name, reason in found.items() if not reason} == {
        ("a_T2w.NII.GZ", False), ("elsewhere/x.mgh.nii", False), ("series", False), ("two", True)
    }  # fmt: skip
    passed = {name: reason for (name, _), reason in found.items() if reason}
    assert set(passed) == {"b/atlas.nii.gz", "derivatives/fsl/bet.nii.gz"}
    assert "derivatives" in passed["derivatives/fsl/bet.nii.gz"]
    assert sum(c.path == tree / "two" for c in scans_below(tree)) == 2, "each series is a scan of its own"
    inside = [str(c.path.relative_to(tree)) for c in scans_below(tree, skip=tree / "b", outside=False)]
    assert inside == ["a_T2w.NII.GZ", "derivatives/fsl/bet.nii.gz", "series", "two", "two"]
