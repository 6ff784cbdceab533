"""From a scan to a sharper scan.

`upscaling.py` does it to volumes and slices in memory, `files.py` from file to file, with a report; `coarser.py` goes
the other way.
"""

from deformmamba.inference.effective import coarsen, to_effective
from deformmamba.inference.files import Upscaled, derivation, upscale_file, weights_hash, weights_name
from deformmamba.inference.upscaling import Settings, Upscaling, predict, upscale, upscale_with_uncertainty

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
