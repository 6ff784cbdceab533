"""Upscaling inside MONAI and TorchIO pipelines. Neither is imported: their objects are recognised by their attributes.

```python
model = deformmamba.from_pretrained("ixi-4x")
monai.transforms.Compose([LoadImaged("t2"), EnsureChannelFirstd("t2"), UpscaleTransform(model, keys="t2")])
torchio.Compose([torchio.ToCanonical(), UpscaleTransform(model)])
UpscaleInferer(consistency="exact")(inputs, model)  # where MONAI expects an Inferer
```
"""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deformmamba.annotations import check_types
from deformmamba.errors import InvalidType, shown
from deformmamba.inference import Settings, upscale
from deformmamba.inference.networks import network as found_network
from deformmamba.volume import Volume, VolumeError
from deformmamba.volume.image import check_unmasked

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel


class UpscaleInferer:
    """A MONAI `Inferer`: upscales (b, c, h, w) or (b, c, i, j, k) in any units; the output is float32.

    Every channel of every item is treated as a separate scan, with a separate intensity scale.

    Args:
        settings: as `inference.upscale`; `axis` counts the spatial axes from 0, None: the last (slices of a volume).
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = asdict(Settings.of(settings))

    def __call__(self, inputs: torch.Tensor, network: "SRModel", *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises TypeError if the network is not an SRModel or a wrapper of one, or if there are further arguments,
        which no SRModel takes; VolumeError for an empty batch."""
        if isinstance(network, str | os.PathLike):  # it would be loaded for each batch
            raise InvalidType(f"the network is the name {shown(network)}; give a model, as from from_pretrained(name)")
        model = found_network(network)
        if not isinstance(inputs, torch.Tensor):
            raise InvalidType(f"inputs must be a tensor (b, c, h, w) or (b, c, i, j, k), not {type(inputs).__name__}")
        if args or kwargs:
            raise InvalidType("a super-resolution model takes only the image; leave the other arguments out")
        if inputs.ndim not in (4, 5):
            raise VolumeError(f"inputs are (b, c, h, w) or (b, c, i, j, k), not {tuple(inputs.shape)}")
        if not inputs.numel():
            raise VolumeError(f"inputs of shape {tuple(inputs.shape)} hold no image; give one or more")
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        return torch.stack([torch.stack([upscale(model, scan, **self.settings) for scan in item]) for item in plain])


class UpscaleTransform:
    """A transform of channel-first images for MONAI (arrays or dictionaries) and TorchIO (images or subjects).

    A MONAI `MetaTensor` and a TorchIO image keep their attributes and their position in the world: the affine is
    adapted to the model's grid. Earlier transforms cannot be inverted afterwards. A plain tensor or array has no
    affine.

    Args:
        model: any SRModel, or the name of weights.
        keys: the dictionary entries to upscale; None: every intensity image of a TorchIO subject.
        settings: as `inference.upscale`; `axis` counts the spatial axes from 0.

    Raises:
        VolumeError: on use: no keys for a plain dictionary, a label map, an entry that is not an image, or as
            `upscale`.
    """

    def __init__(
        self, model: "SRModel | str | os.PathLike[str]", keys: str | Iterable[str] | None = None, **settings: Any
    ) -> None:
        check_types(UpscaleTransform.__init__, {"self": self, "model": model, "keys": keys})
        found = found_network(model)  # a wrapper of a model stays, because it can be sent to another process
        self.model = found if isinstance(model, str | os.PathLike) else model
        self.keys = (keys,) if isinstance(keys, str) else None if keys is None else tuple(keys)
        self.settings = asdict(Settings.of(settings))

    def __call__(self, data: Any) -> Any:
        if isinstance(data, Mapping) and not _is_torchio_image(data):
            return self._dictionary(data)
        if _is_torchio_image(data):
            return self._torchio_image(data)
        if isinstance(data, (torch.Tensor, np.ndarray)):
            return self._array(data)
        raise VolumeError(
            f"cannot upscale a {type(data).__name__}; give a tensor, an array, a dictionary or a TorchIO image"
        )

    def _dictionary(self, data: Any) -> Any:
        keys = self.keys
        if keys is None:
            keys = tuple(name for name, value in data.items() if _is_torchio_image(value) and value.type != "label")
            if not keys:
                raise VolumeError(f"no keys given; name the entries to upscale in keys=: {', '.join(map(str, data))}")
        made = copy.copy(data)
        for key in keys:
            if key not in data:
                raise VolumeError(f"no entry {key!r}; entries: {', '.join(map(str, data))}")
            made[key] = self(data[key])
        if hasattr(made, "update_attributes"):  # subject.t1 as well as subject["t1"]
            made.update_attributes()
        return made

    def _torchio_image(self, image: Any) -> Any:
        if image.type == "label":
            raise VolumeError("a label map cannot be upscaled; resample it to the upscaled image")
        made = copy.copy(image)  # as TorchIO's own transforms do: attributes, path and reader stay
        tensor, affine = self._channels(image.data, np.asarray(image.affine))
        made.set_data(tensor)
        made.affine = affine
        return made

    def _array(self, image: Any) -> Any:
        affine = getattr(image, "affine", None)
        plain = image.as_tensor() if hasattr(image, "as_tensor") else image
        check_unmasked(plain)
        if isinstance(plain, np.ndarray):  # PyTorch has no types of other processors, such as those of MGH files
            plain = torch.as_tensor(plain.astype(plain.dtype.newbyteorder("=")))
        tensor, affine = self._channels(plain, None if affine is None else np.asarray(affine))
        if isinstance(image, np.ndarray):
            return tensor.numpy()
        tensor = tensor.to(plain.device)
        if affine is None:
            return tensor
        meta = {name: value for name, value in image.meta.items() if name != "affine"}
        return type(image)(tensor, affine=torch.from_numpy(affine), meta=meta)

    def _channels(self, image: torch.Tensor, affine: np.ndarray | None) -> tuple[torch.Tensor, np.ndarray | None]:
        """(c, h, w) or (c, i, j, k), each channel upscaled, and the affine of the result."""
        if image.ndim not in (3, 4):
            raise VolumeError(f"an image is (c, h, w) or (c, i, j, k), not {tuple(image.shape)}")
        if not image.numel():
            raise VolumeError(f"an image of shape {tuple(image.shape)} is empty; give one channel or more")
        if image.dtype == torch.bfloat16:  # which numpy lacks
            image = image.float()
        if affine is not None and image.ndim == 3 and affine.shape == (3, 3):
            plane = np.eye(4)
            plane[np.ix_((0, 1, 3), (0, 1, 3))] = affine
            tensor, plane = self._channels(image, plane)  # type: ignore[assignment]
            return tensor, plane[np.ix_((0, 1, 3), (0, 1, 3))]
        if affine is not None and affine.shape != (4, 4):
            raise VolumeError(
                f"an image of shape {tuple(image.shape)} has an affine of shape {affine.shape}; give one image without "
                "a batch axis, with an affine of 4x4, or 3x3 for a slice (c, h, w)"
            )
        if affine is None:
            return torch.stack([upscale(self.model, channel, **self.settings) for channel in image.cpu()]), affine
        settings = {**self.settings, "axis": 2} if image.ndim == 3 else self.settings
        arrays = (channel.detach().cpu().numpy() for channel in (image[..., None] if image.ndim == 3 else image))
        made = [upscale(self.model, Volume(array, affine), **settings) for array in arrays]
        tensor = torch.stack([torch.from_numpy(np.ascontiguousarray(volume.array)) for volume in made])
        return tensor[..., 0] if image.ndim == 3 else tensor, made[0].affine


def _is_torchio_image(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("data", "affine", "type", "spatial_shape")) and not isinstance(
        value, torch.Tensor
    )
