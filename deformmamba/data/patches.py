"""Training data from volumes on disk: find them, split them by subject, degrade whole slices, cut aligned patches.

k-space is global: a slice is degraded (and zero-filled) whole, and the patches of LR, HR and zero-filled image are cut
afterwards. Augmentation acts on the HR slice before it is degraded, because flipping an LR and an HR image by index
reversal would move them apart by scale - 1 HR pixels on the origin-aligned grid.
"""

import csv
import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from deformmamba.data.prepared import MANIFEST, SUFFIX, is_prepared, read_manifest, read_prepared
from deformmamba.physics.degradations import Degradation, KSpaceCrop, parse
from deformmamba.physics.kspace import resize, zero_fill
from deformmamba.volume import Volume, VolumeError, holds_dicom, in_plane, intensity_scale, read_volume, slice_axis

TISSUE = 0.15  # of the intensity scale: what is brighter is not air
FEWEST = 16  # LR pixels a side of a slice that was made coarser
SPLITS = ("train", "val", "test", "external")
INDEX = "volumes.tsv"
ENDINGS = (".nii", ".nii.gz", ".mgz")
NO_IMAGES = (".json", ".tsv", ".csv", ".txt", ".bval", ".bvec", ".png", ".jpg", ".pdf", ".zip", ".h5", SUFFIX)


@dataclass(frozen=True)
class Scan:
    """One volume on disk: its file, or the folder of its DICOM series; its subject (splits go by it), its split, and a
    group such as "T2 brain"."""

    path: Path
    subject: str
    split: str
    group: str


def find_scans(root: str | os.PathLike[str], *, val: float = 0.1, test: float = 0.1, seed: int = 0) -> list[Scan]:
    """The volumes below `root`, sorted by path, each with the split of its subject.

    A folder that `deformmamba prepare` made says all of it itself. Otherwise a `volumes.tsv` at the root (columns
    participant_id, file, split; contrast and anatomy if there) decides. Without one, every NIfTI or MGZ file counts,
    and every folder that holds DICOM files; a subject is the BIDS entity `sub-<label>` in the path (else the name of
    the file or folder), and `val` and `test` are the fractions of SUBJECTS held out: those whose name, hashed with
    `seed`, comes first, so that a new subject never moves another.

    Raises:
        VolumeError: no volume there, a subject in two splits, or a preparation that was interrupted.
    """
    root = Path(root)
    if not root.is_dir():
        raise VolumeError(f"{root}: no such folder of volumes")
    if is_prepared(root):
        scans = _from_manifest(root)
    else:
        scans = _from_index(root) if (root / INDEX).is_file() else _from_tree(root, val, test, seed)
    if not scans:
        raise VolumeError(f"{root}: no volume there; wanted files ending in {', '.join(ENDINGS)}, DICOM, or {INDEX}")
    splits = defaultdict(set)
    for scan in scans:
        splits[scan.subject].add(scan.split)
    for subject, found in splits.items():
        if len(found) > 1:
            raise VolumeError(
                f"{root / INDEX}: subject {subject} is in {' and '.join(sorted(found))}; wanted one split"
            )
    return sorted(scans, key=lambda scan: scan.path)


def _from_manifest(root: Path) -> list[Scan]:
    try:
        rows = read_manifest(root)["volumes"]
        scans = [Scan(root / row["file"], row["subject"], row["split"], row["group"]) for row in rows]
    except (KeyError, TypeError):
        raise VolumeError(f"{root / MANIFEST}: damaged: no list of volumes; prepare the folder again") from None
    for scan in scans:
        if not scan.path.is_file():
            raise VolumeError(f"{scan.path}: its manifest names it, and it is missing; prepare the folder again")
    return scans


def _from_index(root: Path) -> list[Scan]:
    scans = []
    with open(root / INDEX, newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                path, subject, split = root / row["file"], row["participant_id"], row["split"]
            except KeyError as error:
                raise VolumeError(f"{root / INDEX}: no column {error}; wanted participant_id, file, split") from None
            if split not in SPLITS or not path.exists():  # a DICOM series is a folder
                problem = f"split {split!r}" if split not in SPLITS else f"missing file {row['file']}"
                raise VolumeError(f"{root / INDEX}: {problem} of {subject}; splits are {', '.join(SPLITS)}")
            scans.append(Scan(path, subject, split, f"{row.get('contrast', '')} {row.get('anatomy', '')}".strip()))
    return scans


def _from_tree(root: Path, val: float, test: float, seed: int) -> list[Scan]:
    paths = []
    for folder, files in folders_below(root):
        paths += [path for path in files if path.name.endswith(ENDINGS)]
        if holds_dicom(path for path in files if not path.name.endswith((*ENDINGS, *NO_IMAGES))):
            paths.append(folder)

    def subject(path: Path) -> str:
        entity = re.search(r"sub-[A-Za-z0-9]+", str(path.relative_to(root)))
        return entity[0] if entity else path.name.split(".")[0]

    def position(name: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64

    def split(name: str) -> str:
        where = position(name)
        return "test" if where < test else "val" if where < test + val else "train"

    return [Scan(path, subject(path), split(subject(path)), "") for path in paths]


def folders_below(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """`root` and each folder below it with its files, sorted; links are followed, each folder comes once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(folder), [path for name in sorted(names) if (path := Path(folder, name)).is_file()]


def load_volume(path: str | os.PathLike[str], *, phase: bool = False) -> tuple[Volume, int]:
    """A volume and the axis of its slices, which `deformmamba.volume.slice_axis` finds; of a prepared file it is 0.

    A prepared file knows neither how its slices lie in the patient (`Volume.codes` are 0) nor how far they are apart
    (1 mm here). Complex slices (fastMRI) come as their magnitude, with `phase` as they are, complex64.
    """
    if not Path(path).name.endswith(SUFFIX):
        volume = read_volume(path)
        return volume, slice_axis(volume)
    prepared = read_prepared(path)
    slices = prepared.slices
    if np.iscomplexobj(slices) and not phase:
        slices = np.abs(slices)
    return Volume(slices, np.diag([1.0, *prepared.spacing, 1.0]), codes=(0, 0)), 0


class Slices(NamedTuple):
    """(slices, H, W) in scanner units (prepared ones: about [0, 1]), float32, and the pixel's (height, width) in mm."""

    array: np.ndarray
    spacing: tuple[float, float]


def load_slices(path: str | os.PathLike[str], multiple: int = 1, *, phase: bool = False) -> Slices:
    """The slices of a volume, see `load_volume`.

    H and W are cropped at their ends to `multiple`: the scale does not divide every image, and pixel 0 stays where it
    is.
    """
    volume, axis = load_volume(path, phase=phase)
    slices = np.moveaxis(volume.array, axis, 0)
    first, second = in_plane(axis)
    h, w = (n - n % multiple for n in slices.shape[1:])
    if not h or not w:
        raise VolumeError(f"{path}: slices of {slices.shape[1]}x{slices.shape[2]}, smaller than {multiple}x{multiple}")
    return Slices(np.ascontiguousarray(slices[:, :h, :w]), (volume.spacing[first], volume.spacing[second]))


class Sample(NamedTuple):
    """LR (1, p, p), HR (1, s * p, s * p) and zero-filled LR, of one place; about [0, 1] by the volume's LR scale."""

    lr: torch.Tensor
    hr: torch.Tensor
    base: torch.Tensor


class PatchDataset(Dataset[Sample]):
    """Random aligned patches of the slices of many volumes, each a function of (seed, index) alone.

    An epoch has no meaning here: index 0, 1, 2, ... is one endless stream, so a run resumes by starting further on, and
    workers or processes may share it in any way.

    Args:
        scans: the volumes. Slices are kept in memory (float32); prepared ones (`deformmamba prepare`) stay on the disk,
            mapped into memory, and are read as they are drawn.
        scale: factor between HR and LR. Slices are cropped at their ends to a multiple of it, see `load_slices`.
        patch: LR patch size in pixels; smaller slices are refused (see `coarsest` for what becomes of smaller ones).
        length: how many samples there are.
        degradation: what makes LR of HR, an object of `physics.degradations` or its text; None: the k-space crop. Its
            noise is drawn anew for each sample. `Sample.base` is the zero-filled LR in any case, as a model computes
            it; a degradation on the half-pixel grid is for models on that grid.
        jitter: share of the samples that other degradations of the same scale and grid make, by their text, such as
            {"k-space >> rician:snr=30": 0.1}; `degradation` makes the rest.
        weights: share of each group (`Scan.group`), by name; groups left out do not count. None: every slice alike.
        intensity: rule of the intensity scale, from the LR volume, as at inference.
        flips: mirror and transpose the HR slice at random.
        contrast: largest exponent g of a random contrast curve x -> x^c, c log-uniform in [1/g, g]; 1 for none.
        invert: share of the samples that are turned into their negative, 1 - x, so that dark details among bright
            tissue are seen as often as the contrary.
        lesions: share of the samples with small soft ellipses in them, about one for each 500 pixels, 2 to 10 pixels
            long, as often darker as brighter than the tissue they lie in, by up to half of the intensity scale.
        coarsest: largest factor by which the HR slice is k-space cropped first, so that one network sees several voxel
            sizes; half of the samples are, by a factor log-uniform in [1, coarsest], but to no fewer LR pixels a side
            than 16 or the patch; 1 for none. A patch of a slice that has become smaller than itself goes on at the
            opposite edge, as images of a discrete Fourier transform do. `spacings` says what was reached.
        gain: largest factor of a random intensity scaling, log-uniform in [1/gain, gain].
        seed: of everything random.
        progress: a bar while volumes are read, and a line that says how many slices were cropped.

    Attributes:
        spacings: LR pixel sizes in mm, smallest and largest, that samples can have.

    Raises:
        VolumeError: no scan, slices smaller than a patch, or a volume that cannot be read.
        ValueError: a degradation that cannot be built, or of another scale or grid; a number out of range; shares of
            `jitter` beyond 1.
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
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.scale, self.patch, self.length, self.seed = scale, patch, length, seed
        self.flips, self.contrast, self.invert, self.lesions = flips, contrast, invert, lesions
        self.coarsest, self.gain = coarsest, gain
        ranges = (
            ("patch", patch, 1, math.inf), ("contrast", contrast, 1, math.inf), ("gain", gain, 1, math.inf),
            ("coarsest", coarsest, 1, math.inf), ("invert", invert, 0, 1), ("lesions", lesions, 0, 1),
            *((f"the weight of {name}", share, 0, math.inf) for name, share in (weights or {}).items()),
        )  # fmt: skip
        for name, value, lowest, highest in ranges:
            if not lowest <= value <= highest or value == math.inf:
                between = f"from {lowest} to {highest}" if highest < math.inf else f"of {lowest} or more"
                raise ValueError(f"PatchDataset: {name} is {value}; wanted a number {between}")
        if weights and not sum(weights.values()):
            raise ValueError("PatchDataset: all weights are 0; wanted one above 0")
        if isinstance(degradation, str):
            degradation = parse(degradation, scale=scale)
        self.degradation = degradation or KSpaceCrop(scale=scale)
        if self.degradation.scale != scale:
            raise ValueError(f"PatchDataset: {self.degradation} shrinks by {self.degradation.scale}; wanted {scale}")
        self.jitter = {parse(text, scale=scale): share for text, share in (jitter or {}).items()}
        for other in self.jitter:
            if (other.scale, other.grid) != (scale, self.degradation.grid):
                raise ValueError(
                    f"PatchDataset: jitter {other} shrinks by {other.scale} to the {other.grid} grid; "
                    f"wanted {scale} and {self.degradation.grid}, as {self.degradation}"
                )
        if sum(self.jitter.values()) > 1 or any(share < 0 for share in self.jitter.values()):
            raise ValueError(
                f"PatchDataset: jitter has the shares {list(self.jitter.values())}; wanted at most 1 in all"
            )
        chosen = [scan for scan in scans if weights is None or scan.group in weights]
        if not chosen:
            raise VolumeError(f"PatchDataset: no scan to train on; groups wanted: {', '.join(weights or ['any'])}")
        groups: dict[str, list[_Slice]] = {}
        spacings: list[float] = []
        bar: Iterable[Scan] = chosen
        if progress:
            from tqdm import tqdm

            bar = tqdm(chosen, desc="reading", unit="volume", disable=None)
        cropped = 0
        for scan in bar:
            loaded = load_slices(scan.path, phase=True)
            h, w = (n - n % scale for n in loaded.array.shape[1:])
            cropped += (h, w) != loaded.array.shape[1:]
            hr = torch.from_numpy(loaded.array)[:, :h, :w]
            if min(h, w) < patch * scale:
                raise VolumeError(
                    f"{scan.path}: slices {tuple(hr.shape[1:])} are smaller than a patch, {patch * scale}"
                )
            unit = self._unit(hr, intensity)
            # a nearly empty slice teaches nothing
            groups.setdefault(scan.group, []).extend(
                _Slice(image, unit, f"{scan.path.name}, slice {k}")
                for k, image in enumerate(hr)
                if image.abs().mean() / unit > 0.02
            )
            coarse = self._coarse_size(h, w, coarsest)
            spacings += loaded.spacing
            spacings += (size * n / m for size, n, m in zip(loaded.spacing, (h, w), coarse, strict=True))
        if progress and cropped:
            from tqdm import tqdm

            tqdm.write(f"{cropped} of {len(chosen)} volumes were cropped at their ends to a multiple of {scale} pixels")
        if not any(groups.values()):
            raise VolumeError("PatchDataset: every slice is nearly empty; is the data in another place?")
        groups = {name: slices for name, slices in groups.items() if slices}
        self.groups = list(groups.values())
        self.spacings = (scale * min(spacings), scale * max(spacings))
        shares = [weights[name] if weights else len(slices) for name, slices in groups.items()]
        self.shares = np.cumsum(shares) / np.sum(shares)

    def _unit(self, hr: torch.Tensor, intensity: str) -> float:
        """The intensity scale of the LR volume; noise levels refer to an image of about [0, 1]."""
        bright = intensity_scale(hr.abs().numpy())
        return bright * intensity_scale(self.degradation(hr / bright).numpy(), intensity)

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        """File and slice (along its slice axis, from 0) that sample `index` is cut from."""
        return self._drawn(index)[0].place

    def _drawn(self, index: int) -> tuple["_Slice", float, np.random.Generator]:
        """The slice of a sample, the factor by which it becomes coarser, and the generator of all that follows."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        group = int(np.searchsorted(self.shares, rng.random(), side="right"))
        factor = self.coarsest ** rng.random() if self.coarsest > 1 and rng.random() < 0.5 else 1.0
        return self.groups[group][rng.integers(len(self.groups[group]))], factor, rng

    def __getitem__(self, index: int) -> Sample:
        drawn, factor, rng = self._drawn(index)
        hr = self._augment(drawn.image / drawn.unit, factor, rng)
        lr = self._degradation(rng)(hr, seed=(self.seed, index))
        base = zero_fill(lr, self.scale)
        hr = hr.abs() if hr.is_complex() else hr
        corner = [int(rng.integers(n - self.patch + 1 if n >= self.patch else n)) for n in lr.shape]
        return Sample(
            *(_cut(image, corner, self.patch, s) for image, s in ((lr, 1), (hr, self.scale), (base, self.scale)))
        )

    def _degradation(self, rng: np.random.Generator) -> Degradation:
        if self.jitter:
            drawn = rng.random()
            for other, share in self.jitter.items():
                drawn -= share
                if drawn < 0:
                    return other
        return self.degradation

    def _augment(self, hr: torch.Tensor, factor: float, rng: np.random.Generator) -> torch.Tensor:
        if self.flips:
            hr = hr.flip([axis for axis in (-2, -1) if rng.random() < 0.5])
            if rng.random() < 0.5:
                hr = hr.mT
        if self.contrast > 1:
            exponent = float(self.contrast ** rng.uniform(-1, 1))
            hr = _recoloured(hr, lambda magnitude: magnitude**exponent)
        if self.invert and rng.random() < self.invert:
            hr = _recoloured(hr, lambda magnitude: (1 - magnitude).clamp(min=0))
        if self.lesions and rng.random() < self.lesions:
            spots = _ellipses(hr.abs() > TISSUE, rng)
            hr = _recoloured(hr, lambda magnitude: (magnitude + spots).clamp(min=0))
        if self.gain > 1:
            hr = hr * float(self.gain ** rng.uniform(-1, 1))
        if factor > 1:
            low = resize(hr, self._coarse_size(hr.shape[0], hr.shape[1], factor))
            hr = low if hr.is_complex() else low.abs()
        return hr

    def _coarse_size(self, h: int, w: int, factor: float) -> tuple[int, int]:
        """h x w pixels, `factor` times fewer, to a multiple of the scale; how small they may become, see `coarsest`."""
        least = min(self.patch, FEWEST)
        h, w = (max(int(n / factor) // self.scale, least) * self.scale for n in (h, w))
        return h, w


def _cut(image: torch.Tensor, corner: Sequence[int], patch: int, scale: int) -> torch.Tensor:
    """(H, W) to (1, scale * patch, scale * patch), from scale * corner on, across the edges to the opposite ones."""
    rows, columns = (
        (scale * start + torch.arange(scale * patch)) % n for start, n in zip(corner, image.shape, strict=True)
    )
    return image[rows[:, None], columns][None]


def _ellipses(tissue: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(H, W): soft ellipses of positive and negative contrast at random places of `tissue` (H, W), zero elsewhere."""
    image = torch.zeros(tissue.shape)
    places = tissue.nonzero()
    for y, x in places[rng.integers(len(places), size=len(places) // 500)].tolist() if len(places) else ():
        long, short = sorted(np.exp(rng.uniform(np.log(1.0), np.log(5.0), size=2)), reverse=True)  # half axes
        angle, contrast = rng.uniform(0, np.pi), rng.choice((-1, 1)) * rng.uniform(0.1, 0.5)
        top, left, reach = max(y - 8, 0), max(x - 8, 0), 9
        rows, columns = np.mgrid[top : y + reach, left : x + reach]
        along = (rows - y) * np.sin(angle) + (columns - x) * np.cos(angle)
        across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        # half of the contrast at the edge, which is about a pixel wide
        spot = torch.from_numpy(contrast / (1 + np.exp(4 * short * (np.hypot(along / long, across / short) - 1))))
        place = image[top : y + reach, left : x + reach]
        place += spot[: place.shape[0], : place.shape[1]]
    return image


def _recoloured(image: torch.Tensor, curve: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The image with a curve over its magnitudes; of a complex one the phase stays."""
    if image.is_complex():
        return torch.polar(curve(image.abs()), image.angle())
    return curve(image.clamp(min=0))


class _Slice(NamedTuple):
    """One slice (H, W) in the units of its file, what it is divided by, where it is."""

    image: torch.Tensor
    unit: float
    place: str


def subjects(scans: Sequence[Scan]) -> list[str]:
    """The distinct subjects, sorted."""
    return sorted({scan.subject for scan in scans})
