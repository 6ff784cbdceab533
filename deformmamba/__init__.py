"""MR image super-resolution: the Deform-Mamba network, its blocks, and everything around them.

One convention for images, everywhere in this package: tensors are (batch, channel, height, width), floating point,
about [0, 1]; a `Volume` keeps the scanner's own units and axis order with a 4x4 affine in millimetres. Wherever an
image changes size its grid is named: "origin" (LR[i] lies on HR[scale * i]; cropping k-space gives this one) or
"half-pixel" (pixel areas nest; averaging gives this one).

Names resolve when they are first used, so that `import deformmamba` costs nothing and imports no torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME = {
    "SS2D": "layers",
    "VisionMambaBlock": "layers",
    "ModulatedDeformBlock": "layers",
    "DeformMambaBlock": "layers",
    "MultiViewContext": "layers",
    "DeformMambaError": "errors",
    "DeformMambaSR": "models",
    "from_pretrained": "models",
    "MODELS": "models",
    "SRModel": "models",
    "ContrastiveEdgeLoss": "losses",
    "SRLoss": "losses",
    "selective_scan": "scan",
    "selective_scan_2d": "scan",
    "scan_backend": "scan",
    "ScanBackendError": "scan",
    "modulated_deform_conv2d": "deform",
    "degrade": "physics.kspace",
    "zero_fill": "physics.kspace",
    "data_consistency": "physics.consistency",
    "psnr": "metrics",
    "ssim": "metrics",
    "nmse": "metrics",
    "Volume": "volume",
    "VolumeError": "volume",
    "read_volume": "volume",
    "write_volume": "volume",
    "upscale": "inference",
    "upscale_file": "inference",
    "upscale_with_uncertainty": "inference",
    "upscale_cohort": "inference.cohort",
    "isotropic": "inference.isotropic",
    "WeightsError": "weights",
    "list_weights": "weights",
    "fit": "training",
    "evaluate": "evaluation",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:  # `as`: for type checkers, an import under its own name is an export
    from deformmamba.deform import modulated_deform_conv2d as modulated_deform_conv2d
    from deformmamba.errors import DeformMambaError as DeformMambaError
    from deformmamba.evaluation import evaluate as evaluate
    from deformmamba.inference import upscale as upscale
    from deformmamba.inference import upscale_file as upscale_file
    from deformmamba.inference import upscale_with_uncertainty as upscale_with_uncertainty
    from deformmamba.inference.cohort import upscale_cohort as upscale_cohort
    from deformmamba.inference.isotropic import isotropic as isotropic
    from deformmamba.layers import SS2D as SS2D
    from deformmamba.layers import DeformMambaBlock as DeformMambaBlock
    from deformmamba.layers import ModulatedDeformBlock as ModulatedDeformBlock
    from deformmamba.layers import MultiViewContext as MultiViewContext
    from deformmamba.layers import VisionMambaBlock as VisionMambaBlock
    from deformmamba.losses import ContrastiveEdgeLoss as ContrastiveEdgeLoss
    from deformmamba.losses import SRLoss as SRLoss
    from deformmamba.metrics import nmse as nmse
    from deformmamba.metrics import psnr as psnr
    from deformmamba.metrics import ssim as ssim
    from deformmamba.models import MODELS as MODELS
    from deformmamba.models import DeformMambaSR as DeformMambaSR
    from deformmamba.models import SRModel as SRModel
    from deformmamba.models import from_pretrained as from_pretrained
    from deformmamba.physics.consistency import data_consistency as data_consistency
    from deformmamba.physics.kspace import degrade as degrade
    from deformmamba.physics.kspace import zero_fill as zero_fill
    from deformmamba.scan import ScanBackendError as ScanBackendError
    from deformmamba.scan import scan_backend as scan_backend
    from deformmamba.scan import selective_scan as selective_scan
    from deformmamba.scan import selective_scan_2d as selective_scan_2d
    from deformmamba.training import fit as fit
    from deformmamba.volume import Volume as Volume
    from deformmamba.volume import VolumeError as VolumeError
    from deformmamba.volume import read_volume as read_volume
    from deformmamba.volume import write_volume as write_volume
    from deformmamba.weights import WeightsError as WeightsError
    from deformmamba.weights import list_weights as list_weights


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        if name.isidentifier() and not name.startswith("_") and find_spec(f"deformmamba.{name}") is not None:
            return import_module(f"deformmamba.{name}")  # `deformmamba.models.SRCNN` works without a second import
        raise AttributeError(f"module 'deformmamba' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(f"deformmamba.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
