"""DICOM series, through pydicom."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.volume.files import parsing
from deformmamba.volume.image import Volume, VolumeError


def is_dicom(path: Path) -> bool:
    with parsing(path, "cannot be read"), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_folder(folder: Path) -> Volume:
    with parsing(folder, "cannot be read"):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and is_dicom(p))
    return read_series(files, folder)


def read_series(files: Sequence[Path], source: Path) -> Volume:
    """The volume (column, row, slice) of one series, sorted by position along the normal of its slices."""
    import pydicom

    datasets = []
    for path in files:
        with parsing(path, "a damaged DICOM file"):
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
            if "Rows" in dataset:  # a DICOMDIR or a report in the same folder is no image
                datasets.append((path, dataset))
    if not datasets:
        raise VolumeError(f"{source}: holds no DICOM image; give a NIfTI file, a DICOM file or a folder of one series")
    with parsing(source, "DICOM geometry that cannot be understood"):
        n_series = len({str(d.get("SeriesInstanceUID")) for _, d in datasets})
        if n_series > 1:
            raise VolumeError(f"{source}: holds {n_series} DICOM series mixed; put one series into a folder of its own")
        for path, dataset in datasets:
            _check_dicom_image(path, dataset)
        first = datasets[0][1]
        for field, what in _SAME.items():
            if any(not _close(d.get(field), first.get(field)) for _, d in datasets):
                raise VolumeError(f"{source}: the files of this series differ in {what}; they are no single volume")
        axes = np.array(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
        if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
            raise VolumeError(f"{source}: ImageOrientationPatient holds no two perpendicular unit vectors")
        along_row, along_column = axes
        normal = np.cross(along_row, along_column)
        position = {path: np.array(d.ImagePositionPatient, dtype=float) for path, d in datasets}
        paths = sorted(position, key=lambda path: float(normal @ position[path]))
        start = position[paths[0]]
        if len(paths) == 1:
            step = normal * abs(float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0))
        else:
            step = (position[paths[-1]] - start) / (len(paths) - 1)
            _check_spacing(np.array([position[path] for path in paths]), step, source)
        # PixelSpacing is (between rows, between columns); DICOM is LPS+, an affine here RAS+
        between_rows, between_columns = map(float, first.PixelSpacing)
        affine = np.eye(4)
        affine[:3] = np.stack([along_row * between_columns, along_column * between_rows, step, start], axis=1)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    array = np.empty((int(first.Columns), int(first.Rows), len(paths)), np.float32, order="F")
    for k, path in enumerate(paths):
        with parsing(path, "its pixels cannot be decoded: damaged, or compressed in a way that needs pylibjpeg"):
            dataset = pydicom.dcmread(path)
            slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
            array[:, :, k] = dataset.pixel_array.T * slope + intercept
    with parsing(source, "DICOM geometry that cannot be understood"):
        return Volume(array, affine)


_SAME = {
    "ImageOrientationPatient": "orientation",
    "PixelSpacing": "pixel spacing",
    "Rows": "image size",
    "Columns": "image size",
}


def _check_dicom_image(path: Path, dataset: Any) -> None:
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise VolumeError(f"{path}: multi-frame DICOM cannot be read; convert it with dcm2niix first")
    if int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise VolumeError(f"{path}: voxels are colours: take one channel first")
    for field in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
        if not dataset.get(field):
            raise VolumeError(f"{path}: has no {field}, so its place in the patient is unknown")


def _close(a: Any, b: Any) -> bool:
    return bool(np.allclose(np.array(a, dtype=float), np.array(b, dtype=float), rtol=1e-4, atol=1e-4))


def _check_spacing(positions: np.ndarray, step: np.ndarray, source: Path) -> None:
    """`positions` (n, 3) must lie `step` apart; a scanner rounds them by far less than 2 % of that."""
    gaps = np.diff(positions, axis=0) @ step / max(float(step @ step), 1e-12)
    if (gaps < 0.02).any():
        raise VolumeError(f"{source}: several slices share one position (echoes or time points?); keep one of each")
    if np.abs(np.diff(positions, axis=0) - step).max() > 0.02 * np.linalg.norm(step):
        raise VolumeError(f"{source}: slices are not evenly spaced; is a file of the series missing?")
