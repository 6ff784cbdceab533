"""SwinIR and HAT, the windowed transformers that table 2 compares with, as spandrel builds them.

They start from random weights and are trained like every other model here. The convolution before their pixel shuffle
learns the grid of the training pairs. Released weights for natural images were trained on the half-pixel grid: on a
4x k-space crop their output would be shifted by 1.5 pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deformmamba.errors import InvalidArgument, shown
from deformmamba.extras import MissingExtra, require
from deformmamba.models.base import SRModel, check_scale_of_shuffles
from deformmamba.models.padding import crop, pad_to_multiple
from deformmamba.models.skip import add_base, checked_skip, start_at_zero
from deformmamba.physics.kspace import Grid


class _Windowed(SRModel):
    """Base class of both: a spandrel network over windows; images are padded to whole windows."""

    precisions = ("float32", "bfloat16 autocast", "float16 autocast")
    tiles = "multiples of the window, overlapping by at least one window; their edges see less than the inside"
    network: nn.Module

    def __init__(
        self, *, scale: int, in_channels: int, window: int, grid: Grid, skip: str | None, intensity: str
    ) -> None:
        super().__init__(scale=scale, intensity=intensity)
        self.grid = grid
        self.skip = checked_skip(type(self).__name__, skip, grid)
        self.channels = in_channels
        self.multiple = window

    def build(self, network: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
        """The spandrel network of `arguments`; on the meta device too."""
        window = self.multiple
        with _AdaptedConstructors():
            # the size for which an attention mask is kept, the smallest that has shifted windows; others are computed
            made = network(
                img_size=2 * window, window_size=window, in_chans=self.channels, upscale=self.scale, **arguments
            )
        if self.skip:
            start_at_zero(getattr(made, "conv_last", None) or made.get_submodule("upsample"))
        made.mean = torch.zeros(1, 1, 1, 1, device="cpu")  # no buffer there, so never loaded; and RGB's, for 3 channels
        return made

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """The SR image of `lr` (b, in_channels, h, w), values about [0, 1]; `base`: see `DeformMambaSR`."""
        self.check_lr(lr, base)
        padded, (h, w) = pad_to_multiple(lr, self.multiple)
        sr = crop(self.network(padded), self.scale * h, self.scale * w).contiguous()
        return add_base(sr, lr, base, self.scale, self.skip)


class SwinIR(_Windowed):
    """SwinIR: (b, in_channels, h, w) to (b, in_channels, scale * h, scale * w).

    The defaults are its classical network (11.9 million parameters at 4x for three channels); the lightweight one (0.93
    million) is width=60, depths=[6, 6, 6, 6], heads=[6, 6, 6, 6], upsampler="pixelshuffledirect".

    Args:
        scale: upsampling factor: a power of two, or 3.
        in_channels: image channels.
        width: embedding channels, a multiple of every entry of `heads`.
        depths: transformer layers of each residual group.
        heads: attention heads of each group.
        window: window side in pixels; inputs are padded to a multiple of it and cropped back.
        mlp_ratio: hidden over embedding channels of each perceptron.
        upsampler: "pixelshuffle" (classical) or "pixelshuffledirect" (lightweight).
        drop_path: largest rate of dropped residual branches.
        grid: that of the pairs it is trained on.
        skip: None, as published; "zero-fill" adds the zero-filled input, see `deformmamba.models.skip`.
        intensity: see `SRModel`.

    Source: Liang et al., ICCV workshops 2021, in spandrel's implementation. Departures: edges are padded by replication
    instead of reflection, so that any size works, and no mean colour is subtracted.
    """

    def __init__(
        self,
        *,
        scale: int = 4,
        in_channels: int = 1,
        width: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window: int = 8,
        mlp_ratio: float = 2.0,
        upsampler: str = "pixelshuffle",
        drop_path: float = 0.1,
        grid: Grid = "origin",
        skip: str | None = None,
        intensity: str = "p99.9",
    ) -> None:
        super().__init__(scale=scale, in_channels=in_channels, window=window, grid=grid, skip=skip, intensity=intensity)
        if upsampler not in ("pixelshuffle", "pixelshuffledirect"):
            raise InvalidArgument(
                f'SwinIR: upsampler must be "pixelshuffle" or "pixelshuffledirect", not {shown(upsampler)}'
            )
        _check(self, width, depths, heads, window)
        self.network = self.build(
            _spandrel("SwinIR"),
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            mlp_ratio=mlp_ratio,
            upsampler=upsampler,
            drop_path_rate=drop_path,
        )


class HAT(_Windowed):
    """HAT, the hybrid attention transformer: (b, in_channels, h, w) to (b, in_channels, scale * h, scale * w).

    The defaults are the paper's HAT (20.8 million parameters at 4x for three channels).

    Args:
        scale, in_channels, width, depths, heads, mlp_ratio, drop_path, grid, skip, intensity: as in `SwinIR`.
        window: an even side in pixels.
        compress: by how much the convolution beside the attention narrows its channels.
        squeeze: by how much its channel attention narrows them.
        conv_scale: weight of that convolution.
        overlap: by what part of its side a window of the overlapping attention reaches into its neighbours.

    Source: Chen et al., CVPR 2023, in spandrel's implementation; departures as for `SwinIR`.
    """

    def __init__(
        self,
        *,
        scale: int = 4,
        in_channels: int = 1,
        width: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window: int = 16,
        mlp_ratio: float = 2.0,
        compress: int = 3,
        squeeze: int = 30,
        conv_scale: float = 0.01,
        overlap: float = 0.5,
        drop_path: float = 0.1,
        grid: Grid = "origin",
        skip: str | None = None,
        intensity: str = "p99.9",
    ) -> None:
        super().__init__(scale=scale, in_channels=in_channels, window=window, grid=grid, skip=skip, intensity=intensity)
        _check(self, width, depths, heads, window)
        if not 1 <= compress <= width or not 1 <= squeeze <= width:
            raise InvalidArgument(
                f"HAT: compress={compress}, squeeze={squeeze}; both must lie between 1 and width={width}"
            )
        self.network = self.build(
            _spandrel("HAT"),
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            mlp_ratio=mlp_ratio,
            compress_ratio=compress,
            squeeze_factor=squeeze,
            conv_scale=conv_scale,
            overlap_ratio=overlap,
            drop_path_rate=drop_path,
        )


class _AdaptedConstructors(TorchFunctionMode):
    """Two adaptations of the networks' constructors. They read drop rates from a `torch.linspace`, which must be on the
    CPU because the meta device has no numbers; and `torch.meshgrid` gets the explicit indexing without which it
    warns."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        said = {torch.linspace: {"device": "cpu"}, torch.meshgrid: {"indexing": "ij"}}.get(function, {})
        return function(*args, **{**(kwargs or {}), **said})


def _spandrel(name: str) -> Callable[..., nn.Module]:
    """A network class of spandrel. It imports torchvision, which raises if it does not fit the installed torch."""
    try:
        require("torchvision", extra="baselines", what=f"{name} needs spandrel, which")
    except RuntimeError as error:
        raise MissingExtra(
            f"{name} needs spandrel, which needs the torchvision that fits torch {torch.__version__} ({error}); "
            "install that build of torchvision"
        ) from None
    module = require(f"spandrel.architectures.{name}", extra="baselines", what=name)
    network: Callable[..., nn.Module] = getattr(module, name)
    return network


def _check(model: SRModel, width: int, depths: Sequence[int], heads: Sequence[int], window: int) -> None:
    name = type(model).__name__
    check_scale_of_shuffles(model)
    if not 1 <= len(depths) == len(heads) <= 32 or min(*depths, *heads) < 1 or any(width % n for n in heads):
        raise InvalidArgument(
            f"{name}: width={width}, depths={list(depths)}, heads={list(heads)}; depths and heads need one positive "
            "entry a group each, and width must be a multiple of every entry of heads"
        )
    if window < 2 or window % 2:
        raise InvalidArgument(f"{name}: window must be even and at least 2, not {window}")
