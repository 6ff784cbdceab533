"""Data sets as people download them, made into slices with a split by subject: IXI, fastMRI, any folder of scans.

Nobody published how IXI's files became the pictures of the papers, or who was tested. Here the rules are stated, each
prepared set says in its `manifest.json` what was used, skipped and why, and the same files give the same bytes (of
fastMRI, whose images are computed: with the same numpy). See `deformmamba.data.prepared` for what is written.

Which slices of a volume count moves PSNR by decibels (empty ones are easy), so axis and range are arguments, and stand
in the manifest. Intensities are divided by the 99.9th percentile of the non-zero voxels that were kept, and the divisor
is written down. Slices keep their size; whoever trains crops them to a multiple of the scale, see `load_slices`.
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
