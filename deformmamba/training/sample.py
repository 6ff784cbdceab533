"""A picture of a network's result on a validation slice."""

import numpy as np
import torch

from deformmamba.data.scans import Scan, load_volume
from deformmamba.inference import upscale
from deformmamba.models import SRModel, ZeroFill
from deformmamba.physics.degradations import Degradation, KSpaceCrop
from deformmamba.pictures.figures import comparison, oriented_like
from deformmamba.volume import PathLike, intensity_scale


def sample_picture(
    model: SRModel, scan: Scan | PathLike, path: PathLike, *, degradation: Degradation | None = None, title: str = ""
) -> None:
    """The middle slice of `scan`, degraded and upscaled by `model`, beside the truth and, on its grid, zero-filling.

    If that slice is empty, the nearest that is not. The default of `degradation` is the k-space crop. The slice is
    normalised alone; `evaluate` normalises the volume.

    Raises:
        VolumeError: the scan cannot be read, or `path` cannot be written.
    """
    volume, axis = load_volume(scan)
    slices = np.moveaxis(volume.array, axis, 0)
    nearest = sorted(range(len(slices)), key=lambda k: abs(k - len(slices) // 2))
    middle = slices[next((k for k in nearest if slices[k].any()), nearest[0])]
    hr = torch.from_numpy(np.ascontiguousarray(middle[tuple(slice(n - n % model.scale) for n in middle.shape)]))
    hr /= intensity_scale(hr.numpy())
    lr = (degradation or KSpaceCrop(model.scale))(hr)

    models = {"zero-fill": ZeroFill(scale=model.scale), "model": model}
    results = {
        name: oriented_like(upscale(made, lr[None], axis=0)[0].numpy(), volume, axis).image
        for name, made in models.items()
        if made.grid == model.grid
    }
    truth = oriented_like(hr.numpy(), volume, axis)
    comparison(truth.image, results, path, spacing=truth.spacing, title=title)
