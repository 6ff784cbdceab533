"""Data sets from downloaded files: the same input gives the same bytes, and bad input gives one line."""

import hashlib
import json
import resource
import signal

import nibabel
import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.cli import main
from deformmamba.data import prepared
from deformmamba.data.patches import PatchDataset, find_scans, load_slices
from deformmamba.data.prepare import (
    chosen_slices,
    complex_image,
    ismrmrd_spacing,
    plan_fastmri,
    plan_folder,
    plan_ixi,
    prepare,
    read_splits,
    writing,
)
from deformmamba.data.prepared import read_manifest, read_prepared
from deformmamba.volume import VolumeError, intensity_scale

SITES = ("Guys", "HH", "IOP")


def ixi_name(k, contrast="T2"):
    return f"IXI{k:03d}-{SITES[k % 3]}-{800 + k:04d}-{contrast}.nii.gz"


def write_nifti(path, array, spacing=(0.9375, 0.9375, 1.25)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.asarray(array, np.int16), np.diag([*spacing, 1]))
    nibabel.save(image, path)
    return path


@pytest.fixture
def ixi(tmp_path, phantom):
    root = tmp_path / "IXI-T2"
    for k in range(2, 12):
        write_nifti(root / ixi_name(k), phantom + k)
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------------------------------- ixi


def test_ixi_is_split_by_the_hash_of_the_subjects_and_says_so(ixi, tmp_path, phantom):
    write_nifti(ixi / ixi_name(2, "T1"), phantom)
    write_nifti(ixi / "IXI003-HH-0803-DTI-00.nii.gz", phantom)
    (ixi / "notes.nii.gz").write_bytes(b"")
    manifest = prepare(plan_ixi(ixi, slices="central:4", val=0.25), tmp_path / "out")
    order = sorted((f"IXI{k:03d}" for k in range(2, 12)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert manifest["subjects"] == {
        "train": sorted(order[:6]), "val": sorted(order[6:8]), "test": sorted(order[8:])
    }  # fmt: skip
    assert "proportion of 368 to 92" in manifest["rule"]
    assert {row["source"]: row["reason"] for row in manifest["skipped"]} == {
        ixi_name(2, "T1"): "not T2",
        "IXI003-HH-0803-DTI-00.nii.gz": "not T2",
        "notes.nii.gz": "its name is not one of IXI's",
    }
    row = next(row for row in manifest["volumes"] if row["subject"] == "IXI002")
    assert (row["source"], row["axis"], row["first"], row["slices"], row["size"]) == (ixi_name(2), 2, 1, 4, [48, 40])
    assert row["spacing_mm"] == [0.9375, 0.9375]
    assert row["source_sha256"] == hashlib.sha256((ixi / ixi_name(2)).read_bytes()).hexdigest()
    path = tmp_path / "out" / row["file"]
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    voxels = np.moveaxis(nibabel.load(ixi / ixi_name(2)).get_fdata(), 2, 0)[1:5]
    read = read_prepared(path)
    np.testing.assert_allclose(read.slices * row["unit"], voxels, rtol=1e-6)
    assert row["unit"] == pytest.approx(intensity_scale(voxels))
    assert read.slices.dtype == np.float32


@pytest.mark.parametrize(("n", "train", "test"), [(460, 368, 92), (578, 368, 92), (46, 37, 9), (2, 1, 1), (1, 1, 0)])
def test_ixi_counts_as_the_paper_does(tmp_path, n, train, test):
    for k in range(n):
        (tmp_path / ixi_name(k)).touch()
    plan = plan_ixi(tmp_path, val=0)
    splits = [source.split for source in plan.sources]
    assert (splits.count("train"), splits.count("test")) == (train, test)
    assert len(plan.skipped) == n - train - test
    assert ("too few" in plan.rule) == (n < 460)
    if n == 578:  # the last subjects by hash are left out, in any order of the files
        left = {name[:6] for name, _ in plan.skipped}
        order = sorted((f"IXI{k:03d}" for k in range(n)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        assert left == set(order[460:])


def test_the_same_input_gives_the_same_bytes(ixi, tmp_path):
    import shutil

    prepare(plan_ixi(ixi), tmp_path / "a")
    elsewhere = shutil.copytree(ixi, tmp_path / "another" / "place")
    prepare(plan_ixi(elsewhere), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "a").values())


def test_an_interrupted_preparation_goes_on_and_ends_the_same(ixi, tmp_path, monkeypatch):
    prepare(plan_ixi(ixi), tmp_path / "whole")
    out = tmp_path / "out"
    write, made = writing.write_prepared, []

    def interrupted(path, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path.name)
        return write(path, *rest)

    monkeypatch.setattr(writing, "write_prepared", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(plan_ixi(ixi), out)
    with pytest.raises(VolumeError, match="was interrupted; run the same"):
        find_scans(out)
    (out / ".0123456789abcdef.safetensors").write_bytes(b"left by a run that was killed")
    (out / made[0]).write_bytes((out / made[0]).read_bytes()[:-5])  # damaged after it was written
    before = (out / made[1]).stat().st_mtime_ns
    monkeypatch.setattr(writing, "write_prepared", write)
    prepare(plan_ixi(ixi), out)
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / made[1]).stat().st_mtime_ns == before


def test_a_source_that_has_changed_is_prepared_again(ixi, tmp_path, phantom):
    prepare(plan_ixi(ixi), tmp_path / "out")
    before = contents(tmp_path / "out")
    write_nifti(ixi / ixi_name(4), phantom * 2)
    prepare(plan_ixi(ixi), tmp_path / "out")
    after = contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"IXI004.safetensors", "manifest.json"}
    (ixi / ixi_name(4)).unlink()
    prepare(plan_ixi(ixi), tmp_path / "out")
    assert set(before) - set(contents(tmp_path / "out")) == {"IXI004.safetensors"}


def test_files_of_others_stay(ixi, tmp_path):
    out = tmp_path / "out"
    prepare(plan_ixi(ixi), out)
    (out / "own.safetensors").write_bytes(b"weights of a user")
    before = contents(out)
    prepare(plan_ixi(ixi), out)
    with pytest.raises(VolumeError, match=r"holds the source .*; give a new folder"):
        prepare(plan_folder(out), out)
    assert contents(out) == before


def test_a_full_disk_is_one_line_and_the_rest_resumes(ixi, tmp_path, capsys):
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the system refuses to write more
        assert main(["prepare", "ixi", str(ixi), "-o", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "IXI002.safetensors: cannot be written: File too large" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    assert main(["prepare", "ixi", str(ixi), "-o", str(out)]) == 0
    assert len(find_scans(out)) == 10


def test_a_folder_that_holds_something_else_is_left_alone(ixi, tmp_path):
    prepare(plan_ixi(ixi), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(VolumeError, match=r"was prepared with options .*give a new folder"):
        prepare(plan_ixi(ixi, slices="all"), tmp_path / "out")
    with pytest.raises(VolumeError, match="is not empty"):
        prepare(plan_ixi(ixi), ixi)
    (tmp_path / "file").touch()
    with pytest.raises(VolumeError, match="is a file; give a folder"):
        prepare(plan_ixi(ixi), tmp_path / "file")
    assert contents(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------------------- fastmri

# as in fastMRI's files: ISMRMRD's schema; the encoded field of view is twice the reconstructed one along the readout
ISMRMRD = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD" xmlns:xs="http://www.w3.org/2001/XMLSchema"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="http://www.ismrm.org/ISMRMRD ismrmrd.xsd">
 <studyInformation><studyTime>00:00:00</studyTime></studyInformation>
 <acquisitionSystemInformation><systemVendor>SIEMENS</systemVendor>
  <systemFieldStrength_T>2.893620</systemFieldStrength_T><receiverChannels>15</receiverChannels>
 </acquisitionSystemInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>123250000</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  <encodedSpace>
   <matrixSize><x>64</x><y>37</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>28.0</x><y>16.28</y><z>4.5</z></fieldOfView_mm>
  </encodedSpace>
  <reconSpace>
   <matrixSize><x>32</x><y>32</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>14.0</x><y>14.0</y><z>3.0</z></fieldOfView_mm>
  </reconSpace>
  <trajectory>cartesian</trajectory>
  <encodingLimits>
   <kspace_encoding_step_1><minimum>0</minimum><maximum>36</maximum><center>18</center></kspace_encoding_step_1>
  </encodingLimits>
 </encoding>
 <sequenceParameters><TR>2750</TR><TE>32</TE><sequence_type>TurboSpinEcho</sequence_type></sequenceParameters>
</ismrmrdHeader>"""


def write_fastmri(path, seed=0, patient=None, acquisition="CORPD_FBK", **changes):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 37), indexing="ij")
    image = (np.hypot(y * 2, x) < 0.8) * (1 + 0.3 * np.cos(9 * x + 5 * y)) * np.exp(1j * (2 * y + x)) * 2e-4
    image = image + 1e-6 * rng.normal(size=(3, 64, 37))
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, axes=(1, 2)), norm="ortho"), axes=(1, 2))
    data = {
        "kspace": kspace.astype(np.complex64),
        "reconstruction_esc": np.abs(image)[:, 16:48, 2:34].astype(np.float32),
        "ismrmrd_header": np.bytes_(ISMRMRD.encode()),
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            if value is not None:
                file[key] = value
        file.attrs["acquisition"] = acquisition
        file.attrs["max"] = float(np.abs(image).max())
        if patient:
            file.attrs["patient_id"] = patient
    return path


@pytest.fixture
def knees(tmp_path):
    for k in range(6):
        contrast = ("CORPD_FBK", "CORPDFS_FBK")[k % 2]
        folder = "singlecoil_train" if k < 4 else "singlecoil_val"
        write_fastmri(tmp_path / "knees" / folder / f"file100000{k}.h5", k, f"patient{k // 2}", contrast)
    return tmp_path / "knees"


def test_fastmri_stays_complex_and_is_cropped_in_the_image(knees, tmp_path):
    manifest = prepare(plan_fastmri(knees, crop=32), tmp_path / "out")
    rows = manifest["volumes"]
    assert [(row["file"], row["group"]) for row in rows[:2]] == [
        ("file1000000.safetensors", "PD knee"), ("file1000001.safetensors", "PDFS knee")
    ]  # fmt: skip
    assert [row["subject"] for row in rows] == ["patient0", "patient0", "patient1", "patient1", "patient2", "patient2"]
    for patient in ("patient0", "patient1", "patient2"):
        assert len({row["split"] for row in rows if row["subject"] == patient}) == 1
    assert rows[0]["complex"]
    assert rows[0]["size"] == [32, 32]
    assert rows[0]["spacing_mm"] == [0.4375, 0.44]
    with pytest.importorskip("h5py").File(knees / "singlecoil_train" / "file1000000.h5") as file:
        wanted = file["reconstruction_esc"][()]
    path = tmp_path / "out" / rows[0]["file"]
    np.testing.assert_allclose(load_slices(path).array * rows[0]["unit"], wanted, rtol=1e-4, atol=1e-9)
    with_phase = load_slices(path, phase=True).array
    assert with_phase.dtype == np.complex64
    np.testing.assert_allclose(np.abs(with_phase), load_slices(path).array, rtol=1e-6)


def test_fastmri_without_its_lists_is_split_by_patient(knees):
    plan = plan_fastmri(knees, crop=32, val=0)
    order = sorted({"patient0", "patient1", "patient2"}, key=lambda p: hashlib.sha256(p.encode()).hexdigest())
    assert {source.subject: source.split for source in plan.sources} == {
        order[0]: "train", order[1]: "train", order[2]: "test"
    }  # fmt: skip
    assert "227 to 45" in plan.rule


def test_fastmri_with_lists_as_they_were_published(knees, tmp_path):
    (tmp_path / "train.csv").write_text("file1000000,file1000001,0.301723929779229\n")
    (tmp_path / "test.csv").write_text("file1000004,file1000005,0.2\n")
    lists = {"train_list": tmp_path / "train.csv", "test_list": tmp_path / "test.csv"}
    plan = plan_fastmri(knees, crop=32, val=0, **lists)
    assert {source.name: source.split for source in plan.sources} == {
        "file1000000": "train", "file1000001": "train", "file1000004": "test", "file1000005": "test"
    }  # fmt: skip
    assert {reason for _, reason in plan.skipped} == {"in no list"}
    with pytest.raises(VolumeError, match="only one of the two file lists"):
        plan_fastmri(knees, train_list=tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("file1000004.h5\nfile1009999\n")
    with pytest.raises(VolumeError, match=r"lists file1009999, but there is no file1009999.h5"):
        plan_fastmri(knees, **lists)
    (tmp_path / "test.csv").write_text("file1000001\n")
    with pytest.raises(VolumeError, match="file1000001 is in both lists"):
        plan_fastmri(knees, **lists)
    (tmp_path / "train.csv").write_text("file1000000\n")
    with pytest.raises(VolumeError, match="the patient of file1000001 is in both lists"):
        plan_fastmri(knees, **lists)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kspace": None}, "has no data set 'kspace', only ismrmrd_header, reconstruction_esc"),
        ({"ismrmrd_header": None}, "has no data set 'ismrmrd_header'"),
        ({"mask": np.ones(37, bool)}, "undersampled"),
        ({"kspace": np.ones((3, 15, 64, 37), np.complex64)}, "wanted single-coil"),
        ({"kspace": np.ones((3, 64, 37), np.float32)}, "wanted single-coil"),
        ({"kspace": np.ones((3, 64, 20), np.complex64)}, "smaller than the crop of 32"),
        ({"kspace": np.zeros((3, 64, 37), np.complex64)}, "all zero"),
        ({"ismrmrd_header": np.bytes_(b"<ismrmrdHeader/>")}, "no field of view"),
        ({"ismrmrd_header": np.bytes_(b"not xml")}, "no field of view"),
    ],
)
def test_a_file_that_is_not_fastmris_is_one_line_and_may_be_skipped(knees, tmp_path, changes, message, capsys):
    write_fastmri(knees / "singlecoil_val" / "file1000009.h5", 9, "patient9", **changes)
    command = ["prepare", "fastmri", str(knees), "-o", str(tmp_path / "out"), "--crop", "32"]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "file1000009.h5" in error
    assert main([*command, "--skip-unusable"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert [message in row["reason"] for row in manifest["skipped"]] == [True]
    assert len(find_scans(tmp_path / "out")) == 6


def test_a_truncated_file_is_one_line(knees, tmp_path, capsys):
    path = knees / "singlecoil_train" / "file1000001.h5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["prepare", "fastmri", str(knees), "-o", str(tmp_path / "out"), "--crop", "32"]) == 2
    assert "file1000001.h5: not an HDF5 file, or a truncated one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("h", "w"), [(8, 6), (7, 9)])
def test_the_image_of_kspace_is_fastmris(h, w):
    """fastMRI defines it as ifftshift, orthonormal inverse FFT, fftshift; the test sums over all frequencies."""
    rng = np.random.default_rng(0)
    kspace = rng.normal(size=(h, w)) + 1j * rng.normal(size=(h, w))
    ky, y = np.meshgrid(np.arange(h) - h // 2, np.arange(h) - h // 2, indexing="ij")
    kx, x = np.meshgrid(np.arange(w) - w // 2, np.arange(w) - w // 2, indexing="ij")
    wanted = np.exp(2j * np.pi * ky * y / h).T @ kspace @ np.exp(2j * np.pi * kx * x / w) / np.sqrt(h * w)
    np.testing.assert_allclose(complex_image(kspace[None])[0], wanted, atol=1e-5)


def test_the_pixel_size_stands_in_the_header():
    assert ismrmrd_spacing(ISMRMRD.encode(), "a.h5") == pytest.approx((28 / 64, 16.28 / 37))


# -------------------------------------------------------------------------------------------------------------- folder


def write_dicom(folder, array):
    """A classic MR series, one file per slice, as scanners write it."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True)
    series, study = generate_uid(), generate_uid()
    for k in range(array.shape[2]):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.Modality = series, study, "MR"
        dataset.Rows, dataset.Columns = array.shape[1], array.shape[0]
        dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 3 * k]
        dataset.PixelSpacing, dataset.SliceThickness, dataset.InstanceNumber = [1, 1], 3, k + 1
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelData = np.ascontiguousarray(array[:, :, k].T.astype(np.uint16)).tobytes()
        dataset.save_as(folder / f"IM{k:04d}", enforce_file_format=True)


@pytest.fixture
def mixed(tmp_path, phantom):
    root = tmp_path / "mixed"
    for k in range(4):
        write_nifti(root / f"sub-{k}" / "anat" / f"sub-{k}_T2w.nii.gz", phantom + k, (1, 1, 3))
    write_dicom(root / "sub-d" / "series1", phantom)
    (root / "sub-d" / "series1" / "readme.txt").write_text("not an image")
    (root / "sub-2" / "anat" / "broken.nii.gz").write_bytes(b"\x1f\x8b not gzip")
    return root


@pytest.mark.filterwarnings("ignore:.*readme.txt")
def test_a_folder_of_nifti_and_dicom_is_prepared_and_what_is_broken_is_skipped(mixed, tmp_path, phantom):
    manifest = prepare(plan_folder(mixed, val=0.3, test=0.3), tmp_path / "out")
    assert [row["source"] for row in manifest["skipped"]] == ["sub-2/anat/broken.nii.gz"]
    assert "not a NIfTI file, or a damaged one" in manifest["skipped"][0]["reason"]
    assert str(tmp_path) not in json.dumps(manifest)
    assert [row["file"] for row in manifest["volumes"]] == [
        *(f"sub-{k}__anat__sub-{k}_T2w.safetensors" for k in range(4)), "sub-d__series1.safetensors"
    ]  # fmt: skip
    dicom = manifest["volumes"][-1]
    assert (dicom["subject"], dicom["spacing_mm"], dicom["slices"]) == ("sub-d", [1, 1], 6)
    assert {scan.subject: scan.split for scan in find_scans(mixed, val=0.3, test=0.3)} == {
        scan.subject: scan.split for scan in find_scans(tmp_path / "out")
    }
    slices = load_slices(tmp_path / "out" / dicom["file"]).array * dicom["unit"]
    np.testing.assert_allclose(slices, np.moveaxis(phantom.astype(np.uint16), 2, 0), rtol=1e-6)
    with pytest.raises(VolumeError, match=r"broken.nii.gz: .*repair or remove the file"):
        prepare(plan_folder(mixed), tmp_path / "strict", skip_unusable=False)


@pytest.mark.filterwarnings("ignore:.*readme.txt")
def test_other_axes_and_ranges_are_obeyed_and_written_down(mixed, tmp_path, phantom):
    manifest = prepare(plan_folder(mixed, axis=0, slices="10:-30"), tmp_path / "out")
    row = manifest["volumes"][0]
    assert (row["axis"], row["first"], row["slices"], row["size"]) == (0, 10, 8, [40, 6])
    np.testing.assert_allclose(
        read_prepared(tmp_path / "out" / row["file"]).slices * row["unit"], phantom.astype(np.int16)[10:18], rtol=1e-6
    )
    assert manifest["options"]["slices"] == "10:-30"
    with pytest.raises(VolumeError, match="is in the range 90:"):
        prepare(plan_folder(mixed, slices="90:"), tmp_path / "none", skip_unusable=False)


@pytest.mark.filterwarnings("ignore:.*readme.txt")
def test_prepared_and_original_slices_give_the_same_samples(mixed, tmp_path):
    (mixed / "sub-2" / "anat" / "broken.nii.gz").unlink()
    prepare(plan_folder(mixed, val=0, test=0), tmp_path / "out")
    options = {"scale": 2, "patch": 8, "length": 12, "contrast": 1.4, "coarsest": 1.5}
    ours, theirs = (PatchDataset(find_scans(root, val=0, test=0), **options) for root in (tmp_path / "out", mixed))
    for index in range(12):
        for a, b in zip(ours[index], theirs[index], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert ours.spacings == theirs.spacings


def test_complex_slices_are_degraded_with_their_phase(knees, tmp_path):
    prepare(plan_fastmri(knees, crop=32), tmp_path / "out")
    options = {"scale": 2, "patch": 8, "length": 4, "contrast": 1.2, "coarsest": 1.5}
    dataset = PatchDataset(find_scans(tmp_path / "out"), **options)
    for sample in dataset:
        assert not any(image.is_complex() for image in sample)
        assert all(torch.isfinite(image).all() for image in sample)
        assert_close(sample.base[:, ::2, ::2], sample.lr)


def test_a_prepared_folder_that_lost_a_file_or_was_damaged_says_so(ixi, tmp_path):
    out = tmp_path / "out"
    prepare(plan_ixi(ixi), out)
    (out / "IXI002.safetensors").unlink()
    with pytest.raises(VolumeError, match=r"IXI002.safetensors: missing, although the manifest lists it"):
        find_scans(out)
    (out / "IXI003.safetensors").write_bytes((out / "IXI003.safetensors").read_bytes()[:-9])
    with pytest.raises(VolumeError, match="damaged or truncated"):
        load_slices(out / "IXI003.safetensors")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(VolumeError, match="contains no prepared slices"):
        load_slices(tmp_path / "weights.safetensors")
    with pytest.raises(VolumeError, match="no such file"):
        load_slices(tmp_path / "gone.safetensors")
    with pytest.raises(VolumeError, match="not a prepared data set"):
        read_manifest(ixi)


def test_slices_stay_on_the_disk_until_they_are_drawn(tmp_path):
    array = np.zeros((60, 256, 256), np.float32)
    prepared.write_prepared(tmp_path / "a.safetensors", array, {"spacing_mm": [1, 1]})

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = resident()
    read = read_prepared(tmp_path / "a.safetensors")
    assert read.slices[30].sum() == 0
    assert resident() - before < array.nbytes / 2


# ---------------------------------------------------------------------------------------------------- splits and slices


@pytest.mark.parametrize(
    ("rule", "n", "wanted"),
    [
        ("all", 5, range(5)),
        ("central:3", 10, range(3, 6)),
        ("central:3", 2, range(2)),
        ("2:8", 10, range(2, 8)),
        (":-2", 10, range(8)),
        ("2:", 10, range(2, 10)),
        ("2:80", 10, range(2, 10)),
    ],
)
def test_slices_are_chosen_by_a_stated_rule(rule, n, wanted):
    assert chosen_slices(rule, n) == wanted


@pytest.mark.parametrize("rule", ["middle", "central:0", "central:-1", "1:2:3", "a:b", "5"])
def test_other_rules_are_refused_before_anything_is_written(ixi, tmp_path, rule, capsys):
    assert main(["prepare", "ixi", str(ixi), "-o", str(tmp_path / "out"), f"--slices={rule}"]) == 2
    assert "is not a range; wanted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_split_file_decides(ixi, tmp_path):
    for name, separator in (("splits.csv", ","), ("splits.tsv", "\t")):
        lines = [("subject", "split"), ("IXI002", "test"), ("IXI003", "train"), ("IXI004", "external")]
        (tmp_path / name).write_text("\n".join(separator.join(line) for line in lines))
        plan = plan_ixi(ixi, splits=tmp_path / name)
        assert {source.subject: source.split for source in plan.sources} == dict(lines[1:])
        assert len(plan.skipped) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,split\nIXI999,train", "no volume belongs to subject IXI999"),
        (
            "subject,split\nIXI002,train\nIXI002,test",
            "subject IXI002 is in test and train; assign each subject to one split",
        ),
        ("subject,split\nIXI002,later", "split 'later' of IXI002; splits are train, val, test, external"),
        ("name,split\nIXI002,train", "wanted a CSV or TSV file with the columns subject and split"),
        ("", "wanted a CSV or TSV file with the columns subject and split"),
    ],
)
def test_a_wrong_split_file_is_one_line(ixi, tmp_path, text, message, capsys):
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(VolumeError, match=message):
        read_splits(tmp_path / "splits.csv", {"IXI002"})
    command = ["prepare", "ixi", str(ixi), "-o", str(tmp_path / "out"), "--splits", str(tmp_path / "splits.csv")]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("ixi", "no T2 volume of IXI"), ("fastmri", "no .h5 file"), ("folder", "no volume found")],
)
def test_a_folder_with_nothing_usable_is_one_line(tmp_path, kind, message, capsys):
    if kind == "fastmri":
        pytest.importorskip("h5py")
    (tmp_path / "empty").mkdir()
    assert main(["prepare", kind, str(tmp_path / "empty"), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert main(["prepare", kind, str(tmp_path / "gone"), "-o", str(tmp_path / "out")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_broken_scans_has_no_usable_one(tmp_path, capsys):
    (tmp_path / "a.nii.gz").write_bytes(b"broken")
    assert main(["prepare", "folder", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "no usable volume, 1 skipped; a.nii.gz: " in capsys.readouterr().err
    with pytest.raises(VolumeError, match="was interrupted"):
        find_scans(tmp_path / "out")


def test_a_damaged_ixi_file_stops_and_is_left_out_on_request(ixi, tmp_path, capsys):
    damaged = ixi / ixi_name(5)
    damaged.write_bytes(damaged.read_bytes()[:200])
    command = ["prepare", "ixi", str(ixi), "-o", str(tmp_path / "out")]
    assert main(command) == 2
    assert "it resumes" in capsys.readouterr().err
    assert main([*command, "--skip-unusable"]) == 0
    assert "9 volumes, 1 file skipped" in capsys.readouterr().out
    assert [row["source"] for row in read_manifest(tmp_path / "out")["skipped"]] == [ixi_name(5)]


def test_h5py_is_asked_for_by_the_name_of_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert main(["prepare", "fastmri", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "pip install 'deformmamba[data]'" in capsys.readouterr().err


def test_real_volumes_are_prepared(real_data, tmp_path):
    volumes = [scan for scan in find_scans(real_data) if scan.split == "val" and scan.group == "T2 brain"][:2]
    for scan in volumes:
        folder = tmp_path / "some" / scan.subject
        folder.mkdir(parents=True, exist_ok=True)
        (folder / scan.path.name).symlink_to(scan.path)
    manifest = prepare(plan_folder(tmp_path / "some", slices="central:3"), tmp_path / "out")
    assert len(manifest["volumes"]) == len(volumes)
    row = manifest["volumes"][0]
    original = load_slices(volumes[0].path)
    middle = original.array[row["first"] : row["first"] + 3]
    read = load_slices(tmp_path / "out" / row["file"])
    np.testing.assert_allclose(read.array * row["unit"], middle, rtol=1e-6, atol=1e-3)
    assert read.spacing == pytest.approx(original.spacing, abs=1e-5)


def test_the_manifest_is_for_people_and_programs(ixi, tmp_path):
    prepare(plan_ixi(ixi), tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["complete"] is True
    assert manifest["options"] == {"contrast": "T2", "axis": None, "slices": "central:100", "val": 0.1, "splits": None}
    assert len(text.splitlines()) > 50


@pytest.mark.parametrize(
    ("scans", "given", "words"),
    [
        ([], {"patch": 16.0}, "patch must be an integer, not 16.0"),
        ([], {"weights": ["a"]}, "weights must be a dictionary or None, not a list"),
        ([], {"degradation": 3}, "degradation must be an instance of Degradation or a text or None, not 3"),
        (["a.nii"], {}, r"scans holds 'a.nii'; wanted Scan objects, as find_scans\(folder\) returns"),
        ("data", {}, "scans must be a list, not 'data'"),
    ],
)
def test_patches_of_wrong_types(scans, given, words):
    with pytest.raises(TypeError, match=f"PatchDataset: {words}"):
        PatchDataset(scans, scale=2, length=3, **given)
