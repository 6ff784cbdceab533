"""From file to file, and what is said about it: in the header, in the report."""

import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

from deformmamba import __version__
from deformmamba.inference.effective import to_effective
from deformmamba.inference.upscaling import Settings, Upscaling
from deformmamba.pictures.report import SUFFIXES as REPORT_SUFFIXES
from deformmamba.pictures.report import write_report
from deformmamba.volume import PathLike, Volume, VolumeError, check_output, in_plane, read_volume, writing
from deformmamba.volume.inspection import effective_matrix, spacing_remark
from deformmamba.weights import WeightsError, load_checkpoint

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel


@dataclass(frozen=True)
class Upscaled:
    """What `upscale_file` did.

    Attributes:
        source: the scan as it was read, cropped to its effective matrix if that was asked for.
        place: the geometry and header of what was written; its array is that of `source`.
        shape: (i, j, k) of what was written.
        axis: where slices are stacked.
        kept: index to (slice (h, w), deviation of the ensemble or None) of the slices that `keep` named.
        remark: the pixel sizes that the weights were trained on beside those of the scan, see
            `inspection.spacing_remark`.
        seconds: from the first slice to the whole file, without the report.
        settings: what `upscale` worked with, defaults filled in.
    """

    source: Volume
    place: Volume
    shape: tuple[int, int, int]
    axis: int
    kept: dict[int, tuple[np.ndarray, np.ndarray | None]]
    remark: str
    seconds: float
    settings: dict[str, Any]


def upscale_file(
    model: "SRModel",
    source: PathLike,
    target: PathLike,
    *,
    volume: int | None = None,
    series: int | str | None = None,
    dtype: str | None = None,
    uncertainty: PathLike | None = None,
    report: PathLike | None = None,
    effective: bool = False,
    keep: Callable[[int], Container[int]] = lambda n: (),
    **settings: Unpack[Settings],
) -> Upscaled:
    """Read `source`, upscale it, write `target`: slices go to the file as they are made, so that the output is never in
    memory; the input is. Nothing appears under `target` before all of it is there.

    Args:
        model: any SRModel.
        source, volume, series: as `read_volume`.
        target, dtype: as `volume.writing`; a scan that came as DICOM can be written as DICOM.
        uncertainty: another file, for what `upscale_with_uncertainty` gives as its second result. Makes an ensemble of
            it.
        report: .html, a page to look at what came out, see `report.write_report`. The slices wait for it in a nameless
            file beside it, as large as the output in float32.
        effective: start from the matrix that k-space says was measured, see `to_effective`.
        keep: says, of n slices, which are wanted in memory as well, for pictures: `Upscaled.kept`.
        settings: as `upscale`.

    Raises:
        VolumeError: what the functions named above raise; or one of the files is another one of them.
        ValueError: as `upscale`.
    """
    named = [path for path in (source, target, uncertainty, report) if path is not None]
    if len({os.path.realpath(path) for path in named}) < len(named):
        raise VolumeError(f"{target}: is the input itself, or two outputs have one name; nothing is overwritten")
    if report is not None:
        check_output(report, REPORT_SUFFIXES)
    scan = read_volume(source, volume=volume, series=series)
    check_output(target, source=scan, dtype=dtype)
    if uncertainty is not None:
        check_output(uncertainty, source=scan)
        settings["ensemble"] = True
    if effective:
        scan = to_effective(scan, axis=settings.get("axis"))
    job = Upscaling(model, scan, **settings)
    if not effective:
        _warn_if_filled(scan, job.axis)
    wanted = keep(scan.array.shape[job.axis])
    pictures: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    start = time.perf_counter()
    with ExitStack() as until_reported:
        pages = []
        if report is not None:
            pages = [until_reported.enter_context(_room(report, job)) for _ in range(1 if uncertainty is None else 2)]
        with ExitStack() as stack:
            open_for = partial(writing, like=job.place, shape=job.shape, axis=job.axis, derivation=derivation(model))
            writers = [stack.enter_context(open_for(target, dtype=dtype))]
            if uncertainty is not None:
                writers.append(stack.enter_context(open_for(uncertainty)))

            def put(k: int, image: np.ndarray, deviation: np.ndarray | None) -> None:
                for write, values in zip(writers, (image, deviation), strict=False):
                    write(values)  # type: ignore[arg-type]
                for page, values in zip(pages, (image, deviation), strict=False):
                    np.moveaxis(page, job.axis, 0)[k] = values
                if k in wanted:
                    pictures[k] = image, deviation

            job.run(put)
        seconds = time.perf_counter() - start
        if report is not None:
            after, *spread = (replace(job.place, array=page) for page in pages)
            write_report(
                report,
                scan,
                after,
                axis=job.axis,
                grid=model.grid,
                facts=_facts(model, job.settings, seconds, effective),
                uncertainty=spread[0] if spread else None,
            )
    remark = spacing_remark(model, scan, job.axis)
    return Upscaled(scan, job.place, job.shape, job.axis, pictures, remark, seconds, job.settings)


@contextmanager
def _room(report: PathLike, job: Upscaling) -> Iterator[np.ndarray]:
    """An array for the result in a file without a name beside `report`, gone with the process."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(report))))
            # now: a disk that is full when a mapped page is written kills the process
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(job.shape))
        except OSError as error:
            raise VolumeError(f"{report}: no room beside it: {error.strerror or type(error).__name__}") from error
        h, w = (job.shape[a] for a in in_plane(job.axis))
        yield np.moveaxis(np.memmap(file, np.float32, "r+", shape=(job.shape[job.axis], h, w)), 0, job.axis)


def _warn_if_filled(scan: Volume, axis: int) -> None:
    slices = np.moveaxis(scan.array, axis, 0)
    (h, w), (rows, columns) = slices.shape[1:], effective_matrix(slices)
    if (rows, columns) != (h, w):
        warnings.warn(
            f"the slices have {h}x{w} pixels, but their k-space is filled to about {rows}x{columns}: the scan was "
            "interpolated, its true resolution is lower than its header says; effective=True (--effective) starts "
            "from what was measured",
            stacklevel=3,  # whoever called `upscale_file`
        )


def _facts(model: "SRModel", settings: dict[str, Any], seconds: float, effective: bool) -> dict[str, str]:
    """What a report says ran."""
    tile, overlap = settings["tile"], settings["overlap"]
    corrected = {
        False: "off",
        True: "exact: degrading the output gives the input back",
        "object": "where the object is: degrading the output gives the input back there, nearly",
    }
    weights = weights_name(model) or "weights of which no file is known"
    return {
        "model": f"{type(model).__name__}, {model.scale}x, {weights}",
        "sha256 of the weights": weights_hash(model) or "no file is known",
        "version": f"deformmamba {__version__}",
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "time taken": f"{seconds:.1f} s",
        "data consistency": corrected[settings["consistency"]],
        "ensemble": "mean over eight reflections and transposes" if settings["ensemble"] else "off",
        "tiles": "whole slices" if tile is None else f"{tile}x{tile} pixels, overlapping by {overlap}",
        "start": "the matrix that k-space says was measured" if effective else "the scan as it came",
    }


def derivation(model: "SRModel") -> str:
    """What made an image, in a line of ASCII for its header: this package, the network, its weights and their hash."""
    digest = weights_hash(model)
    weights = f"{weights_name(model)}, sha256 {digest}" if digest else "weights of which no file is known"
    line = f"deformmamba {__version__}, {type(model).__name__} {model.scale}x, {weights}"
    return line.encode("ascii", "replace").decode()


def weights_hash(model: "SRModel") -> str | None:
    """The sha256 of the checkpoint that the model was loaded from; None for weights from nowhere, weights that were
    changed since, and a file that is gone or another one by now."""
    if model.source is None or model.sha256 is None:
        return None
    try:
        checkpoint = load_checkpoint(model.source, local_files_only=True)
    except WeightsError:
        return None
    state, stored = model.state_dict(), checkpoint.tensors
    same = checkpoint.sha256 == model.sha256 and state.keys() == stored.keys()
    return model.sha256 if same and all(torch.equal(state[name].cpu(), stored[name]) for name in stored) else None


def weights_name(model: "SRModel") -> str | None:
    """The manifest name, org/repo@commit, or the file's name without its folder; None for weights from nowhere."""
    return os.path.basename(model.source) if model.source and os.path.exists(model.source) else model.source
