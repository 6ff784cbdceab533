"""Training data from volumes on disk: find them, split them by subject, degrade whole slices, cut aligned patches.

k-space is global: a slice is degraded (and zero-filled) whole, and the patches of LR, HR and zero-filled image are cut
afterwards, all on the origin-aligned grid. Augmentation acts on the HR slice before it is degraded, because flipping an
LR and an HR image by index reversal would move them apart by scale - 1 HR pixels.
"""

import csv
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from deformmamba.kspace import crop_spectrum, degrade, fft2c, ifft2c, zero_fill
from deformmamba.volume import VolumeError, intensity_scale, read_volume, slice_axis

SPLITS = ("train", "val", "test", "external")
INDEX = "volumes.tsv"
ENDINGS = (".nii", ".nii.gz", ".mgz")


@dataclass(frozen=True)
class Scan:
    """One volume on disk: its file, its subject (splits go by it), its split, and a group such as "T2 brain"."""

    path: Path
    subject: str
    split: str
    group: str


def find_scans(root: str | os.PathLike[str], *, val: float = 0.1, test: float = 0.1, seed: int = 0) -> list[Scan]:
    """The volumes below `root`, sorted by path, each with the split of its subject.

    A `volumes.tsv` at the root (columns participant_id, file, split; contrast and anatomy if there) decides. Without
    one, every NIfTI or MGZ file counts, its subject is the BIDS entity `sub-<label>` in its path (else the file's own
    name), and `val` and `test` are the fractions of SUBJECTS held out: those whose name, hashed with `seed`, comes
    first, so that a new subject never moves another.

    Raises:
        VolumeError: no volume there, or a subject in two splits.
    """
    root = Path(root)
    if not root.is_dir():
        raise VolumeError(f"{root}: no such folder of volumes")
    scans = _from_index(root) if (root / INDEX).is_file() else _from_tree(root, val, test, seed)
    if not scans:
        raise VolumeError(f"{root}: no volume there; wanted files ending in {', '.join(ENDINGS)}, or {INDEX}")
    splits = defaultdict(set)
    for scan in scans:
        splits[scan.subject].add(scan.split)
    for subject, found in splits.items():
        if len(found) > 1:
            raise VolumeError(
                f"{root / INDEX}: subject {subject} is in {' and '.join(sorted(found))}; wanted one split"
            )
    return sorted(scans, key=lambda scan: scan.path)


def _from_index(root: Path) -> list[Scan]:
    scans = []
    with open(root / INDEX, newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                path, subject, split = root / row["file"], row["participant_id"], row["split"]
            except KeyError as error:
                raise VolumeError(f"{root / INDEX}: no column {error}; wanted participant_id, file, split") from None
            if split not in SPLITS or not path.is_file():
                problem = f"split {split!r}" if split not in SPLITS else f"missing file {row['file']}"
                raise VolumeError(f"{root / INDEX}: {problem} of {subject}; splits are {', '.join(SPLITS)}")
            scans.append(Scan(path, subject, split, f"{row.get('contrast', '')} {row.get('anatomy', '')}".strip()))
    return scans


def _from_tree(root: Path, val: float, test: float, seed: int) -> list[Scan]:
    paths = sorted(path for path in root.rglob("*") if path.name.endswith(ENDINGS) and path.is_file())

    def subject(path: Path) -> str:
        entity = re.search(r"sub-[A-Za-z0-9]+", str(path.relative_to(root)))
        return entity[0] if entity else path.name.split(".")[0]

    def position(name: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64

    def split(name: str) -> str:
        where = position(name)
        return "test" if where < test else "val" if where < test + val else "train"

    return [Scan(path, subject(path), split(subject(path)), "") for path in paths]


class Slices(NamedTuple):
    """(slices, H, W) in scanner units, float32, and the (height, width) of a pixel in mm."""

    array: np.ndarray
    spacing: tuple[float, float]


def load_slices(path: str | os.PathLike[str], multiple: int = 1) -> Slices:
    """The slices of a volume, across the axis that `deformmamba.volume.slice_axis` finds.

    H and W are cropped at their ends to `multiple`.
    """
    volume = read_volume(path)
    axis = slice_axis(volume)
    slices = np.moveaxis(volume.array, axis, 0)
    h, w = (n - n % multiple for n in slices.shape[1:])
    if not h or not w:
        raise VolumeError(f"{path}: slices of {slices.shape[1]}x{slices.shape[2]}, smaller than {multiple}x{multiple}")
    height, width = (size for a, size in enumerate(volume.spacing) if a != axis)
    return Slices(np.ascontiguousarray(slices[:, :h, :w], dtype=np.float32), (height, width))


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
        scans: the volumes; all slices are kept in memory (float32).
        scale: factor between HR and LR.
        patch: LR patch size in pixels; smaller slices are refused.
        length: how many samples there are.
        weights: share of each group (`Scan.group`), by name; groups left out do not count. None: every slice alike.
        intensity: rule of the intensity scale, from the LR volume, as at inference.
        flips: mirror and transpose the HR slice at random.
        contrast: largest exponent g of a random contrast curve x -> x^c, c log-uniform in [1/g, g]; 1 for none.
        coarsest: largest factor by which the HR slice is k-space cropped first, so that one network sees several voxel
            sizes; half of the samples are, by a factor log-uniform in [1, coarsest]; 1 for none.
        gain: largest factor of a random intensity scaling, log-uniform in [1/gain, gain].
        seed: of everything random.
    """

    def __init__(
        self,
        scans: Iterable[Scan],
        *,
        scale: int,
        patch: int = 32,
        length: int,
        weights: Mapping[str, float] | None = None,
        intensity: str = "p99.9",
        flips: bool = True,
        contrast: float = 1.0,
        coarsest: float = 1.0,
        gain: float = 1.0,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.scale, self.patch, self.length, self.seed = scale, patch, length, seed
        self.flips, self.contrast, self.coarsest, self.gain = flips, contrast, coarsest, gain
        groups: dict[str, list[torch.Tensor]] = defaultdict(list)
        spacings: list[float] = []
        chosen = [scan for scan in scans if weights is None or scan.group in weights]
        if not chosen:
            raise VolumeError(f"PatchDataset: no scan to train on; groups wanted: {', '.join(weights or ['any'])}")
        if progress:
            from tqdm import tqdm

            chosen = tqdm(chosen, desc="reading", unit="volume", disable=None)
        for scan in chosen:
            loaded = load_slices(scan.path, scale)
            hr = torch.from_numpy(loaded.array)
            spacings.extend(loaded.spacing)
            if min(hr.shape[-2:]) < patch * scale:
                raise VolumeError(
                    f"{scan.path}: slices {tuple(hr.shape[1:])} are smaller than a patch, {patch * scale}"
                )
            hr = hr / intensity_scale(degrade(hr, scale).numpy(), intensity)
            groups[scan.group].extend(hr[hr.mean((-2, -1)) > 0.02])  # a nearly empty slice teaches nothing
        self.groups = list(groups.values())
        # LR pixel sizes in mm, smallest and largest, that samples have
        self.spacings = (scale * min(spacings), scale * max(spacings) * coarsest)
        shares = [weights[name] if weights else len(slices) for name, slices in groups.items()]
        self.shares = np.cumsum(shares) / np.sum(shares)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        slices = self.groups[int(np.searchsorted(self.shares, rng.random(), side="right"))]
        hr = self._augment(slices[rng.integers(len(slices))], rng)
        lr = degrade(hr, self.scale)
        base = zero_fill(lr, self.scale)
        y, x = (int(rng.integers(n - self.patch + 1)) for n in lr.shape)
        p, s = self.patch, self.scale
        large = slice(s * y, s * (y + p)), slice(s * x, s * (x + p))
        small = slice(y, y + p), slice(x, x + p)
        return Sample(*(image[None, *at].clone() for image, at in ((lr, small), (hr, large), (base, large))))

    def _augment(self, hr: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if self.flips:
            hr = hr.flip([axis for axis in (-2, -1) if rng.random() < 0.5])
            if rng.random() < 0.5:
                hr = hr.mT
        if self.contrast > 1:
            hr = hr.clamp(min=0) ** float(self.contrast ** rng.uniform(-1, 1))
        if self.gain > 1:
            hr = hr * float(self.gain ** rng.uniform(-1, 1))
        if self.coarsest > 1 and rng.random() < 0.5:
            factor = self.coarsest ** rng.random()
            smallest = self.patch * self.scale
            size = [max(int(n / factor) // self.scale * self.scale, smallest) for n in hr.shape]
            hr = ifft2c(crop_spectrum(fft2c(hr), (size[0], size[1]))).abs()
        return hr


def subjects(scans: Sequence[Scan]) -> list[str]:
    """The distinct subjects, sorted."""
    return sorted({scan.subject for scan in scans})
