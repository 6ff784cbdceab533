"""The page's file readers and writer, run in Node: voxels, affines and messages equal those of the package."""

import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, MRImageStorage, generate_uid

import deformmamba
from deformmamba.volume import slice_axis

VOLUME = Path(__file__).parents[2] / "web" / "volume.js"
if shutil.which("node") is None or not VOLUME.is_file():
    missing = "web/" if shutil.which("node") else "Node"
    pytest.skip(f"the page's readers are not tested here: {missing} missing", allow_module_level=True)

# reads each file, prints its properties, writes it unchanged, and writes an empty result of scale 2
SCRIPT = """
import { readFileSync, readdirSync, statSync, writeFileSync } from "node:fs";
const [, module, ...files] = process.argv;
const { finer, niftiBytes, readScan } = await import(module);
const told = {};
for (const path of files) {
  const name = path.split("/").at(-1);
  try {
    const folder = statSync(path).isDirectory();
    const paths = folder ? readdirSync(path).sort().map((p) => `${path}/${p}`) : [path];
    const scan = await readScan(paths.map((p) => new File([readFileSync(p)], p.split("/").at(-1))));
    writeFileSync(path + ".read", Buffer.from(niftiBytes(scan)));
    writeFileSync(path + ".result", Buffer.from(niftiBytes(finer(scan, 2))));
    told[name] = { slices: scan.slices, spacing: scan.spacing };
  } catch (error) {
    told[name] = { error: error.constructor.name === "ScanError" ? error.message : String(error.stack) };
  }
}
console.log(JSON.stringify(told));
"""


def in_node(files: list[Path]) -> dict[str, dict[str, Any]]:
    """The page's answer for each file given alone, or for all files of a folder."""
    done = subprocess.run(
        ["node", "--input-type=module", "-e", SCRIPT, VOLUME.as_uri(), *map(str, files)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return told


def affine() -> np.ndarray:
    """An oblique, mirrored affine with voxels of 0.8 x 0.9 x 4 mm."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    made = np.eye(4)
    made[:3, :3] = rotation * [0.8, 0.9, 4.0]
    made[:3, 3] = [-20.0, 13.5, 7.25]
    return made


def nifti(dtype: str, kind: Any = nibabel.Nifti1Image, end: str = "<", shape: tuple[int, ...] = (5, 4, 3)) -> Any:
    array = np.random.default_rng(1).integers(1, 100, shape).astype(dtype)
    header = kind.header_class(endianness=end)
    header.set_data_dtype(np.dtype(dtype))
    return kind(array, affine(), header)


def scaled() -> Any:
    image = nifti("int16")
    image.header.set_slope_inter(0.25, -3.0)
    return image


def coded(qform: int, sform: int, units: str = "mm") -> Any:
    image = nifti("uint8")
    image.header.set_xyzt_units(units)
    image.set_qform(affine(), qform)
    image.set_sform(affine(), sform)
    return image


def stacked_first() -> Any:
    image = nifti("float32")
    image.header.set_dim_info(slice=0)
    return image


READ: dict[str, Callable[[], Any]] = {
    **{f"{dtype}.nii": lambda dtype=dtype: nifti(dtype) for dtype in ("uint8", "int16", "uint16", "int32", "float64")},
    "int64.nii": lambda: nibabel.Nifti1Image(nifti("int16").get_fdata().astype(np.int64), affine(), dtype=np.int64),
    "big.nii": lambda: nifti("int16", end=">"),
    "big-second.nii": lambda: nifti("float32", nibabel.Nifti2Image, end=">"),
    "second.nii": lambda: nifti("int16", nibabel.Nifti2Image),
    "packed.nii.gz": lambda: nifti("int16"),
    "packed-second.nii.gz": lambda: nifti("float64", nibabel.Nifti2Image),
    "scaled.nii": scaled,
    "flat.nii": lambda: nifti("int16", shape=(5, 4)),
    "one-volume.nii": lambda: nifti("int16", shape=(5, 4, 3, 1)),
    "qform.nii": lambda: coded(1, 0),
    "both.nii": lambda: coded(1, 2),
    "neither.nii": lambda: coded(0, 0),
    "metres.nii": lambda: coded(1, 1, "meter"),
    "microns.nii": lambda: coded(1, 0, "micron"),
    "first.nii": stacked_first,
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("scans")
    for name, make in READ.items():
        nibabel.save(make(), folder / name)
    return folder, in_node([folder / name for name in READ])


@pytest.mark.filterwarnings("ignore:.*the header has two voxel sizes")
@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_and_saved_as_the_package_does(scans: tuple[Path, dict[str, dict[str, Any]]], name: str) -> None:
    folder, told = scans
    assert "error" not in told[name], told[name]
    wanted = deformmamba.read_volume(folder / name)
    assert told[name]["slices"] == slice_axis(wanted)
    np.testing.assert_allclose(told[name]["spacing"], wanted.spacing, rtol=1e-6)
    for what in ("read", "result"):
        (folder / f"{what}-{name.removesuffix('.gz')}").write_bytes((folder / f"{name}.{what}").read_bytes())
    got = deformmamba.read_volume(folder / f"read-{name.removesuffix('.gz')}")
    np.testing.assert_array_equal(got.array, wanted.array)
    assert got.codes == wanted.codes
    result: Any = nibabel.load(folder / f"result-{name.removesuffix('.gz')}")
    axes = [axis for axis in range(3) if axis != told[name]["slices"]]
    place = wanted.resampled(wanted.array, 2, tuple(axes), "origin")  # type: ignore[arg-type]
    # positions in float32: a few units in the last place of the largest coordinate
    for given, expected in ((got.affine, wanted.affine), (result.affine, place.affine)):
        np.testing.assert_allclose(given, expected, atol=1e-5, rtol=1e-6)
    assert result.get_data_dtype() == np.float32
    if got.codes[0] > 0:
        sizes = np.linalg.norm(place.qform[:3, :3], axis=0)
        np.testing.assert_allclose(result.header.get_zooms(), sizes, rtol=1e-6)
        np.testing.assert_allclose(got.qform, wanted.qform, atol=1e-5, rtol=1e-6)


def dicom(syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """One DICOM image."""
    from io import BytesIO

    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = MRImageStorage, generate_uid(), generate_uid()
    ds.ImageType, ds.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "M"], [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient, ds.PixelSpacing = [0, 0, 0], [1, 1]
    ds.Columns, ds.Rows, ds.SamplesPerPixel, ds.PhotometricInterpretation = 4, 3, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = np.arange(12, dtype="<u2").tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == JPEG2000Lossless:
        from pydicom.encaps import encapsulate

        ds.PixelData = encapsulate([b"\xff\x4f\xff\x51" * 4])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def without_a_voxel_size() -> bytes:
    data = bytearray(coded(1, 0).to_bytes())
    data[80:92] = bytes(12)
    return bytes(data)


def packed() -> bytes:
    return gzip.compress(nifti("int16", shape=(20, 20, 20)).to_bytes())


def changed(at: int, content: bytes) -> bytes:
    """A NIfTI-1 file with other bytes at this place of its header."""
    data = bytearray(nifti("uint8").to_bytes())
    data[at : at + len(content)] = content
    return bytes(data)


def huge() -> bytes:
    """A NIfTI-2 file whose header gives 2^186 voxels."""
    data = bytearray(nifti("uint8", nibabel.Nifti2Image).to_bytes())
    data[24:48] = np.int64([2**62] * 3).tobytes()
    return bytes(data)


PHOTO = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1" + bytes(5000)
COLOURS = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
DAMAGED = "not a NIfTI file, or a damaged one"
TRUNCATED = "truncated: the file is shorter than its header requires"
ONE_CHANNEL = "voxels are colours; extract one channel first"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "text.nii": (lambda: b"not a scan" * 100, DAMAGED),
    "empty.nii": (lambda: b"", DAMAGED),
    "empty.nii.gz": (lambda: b"", DAMAGED),
    "photo.nii.gz": (lambda: PHOTO, DAMAGED),
    "photo-inside.nii.gz": (lambda: gzip.compress(PHOTO), DAMAGED),
    "photo.jpg": (lambda: PHOTO, "not a scan that can be read; give .nii, .nii.gz"),
    "photo.dcm": (lambda: PHOTO, "not a scan that can be read; give .nii, .nii.gz"),
    "huge.nii": (lambda: changed(40, np.int16([3, *[32767] * 3]).tobytes()), TRUNCATED),
    "huge-second.nii": (huge, TRUNCATED),
    "negative.nii": (
        lambda: changed(42, np.int16([-5]).tobytes()),
        "a volume is a 3-D array, not one of shape (-5, 4, 3)",
    ),
    "coloured.nii": (lambda: nibabel.Nifti1Image(np.zeros((4, 4, 4), COLOURS), np.eye(4)).to_bytes(), ONE_CHANNEL),
    "cut.nii": (lambda: nifti("float64").to_bytes()[:500], TRUNCATED),
    "cut.nii.gz": (lambda: b"\x1f\x8b\x08\x00 not gzip", DAMAGED),
    "half.nii.gz": (lambda: packed()[:-900], DAMAGED),
    "checksum.nii.gz": (lambda: packed()[:-8] + b"\1\2\3\4" + packed()[-4:], DAMAGED),
    "magic.nii": (lambda: changed(344, b"x+1\0"), DAMAGED),
    "intercept.nii": (lambda: changed(112, np.float32([2, np.nan]).tobytes()), DAMAGED),
    "inside.nii": (lambda: changed(108, bytes(4)), "the header places the voxels at byte 0, inside the header itself"),
    "unplaced.nii": (lambda: changed(280, np.float32([np.nan]).tobytes()), "the affine must be a finite 4x4 matrix"),
    "plane.nii": (lambda: changed(280, bytes(16)), "the affine is singular: its axes lie in one plane"),
    "four.nii": (
        lambda: nifti("int16", shape=(3, 3, 3, 2)).to_bytes(),
        "holds 2 volumes; save the one to upscale",
    ),
    "five.nii": (lambda: nifti("int16", shape=(3, 3, 3, 2, 2)).to_bytes(), "has 5 dimensions (3, 3, 3, 2, 2)"),
    "complex.nii": (lambda: nifti("complex64").to_bytes(), "voxels are complex numbers; take the magnitude first"),
    "unsized.nii": (without_a_voxel_size, "the voxel spacing in the header is zero or missing"),
    "nan.nii": (
        lambda: nibabel.Nifti1Image(np.full((4, 4, 4), np.nan, np.float32), np.eye(4)).to_bytes(),
        "64 of 64 voxels are NaN or infinite",
    ),
    "zeros.nii": (
        lambda: nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)).to_bytes(),
        "every voxel is zero; the volume is empty",
    ),
    "half.hdr": (lambda: b"\0" * 348, "half of a pair .hdr and .img (NIfTI or Analyze), which is not read"),
    "brain.mgh": (lambda: b"\0\0\0\1" * 100, "MGH, which this page cannot read; use the deformmamba package"),
    "bare.dcm": (
        lambda: dicom()[132:],
        'DICOM without the preamble ("DICM" after 128 bytes), which is not read; convert it with dcm2niix',
    ),
    "packed.dcm": (
        lambda: dicom(JPEG2000Lossless),
        f"pixels are compressed or big endian ({JPEG2000Lossless}), which this page cannot read",
    ),
    "mosaic.dcm": (
        lambda: dicom(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]),
        "a Siemens mosaic, which this page cannot read; use the deformmamba package",
    ),
    "frames.dcm": (
        lambda: dicom(NumberOfFrames=2, PixelData=bytes(48)),
        "multi-frame DICOM, which this page cannot read; use the deformmamba package",
    ),
    "placeless.dcm": (
        lambda: dicom(ImagePositionPatient=[]),
        "has no ImagePositionPatient, so its position in the patient is unknown",
    ),
    "colours.dcm": (
        lambda: dicom(SamplesPerPixel=3, PixelData=bytes(72)),
        ONE_CHANNEL,
    ),
    "palette.dcm": (lambda: dicom(PhotometricInterpretation="PALETTE COLOR"), ONE_CHANNEL),
}


OTHER_ADVICE = ("four.nii", "five.nii", "bare.dcm", "placeless.dcm")


def test_what_is_not_read_is_one_sentence(tmp_path: Path) -> None:
    for name, (make, _) in REFUSED.items():
        (tmp_path / name).write_bytes(make())
    told = in_node([tmp_path / name for name in REFUSED])
    for name, (_, sentence) in REFUSED.items():
        assert told[name].get("error", "").startswith(f"{name}: {sentence}"), told[name]
        assert "\n" not in told[name]["error"]
    # the package refuses the same files in the same words
    for name, (_, sentence) in REFUSED.items():
        if "this page" not in sentence and name not in OTHER_ADVICE:
            with pytest.raises(deformmamba.VolumeError, match=re.escape(f"{name}: {sentence}")):
                deformmamba.read_volume(tmp_path / name)


def test_files_that_are_no_single_series_are_refused(tmp_path: Path) -> None:
    places = {"ImagePositionPatient": [0, 0, 3]}
    series = {"SeriesInstanceUID": generate_uid()}
    pairs: dict[str, tuple[tuple[bytes, ...], str]] = {
        "mixed": ((dicom(), dicom(**places)), "the files hold 2 DICOM series; drop the files of one"),
        "twice": ((dicom(**series), dicom(**series)), "a.dcm: several slices have the same position"),
        "turned": (
            (dicom(**series), dicom(**series, **places, ImageOrientationPatient=[0, 1, 0, 0, 0, 1])),
            "a.dcm: its slices have several orientations or sizes",
        ),
        "gap": (
            tuple(dicom(**series, ImagePositionPatient=[0, 0, z]) for z in (0, 3, 9)),
            "a.dcm: slices are not evenly spaced; probably a file of the series is missing",
        ),
        "two scans": ((changed(0, b""), changed(0, b"")), "2 files were given; drop one NIfTI file, or"),
        "scan and series": ((dicom(), changed(0, b"")), "1 of 2 files are empty, damaged or not DICOM images (b.dcm)"),
    }  # fmt: skip
    for folder, (contents, _) in pairs.items():
        (tmp_path / folder).mkdir()
        for name, content in zip("abc", contents, strict=False):
            (tmp_path / folder / f"{name}.dcm").write_bytes(content)
    (tmp_path / "halves").mkdir()
    for suffix in ("hdr", "img"):
        (tmp_path / "halves" / f"a.{suffix}").write_bytes(bytes(348))
    pairs["halves"] = ((), "a.hdr: half of a pair .hdr and .img (NIfTI or Analyze), which is not read")
    told = in_node([tmp_path / folder for folder in pairs])
    for folder, (_, sentence) in pairs.items():
        assert told[folder].get("error", "").startswith(sentence), told[folder]


def test_a_dropped_folder_is_read_with_its_subfolders() -> None:
    """As browsers give them: a reader answers in parts, and the last part is empty."""
    script = """
const [, module] = process.argv, { inFolders } = await import(module);
const file = (name) => ({ name, isFile: true, file: (done) => done(name) });
const folder = (name, ...parts) => ({
  name, createReader: () => ({ readEntries: (done) => done(parts.shift() ?? []) }),
});
const parts = [[file("a"), file(".DS_Store")], [file("b"), folder("more", [file("c")])], [file("DICOMDIR")]];
const series = folder("series", ...parts);
console.log(JSON.stringify(await inFolders([series, file("d")])));
"""
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script, VOLUME.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == ["a", "b", "c", "d"]


def test_the_view_shows_the_input_on_the_grid_of_its_result() -> None:
    """On the origin grid, voxel i of the input is at voxel s * i of the result; others are nearest, or interpolated."""
    shape, scale = (3, 4, 2), 2
    array = np.arange(24, dtype=np.float32).reshape(shape, order="F")
    script = (
        "const [, module, text] = process.argv; const { finer, onGridOf } = await import(module);"
        "const scan = { ...JSON.parse(text), affine: [[1,0,0,0],[0,1,0,0],[0,0,1,0]], slices: 2,"
        "  header: { qform: { zooms: [1, 1, 1] } } };"
        "console.log(JSON.stringify([false, true].map((smooth) => [...onGridOf(scan, finer(scan, 2), smooth).data])));"
    )
    given = json.dumps({"shape": shape, "data": array.ravel(order="F").tolist()})
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script, VOLUME.as_uri(), given],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    got, smooth = (np.reshape(data, (6, 8, 2), order="F") for data in json.loads(done.stdout))
    np.testing.assert_array_equal(got[::scale, ::scale], array)
    np.testing.assert_array_equal(got[1], got[2])  # the half-pixel between two voxels is rounded up
    np.testing.assert_array_equal(got[-1], got[-2])  # beyond the last voxel
    y, x, z = np.meshgrid(*(np.arange(n) / 2 for n in (6, 8)), np.arange(2), indexing="ij")
    wanted = np.minimum(y, 2) + 3 * np.minimum(x, 3) + 12 * z  # the array is linear in its indices
    np.testing.assert_allclose(smooth, wanted, atol=1e-6, rtol=0)
