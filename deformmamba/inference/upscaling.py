"""Volumes and slices: normalise, run the model, correct, restore units, place in the world."""

import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba.inference.tiling import default_overlap, spans, tiled
from deformmamba.physics.kspace import Consistency, Grid, data_consistency, lowpass, zero_fill
from deformmamba.volume import (
    Volume,
    VolumeError,
    chosen_axis,
    from_nibabel,
    in_plane,
    intensity_scale,
    normalise,
    restore,
    to_nibabel,
)
from deformmamba.volume.inspection import is_far, trained_spacings

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

# a Volume, an array, a tensor or a nibabel image: what comes in goes out
Scan = TypeVar("Scan")

# HR pixels in one batch on a CPU: larger batches cost memory and gain no speed there
CPU_BATCH_PIXELS = 1 << 18
# HR pixels in all batches that run at once on a CPU
CPU_PARALLEL_PIXELS = 8 * CPU_BATCH_PIXELS
# of the accelerator's free memory, after one slice has shown what a slice takes
FREE_MEMORY_SHARE = 0.6

# of the intensity scale: what is brighter is no air; best of 0.02, 0.05 and 0.1 on validation (ixi-4x)
SIGNAL = 0.1
# of a slice's pixels: with less air than this nothing is said of noise
ENOUGH_AIR = 0.02


class Settings(TypedDict, total=False):
    """The keyword arguments of `upscale`, for functions that hand them on."""

    axis: int | None
    batch_size: int | None
    consistency: Consistency | None
    ensemble: bool
    tile: int | None
    overlap: int | None
    device: str | torch.device | None
    progress: bool


def upscale(
    model: "SRModel",
    scan: Scan,
    *,
    axis: int | None = None,
    batch_size: int | None = None,
    consistency: Consistency | None = None,
    ensemble: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Scan:
    """`scan` at `model.scale` times the in-plane resolution: the same kind of object, float32, in the same units.

    Slices are taken across `axis`, whole, and divided by one intensity scale of the whole scan by the model's rule.
    The number of slices stays. Magnitude images stay so: negative outputs become 0 if the scan has no negative value,
    and are kept if it has one.

    Args:
        model: any SRModel; run in eval mode.
        scan: a `Volume` or a nibabel image (NIfTI or MGH, 3-D), whose affine follows on the model's grid; or real
            numbers (h, w) or 3-D as an array or tensor.
        axis: where slices are stacked; None: `volume.slice_axis`, which for bare numbers, whose geometry nobody knows,
            is the last axis (or the only one of length 1). (slices, h, w) needs axis=0.
        batch_size: slices at once; None: as memory allows.
        consistency: correct each slice so that degrading it gives the input back (`kspace.data_consistency`; before
            negative values become 0); "object": only where there is signal, since ringing in air is what the network
            had removed, and only as far as noise does not explain the difference, since noise is what it had removed
            too; None: what was found best for the weights (`model.consistency`, else off).
        ensemble: the mean over the eight reflections and transposes of each slice, see `predict`: eight times the work
            for 0.15 dB (ixi-4x, validation, T2 brain; spine 0.12).
        tile: run the model on tiles of this side, in LR pixels, blended (`tiling.tiled`), for slices that do not fit
            into memory; None: on whole slices, as the networks want it.
        overlap: LR pixels that neighbouring tiles share; None: `tiling.default_overlap`.
        device: where to run; moves the model there. None: where the model is.
        progress: a bar on stderr, if that is a terminal.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, not 2-D or 3-D, no such axis, or slices smaller than the
            model takes.
        ValueError: consistency asked of a model on the half-pixel grid; a tile that the model or the overlap is too
            large for.
    """
    settings = Settings(
        axis=axis, batch_size=batch_size, consistency=consistency, ensemble=ensemble, tile=tile, overlap=overlap,
        device=device, progress=progress,
    )  # fmt: skip
    volume, like, settings = _opened(scan, settings)
    job = Upscaling(model, volume, **settings)
    out = job.empty()
    sharp = np.moveaxis(out, job.axis, 0)

    def put(k: int, image: np.ndarray, _: np.ndarray | None) -> None:
        sharp[k] = image

    job.run(put)
    return like(job, out)


def upscale_with_uncertainty(model: "SRModel", scan: Scan, **settings: Unpack[Settings]) -> tuple[Scan, Scan]:
    """`upscale(model, scan, ensemble=True)`, and beside it where its eight members disagree.

    The second result has the shape, kind and units of the first: the standard deviation of the eight in each voxel. It
    is no confidence interval: where it is small, the network merely says the same eight times. On validation (ixi-4x,
    T2 brain) it correlates with the absolute error by 0.57 over all voxels and 0.35 inside the head, at a fifth of its
    size; benchmarks/uncertainty.py measures it.
    """
    volume, like, settings = _opened(scan, settings)
    settings["ensemble"] = True
    job = Upscaling(model, volume, **settings)
    outs = job.empty(), job.empty()
    sharp, spread = (np.moveaxis(out, job.axis, 0) for out in outs)

    def put(k: int, image: np.ndarray, deviation: np.ndarray | None) -> None:
        sharp[k], spread[k] = image, deviation

    job.run(put)
    return like(job, outs[0]), like(job, outs[1])


class Upscaling:
    """One volume on its way to a sharper one: checks everything first, then hands out slice after slice.

    The arguments are those of `upscale`.

    Attributes:
        axis: where slices are stacked.
        shape: (i, j, k) of the result.
        place: the result's geometry and header; its array is still the input's.
        settings: the arguments with defaults filled in.
    """

    def __init__(self, model: "SRModel", volume: Volume, **settings: Unpack[Settings]) -> None:
        axis = chosen_axis(volume, settings.get("axis"))
        consistency, tile, overlap = settings.get("consistency"), settings.get("tile"), settings.get("overlap")
        if consistency is None:
            consistency = model.consistency
        if consistency not in (False, True, "object"):
            raise ValueError(f'consistency is {consistency!r}; it must be True, False or "object"')
        if consistency and model.grid != "origin":
            raise ValueError(f'consistency is defined for the "origin" grid; {type(model).__name__} has {model.grid!r}')
        if tile is None and overlap is not None:
            raise ValueError(f"an overlap of {overlap} needs tiles: give tile=N (--tile N) as well")
        if tile is not None:
            if tile < model.minimum_size:
                raise ValueError(
                    f"tiles of {tile} are too small: the smallest image that {type(model).__name__} takes is "
                    f"{model.minimum_size}x{model.minimum_size}"
                )
            overlap = default_overlap(tile) if overlap is None else overlap
            spans(1, tile, overlap, model.multiple)  # refuses an overlap that does not go with the tile
        _check(model, volume, axis)
        self.axis = axis
        i, j, k = (n if a == axis else n * model.scale for a, n in enumerate(volume.array.shape))
        self.shape = i, j, k
        self.place = volume.resampled(volume.array, model.scale, in_plane(axis), model.grid)
        self.settings: dict[str, Any] = {
            "axis": axis,
            "consistency": consistency,
            "ensemble": settings.get("ensemble", False),
            "tile": tile,
            "overlap": overlap,
        }
        self._model, self._volume = model, volume
        self._batch_size, self._progress = settings.get("batch_size"), settings.get("progress", False)
        if (device := settings.get("device")) is not None:
            model.to(device)
        self._device = next((p.device for p in model.parameters()), torch.device(device or "cpu"))

    def empty(self) -> np.ndarray:
        """Room for the result, in the order in which NIfTI is written: slices of the last axis are contiguous."""
        return np.empty(self.shape, np.float32, order="F")

    def run(self, put: Callable[[int, np.ndarray, np.ndarray | None], None]) -> None:
        """Calls put(k, slice (h, w), deviation of the ensemble or None) for each slice, in order, in scanner units."""
        from tqdm import tqdm

        model = self._model
        slices = np.moveaxis(self._volume.array, self.axis, 0)
        intensity = intensity_scale(self._volume.array, model.intensity)
        signed = bool(self._volume.array.min() < 0)
        was_training = model.training
        model.eval()
        try:
            with (
                closing(self._batches(slices, intensity, signed)) as batches,
                tqdm(total=len(slices), unit="slice", disable=None if self._progress else True) as bar,
            ):
                k = 0
                for sharp, spread in batches:
                    for image, deviation in zip(sharp, [None] * len(sharp) if spread is None else spread, strict=True):
                        put(k, image, deviation)
                        k += 1
                    bar.update(len(sharp))
        finally:
            model.train(was_training)

    def _batches(
        self, slices: np.ndarray, intensity: float, signed: bool
    ) -> Generator[tuple[np.ndarray, np.ndarray | None], None, None]:
        """The sharper slices, some at once, in order.

        On a CPU several batches at once, each with its share of torch's threads: the threads of one operation wait for
        each other at its end, which on a machine with other work costs ten times as much (measured: 39 s against 4 s).
        """

        def sharpened(start: int, n: int) -> tuple[np.ndarray, np.ndarray | None]:
            return self._sharpened(np.ascontiguousarray(slices[start : start + n], np.float32), intensity, signed)

        if self._device.type != "cpu":
            start = 0
            while start < len(slices):
                n = self._batch_size or self._batch(slices.shape[-2:], first=start == 0)
                yield sharpened(start, n)
                start += n
            return
        n = min(len(slices), self._batch_size or self._batch(slices.shape[-2:], first=False))
        starts = range(0, len(slices), n)
        threads = torch.get_num_threads()
        pixels = n * slices.shape[1] * slices.shape[2] * self._model.scale**2
        workers = min(threads, len(starts), max(1, CPU_PARALLEL_PIXELS // pixels))
        if workers == 1 or torch.is_autocast_enabled("cpu"):  # autocast is a thread's own
            for start in starts:
                yield sharpened(start, n)
            return
        waiting: deque[Future[tuple[np.ndarray, np.ndarray | None]]] = deque()
        torch.set_num_threads(threads // workers)  # of every thread that begins now
        try:
            with ThreadPoolExecutor(workers, "deformmamba-slices") as pool:
                try:
                    for start in starts:
                        waiting.append(pool.submit(copy_context().run, sharpened, start, n))
                        if len(waiting) > workers:
                            yield waiting.popleft().result()
                    while waiting:
                        yield waiting.popleft().result()
                finally:
                    for future in waiting:
                        future.cancel()
        finally:
            torch.set_num_threads(threads)

    def _sharpened(self, images: np.ndarray, intensity: float, signed: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Some slices (n, h, w), in scanner units, sharper, and their deviation."""
        model = self._model
        with torch.inference_mode():
            lr = normalise(torch.from_numpy(images).to(self._device), intensity)[:, None]
            keys = ("ensemble", "tile", "overlap")
            sr, spread = predict(model, lr, **{key: self.settings[key] for key in keys})
            if how := self.settings["consistency"]:
                within = _measured(sr, lr, model.scale, signed) if how == "object" else None
                sr = data_consistency(sr, lr, model.scale, magnitude=not signed, within=within)
            sharp, deviation = (None if x is None else restore(x[:, 0], intensity) for x in (sr, spread))
            assert sharp is not None
            sharp = sharp if signed else sharp.clamp_(min=0)
            return sharp.cpu().numpy(), None if deviation is None else deviation.cpu().numpy()

    def _batch(self, size: tuple[int, ...], *, first: bool) -> int:
        """How many slices of `size` to run at once."""
        side = self.settings["tile"]
        h, w = size if side is None else (min(n, side) for n in size)
        if self._device.type != "cuda":
            return max(1, CPU_BATCH_PIXELS // (h * w * self._model.scale**2))
        if first:
            torch.cuda.reset_peak_memory_stats(self._device)
            return 1
        free, _ = torch.cuda.mem_get_info(self._device)
        held = torch.cuda.memory_allocated(self._device)
        reusable = torch.cuda.memory_reserved(self._device) - held
        slice_bytes = max(1, torch.cuda.max_memory_allocated(self._device) - held)
        return max(1, int(FREE_MEMORY_SHARE * (free + reusable) / slice_bytes))


def _measured(sr: torch.Tensor, lr: torch.Tensor, scale: int, signed: bool) -> torch.Tensor:
    """What data consistency may change of `sr`, a share for each pixel: none in air, elsewhere what is no noise.

    Air is what lies more than two pixels from any signal, a tenth of the intensity scale; the border is soft. What the
    estimate leaves out of the air of `lr` is noise: normal, or of a magnitude Rayleigh, with twice the power of either
    part. Where the object differs from `lr` no more than noise does, the estimate is right to differ; of a larger
    difference the part of its power that is not noise's is taken (the gain of a Wiener filter), one share a slice.

    Source: ours, not in the paper.
    """
    near = F.max_pool2d((sr.abs() > SIGNAL).to(sr.dtype), 5, 1, 2)
    within = F.avg_pool2d(near, 5, 1, 2, count_include_pad=False)
    low = lowpass(sr, scale)
    difference = (lr - (low.real if signed else low.abs())) ** 2
    at_samples = within[..., ::scale, ::scale]

    def mean(where: torch.Tensor) -> torch.Tensor:
        return (difference * where).sum((-2, -1), keepdim=True) / where.sum((-2, -1), keepdim=True).clamp(min=1)

    air = at_samples == 0
    enough = air.to(sr.dtype).mean((-2, -1), keepdim=True) > ENOUGH_AIR
    noise = mean(air) / (1 if signed else 2) * enough
    found = mean(at_samples == 1).clamp(min=torch.finfo(sr.dtype).tiny)
    return within * (1 - noise / found).clamp(min=0)


def predict(
    model: "SRModel",
    lr: torch.Tensor,
    *,
    ensemble: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `model` makes of whole slices (b, c, h, w), about [0, 1]: (b, c, scale * h, scale * w), float32 at least.

    With `ensemble`, the mean over the eight reflections and transposes of the slice, each undone afterwards, and beside
    it their standard deviation (else None). On the origin-aligned grid an image is reflected about index 0, i to
    -i mod n: plain reversal would move LR and HR apart by scale - 1 HR pixels.

    With `tile`, each of them is computed tile by tile, every tile with its cut of the whole slice's zero-filled image.
    """

    def once(image: torch.Tensor) -> torch.Tensor:
        if tile is None:
            return model(image).to(torch.promote_types(image.dtype, torch.float32))
        base = zero_fill(image.to(torch.promote_types(image.dtype, torch.float32)), model.scale)
        return tiled(
            lambda cut, base_cut: model(cut, base=base_cut).to(base),
            image,
            model.scale,
            tile=tile,
            overlap=overlap,
            multiple=model.multiple,
            base=base if model.grid == "origin" else None,
        )

    if not ensemble:
        return once(lr), None
    mean = squares = None
    for k in range(8):
        sr = _transformed(once(_transformed(lr, k, model.grid)), k, model.grid, back=True)
        if mean is None or squares is None:
            mean, squares = sr.clone(), torch.zeros_like(sr)
        else:  # Welford: no difference of large squares
            before = sr - mean
            mean += before / (k + 1)
            squares += before * (sr - mean)
    assert mean is not None
    assert squares is not None
    return mean, (squares / 8).sqrt()


def _transformed(image: torch.Tensor, k: int, grid: Grid, *, back: bool = False) -> torch.Tensor:
    """The k-th of eight: rows reflected (bit 0), columns reflected (bit 1), then transposed (bit 2)."""
    if k & 4 and back:
        image = image.mT
    for bit, dim in ((1, -2), (2, -1)):
        if k & bit:
            image = image.flip(dim)
            if grid == "origin":
                image = image.roll(1, dim)
    if k & 4 and not back:
        image = image.mT
    return image


def _opened(scan: Any, settings: Settings) -> tuple[Volume, Callable[[Upscaling, np.ndarray], Any], Settings]:
    """The scan as a volume, what turns the result into a thing of its kind, and settings that fit the volume."""
    if isinstance(scan, Volume):
        return scan, lambda job, out: replace(job.place, array=out), settings
    if hasattr(scan, "dataobj") and hasattr(scan, "header"):
        return from_nibabel(scan), lambda job, out: to_nibabel(replace(job.place, array=out), type(scan)), settings
    if isinstance(scan, torch.Tensor):
        plain = scan.detach().cpu()
        array = (plain.float() if plain.is_floating_point() else plain).numpy()  # numpy has no bfloat16
    else:
        array = np.asarray(scan)
    if array.ndim not in (2, 3):
        raise VolumeError(f"a scan is (h, w) or 3-D, not {array.shape}; a batch of images goes to the model itself")
    flat = array.ndim == 2
    if flat:
        if settings.get("axis") is not None:
            raise VolumeError("axis chooses among the axes of a 3-D scan; a 2-D one is a slice already")
        settings, array = Settings(**{**settings, "axis": 2}), array[:, :, None]

    def like(_: Upscaling, out: np.ndarray) -> Any:
        out = out[:, :, 0] if flat else out
        return torch.from_numpy(out).to(scan.device) if isinstance(scan, torch.Tensor) else out

    return Volume(array, np.eye(4), codes=(0, 0)), like, settings


def _check(model: "SRModel", volume: Volume, axis: int) -> None:
    first, second = in_plane(axis)
    check_voxels(volume.array)
    size = volume.array.shape[first], volume.array.shape[second]
    if min(size) < model.minimum_size:
        raise VolumeError(
            f"slices across axis {axis} are {size[0]}x{size[1]} pixels, the smallest that {type(model).__name__} takes "
            f"is {model.minimum_size}x{model.minimum_size}; choose another axis or pad the scan"
        )
    trained, pixel = trained_spacings(model), (volume.spacing[first], volume.spacing[second])
    if trained and any(volume.codes) and is_far(pixel, trained):
        warnings.warn(
            f"the pixels are {pixel[0]:.3g} x {pixel[1]:.3g} mm, the weights were trained on {trained[0]:.3g} to "
            f"{trained[1]:.3g} mm: the result may be worse than reported",
            stacklevel=4,  # whoever called `upscale`
        )


def check_voxels(array: np.ndarray) -> None:
    if array.dtype.kind not in "iuf":
        raise VolumeError(f"the scan holds {array.dtype}, not real numbers; of complex ones take the magnitude first")
    if not np.isfinite(array).all():
        raise VolumeError("the scan holds NaN or infinite voxels; replace them first")
