"""Siemens mosaics: all slices of a time point as tiles of one DICOM image.

The header's geometry is that of the whole mosaic. Only Siemens' private CSA header holds the number of tiles and the
direction in which they are stacked; a mosaic without it is refused.

Source: dcm2niix, and nibabel's description of the format, https://nipy.org/nibabel/dicom/dicom_mosaic.html.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deformmamba.volume.image import VolumeError

_CURE = "convert the series to NIfTI with dcm2niix"


class Tile(NamedTuple):
    """A slice in the mosaic (first row, end row, first column, end column) and in the patient (mm, LPS+)."""

    box: tuple[int, int, int, int]
    position: np.ndarray


def is_mosaic(dataset: Any) -> bool:
    return "MOSAIC" in {str(value).upper() for value in dataset.get("ImageType") or ()}


def tiles(path: Path, dataset: Any, position: np.ndarray, axes: np.ndarray, spacing: tuple[float, float]) -> list[Tile]:
    """The slices of a classic mosaic, in the order of its tiles.

    Args:
        path, dataset: of the file.
        position: of the mosaic's first pixel, mm.
        axes: directions along a row and along a column.
        spacing: between rows and between columns, mm.

    Raises:
        VolumeError: the number, the size or the direction of the slices is not in the file.
    """
    n, normal = _from_csa(path, dataset)
    step = float(dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 0)
    side = math.ceil(math.sqrt(n))
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if n < 1 or step <= 0 or rows % side or columns % side:
        raise VolumeError(f"{path}: a Siemens mosaic whose {n} tiles do not fit into {columns}x{rows} pixels; {_CURE}")
    across = np.cross(axes[0], axes[1])
    if abs(abs(across @ normal) - 1) > 1e-3:
        raise VolumeError(f"{path}: a Siemens mosaic whose slices are not perpendicular to their normal; {_CURE}")
    height, width = rows // side, columns // side
    # the position is that of a slice as large as the mosaic, around the same centre
    first = position + axes[0] * spacing[1] * (columns - width) / 2 + axes[1] * spacing[0] * (rows - height) / 2
    made = []
    for k in range(n):
        top, left = height * (k // side), width * (k % side)
        made.append(Tile((top, top + height, left, left + width), first + normal * step * k))
    return made


def _from_csa(path: Path, dataset: Any) -> tuple[int, np.ndarray]:
    """The number of tiles and the direction in which they are stacked."""
    from nibabel.nicom import csareader

    problem = f"{path}: a Siemens mosaic without the private header that gives its slice positions; {_CURE}"
    try:
        header = csareader.get_csa_header(dataset, "image")
        tags = header["tags"]
        n, normal = int(tags["NumberOfImagesInMosaic"]["items"][0]), csareader.get_slice_normal(header)
        numbers = tags.get("ProtocolSliceNumber", {}).get("items") or [0]
    except Exception:  # a damaged private header raises anything
        raise VolumeError(problem) from None
    if normal is None:
        raise VolumeError(problem)
    if int(numbers[0]) > 0:
        raise VolumeError(f"{path}: a Siemens mosaic whose slices are numbered in reverse; {_CURE}")
    return n, np.asarray(normal, dtype=np.float64)
