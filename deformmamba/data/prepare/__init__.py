"""Converts downloaded data sets (IXI, fastMRI, any folder of scans) into slices with a split by subject.

The papers do not state how they converted IXI's files to slices, or which subjects they tested on. This package states
its rules. The `manifest.json` of each prepared set lists the files used, the files skipped, and the reasons. The same
files give the same bytes (for fastMRI, whose images are computed: with the same numpy). `deformmamba.data.prepared`
documents the output.

The choice of slices changes PSNR by decibels (empty slices are easy), so axis and range are arguments and are recorded
in the manifest. Intensities are divided by the 99.9th percentile of the non-zero voxels in the chosen slices; the
manifest records the divisor. Slices keep their size; training crops them to a multiple of the scale, see `load_slices`.
"""

from deformmamba.data.prepare.fastmri import complex_image, ismrmrd_spacing, plan_fastmri
from deformmamba.data.prepare.folder import plan_folder
from deformmamba.data.prepare.ixi import plan_ixi
from deformmamba.data.prepare.plan import Plan, Source, Unusable, chosen_slices
from deformmamba.data.prepare.writing import prepare
from deformmamba.data.splits import read_splits

__all__ = [
    "Plan",
    "Source",
    "Unusable",
    "chosen_slices",
    "complex_image",
    "ismrmrd_spacing",
    "plan_fastmri",
    "plan_folder",
    "plan_ixi",
    "prepare",
    "read_splits",
]
