"""Training data for the slice direction: in-plane images degraded along one axis like thick slices.

A scan is sharp within its slices and coarse across them. A slice profile makes an in-plane image coarse along ONE axis,
and a cubic spline interpolates it back to its grid. The result resembles a sagittal or coronal section through the
interpolated scan; the original image is the training target. The coarse axis is always the first one, so the direction
is fixed for the network.

Source: Zhao et al., SMORE, IEEE TMI 40 (2021); Remedios et al., ECLARE, arXiv 2503.10822.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from deformmamba.annotations import check_seed
from deformmamba.data.augmentation import check_range
from deformmamba.data.groups import check_weights, cumulative_shares
from deformmamba.data.scans import Scan, load_volume
from deformmamba.errors import InvalidArgument
from deformmamba.physics.slice_profile import SliceProfile, ThickSlices, slice_positions, spline_matrix
from deformmamba.volume import VolumeError, in_plane

# percentiles of a volume that become 0 and 1; the second among voxels above the first
LOW, HIGH = 0.5, 99.5
EMPTY = 0.02  # images with a lower mean, in units of the range, are skipped as empty
FEWEST = 4  # smallest number of thick slices across an image


def robust_range(array: np.ndarray) -> tuple[float, float]:
    """The values mapped to 0 and 1 for the network: a low percentile, and a high percentile of the voxels above it.

    An offset, negative values, a few bright voxels and the size of the background change it little. If all voxels are
    equal the range is 1, to avoid a division by 0.
    """
    values = np.asarray(array, np.float32).ravel()
    values = values[:: max(1, len(values) // 2_000_000)]  # a sample of the voxels is exact enough
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low = float(np.percentile(values, LOW))
    above = values[values > low]
    high = float(np.percentile(above, HIGH)) if len(above) else low
    return low, high if high > low else low + 1.0


def trained_on(provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """The training data of weights for the slice direction: the [data] section of their recipe; None for other weights.

    Settings that the recipe does not name are the defaults of `ThickSliceDataset`.
    """
    recipe = provenance.get("recipe")
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    if not isinstance(data, Mapping) or data.get("kind") != "thick":
        return None
    defaults = {name: value.default for name, value in inspect.signature(ThickSliceDataset).parameters.items()}
    return {**defaults, **data}


def thick(image: torch.Tensor, *, ratio: float, profile: SliceProfile, phase: float = 0.0) -> torch.Tensor:
    """Samples `image` (n, w) with thick slices along its first axis, and interpolates to n rows by a cubic spline.

    Args:
        ratio: rows from one slice centre to the next; any number of 1 or more.
        profile: the slice profile; its unit, mm, stands for one row.
        phase: row of the first slice centre.
    """
    return thick_matrix(image.shape[0], ratio, profile, phase).to(image) @ image


def thick_matrix(n: int, ratio: float, profile: SliceProfile, phase: float) -> torch.Tensor:
    """The matrix (n, n), float32, that `thick` applies to each column of an image: slice sampling, then the spline."""
    at = slice_positions(n_slices(n, ratio, phase), ratio, phase)
    rows = (torch.arange(n, dtype=torch.float64) - phase) / ratio
    return (spline_matrix(len(at), rows) @ ThickSlices(n, 1.0, at, profile).matrix).float()


def n_slices(n: int, ratio: float, phase: float = 0.0) -> int:
    """The number of slice centres on n rows."""
    return int((n - 1 - phase) / ratio + 1e-9) + 1


class ThickSample(NamedTuple):
    """The interpolated thick slices and the original image, both (1, p, p), values of about [0, 1]."""

    lr: torch.Tensor
    hr: torch.Tensor


class _Stack(NamedTuple):
    """Images (n, h, w) in scanner units, their intensity range, and their source."""

    images: torch.Tensor
    low: float
    high: float
    place: str
    full: np.ndarray  # indices of the images that are not empty


class ThickSliceDataset(Dataset[ThickSample]):
    """Random patches of in-plane images, coarse along their first axis; each a function of (seed, index) alone.

    Args:
        scans: the volumes; kept in memory.
        patch: rows and columns of a sample; smaller images are skipped.
        length: number of samples.
        weights: share of each group (`Scan.group`), by name; other groups are ignored. None: in proportion to the
            number of volumes. Within a group every volume has the same share.
        ratio: smallest and largest number of rows from slice to slice; log-uniform between them.
        thickness: smallest and largest slice thickness as a share of that distance. Below 1 slices have gaps, above 1
            they overlap.
        boxcar: share of the samples with a boxcar slice profile; the others have a Gaussian one.
        reformats: largest ratio of the voxel's longest to its shortest side for which half of a volume's samples are
            sections across the slices, coarse along the slice direction; 1 for exact cubes only.
        flips: mirror at random.
        contrast: largest exponent g of a random contrast curve x -> x^c, c log-uniform in [1/g, g].
        gain: largest factor of a random intensity scaling, log-uniform in [1/gain, gain].
        invert: share of the samples replaced by their negative, 1 - x.
        seed: seeds all randomness.
        progress: show a progress bar while reading volumes.

    Raises:
        VolumeError: no image to train on.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        scans: Iterable[Scan],
        *,
        patch: int = 96,
        length: int,
        weights: Mapping[str, float] | None = None,
        ratio: Sequence[float] = (2.0, 8.0),
        thickness: Sequence[float] = (0.8, 1.2),
        boxcar: float = 0.3,
        reformats: float = 1.3,
        flips: bool = True,
        contrast: float = 1.0,
        gain: float = 1.0,
        invert: float = 0.0,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        check_range("patch", patch, 8, of="ThickSliceDataset")
        for name, share in (("boxcar", boxcar), ("invert", invert)):
            check_range(name, share, 0, 1, of="ThickSliceDataset")
        for name, factor in (("reformats", reformats), ("contrast", contrast), ("gain", gain)):
            check_range(name, factor, 1, of="ThickSliceDataset")
        check_weights(weights, of="ThickSliceDataset")
        for name, pair, lowest in (("ratio", ratio, 1.0), ("thickness", thickness, 0.1)):
            if len(pair) != 2 or not lowest <= pair[0] <= pair[1] < math.inf:
                raise InvalidArgument(
                    f"ThickSliceDataset: {name} is {list(pair)}; wanted smallest and largest value, {lowest:g} or more"
                )
        self.patch, self.length, self.seed = patch, length, check_seed(seed)
        self.ratio, self.thickness, self.boxcar = tuple(ratio), tuple(thickness), boxcar
        self.flips, self.contrast, self.gain, self.invert = flips, contrast, gain, invert
        chosen = [scan for scan in scans if weights is None or scan.group in weights]
        bar: Iterable[Scan] = chosen
        if progress:
            from tqdm import tqdm

            bar = tqdm(chosen, desc="reading", unit="volume", disable=None)
        # for each group: the in-plane stacks, and the stacks of sections across the slices
        self.groups: dict[str, tuple[list[_Stack], list[_Stack]]] = {}
        spacings: list[float] = []
        for scan in bar:
            flat, sections = self._stacks(scan, reformats, spacings)
            group = self.groups.setdefault(scan.group, ([], []))
            group[0].extend(flat)
            group[1].extend(sections)
        self.groups = {name: group for name, group in self.groups.items() if group[0]}
        if not self.groups:
            raise VolumeError(
                f"ThickSliceDataset: no volume to train on, of {len(chosen)}, has slices of {patch}x{patch} or more "
                f"that are not empty; groups wanted: {', '.join(weights or ['any'])}"
            )
        self.spacings = (min(spacings), max(spacings))
        counts = {name: len(flat) for name, (flat, _) in self.groups.items()}
        self.shares = cumulative_shares(counts, weights, of="ThickSliceDataset")

    def _stacks(self, scan: Scan, reformats: float, spacings: list[float]) -> tuple[list[_Stack], list[_Stack]]:
        volume, axis = load_volume(scan)
        low, high = robust_range(volume.array)
        array = torch.from_numpy(np.ascontiguousarray(np.moveaxis(volume.array, axis, 0), np.float32))
        flat = self._stack(array, low, high, f"{scan.path.name}, slice")
        if not flat:
            return [], []
        size = volume.spacing
        spacings += (size[a] for a in in_plane(axis))
        sections: list[_Stack] = []
        if max(size) <= reformats * min(size) * 1.001:  # (slices, h, w) to sections (k, slices, w) and (k, slices, h)
            sections += self._stack(array.permute(1, 0, 2), low, high, f"{scan.path.name}, row")
            sections += self._stack(array.permute(2, 0, 1), low, high, f"{scan.path.name}, column")
        return flat, sections

    def _stack(self, images: torch.Tensor, low: float, high: float, place: str) -> list[_Stack]:
        if min(images.shape[1:]) < self.patch:
            return []
        means = ((images - low) / (high - low)).clamp(0, 1).mean((1, 2))
        full = (means > EMPTY).nonzero()[:, 0].numpy()
        return [_Stack(images, low, high, place, full)] if len(full) else []

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        """File name and image number of sample `index`."""
        stack, k, _, _ = self._draw(index)
        return f"{stack.place} {k}"

    def _draw(self, index: int) -> tuple[_Stack, int, bool, np.random.Generator]:
        """The stack of a sample, the image number, whether it is a section, and the generator for the remaining
        draws."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        number = int(np.searchsorted(self.shares, rng.random(), side="right"))
        flat, sections = list(self.groups.values())[number]
        is_section = bool(sections) and rng.random() < 0.5
        stacks = sections if is_section else flat
        stack = stacks[rng.integers(len(stacks))]
        return stack, int(stack.full[rng.integers(len(stack.full))]), is_section, rng

    def __getitem__(self, index: int) -> ThickSample:
        stack, k, is_section, rng = self._draw(index)
        image = (stack.images[k] - stack.low) / (stack.high - stack.low)
        if not is_section and rng.random() < 0.5:
            image = image.mT
        if self.flips:
            image = image.flip([axis for axis in (0, 1) if rng.random() < 0.5])
        n, w = image.shape
        left = int(rng.integers(w - self.patch + 1))
        hr = self._recoloured(image[:, left : left + self.patch], rng)
        smallest, largest = self.ratio
        largest = max(min(largest, (n - 1) / FEWEST), smallest)
        ratio = smallest * (largest / smallest) ** rng.random()
        low, high = self.thickness
        thickness = ratio * rng.uniform(low, high)
        kind = "boxcar" if rng.random() < self.boxcar else "gaussian"
        matrix = thick_matrix(n, ratio, SliceProfile(kind, thickness), ratio * rng.random())
        top = int(rng.integers(n - self.patch + 1))
        rows = slice(top, top + self.patch)
        return ThickSample((matrix[rows] @ hr)[None], hr[rows].contiguous()[None])

    def _recoloured(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if self.contrast > 1:
            exponent = float(self.contrast ** rng.uniform(-1, 1))
            image = image.sign() * image.abs() ** exponent  # values below the low percentile stay negative
        if self.invert and rng.random() < self.invert:
            image = 1 - image
        if self.gain > 1:
            image = image * float(self.gain ** rng.uniform(-1, 1))
        return image


class ThickCase(NamedTuple):
    """A whole image for validation: interpolated thick slices (1, 1, n, w), the truth, and the source file."""

    lr: torch.Tensor
    hr: torch.Tensor
    place: str


def thick_cases(
    scans: Iterable[Scan], *, ratios: Sequence[float] = (2.7, 4.0, 5.5), images: int = 3, axis: int | None = None
) -> list[ThickCase]:
    """`images` in-plane images of each scan, the same in every call. The cases cycle through `ratios`, and alternate
    between rows and columns as the coarse direction."""
    cases: list[ThickCase] = []
    for scan in scans:
        volume, along = load_volume(scan)
        low, high = robust_range(volume.array)
        stack = np.moveaxis(volume.array, along, 0)
        for number in range(images):
            k = round((number + 1) / (images + 1) * (len(stack) - 1))
            image = torch.from_numpy(np.ascontiguousarray((stack[k] - low) / (high - low), np.float32))
            if axis == 1 or (axis is None and len(cases) % 2):
                image = image.mT.contiguous()
            ratio = ratios[number % len(ratios)]
            base = thick(image, ratio=ratio, profile=SliceProfile("gaussian", ratio), phase=0.3 * ratio)
            cases.append(ThickCase(base[None, None], image[None, None], f"{scan.path.name}, slice {k}"))
    return cases
