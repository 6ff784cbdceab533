"""FreeSurfer's MGH format, through nibabel: headers without units and without codes for the orientation."""

from typing import Any

import numpy as np

from deformmamba.volume.image import Volume


def image_class() -> Any:
    import nibabel

    return nibabel.freesurfer.mghformat.MGHImage


def placed(array: np.ndarray, image: Any) -> Volume:
    """`array` at the place of an MGH image."""
    return Volume(array, image.affine, header=image.header)


def image(voxels: np.ndarray, volume: Volume, kind: Any = None) -> Any:
    """`voxels` at the place of `volume`, as an image of the class `kind`; with its header if that is of this format."""
    kind = kind or image_class()
    header = volume.header.copy() if isinstance(volume.header, kind.header_class) else None
    if header is not None:
        header.set_data_dtype(voxels.dtype)
    return kind(voxels, volume.affine, header)
