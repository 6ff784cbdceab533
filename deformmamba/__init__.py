"""MR image super-resolution: the Deform-Mamba network, its blocks, and everything around them.

One convention for images, everywhere in this package: tensors are (batch, channel, height, width), floating point,
about [0, 1]; a `Volume` keeps the scanner's own units and axis order with a 4x4 affine in millimetres. Wherever an
image changes size its grid is named: "origin" (LR[i] lies on HR[scale * i]; cropping k-space gives this one) or
"half-pixel" (pixel areas nest; averaging gives this one).

Names resolve when they are first used, so that `import deformmamba` costs nothing and imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME = {
    "SS2D": "layers",
    "VisionMambaBlock": "layers",
    "ModulatedDeformBlock": "layers",
    "DeformMambaBlock": "layers",
    "MultiViewContext": "layers",
    "DeformMambaSR": "models",
    "from_pretrained": "models",
    "MODELS": "models",
    "ContrastiveEdgeLoss": "losses",
    "SRLoss": "losses",
    "selective_scan": "scan",
    "selective_scan_2d": "scan",
    "scan_backend": "scan",
    "ScanBackendError": "scan",
    "modulated_deform_conv2d": "deform",
    "degrade": "kspace",
    "zero_fill": "kspace",
    "data_consistency": "kspace",
    "psnr": "metrics",
    "ssim": "metrics",
    "nmse": "metrics",
    "Volume": "volume",
    "VolumeError": "volume",
    "read_volume": "volume",
    "write_volume": "volume",
    "upscale": "inference",
    "WeightsError": "weights",
    "list_weights": "weights",
    "fit": "training",
    "evaluate": "evaluation",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from deformmamba.deform import modulated_deform_conv2d
    from deformmamba.evaluation import evaluate
    from deformmamba.inference import upscale
    from deformmamba.kspace import data_consistency, degrade, zero_fill
    from deformmamba.layers import SS2D, DeformMambaBlock, ModulatedDeformBlock, MultiViewContext, VisionMambaBlock
    from deformmamba.losses import ContrastiveEdgeLoss, SRLoss
    from deformmamba.metrics import nmse, psnr, ssim
    from deformmamba.models import MODELS, DeformMambaSR, from_pretrained
    from deformmamba.scan import ScanBackendError, scan_backend, selective_scan, selective_scan_2d
    from deformmamba.training import fit
    from deformmamba.volume import Volume, VolumeError, read_volume, write_volume
    from deformmamba.weights import WeightsError, list_weights


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deformmamba' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(f"deformmamba.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
