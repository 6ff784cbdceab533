"""Damaged, mislabelled or malicious files: each gives a valid volume or an error of one line."""

import gc
import gzip
import io
import os
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_made import classic, enhanced, oblique, save, voxels
from pydicom.data import get_testdata_file

from deformmamba.volume import Volume, VolumeError, read_volume, write_text, write_volume, writing
from deformmamba.volume.files import CompressedFile, closed

N_DAMAGED = 24  # of each kind of file
# a parser needs some memory; the files have less than 100 kB
MOST_MEMORY = 16e6
MOST_SECONDS = 10  # processor time
EXTREMES = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
SECRETS = ("SECRET", "CompressedSamples")  # names in the headers of this file and of pydicom's files


def intact(folder: Path, kind: str) -> Path:
    """A valid file that contains a patient's name."""
    folder.mkdir(exist_ok=True)
    if kind == "classic":
        classic(folder / "series", oblique(0), (7, 6, 1))
        return folder / "series" / "IM0000"
    if kind == "enhanced":
        enhanced(folder / "enhanced.dcm", oblique(0), (7, 6, 3))
        return folder / "enhanced.dcm"
    if kind.startswith("MR_small"):
        path = folder / f"{kind}.dcm"
        path.write_bytes(Path(get_testdata_file(f"{kind}.dcm", download=False)).read_bytes())
        return path
    path = folder / f"scan{kind}"
    if kind.startswith(".mg"):
        image = nibabel.freesurfer.mghformat.MGHImage(voxels().astype(np.float32), oblique(0))
    else:
        image = (nibabel.Nifti2Image if kind == ".2.nii" else nibabel.Nifti1Image)(voxels(), oblique(0))
        image.set_qform(oblique(0), 1)
        image.header["descrip"] = b"SECRET patient"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"SECRET words" * 9))
    nibabel.save(image, path)
    return path


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: truncation, flipped bits, other bytes, extreme numbers, inserted bytes, removed bytes."""
    new = bytearray(data)
    # most of the header is at the beginning
    header = min(len(data), 1400)
    for _ in range(rng.integers(1, 4)):
        if len(new) < 16:
            break
        place = int(rng.integers(min(header, len(new) - 8)))
        injury = rng.integers(6)
        if injury == 0:
            del new[int(rng.integers(len(new))) :]
        elif injury == 1:
            new[place] ^= 1 << int(rng.integers(8))
        elif injury == 2:
            new[int(rng.integers(len(new)))] = int(rng.integers(256))
        elif injury == 3:
            width = int(rng.choice([2, 4]))
            value = int(rng.choice(EXTREMES)) % 256**width
            new[place : place + width] = value.to_bytes(width, "little")
        elif injury == 4:
            new[place:place] = rng.bytes(int(rng.integers(1, 20)))
        else:
            del new[place : place + int(rng.integers(1, 10))]
    return bytes(new)


def verdict(path: Path) -> str:
    """The one line of the error, or "" for a valid volume; any other outcome fails."""
    tracemalloc.reset_peak()
    held, start = tracemalloc.get_traced_memory()[0], time.process_time()
    message, chained = "", False
    try:
        volume = read_volume(path)
    except VolumeError as error:
        message = str(error)
        chained = error.__context__ is not None and not error.__suppress_context__
    else:
        assert volume.array.ndim == 3
        assert np.isfinite(volume.array).all()
        assert np.isfinite(volume.affine).all()
    assert not chained  # a parser's own error would be printed with the traceback
    assert "\n" not in message
    assert not [secret for secret in SECRETS if secret in message]
    assert time.process_time() - start < MOST_SECONDS
    assert tracemalloc.get_traced_memory()[1] - held < MOST_MEMORY
    return message


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "kind",
    [
        *(".nii", ".2.nii", ".nii.gz", ".mgh", ".mgz"),
        *("classic", "enhanced", "MR_small_implicit", "MR_small_bigendian", "MR_small_RLE"),
    ],
)
def test_damage(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = intact(tmp_path, kind)
    assert verdict(path) == ""
    data, rng = path.read_bytes(), np.random.default_rng(sum(kind.encode()))
    packed = kind == ".nii.gz"
    refused = 0
    for n in range(N_DAMAGED):
        if packed and n % 2:  # inside the compressed data, so that its checksum is right
            path.write_bytes(gzip.compress(damaged(gzip.decompress(data), rng), 1))
        else:
            path.write_bytes(damaged(data, rng))
        refused += bool(verdict(path))
    assert N_DAMAGED // 4 < refused <= N_DAMAGED
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_names_that_lie(tmp_path: Path) -> None:
    kinds = (".nii", ".nii.gz", ".mgh", ".mgz", "classic", "enhanced")
    files = {kind: intact(tmp_path / f"k{n}", kind).read_bytes() for n, kind in enumerate(kinds)}
    said = []
    for kind, data in files.items():
        for name in ("a.nii", "a.nii.gz", "a.mgh", "a.mgz", "a.dcm", "a.ima", "a", "a.png", "a.nii.dcm"):
            (tmp_path / name).write_bytes(data)
            said.append(verdict(tmp_path / name))
            if kind in ("classic", "enhanced"):  # recognised by content: scanners use any name
                assert (said[-1] == "") == (not name.endswith((".nii", ".gz", ".mgh", ".mgz")))
            elif name.endswith(kind):
                assert said[-1] == ""
    assert len(said) == 54
    assert sum(map(bool, said)) > 30


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("ignore:.*(and the weights are for MR images|padding .* was set to the lowest value)")
def test_the_headers_of_pydicoms_files_end_no_reading(tmp_path: Path) -> None:
    """Colour, ultrasound, dose, waveform, report, broken and compressed files give a volume or an error of one line."""
    folder = Path(get_testdata_file("MR_small.dcm", download=False)).parent
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size < 2e5]
    valid = 0
    for path in paths:
        if verdict(path):
            continue
        valid += 1
        volume = read_volume(path)
        write_volume(tmp_path / "out", volume)
        again = read_volume(tmp_path / "out")
        step = np.abs(volume.array).max() / (65535 if volume.array.min() >= 0 else 32767)
        np.testing.assert_allclose(again.array, volume.array, atol=0.501 * step, rtol=1e-6)
        np.testing.assert_allclose(again.affine, volume.affine, rtol=1e-6, atol=1e-6)
    assert len(paths) > 50
    assert valid >= 10


@pytest.mark.slow
def test_damaged_dicom_that_can_be_read_is_written_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written, said = 0, []
    for kind in ("classic", "enhanced"):
        path = intact(tmp_path / kind, kind)
        data = path.read_bytes()
        for _ in range(30):
            path.write_bytes(damaged(data, rng))
            try:
                volume = read_volume(path)
                write_volume(tmp_path / "out", volume)
            except VolumeError as error:
                said.append(str(error))
                continue
            written += 1
            np.testing.assert_allclose(read_volume(tmp_path / "out").affine, volume.affine, rtol=1e-5, atol=1e-3)
        assert not list(tmp_path.glob(".*"))
    assert written > 5
    assert not [line for line in said if "SECRET" in line or "\n" in line]


def test_headers_that_promise_more_than_there_is(tmp_path: Path) -> None:
    path = intact(tmp_path, "classic")
    ds = pydicom.dcmread(path)
    ds.Rows = ds.Columns = 65535
    save(ds, path)
    assert "truncated" in verdict(path)
    path = intact(tmp_path, "MR_small_RLE")
    ds = pydicom.dcmread(path)
    ds.Rows = ds.Columns = 65535
    save(ds, path)
    assert "truncated" in verdict(path)
    data = bytearray(intact(tmp_path, ".nii").read_bytes())
    data[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], "<i2").tobytes()
    (tmp_path / "huge.nii").write_bytes(data)
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress(bytes(data)))
    assert "truncated" in verdict(tmp_path / "huge.nii")
    assert "truncated" in verdict(tmp_path / "huge.nii.gz")


def test_voxels_cannot_start_inside_the_header(tmp_path: Path) -> None:
    """nibabel reads the header itself as voxels if `vox_offset` is 0."""
    data = bytearray(intact(tmp_path, ".nii").read_bytes())
    data[108:112] = bytes(4)
    (tmp_path / "inside.nii").write_bytes(data)
    assert "the header places the voxels at byte 0, inside the header itself" in verdict(tmp_path / "inside.nii")


def test_names_with_spaces_and_other_letters(tmp_path: Path) -> None:
    folder = tmp_path / "Zürich – 神经 scan (1)"
    array = classic(folder, oblique(0))
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, array)
    for name in ("é 中.nii.gz", "tab\there.nii", "line\nbreak.mgz", "-o.nii", "ö ü/"):
        write_volume(f"{tmp_path}/{name}", volume)
        np.testing.assert_allclose(read_volume(f"{tmp_path}/{name}").array, volume.array, atol=0.02)
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.nii")  # not UTF-8
    write_volume(strange, volume)
    np.testing.assert_array_equal(read_volume(strange).array, volume.array)
    for name in ("a\0b.nii", "x" * 300, "x" * 300 + ".nii"):
        with pytest.raises(VolumeError):
            read_volume(tmp_path / name)


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    array = classic(tmp_path / "archive", oblique(0))
    (tmp_path / "view").mkdir()
    for path in (tmp_path / "archive").iterdir():
        (tmp_path / "view" / path.name).symlink_to(path)
    np.testing.assert_array_equal(read_volume(tmp_path / "view").array, array)
    (tmp_path / "view" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "view" / "circle").symlink_to(tmp_path / "view")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    np.testing.assert_array_equal(read_volume(tmp_path / "view").array, array)
    assert "no such file" in verdict(tmp_path / "self")
    os.mkfifo(tmp_path / "view" / "pipe")
    np.testing.assert_array_equal(read_volume(tmp_path / "view").array, array)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's permissions: root becomes user 65534 for the block, other users stay as they are."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_and_folders_that_are_closed() -> None:
    with tempfile.TemporaryDirectory() as name:  # user 65534 may not enter the tests' folder
        folder = Path(name)
        path = intact(folder, ".nii")
        series = intact(folder, "classic").parent
        volume, scan = read_volume(path), read_volume(series)
        for closed, mode in ((path, 0o000), (series / "IM0000", 0o000), (folder, 0o555)):
            closed.chmod(mode)
        said = []
        with as_nobody():
            for action in (
                lambda: read_volume(path),
                lambda: read_volume(series),
                lambda: write_volume(folder / "out.nii", volume),
                lambda: write_volume(folder / "out", scan),
            ):
                with pytest.raises(VolumeError) as caught:
                    action()
                said.append(str(caught.value))
        folder.chmod(0o755)
        assert said[0] == f"{path}: permission denied"
        assert said[1] == f"{series}/IM0000: permission denied"
        assert "cannot be written" in said[2]
        assert "cannot be written" in said[3]
        assert sorted(p.name for p in folder.iterdir()) == ["scan.nii", "series"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; skips if mounting is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "out.mgz", "out", "out.dcm"])
@pytest.mark.parametrize("axis", [0, 2])
def test_a_disk_that_fills_up(tmp_path: Path, small_disk: Path, name: str, axis: int) -> None:
    if name == "out.dcm":
        enhanced(tmp_path / "source", oblique(0))
    else:
        classic(tmp_path / "source", oblique(0))
    place = read_volume(tmp_path / "source")
    noise = np.random.default_rng(0).random((64, 64, 9), dtype=np.float32)

    def write() -> None:
        with writing(small_disk / name, place, noise.shape, axis=axis) as put:
            for image in np.moveaxis(noise, axis, 0):
                put(image)

    with pytest.raises(VolumeError, match="No space left on device"):
        write()
    assert not list(small_disk.iterdir())
    gc.collect()  # a file object that still holds data would print a traceback now


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Neither directly nor at the end of a link, which is followed: as root, that could replace a device."""
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "link.nii").symlink_to(tmp_path / "pipe.nii")
    volume = Volume(np.ones((4, 4, 2), np.float32), np.eye(4))
    for name in ("pipe.nii", "link.nii"):
        for write in (lambda path: write_volume(path, volume), lambda path: write_text(path, "x")):
            with pytest.raises(VolumeError, match="a device, a pipe or a socket"):
                write(tmp_path / name)
    assert (tmp_path / "pipe.nii").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.nii", "pipe.nii"]


def test_a_compressed_file_is_written_in_order_and_has_no_date(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    with closed(CompressedFile(path)) as file:
        assert file.write(b"head") == 4
        file.seek(9)
        file.write(b"tail")
        assert file.tell() == 13
        with pytest.raises(io.UnsupportedOperation):
            file.seek(5)
    assert gzip.decompress(path.read_bytes()) == b"head" + bytes(5) + b"tail"
    assert path.read_bytes()[4:8] == bytes(4), "the time of the header"


def test_a_volume_without_geometry_is_said_to_have_none(tmp_path: Path) -> None:
    for affine in (np.zeros((4, 4)), np.diag([1.0, 1, 0, 1]), np.ones((4, 4)), np.full((4, 4), np.inf)):
        with pytest.raises(VolumeError):
            Volume(np.ones((2, 2, 2)), affine)
    path = intact(tmp_path, "classic")
    for field, value in (("PixelSpacing", ["0", "0"]), ("ImageOrientationPatient", ["0"] * 6)):
        ds = pydicom.dcmread(path)
        before = ds[field].value
        setattr(ds, field, value)
        save(ds, path)
        assert verdict(path)
        setattr(ds, field, before)
        save(ds, path)
    assert verdict(path) == ""
