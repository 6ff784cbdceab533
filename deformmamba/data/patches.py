"""Training data: degrades whole slices and cuts aligned patches.

k-space is global, so each slice is degraded and zero-filled whole; the patches of the LR, HR and zero-filled images are
cut afterwards. `scans.py` finds and reads the volumes, `augmentation.py` changes the slices before degradation.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from deformmamba.annotations import check_seed, check_types, is_one_of
from deformmamba.data.augmentation import TISSUE, Augmentation, check_range, closed
from deformmamba.data.groups import check_weights, cumulative_shares
from deformmamba.data.scans import Scan, Slices, find_scans, load_slices, load_volume, subjects
from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.models.normalise import slice_range
from deformmamba.models.skip import BASES
from deformmamba.physics.degradations import Degradation, KSpaceCrop, parse
from deformmamba.physics.edges import cubic
from deformmamba.physics.kspace import resize
from deformmamba.volume import VolumeError, intensity_scale
from deformmamba.volume.inspection import too_negative

__all__ = ["PatchDataset", "Sample", "Scan", "Slices", "find_scans", "load_slices", "load_volume", "subjects"]

FEWEST = 16  # smallest side, in LR pixels, of a slice that was made coarser
EMPTY = 0.02  # share of the intensity scale: slices with a lower mean are nearly empty and are skipped


class Sample(NamedTuple):
    """LR (1, p, p), HR (1, s * p, s * p) and zero-filled patch of one place; about [0, 1] by the volume's LR scale.

    `norm` (1, 2) is the `slice_range` of the whole slice.
    """

    lr: torch.Tensor
    hr: torch.Tensor
    base: torch.Tensor
    norm: torch.Tensor


class PatchDataset(Dataset[Sample]):
    """Random aligned patches of the slices of many volumes, each a function of (seed, index) alone.

    There are no epochs: indices 0, 1, 2, ... form one endless stream. A run resumes from a later index, and workers or
    processes may share the indices in any way.

    Args:
        scans: the volumes. Slices are kept in memory (float32). Prepared slices (`deformmamba prepare`) stay on disk,
            memory-mapped, and are read on demand.
        scale: factor between HR and LR. Slices are cropped at their ends to a multiple of it, see `load_slices`.
        patch: LR patch size in pixels; smaller slices are refused (`coarsest` treats slices that become smaller).
        length: number of samples.
        degradation: makes LR from HR: an object of `physics.degradations` or its text; None: the k-space crop. Its
            noise is drawn anew for each sample. `Sample.base` always comes from the LR image, as in a model. Use a
            degradation on the half-pixel grid for models on that grid only.
        jitter: other degradations of the same scale and grid, as text, with the share of samples that each makes, such
            as {"k-space >> rician:snr=30": 0.1}; `degradation` makes the rest.
        weights: share of each group (`Scan.group`), by name; other groups are ignored. None: all slices count equally.
        intensity: rule of the intensity scale, computed from the LR volume, as at inference.
        flips: mirror and transpose the HR slice at random.
        contrast: largest exponent g of a random contrast curve x -> x^c, c log-uniform in [1/g, g]; 1 for none.
        invert: share of the samples replaced by their negative, 1 - x, so that dark details in bright tissue are as
            frequent as bright details in dark tissue.
        lesions: share of the samples with small soft ellipses, about one for each 500 pixels, 2 to 10 pixels long.
            They are equally often darker and brighter than the tissue, by up to half of the intensity scale.
        coarsest: largest factor by which the HR slice is k-space cropped first, so that the network trains on several
            voxel sizes; 1 for none. It applies to half of the samples, with a factor log-uniform in [1, coarsest]. A
            side keeps at least 16 LR pixels, or the patch size if that is smaller. A patch larger than its slice
            continues at the opposite edge, by the periodicity of the discrete Fourier transform. `spacings` gives the
            resulting pixel sizes.
        gain: largest factor of a random intensity scaling, log-uniform in [1/gain, gain].
        markers: share of the samples with bright spots, 2 to 20 times as bright as bright tissue, on 0.05 to 0.5 % of
            the slice's pixels.
        masked: share of the samples whose background is set to 0 in LR and HR, as after skull stripping.
        cut: share of the samples that are treated as complete fields of view: `Sample.base` and `Sample.norm` are
            computed from the patch alone, as a model does for an image that ends there.
        base: name of the skip that computes `Sample.base` (`models.skip.BASES`).
        seed: seeds all randomness.
        progress: show a progress bar while reading volumes, and a line with the number of cropped volumes.

    Attributes:
        spacings: smallest and largest LR pixel size in mm that samples can have.

    Raises:
        VolumeError: no scan, slices smaller than a patch, or a volume that cannot be read.
        ValueError: a degradation that cannot be built, or has another scale or grid; a number out of range; shares of
            `jitter` that add up to more than 1.
    """

    def __init__(
        self,
        scans: Iterable[Scan],
        *,
        scale: int,
        patch: int = 32,
        length: int,
        degradation: Degradation | str | None = None,
        jitter: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        intensity: str = "p99.9",
        flips: bool = True,
        contrast: float = 1.0,
        invert: float = 0.0,
        lesions: float = 0.0,
        coarsest: float = 1.0,
        gain: float = 1.0,
        markers: float = 0.0,
        masked: float = 0.0,
        cut: float = 0.0,
        base: str = "zero-fill",
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        check_types(PatchDataset.__init__, locals())
        scans = list(scans)
        if strangers := [scan for scan in scans if not isinstance(scan, Scan)]:
            raise InvalidType(
                f"PatchDataset: scans holds {shown(strangers[0])}; wanted Scan objects, as find_scans(folder) returns"
            )
        check_range("patch", patch, 1)
        check_range("masked", masked, 0, 1)
        check_range("cut", cut, 0, 1)
        if not is_one_of(base, BASES):
            raise InvalidArgument(f"PatchDataset: base is {shown(base)}; it must be one of {', '.join(BASES)}")
        check_range("coarsest", coarsest, 1)
        self.scale, self.patch, self.length, self.seed = scale, patch, length, check_seed(seed)
        self.coarsest, self.masked, self.cut, self.base = coarsest, masked, cut, base
        self.augmentation = Augmentation(
            flips=flips, contrast=contrast, invert=invert, lesions=lesions, gain=gain, markers=markers
        )
        self.degradation = _parsed_degradation(degradation, scale)
        self.jitter = _parsed_jitter(jitter or {}, self.degradation)
        check_weights(weights, of="PatchDataset")

        chosen = [scan for scan in scans if weights is None or scan.group in weights]
        if not chosen:
            raise VolumeError(
                f"PatchDataset: no scan to train on in the groups {', '.join(weights or ['any'])}; check weights="
            )
        groups, spacings = self._read(chosen, intensity, progress)
        self.groups = list(groups.values())
        self.spacings = (scale * min(spacings), scale * max(spacings))
        counts = {name: len(slices) for name, slices in groups.items()}
        self.shares = cumulative_shares(counts, weights, of="PatchDataset")

    def _read(
        self, scans: Sequence[Scan], intensity: str, progress: bool
    ) -> tuple[dict[str, list["_Slice"]], list[float]]:
        """The slices of each group without nearly empty ones, and their possible HR pixel sizes in mm."""
        groups: dict[str, list[_Slice]] = {}
        spacings: list[float] = []
        n_cropped = 0
        for scan in _with_bar(scans, progress):
            loaded = load_slices(scan, phase=True)
            h, w = (n - n % self.scale for n in loaded.array.shape[1:])
            n_cropped += (h, w) != loaded.array.shape[1:]
            hr = torch.from_numpy(loaded.array)[:, :h, :w]
            check_magnitudes(scan, hr.numpy())
            if min(h, w) < self.patch * self.scale:
                raise VolumeError(
                    f"{scan.path}: slices of {h}x{w} pixels are smaller than an HR patch, {self.patch * self.scale} "
                    f"(patch {self.patch} times scale {self.scale}); leave the scan out, or give a patch of "
                    f"{min(h, w) // self.scale} or less ([data] of a recipe)"
                )
            unit = self._unit(hr, intensity)
            slices = [
                _Slice(image, unit, f"{scan.path.name}, slice {k}")
                for k, image in enumerate(hr)
                if image.abs().mean() / unit > EMPTY
            ]
            if slices:
                groups.setdefault(scan.group, []).extend(slices)
            coarse = self._coarse_size(h, w, self.coarsest)
            spacings += loaded.spacing
            spacings += (size * n / m for size, n, m in zip(loaded.spacing, (h, w), coarse, strict=True))
        if progress and n_cropped:
            from tqdm import tqdm

            tqdm.write(
                f"{n_cropped} of {len(scans)} volumes were cropped at their ends to a multiple of {self.scale} pixels"
            )
        if not groups:
            raise VolumeError("PatchDataset: every slice is nearly empty; check that these are the intended scans")
        return groups, spacings

    def _unit(self, hr: torch.Tensor, intensity: str) -> float:
        """The intensity scale of the LR volume; noise levels refer to an image of about [0, 1]."""
        bright = intensity_scale(hr.abs().numpy())
        return bright * intensity_scale(self.degradation(hr / bright).numpy(), intensity)

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        """File name and slice number (along the slice axis, from 0) of sample `index`."""
        return self._draw(index)[0].place

    def _draw(self, index: int) -> tuple["_Slice", float, np.random.Generator]:
        """The slice of a sample, its coarsening factor, and the random generator for the remaining draws."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        group = int(np.searchsorted(self.shares, rng.random(), side="right"))
        factor = self.coarsest ** rng.random() if self.coarsest > 1 and rng.random() < 0.5 else 1.0
        return self.groups[group][rng.integers(len(self.groups[group]))], factor, rng

    def __getitem__(self, index: int) -> Sample:
        drawn, factor, rng = self._draw(index)
        hr = self._coarsened(self.augmentation(drawn.image / drawn.unit, rng), factor)
        lr = self._degradation(rng)(hr, seed=(self.seed, index))
        hr = hr.abs() if hr.is_complex() else hr
        if self.masked and rng.random() < self.masked:
            mask = _head(lr, rng)
            lr, hr = lr * mask, hr * (cubic(mask, self.scale) > 0.5)
        corner = [int(rng.integers(n - self.patch + 1 if n >= self.patch else n)) for n in lr.shape]
        lr_patch, hr_patch = _cut(lr, corner, self.patch, 1), _cut(hr, corner, self.patch, self.scale)
        if self.cut and min(lr.shape) > self.patch and rng.random() < self.cut:
            return Sample(lr_patch, hr_patch, BASES[self.base](lr_patch, self.scale), slice_range(lr_patch))
        base = _cut(BASES[self.base](lr, self.scale), corner, self.patch, self.scale)
        return Sample(lr_patch, hr_patch, base, slice_range(lr)[None])

    def _degradation(self, rng: np.random.Generator) -> Degradation:
        if self.jitter:
            drawn = rng.random()
            for other, share in self.jitter.items():
                drawn -= share
                if drawn < 0:
                    return other
        return self.degradation

    def _coarsened(self, hr: torch.Tensor, factor: float) -> torch.Tensor:
        """The slice (H, W) with about `factor` times fewer pixels a side, by cropping its k-space."""
        if factor == 1:
            return hr
        low = resize(hr, self._coarse_size(hr.shape[0], hr.shape[1], factor))
        return low if hr.is_complex() else low.abs()

    def _coarse_size(self, h: int, w: int, factor: float) -> tuple[int, int]:
        """h and w divided by `factor`, as multiples of the scale; `coarsest` documents the smallest size."""
        least = min(self.patch, FEWEST)
        h, w = (max(int(n / factor) // self.scale, least) * self.scale for n in (h, w))
        return h, w


def check_magnitudes(scan: Scan, slices: np.ndarray) -> None:
    """Raises VolumeError for real slices with more negative voxels than those of a magnitude image have."""
    if not np.iscomplexobj(slices) and (negative := too_negative(slices)):
        raise VolumeError(
            f"{scan.path}: {negative}, and this training is on magnitudes; add a constant to the scan that makes air "
            "0, or leave the scan out"
        )


def _cut(image: torch.Tensor, corner: Sequence[int], patch: int, scale: int) -> torch.Tensor:
    """(H, W) to (1, scale * patch, scale * patch), starting at scale * corner, with periodic boundaries."""
    rows, columns = (
        (scale * start + torch.arange(scale * patch)) % n for start, n in zip(corner, image.shape, strict=True)
    )
    return image[rows[:, None], columns][None]


def _head(lr: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A mask (h, w) as after skull stripping: 1 in the tissue (holes filled, rim eroded at random), 0 outside.

    In half of the cases an ellipse also cuts through the tissue.
    """
    mask = closed((lr.abs() > TISSUE).to(lr.dtype)[None, None])
    rim = 2 * int(rng.integers(0, 4)) + 1
    mask = -F.max_pool2d(-mask, rim, 1, rim // 2)[0, 0]
    if rng.random() < 0.5:
        axes = [
            (torch.arange(n, dtype=lr.dtype) / n - rng.uniform(0.4, 0.6)) / rng.uniform(0.25, 0.45) for n in lr.shape
        ]
        mask = mask * (axes[0][:, None] ** 2 + axes[1] ** 2 < 1)
    return mask


class _Slice(NamedTuple):
    """One slice (H, W) in the units of its file, its divisor, and its place (file and slice number)."""

    image: torch.Tensor
    unit: float
    place: str


def _parsed_degradation(degradation: Degradation | str | None, scale: int) -> Degradation:
    if isinstance(degradation, str):
        degradation = parse(degradation, scale=scale)
    degradation = degradation or KSpaceCrop(scale=scale)
    if degradation.scale != scale:
        raise InvalidArgument(f"PatchDataset: {degradation} shrinks by {degradation.scale}; wanted {scale}")
    return degradation


def _parsed_jitter(jitter: Mapping[str, float], main: Degradation) -> dict[Degradation, float]:
    """The degradations of `jitter` with their shares; all have the scale and grid of `main`."""
    parsed = {parse(text, scale=main.scale): share for text, share in jitter.items()}
    for other in parsed:
        if (other.scale, other.grid) != (main.scale, main.grid):
            raise InvalidArgument(
                f"PatchDataset: jitter {other} shrinks by {other.scale} to the {other.grid} grid; "
                f"wanted {main.scale} and {main.grid}, as {main}"
            )
    if not sum(parsed.values()) <= 1 or any(not share >= 0 for share in parsed.values()):
        raise InvalidArgument(
            f"PatchDataset: jitter has the shares {list(parsed.values())}; their sum must be at most 1"
        )
    return parsed


def _with_bar(scans: Sequence[Scan], progress: bool) -> Iterable[Scan]:
    if not progress:
        return scans
    from tqdm import tqdm

    bar: Iterable[Scan] = tqdm(scans, desc="reading", unit="volume", disable=None)
    return bar
