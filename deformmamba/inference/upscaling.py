"""Upscales volumes and slices in memory: normalise, run the model, data consistency, restore units, set the affine."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from deformmamba.errors import InvalidArgument
from deformmamba.inference.ensemble import predict
from deformmamba.inference.inputs import check_voxels, intensity_cautions, is_list, of_list, opened
from deformmamba.inference.networks import (
    check_in_plane,
    check_precision,
    evaluating,
    is_compiled,
    network,
)
from deformmamba.inference.progress import Progress
from deformmamba.inference.settings import Settings
from deformmamba.inference.sharing import shared_threads
from deformmamba.inference.tiling import default_overlap, spans
from deformmamba.physics.consistency import Consistency, corrected
from deformmamba.physics.edges import cubic, lowest_without, outliers
from deformmamba.tensors import check_device, on_cpu_by_default
from deformmamba.volume import PathLike, Volume, VolumeError, chosen_axis, in_plane, intensity_scale, normalise, restore
from deformmamba.volume.files import warn_of
from deformmamba.volume.inspection import is_far, trained_spacings
from deformmamba.weights.cards import pixel_range

if TYPE_CHECKING:
    from torch import nn

    from deformmamba.models.base import SRModel

# a Volume, an array, a tensor or a nibabel image: the result is of the same kind
Scan = TypeVar("Scan")

# HR pixels in one batch on a CPU; larger batches need more memory and are not faster
CPU_BATCH_PIXELS = 1 << 18
# HR pixels in all batches that run at once on a CPU
CPU_PARALLEL_PIXELS = 8 * CPU_BATCH_PIXELS
# share of the accelerator's free memory; the first slice shows how much memory a slice needs
FREE_MEMORY_SHARE = 0.6
# ratio of the 99.9th to the 99th percentile of T2 head scans (validation: 1.3); consistency uses a share of it
ABOVE_P99 = 1.3


@on_cpu_by_default
def upscale(
    model: "SRModel | nn.Module | PathLike",
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

    The model gets whole slices across `axis`. The number of slices is unchanged. A model that takes any intensity
    (`SRModel.any_intensity`) gives a * out + b for a * scan + b with a > 0, and nothing below the scan's lowest value.
    For any other model, the scan is divided by one intensity scale, by the model's rule. Negative outputs become 0
    unless the scan has a negative value.

    Args:
        model: any SRModel, also inside `DataParallel`, `torch.compile` or an averaged model; or a name of weights as in
            `from_pretrained`. The model runs in eval mode; afterwards the mode of every module is restored.
        scan: a `Volume` or a nibabel image (NIfTI or MGH, 3-D), whose affine is adapted to the model's grid; real
            numbers (h, w) or 3-D as an array or tensor; a path, which gives a `Volume`; or a list of these, which gives
            a list. Slices (h, w) of one size in a list are one scan.
        axis: where slices are stacked; None: `volume.slice_axis`. For arrays without geometry this is the last axis (or
            the only one of length 1). (slices, h, w) needs axis=0.
        batch_size: slices per batch; None: as memory allows.
        consistency: data consistency (`physics.consistency`), applied before negative values become 0. "exact":
            degrading the output gives the input back. "object": inside the anatomy only, reduced by the estimated
            noise, so that ringing in air and noise do not return. "off": none. None: the best mode for these weights
            on validation data (`model.consistency`).
        ensemble: the mean over the eight flips and rotations of each slice, see `predict`: eight times the work
            for 0.15 dB (ixi-4x, validation, T2 brain; spine 0.12).
        tile: run the model on blended tiles of this side, in LR pixels (`tiling.tiled`), for slices that do not fit
            into memory; None: on whole slices, which suits the networks best.
        overlap: LR pixels that neighbouring tiles share; None: `tiling.default_overlap`. With less than 8, an edge can
            appear where a seam runs along the border of a masked background.
        device: the model is moved there and runs there. None: the model's current device.
        progress: a bar on a terminal and in a notebook; elsewhere a line on stderr every 30 s.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, not 2-D or 3-D, no such axis, or slices smaller than the
            model takes.
        ValueError: data consistency for a model on the half-pixel grid; a tile too small for the model or the overlap;
            a missing device.
        TypeError: `model` is not a model, or is in half precision.
    """
    settings = Settings(
        axis=axis, batch_size=batch_size, consistency=consistency, ensemble=ensemble, tile=tile, overlap=overlap,
        device=device, progress=progress,
    )  # fmt: skip
    model = network(model)
    check_in_plane(model)
    if is_list(scan):
        made: Any = of_list(scan, lambda one, **other: upscale(model, one, **{**vars(settings), **other}), axis)
        return made
    volume, back, settings = opened(scan, settings)
    job = Upscaling(model, volume, settings)
    result: Scan = back(job.place, job.result())
    return result


@on_cpu_by_default
def upscale_with_uncertainty(model: "SRModel | nn.Module | PathLike", scan: Scan, **settings: Any) -> tuple[Scan, Scan]:
    """`upscale(model, scan, ensemble=True)`, and the disagreement of its eight members.

    The second result has the shape, kind and units of the first: the standard deviation of the eight members in each
    voxel. It is not a confidence interval: a small value means that the eight agree, not that they are right. On
    validation data (ixi-4x, T2 brain) its correlation with the absolute error is 0.57 over all voxels and 0.35 inside
    the head, and it is a fifth of the error's size; benchmarks/uncertainty.py measures this.

    Args:
        model, scan, settings: as `upscale`.

    Raises:
        TypeError: an unknown setting.
        VolumeError, ValueError: as `upscale`.
    """
    chosen = Settings.of(settings)
    model = network(model)
    check_in_plane(model)
    if is_list(scan):
        pairs = of_list(
            scan, lambda one, **other: upscale_with_uncertainty(model, one, **{**settings, **other}), chosen.axis
        )
        return tuple(map(list, zip(*pairs, strict=True)))  # type: ignore[return-value]
    volume, back, chosen = opened(scan, chosen)
    job = Upscaling(model, volume, replace(chosen, ensemble=True))
    outs = job.empty(), job.empty()
    sharp, spread = (np.moveaxis(out, job.axis, 0) for out in outs)

    def put(k: int, image: np.ndarray, deviation: np.ndarray | None) -> None:
        sharp[k], spread[k] = image, deviation

    job.run(put)
    return back(job.place, outs[0]), back(job.place, outs[1])


class Upscaling:
    """Upscales one volume: checks all arguments first, then computes slice after slice.

    Attributes:
        axis: where slices are stacked.
        shape: (i, j, k) of the result.
        place: the result's geometry and header; its array is still the input's.
        settings: as given, with `axis`, `consistency` and `overlap` filled in.
        cautions: reasons why the result may be worse than reported, a sentence each; also given as warnings. Empty with
            judge=False, for a volume that was judged before.
    """

    def __init__(
        self, model: "SRModel | nn.Module | PathLike", volume: Volume, settings: Settings, *, judge: bool = True
    ) -> None:
        found: SRModel = network(model)
        self._dtype = check_precision(found)
        if settings.device is not None:
            check_device(settings.device)
        axis = chosen_axis(volume, settings.axis)
        consistency = settings.consistency or found.consistency
        if consistency != "off" and found.grid != "origin":
            raise InvalidArgument(
                f'consistency is defined for the "origin" grid; {type(found).__name__} has {found.grid!r}'
            )
        overlap = None if settings.tile is None else _checked_overlap(found, settings.tile, settings.overlap)
        _check_slices(found, volume, axis)
        self.cautions = _cautions(found, volume, axis) if judge else ()
        warn_of(self.cautions)
        self.axis = axis
        i, j, k = (n if a == axis else n * found.scale for a, n in enumerate(volume.array.shape))
        self.shape = i, j, k
        self.place = volume.resampled(volume.array, found.scale, in_plane(axis), found.grid)
        self.settings = replace(settings, axis=axis, consistency=consistency, overlap=overlap)
        self._model, self._volume = found, volume
        if settings.device is not None:
            found.to(settings.device)
        self._device = next((p.device for p in found.parameters()), torch.device(settings.device or "cpu"))

    def empty(self) -> np.ndarray:
        """An array for the result, in NIfTI's memory order: slices of the last axis are contiguous."""
        return np.empty(self.shape, np.float32, order="F")

    def result(self) -> np.ndarray:
        """The upscaled array."""
        out = self.empty()
        sharp = np.moveaxis(out, self.axis, 0)

        def put(k: int, image: np.ndarray, _: np.ndarray | None) -> None:
            sharp[k] = image

        self.run(put)
        return out

    def run(self, put: Callable[[int, np.ndarray, np.ndarray | None], None], progress: Progress | None = None) -> None:
        """Calls put(k, slice (h, w), deviation of the ensemble or None) for each slice, in order, in scanner units.

        `progress` counts the slices of several jobs; None: of this job only, according to the settings.
        """
        model = self._model
        slices = np.moveaxis(self._volume.array, self.axis, 0)
        units = scan_units(model, self._volume.array)
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            batches = stack.enter_context(closing(self._batches(slices, units)))
            if progress is None:
                progress = stack.enter_context(Progress(len(slices), shown=self.settings.progress))
            k = 0
            for sharp, spread in batches:
                for image, deviation in zip(sharp, [None] * len(sharp) if spread is None else spread, strict=True):
                    put(k, image, deviation)
                    k += 1
                progress.update(len(sharp))

    def _batches(
        self, slices: np.ndarray, units: "_Units"
    ) -> Generator[tuple[np.ndarray, np.ndarray | None], None, None]:
        """Yields batches of upscaled slices, in order.

        A CPU runs several batches in parallel, each with its share of torch's threads. With one batch, all threads wait
        for each other at the end of each operation: ten times slower on a busy machine (measured: 39 s against 4 s).
        """

        def sharpened(start: int, n: int) -> tuple[np.ndarray, np.ndarray | None]:
            # a copy even of one slice, whose negative stride or write protection PyTorch would refuse
            return self._sharpened(np.array(slices[start : start + n], np.float32, order="C"), units)

        if self._device.type != "cpu":
            start = 0
            while start < len(slices):
                n = self.settings.batch_size or self._batch(slices.shape[-2:], first=start == 0)
                yield sharpened(start, n)
                start += n
            return
        threads = torch.get_num_threads()
        # small slices or tiles: a separate batch for each thread
        most = self.settings.batch_size or self._batch(slices.shape[-2:], first=False)
        n = min(most, -(-len(slices) // threads)) if self.settings.batch_size is None else min(most, len(slices))
        starts = range(0, len(slices), n)
        pixels = n * slices.shape[1] * slices.shape[2] * self._model.scale**2
        workers = min(threads, len(starts), max(1, CPU_PARALLEL_PIXELS // pixels))
        # autocast is per thread; only one thread at a time can trace a compiled model
        if workers == 1 or torch.is_autocast_enabled("cpu") or is_compiled(self._model):
            for start in starts:
                yield sharpened(start, n)
            return
        waiting: deque[Future[tuple[np.ndarray, np.ndarray | None]]] = deque()
        with (
            shared_threads(workers) as share,
            ThreadPoolExecutor(workers, "deformmamba-slices", torch.set_num_threads, (share,)) as pool,
        ):
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

    def _sharpened(self, images: np.ndarray, units: "_Units") -> tuple[np.ndarray, np.ndarray | None]:
        """Upscales slices (n, h, w) in scanner units; returns them and their deviation.

        `units` as `scan_units` gives them.
        """
        model = self._model
        with torch.inference_mode():
            image = torch.from_numpy(images).to(self._device, self._dtype)
            units = slice_units(image) if model.any_intensity else units
            lr = normalise(image - units.zero, units.scale)[:, None]
            settings, floor = self.settings, units.floor
            if isinstance(floor, torch.Tensor):
                floor = floor[:, None]
            deep = torch.zeros_like(lr)
            if isinstance(floor, torch.Tensor) and model.robust_edges:
                # outliers below the slice do not lower the floor of the rest, and it does not cut them off
                spots = outliers(lr)
                deep = spots.clamp(max=0)
                floor = torch.where(deep.amin((-2, -1), keepdim=True) < 0, lowest_without(spots, lr), floor)
            sr, spread = predict(model, lr, ensemble=settings.ensemble, tile=settings.tile, overlap=settings.overlap)
            if sr.shape[-2:] != (wanted := tuple(model.scale * n for n in lr.shape[-2:])):
                raise InvalidArgument(f"the model returned images of {tuple(sr.shape[-2:])}; wanted {wanted}")
            assert settings.consistency is not None
            lowest = 0.0 if floor is None else floor
            sr = corrected(
                sr - lowest,
                lr - lowest,
                model.scale,
                settings.consistency,
                magnitude=floor is not None,
                edges=model.any_intensity,
                robust=model.robust_edges,
                air=-lowest,
            )
            if floor is not None:  # magnitudes, above the lowest possible value
                sr = sr.clamp_(min=0) + floor if not deep.any() else _above(sr, floor, lr, deep)
            sharp = restore(sr[:, 0], units.scale) + units.zero
            deviation = None if spread is None else restore(spread[:, 0], units.scale)
            made = [None if x is None else x.to("cpu", torch.float32).numpy() for x in (sharp, deviation)]
            assert made[0] is not None
            return made[0], made[1]

    def _batch(self, size: tuple[int, ...], *, first: bool) -> int:
        """Number of slices of `size` in one batch."""
        side = self.settings.tile
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


def _above(sr: torch.Tensor, floor: torch.Tensor | float, lr: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
    """`sr`, counted from the floor, at least there, except for the outliers `deep` of `lr` below the floor; but nothing
    below the lowest value of `lr`."""
    below = cubic(deep, sr.shape[-1] // lr.shape[-1])
    return torch.maximum((sr - below).clamp(min=0) + below + floor, lr.amin((-2, -1), keepdim=True))


class _Units(NamedTuple):
    """The model gets (slice - zero) / scale.

    `floor`: the lowest allowed value of the result, in the model's units; None for data with a sign.

    Numbers that hold for the whole scan, or tensors (n, 1, 1) with one value for each of n slices.
    """

    zero: float | torch.Tensor
    scale: float | torch.Tensor
    floor: float | torch.Tensor | None


def scan_units(model: "SRModel", array: np.ndarray) -> _Units:
    """The units in which a model for images of about [0, 1] gets the whole scan: divided by its intensity rule.

    A scan with a negative value counts as data with a sign. All are 0 for a model for any intensity: there each slice
    has its own, see `slice_units`.
    """
    if model.any_intensity:
        return _Units(0.0, 0.0, 0.0)
    return _Units(0.0, intensity_scale(array, model.intensity), 0.0 if float(array.min()) >= 0 else None)


def slice_units(slices: torch.Tensor) -> _Units:
    """The units in which a model for any intensity gets slices (n, h, w), one by one.

    The model itself does not depend on units. To make data consistency independent of them too, each slice is mapped to
    [0, 1] by its 1st and 99th percentile. Its lowest allowed value is its lowest value.
    """
    values = slices.flatten(1).cpu().numpy()
    low, high = np.percentile(values, (1, 99), axis=1)
    lowest, highest = values.min(1), values.max(1)
    span = ABOVE_P99 * (high - low)
    span = np.where(span > 0, span, highest - lowest)
    span = np.where(span > 0, span, 1.0)
    zero, scale, floor = (
        torch.from_numpy(value.astype(np.float32)).to(slices)[:, None, None]
        for value in (low, span, (lowest - low) / span)
    )
    return _Units(zero, scale, floor)


def _checked_overlap(model: "SRModel", tile: int, overlap: int | None) -> int:
    """The overlap of tiles, or the default. Raises ValueError if tile, overlap and model do not fit together."""
    if tile < model.minimum_size:
        raise InvalidArgument(
            f"tiles of {tile} are too small: the smallest image that {type(model).__name__} takes is "
            f"{model.minimum_size}x{model.minimum_size}"
        )
    overlap = default_overlap(tile, model.multiple) if overlap is None else overlap
    spans(1, tile, overlap, model.multiple)  # refuses an overlap that does not go with the tile
    return overlap


def _check_slices(model: "SRModel", volume: Volume, axis: int) -> None:
    first, second = in_plane(axis)
    check_voxels(volume.array)
    size = volume.array.shape[first], volume.array.shape[second]
    if min(size) < model.minimum_size:
        raise VolumeError(
            f"slices across axis {axis} are {size[0]}x{size[1]} pixels, the smallest that {type(model).__name__} takes "
            f"is {model.minimum_size}x{model.minimum_size}; choose another axis or pad the scan"
        )


def _cautions(model: "SRModel", volume: Volume, axis: int) -> tuple[str, ...]:
    """Reasons why the result may be worse than reported: intensities, or a pixel size far from the training data."""
    first, second = in_plane(axis)
    found = intensity_cautions(volume.array, trained=model.num_parameters() > 0)
    trained, pixel = trained_spacings(model), (volume.spacing[first], volume.spacing[second])
    if trained and any(volume.codes) and is_far(pixel, trained):
        found.append(
            f"the pixels are {pixel[0]:.3g} x {pixel[1]:.3g} mm, the weights were trained on {pixel_range(*trained)}: "
            "the result may be worse than reported"
        )
    return tuple(found)
