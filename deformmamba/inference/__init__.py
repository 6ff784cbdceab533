"""Super-resolution of scans.

`upscaling.py` upscales volumes and slices in memory. `files.py` upscales files and writes a report. `effective.py`
reduces the resolution of scans.
"""

from deformmamba.inference.effective import coarsen, to_effective
from deformmamba.inference.ensemble import predict
from deformmamba.inference.files import Upscaled, upscale_file
from deformmamba.inference.provenance import derivation, weights_hash, weights_name
from deformmamba.inference.settings import Settings
from deformmamba.inference.upscaling import Upscaling, upscale, upscale_with_uncertainty

__all__ = [
    "Settings",
    "Upscaled",
    "Upscaling",
    "coarsen",
    "derivation",
    "predict",
    "to_effective",
    "upscale",
    "upscale_file",
    "upscale_with_uncertainty",
    "weights_hash",
    "weights_name",
]
