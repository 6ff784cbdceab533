"""FreeSurfer's MGH format, through nibabel: headers without units and without codes for the orientation."""

from typing import Any

import numpy as np

from deformmamba.volume.image import Volume


def image_class() -> Any:
    import nibabel

    return nibabel.freesurfer.mghformat.MGHImage


# position of the flag in the file, a big-endian 16-bit integer
FLAG = slice(28, 30)


def placed(array: np.ndarray, header: Any, flag: int = 1) -> Volume:
    """`array` with the geometry of an MGH header.

    With goodRASFlag 0 the header states no geometry: nibabel and FreeSurfer then assume coronal slices of 1 mm voxels
    around the origin, and the volume has no orientation. nibabel sets the flag to 1, so `flag` is the one in the file.
    """
    return Volume(array, header.get_affine(), codes=(1, 1) if flag > 0 else (0, 0), header=header)


def time_step(header: Any) -> float:
    """Seconds between the volumes of a 4-D file, from the field `tr` (ms); 0 if unknown."""
    milliseconds = float(header["tr"])
    return milliseconds / 1000 if 0 < milliseconds < np.inf else 0.0


def image(voxels: np.ndarray, volume: Volume, kind: Any = None) -> Any:
    """`voxels` with the geometry of `volume` as an image of class `kind`; with its header if that is of this format."""
    kind = kind or image_class()
    header = volume.header.copy() if isinstance(volume.header, kind.header_class) else None
    if header is not None:
        header.set_data_dtype(voxels.dtype)
    return kind(voxels, volume.affine, header)
