"""Deform-Mamba (figure 1 A): learned upsampling, then a U-shaped network of Deform-Mamba blocks on the HR grid."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deformmamba.annotations import is_one_of
from deformmamba.errors import InvalidArgument, did_you_mean, shown
from deformmamba.layers import (
    Block,
    DeformMambaBlock,
    MultiViewContext,
    PatchEmbed,
    PatchExpand,
    PatchMerge,
    VisionMambaBlock,
    exempt_from_weight_decay,
    start_as_identity,
)
from deformmamba.models.base import SRModel, check_part
from deformmamba.models.normalise import NORMALISATIONS, keep_constant, normalised, slice_range
from deformmamba.models.padding import crop, pad_to_multiple
from deformmamba.models.skip import SKIPS, add_base, base_image, start_at_zero
from deformmamba.physics.edges import outliers
from deformmamba.torch_private import transforms_are_active

# Constructor arguments that differ from the defaults (which are the paper's), by preset.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-literal": {
        "dims": [96, 128, 384, 768],
        "discretization": "zoh",
        "extra_activations": False,
        "separable": True,
        "final_norm": True,
    },
    "small": {"dims": [64, 96, 160], "depths": [2, 2, 2], "stem_channels": 16, "skip": "zero-fill"},
    "tiny": {
        "dims": [40, 64, 96],
        "depths": [1, 1, 1],
        "stem_channels": 16,
        "d_state": 8,
        "expand": 1.5,
        "skip": "zero-fill",
    },
}


class DeformMambaSR(Block, SRModel):
    """The Deform-Mamba network: (b, in_channels, h, w) to (b, in_channels, scale * h, scale * w).

    Convolution and pixel shuffle to the HR grid; patch embedding; an encoder of Deform-Mamba blocks and patch merging;
    the multi-view context module; a decoder of pure vision Mamba blocks and patch expanding, with added skips; a final
    expansion and a 3x3 convolution. Sizes that do not fit are padded inside (edges replicated) and cropped back.

    Args:
        scale: upsampling factor.
        in_channels: image channels, 1 for magnitude MR.
        dims: channels of each level. The paper prints 96, 128, 384, 768; a doubling merge gives 192 for the second,
            which is the default (preset "paper"; as printed: "paper-literal").
        depths: blocks of each level, in the encoder and again in the decoder.
        patch: patch size on the HR grid. Not stated in the paper; VM-UNet's 4 is the default.
        stem_channels: channels after the pixel shuffle; default: `in_channels`, the simplest interpretation.
        d_state, expand, directions, discretization, channel_attention, drop_path: as in `VisionMambaBlock`; drop_path
            grows linearly from 0 to this value over the blocks.
        extra_activations: two SiLUs that the paper does not print, after the deform branch and in the multi-view
            context, without which the first is nearly linear and the second is linear.
        separable: a 1x1 convolution after each depthwise one, as in the paper's "depthwise separable convolution".
        final_norm: a LayerNorm in the final expansion, as in VM-UNet; it removes the local amplitude of the output.
        deform: False is the paper's ablation "w/o Deform".
        context: False is the paper's ablation "w/o MVC".
        context_rates: dilation rates of the multi-view context; not printed.
        skip: None is the paper's network. "zero-fill" adds the zero-filled input to the output, so that the network
            learns the difference only; its last convolution is then initialised with zero. "zero-fill-edges" does the
            same for fields of view that are cut at their edges. "zero-fill-robust" is better at such edges, and
            prevents ringing of outliers, see `physics.edges`; with `normalise="slice"` the network gets the slice
            without them.
        normalise: None is the paper's network, for images of about [0, 1]. "slice" takes images of any gain, offset
            and outliers: each slice is normalised inside (`models.normalise`), and where the 5x5 neighbourhood of an
            input pixel is constant, as in a masked background, the output is that constant.
        checkpointing: recompute each block's activations in the backward pass instead of keeping them.
        intensity: see `SRModel`.

    The third ablation, "w/o CELoss", is an option of the training loss: `SRLoss(beta=0)`.

    Source: section 2.2, figure 1; patch layers and added skips are those of VM-UNet (Ruan & Xiang 2024). There are two
    departures from VM-UNet. The final expansion has no LayerNorm, which would remove the local amplitude from the
    residual. Linear layers have PyTorch's initialisation, because with a standard deviation of 0.02 every gate is
    closed and the network is linear.
    """

    tiles = (
        "prefer whole slices, as every pixel sees the whole image along its row and column; else tiles at least as "
        "large as those trained on, overlapping by half, each with its cut of the whole slice's `base`"
    )

    def __init__(
        self,
        *,
        scale: int = 4,
        in_channels: int = 1,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (4, 4, 4, 4),
        patch: int = 4,
        stem_channels: int | None = None,
        d_state: int = 16,
        expand: float = 2.0,
        directions: int = 4,
        discretization: str = "euler",
        channel_attention: bool = True,
        drop_path: float = 0.0,
        extra_activations: bool = True,
        separable: bool = False,
        final_norm: bool = False,
        deform: bool = True,
        context: bool = True,
        context_rates: Sequence[int] = (1, 2, 3, 4),
        skip: str | None = None,
        normalise: str | None = None,
        checkpointing: bool = False,
        intensity: str = "p99.9",
    ) -> None:
        super().__init__(scale=scale, intensity=intensity)
        _check_arguments(dims, depths, patch, skip, normalise)
        self.channels, self.checkpointing = in_channels, checkpointing
        self.skip, self.normalise = skip, normalise
        self.any_intensity, self.robust_edges = normalise is not None, skip == "zero-fill-robust"
        hr_multiple = patch * 2 ** (len(dims) - 1)
        self.multiple = hr_multiple // math.gcd(hr_multiple, scale)

        stem = stem_channels or in_channels
        self.upsample = nn.Conv2d(in_channels, scale**2 * stem, 3, padding=1)
        self.embed = PatchEmbed(stem, dims[0], patch)
        mamba: dict[str, Any] = {
            "d_state": d_state,
            "expand": expand,
            "directions": directions,
            "discretization": discretization,
            "channel_attention": channel_attention,
            "separable": separable,
        }
        n_blocks = 2 * sum(depths)
        drops = iter([drop_path * i / (n_blocks - 1) for i in range(n_blocks)])
        block = partial(DeformMambaBlock, deform=deform, activation=extra_activations, **mamba)
        self.encoder = _levels(block, dims, depths, drops)
        self.merges = nn.ModuleList(PatchMerge(a, b) for a, b in itertools.pairwise(dims))
        activation = None if extra_activations else nn.Identity()
        self.context = (
            MultiViewContext(dims[-1], rates=context_rates, activation=activation) if context else nn.Identity()
        )
        self.decoder = _levels(partial(VisionMambaBlock, **mamba), dims[::-1], depths[::-1], drops)
        self.expands = nn.ModuleList(PatchExpand(b, a) for a, b in zip(dims[-2::-1], dims[:0:-1], strict=True))
        self.final = PatchExpand(dims[0], dims[0] // patch, patch, norm=final_norm)
        self.project = nn.Conv2d(dims[0] // patch, in_channels, 3, padding=1)
        if skip is not None:
            start_at_zero(self.project)
        exempt_from_weight_decay(self)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DeformMambaSR":
        """A new network with random weights: `PRESETS[name]` (paper, paper-literal, small, tiny), then `overrides`."""
        if not is_one_of(name, PRESETS):
            hint = did_you_mean(name, PRESETS) if isinstance(name, str) else ""
            raise InvalidArgument(f"DeformMambaSR: unknown preset {shown(name)}{hint}; presets: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def load_initial(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights that a training starts from, of this network or of one with fewer blocks in some levels.

        The further blocks of a level follow the given ones and at first return their input, so that both networks
        compute the same.

        Raises:
            RuntimeError: names or shapes that differ, except those of further blocks.
        """
        missing = self.state_dict().keys() - weights.keys()
        further: dict[str, torch.Tensor] = {}
        for side in ("encoder", "decoder"):
            for level, blocks in enumerate(getattr(self, side)):
                for number, block in enumerate(blocks):
                    place = f"{side}.{level}.{number}."
                    own = {place + name for name in block.state_dict()}
                    if number and own <= missing:
                        start_as_identity(block)
                        further |= {place + name: tensor for name, tensor in block.state_dict().items()}
        super().load_initial({**weights, **further})

    def forward(
        self, lr: torch.Tensor, base: torch.Tensor | None = None, norm: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The SR image of `lr` (b, in_channels, h, w) on the origin-aligned grid.

        Values of `lr` are about [0, 1], or any with `normalise="slice"`.

        For a patch or tile, pass `base` and `norm` of the WHOLE slice (`whole_slice` computes both). None: `lr` is the
        whole slice.

        `base` (b, in_channels, scale * h, scale * w): the matching cut of the image to which a skip adds the output;
        without a skip it changes nothing.
        `norm` (b, in_channels, 2): with `normalise="slice"`, the `slice_range` of the whole slice; else it changes
        nothing.

        Raises:
            InvalidType, InvalidArgument: an argument that is not as above.
        """
        self.check_lr(lr, base)
        check_part("DeformMambaSR", "norm", norm, (*lr.shape[:2], 2))
        if self.normalise is None:
            sr = self._network(lr)
            return add_base(sr, lr, base, self.scale, self.skip) if self.skip else sr.contiguous()
        exact = lr.to(torch.promote_types(lr.dtype, torch.float32))
        norm = slice_range(exact) if norm is None else norm.to(exact)
        centre, spread = norm[..., 0, None, None], norm[..., 1, None, None]
        rest = exact - outliers(exact, centre, spread) if self.robust_edges else exact
        residual = self._network(normalised(rest, centre, spread)).to(exact.dtype) * spread
        if self.skip:
            centred = None if base is None else base.to(exact) - centre
            sr = add_base(residual, exact - centre, centred, self.scale, self.skip) + centre
        else:
            sr = residual + centre
        return keep_constant(sr, exact, self.scale).to(lr.dtype).contiguous()

    def whole_slice(self, lr: torch.Tensor) -> dict[str, torch.Tensor]:
        """The further arguments of `forward` for the whole slices `lr` (b, c, h, w); a tile gets its cut of `base`."""
        exact = lr.to(torch.promote_types(lr.dtype, torch.float32))
        arguments = {"base": base_image(exact, self.scale, self.skip or "zero-fill")}
        return arguments if self.normalise is None else {**arguments, "norm": slice_range(exact)}

    def _network(self, lr: torch.Tensor) -> torch.Tensor:
        """The network alone, without normalisation and skip."""
        padded, (h, w) = pad_to_multiple(lr, self.multiple)
        x = self.embed(F.pixel_shuffle(self.upsample(_channels_last(padded)), self.scale))
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = self.merges[level - 1](x)
            x = self._run(blocks, x)
            skips.append(x)
        skips.pop()
        x = self.context(x)
        for level, blocks in enumerate(self.decoder):
            if level:
                x = self.expands[level - 1](x) + skips.pop()
            x = self._run(blocks, x)
        return crop(self.project(self.final(x)), self.scale * h, self.scale * w)

    def _run(self, blocks: nn.Module, x: torch.Tensor) -> torch.Tensor:
        remember = self.checkpointing and self.training and not _in_torch_func()  # which does not support checkpoints
        for block in blocks:  # type: ignore[attr-defined]
            x = checkpoint(block, x, use_reentrant=False) if remember else block(x)
        return x


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` in `torch.channels_last` format; vmap has no rule for the second of the two ways."""
    if _in_torch_func():
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def _in_torch_func() -> bool:
    """Whether a transform of torch.func is active; False while a compiler traces the network."""
    return not torch.compiler.is_compiling() and transforms_are_active()


def _check_arguments(
    dims: Sequence[int], depths: Sequence[int], patch: int, skip: str | None, normalise: str | None
) -> None:
    if not 1 <= len(dims) == len(depths) <= 8 or min(dims) < patch or patch < 1 or not 1 <= sum(depths) <= 256:
        raise InvalidArgument(
            f"DeformMambaSR: dims={list(dims)}, depths={list(depths)}, patch={patch}; dims and depths need one "
            "positive entry per level (1 to 8 levels, 256 blocks), and dims at least the patch size"
        )
    if min(depths) < 1:
        raise InvalidArgument(f"DeformMambaSR: depths={list(depths)}; each level needs at least one block")
    if skip not in SKIPS:
        raise InvalidArgument(f"DeformMambaSR: skip is {shown(skip)}; it must be one of {SKIPS}")
    if normalise not in NORMALISATIONS:
        raise InvalidArgument(f"DeformMambaSR: normalise is {shown(normalise)}; it must be one of {NORMALISATIONS}")


def _levels(
    block: Callable[..., nn.Module], dims: Sequence[int], depths: Sequence[int], drops: Iterator[float]
) -> nn.ModuleList:
    """The blocks of each level, one list per level; each block takes the next of the rates `drops`."""
    return nn.ModuleList(
        nn.ModuleList(block(dim, drop_path=next(drops)) for _ in range(depth))
        for dim, depth in zip(dims, depths, strict=True)
    )
