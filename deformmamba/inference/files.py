"""Upscales files: reads a scan, upscales it, writes the result, and describes it in a report."""

import itertools
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial as partial_of
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from deformmamba.annotations import check_types
from deformmamba.inference.effective import to_effective
from deformmamba.inference.inputs import check_voxels, intensity_cautions, rounding_notes
from deformmamba.inference.networks import check_in_plane, network
from deformmamba.inference.progress import Progress
from deformmamba.inference.provenance import (
    derivation,
    distrust,
    generated_by,
    report_facts,
    unusual,
    write_sidecar,
)
from deformmamba.inference.settings import Settings
from deformmamba.inference.upscaling import Upscaling
from deformmamba.pictures.report import SUFFIXES as REPORT_SUFFIXES
from deformmamba.pictures.report import write_report
from deformmamba.tensors import on_cpu_by_default
from deformmamba.volume import (
    NIFTI_SUFFIXES,
    ChoiceNeeded,
    PathLike,
    Volume,
    VolumeError,
    check_output,
    chosen_axis,
    count_volumes,
    in_plane,
    no_scan,
    read_volume,
    read_volumes,
    replacing,
    writing,
)
from deformmamba.volume.files import warn_of
from deformmamba.volume.inspection import measured_matrix, spacing_remark
from deformmamba.volume.selection import sidecar_of

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

# slice (h, w) and deviation of the ensemble or None
Result = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Upscaled:
    """The result of `upscale_file`.

    Attributes:
        source: the scan from the file; with `effective`, cropped to its effective matrix.
        place: geometry and header of the output; its array is that of `source`.
        shape: (i, j, k) of the output.
        axis: where slices are stacked.
        kept: the slices chosen by `keep`: index to (slice (h, w), deviation of the ensemble or None).
        remark: the scan's pixel size compared with the training data, see `inspection.spacing_remark`.
        seconds: from the first slice to the complete file, without the report.
        settings: the settings of `upscale`, with defaults filled in.
        n_volumes: number of volumes in the output.
        cautions: reasons why the result may be worse than reported, and the reader's remarks about the file, a sentence
            each.
        made_by: the derivation text in the output's header.
    """

    source: Volume
    place: Volume
    shape: tuple[int, int, int]
    axis: int
    kept: dict[int, Result]
    remark: str
    seconds: float
    settings: Settings
    n_volumes: int = 1
    cautions: tuple[str, ...] = ()
    made_by: str = ""


@on_cpu_by_default
def upscale_file(
    model: "SRModel | PathLike",
    source: PathLike,
    target: PathLike,
    *,
    volume: int | None = None,
    series: int | str | None = None,
    stack: int | None = None,
    nan: Literal["refuse", "zero"] = "refuse",
    partial: bool = False,
    as_image: bool = False,
    dtype: str | None = None,
    uncertainty: PathLike | None = None,
    report: PathLike | None = None,
    sidecar: bool = True,
    effective: bool = False,
    keep: Callable[[int], Container[int]] = lambda n: (),
    started: Callable[[Upscaling, int], None] = lambda job, n_volumes: None,
    **settings: Any,
) -> Upscaled:
    """Read `source`, upscale it, write `target`.

    Each slice is written immediately, so that memory holds only the input (one volume of a 4-D scan), never the output.
    `target` appears when it is complete. Model, version, hash and warnings are stored in NIfTI's `descrip`, in DICOM's
    DerivationDescription, and in a JSON file of the same name beside a NIfTI or MGH output.

    Args:
        model: any SRModel, or the name of weights.
        source, volume, series, stack, nan, partial: as `read_volume`. But without `volume`, all volumes of a source
            with several are upscaled into one 4-D NIfTI file. It gets copies of the .bval and .bvec files beside a
            NIfTI source, which apply to it as they are.
        target, dtype: as `volume.writing`; the output can be DICOM if the input is DICOM.
        as_image: also accept files that `volume.not_a_scan` rejects: a mask, a phase image, an output of this package.
        uncertainty: another file, for the second result of `upscale_with_uncertainty`; turns the ensemble on.
        report: .html, a report for visual checks, see `report.write_report`; for a 4-D scan, of its first volume. Until
            the report is written, its folder needs disk space for the output in float32.
        sidecar: write the JSON file. An existing file that this package did not write is not changed.
        effective: start from the filled part of k-space, see `to_effective`.
        keep: gets the number of slices and returns the indices to keep in memory, for figures: `Upscaled.kept`; for a
            4-D scan of its first volume.
        started: called with the job and the number of volumes before anything is computed.
        settings: as `upscale`.

    Raises:
        TypeError: an unknown setting.
        VolumeError: as the functions named above; or two of the files are the same.
        ValueError: as `upscale`.
    """
    chosen = Settings.of(settings)
    found: SRModel = network(model)  # first: it names a scan that was given as the model
    check_types(upscale_file, locals())
    check_paths(source, target, uncertainty, report)
    read, n_volumes = _scans(source, target, volume, {"series": series, "stack": stack, "nan": nan, "partial": partial})
    scan = next(scans := read())
    if not as_image and (reason := no_scan(source, scan)):
        raise VolumeError(f"{source}: {reason}; as_image=True (--as-image) upscales it anyway")
    check_output(target, source=scan, dtype=dtype)
    if uncertainty is not None:
        check_output(uncertainty, source=scan)
        chosen = replace(chosen, ensemble=True)
    prepared = _preparation(scan, chosen_axis(scan, chosen.axis), effective)
    scan = prepared(scan)
    check_in_plane(found)
    job = Upscaling(found, scan, chosen)
    jobs_of = partial_of(map, lambda one: Upscaling(found, prepared(one), chosen, judge=False))
    more_notes, more = _of_more_volumes(itertools.chain([scan], scans), found) if n_volumes > 1 else ((), ())
    notes, odd = (*scan.notes, *more_notes, *rounding_notes(scan.array, dtype)), (*job.cautions, *more)
    cautions = (*notes, *odd)
    started(job, n_volumes)
    start = time.perf_counter()
    made_by = derivation(found, distrust(odd, notes))
    outputs = [(target, dtype)] if uncertainty is None else [(target, dtype), (uncertainty, None)]
    with ExitStack() as until_reported:
        pages = [until_reported.enter_context(_temporary_array(report, job)) for _ in outputs if report is not None]
        jobs = itertools.chain([job], jobs_of(itertools.islice(_silently(read()), 1, None)))
        kept = _write(jobs, n_volumes, job, outputs, made_by, pages, keep(scan.array.shape[job.axis]))
        seconds = time.perf_counter() - start
        if report is not None:
            facts = report_facts(found, job.settings, seconds, effective)
            _write_page(report, found, scan, job, pages, facts, cautions)
    _copy_gradients(source, target, n_volumes)
    if sidecar:
        reading = {"volume": volume, "dtype": dtype, "effective": effective, **unusual(nan, partial)}
        write_sidecar(target, source, "sr", generated_by(found, job.settings, reading), cautions)
    remark = spacing_remark(found, scan, job.axis)
    return Upscaled(
        scan, job.place, job.shape, job.axis, kept, remark, seconds, job.settings, n_volumes, cautions, made_by
    )


def check_paths(source: PathLike, target: PathLike, uncertainty: PathLike | None, report: PathLike | None) -> None:
    """Raises VolumeError where two of the files are the same one, or the report cannot be written."""
    scan, *outputs = (os.path.realpath(path) for path in (source, target, uncertainty, report) if path is not None)
    if scan in outputs:
        raise VolumeError(f"{source}: the output is the input file; choose another output name; nothing was written")
    if len(set(outputs)) < len(outputs):
        raise VolumeError(f"{target}: two outputs have the same name; choose other names; nothing was written")
    if report is not None:
        check_output(report, REPORT_SUFFIXES)


def _scans(
    source: PathLike, target: PathLike, volume: int | None, reading: dict[str, Any]
) -> tuple[Callable[[], Iterator[Volume]], int]:
    """A function that reads the volumes to upscale, and their number: one, or all volumes of the source."""
    try:
        one = read_volume(source, volume=volume, **reading)
        return (lambda: iter([one])), 1
    except ChoiceNeeded as choice:
        if choice.argument != "volume" or volume is not None:
            raise
        if not str(target).lower().endswith(NIFTI_SUFFIXES):
            problem = f"{choice.problem}, and only a NIfTI file (.nii.gz) can contain the results of all"
            raise ChoiceNeeded(problem, "volume", choice.which) from None
    n_volumes = count_volumes(source, **{key: value for key, value in reading.items() if key != "nan"})
    return (lambda: read_volumes(source, **reading)), n_volumes


def _of_more_volumes(volumes: Iterable[Volume], model: "SRModel") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The notes on `volumes` after the first that the first does not have, and the cautions about their intensities:
    of each volume that has more of them than those before it. The cautions are also given as warnings.

    All volumes are read here, so that a faulty one is found before anything is computed.
    """
    found: list[str] = []
    notes: dict[str, int] = {}
    most = 0
    for number, volume in enumerate(volumes):
        try:
            check_voxels(volume.array)
        except VolumeError as error:
            raise VolumeError(f"volume {number}: {error}") from None
        for note in volume.notes:
            notes.setdefault(note, number)
        said = intensity_cautions(volume.array, trained=model.num_parameters() > 0)
        if number > 0 and len(said) > most:
            found += [f"volume {number}: {caution}" for caution in said]
        most = max(most, len(said))
    warn_of(found)
    return tuple(f"volume {number}: {note}" for note, number in notes.items() if number > 0), tuple(found)


def _copy_gradients(source: PathLike, target: PathLike, n_volumes: int) -> None:
    """Copies FSL's .bval and .bvec beside a 4-D NIfTI source; its upscaled volumes have the same order and axes."""
    if n_volumes == 1 or not os.fspath(source).lower().endswith(NIFTI_SUFFIXES):
        return
    for ending in (".bval", ".bvec"):
        before, after = (sidecar_of(path).with_suffix(ending) for path in (source, target))
        if before.is_file() and before != after:
            with replacing(after) as temporary:
                shutil.copyfile(before, temporary)


def _silently(volumes: Iterator[Volume]) -> Iterator[Volume]:
    """The same volumes without the warnings of reading them, which were given before."""
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = next(volumes, None)
        if volume is None:
            return
        yield volume


def _write(
    jobs: Iterable[Upscaling],
    n_volumes: int,
    first: Upscaling,
    outputs: Sequence[tuple[PathLike, str | None]],
    made_by: str,
    pages: Sequence[np.ndarray],
    wanted: Container[int],
) -> dict[int, Result]:
    """Runs the jobs, one for each volume, and writes the files `outputs` (path, dtype: the result, then its deviation).
    The first job also fills the arrays `pages`, and its `wanted` slices are returned."""
    kept: dict[int, Result] = {}
    shape = first.shape if n_volumes == 1 else (*first.shape, n_volumes)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                writing(path, first.place, shape, axis=first.axis, dtype=dtype, derivation=made_by, deviation=nth > 0)
            )
            for nth, (path, dtype) in enumerate(outputs)
        ]
        total = first.shape[first.axis] * n_volumes
        progress = stack.enter_context(Progress(total, shown=first.settings.progress))
        for job in jobs:

            def put(k: int, image: np.ndarray, deviation: np.ndarray | None, job: Upscaling = job) -> None:
                for write, values in zip(writers, (image, deviation), strict=False):
                    write(values)  # type: ignore[arg-type]
                if job is not first:
                    return
                for page, values in zip(pages, (image, deviation), strict=False):
                    np.moveaxis(page, job.axis, 0)[k] = values
                if k in wanted:
                    kept[k] = image, deviation

            job.run(put, progress)
    return kept


def _write_page(
    report: PathLike,
    model: "SRModel",
    scan: Volume,
    job: Upscaling,
    pages: Sequence[np.ndarray],
    facts: dict[str, str],
    cautions: tuple[str, ...],
) -> None:
    """The report on a scan and its result; `pages` are the result and, if there is one, its deviation."""
    after, *spread = (replace(job.place, array=page) for page in pages)
    write_report(
        report,
        scan,
        after,
        axis=job.axis,
        grid=model.grid,
        facts=facts,
        uncertainty=spread[0] if spread else None,
        cautions=cautions,
    )


def _reserve(file: IO[bytes], n_bytes: int) -> None:
    """Reserves disk space for `n_bytes` of an empty file; OSError if the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return
    # macOS and Windows: written zeros reserve the space too
    zeros = bytes(1 << 20)
    for start in range(0, n_bytes, len(zeros)):
        file.write(zeros[: n_bytes - start])
    file.flush()


@contextmanager
def _temporary_array(report: PathLike, job: Upscaling) -> Iterator[np.ndarray]:
    """An array for the result in a temporary file without a name in the folder of `report`; it disappears with the
    process."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(report))))
            # reserved now, because a disk that is full when a mapped page is written kills the process
            _reserve(file, 4 * math.prod(job.shape))
        except OSError as error:
            raise VolumeError(
                f"{report}: its folder has no room for a temporary file: {error.strerror or type(error).__name__}"
            ) from error
        h, w = (job.shape[a] for a in in_plane(job.axis))
        yield np.moveaxis(np.memmap(file, np.float32, "r+", shape=(job.shape[job.axis], h, w)), 0, job.axis)


def _preparation(scan: Volume, axis: int, effective: bool) -> Callable[[Volume], Volume]:
    """What is done to each volume of a file before it is upscaled: with `effective`, `to_effective`.

    All volumes are cropped to the matrix of the first, `scan`, because they become one file. Without `effective`, warns
    if k-space is filled to a smaller size than that of the slices, and adds a note to each volume.
    """
    (h, w), (rows, columns) = (scan.array.shape[a] for a in in_plane(axis)), measured_matrix(scan, axis)
    if effective:
        return partial_of(to_effective, axis=axis, matrix=(rows, columns))
    if (rows, columns) == (h, w):
        return lambda one: one
    interpolated = (
        f"the slices have {h}x{w} pixels, but their k-space is filled to about {rows}x{columns}: the scan was "
        "interpolated, and its true resolution is lower than the header states"
    )
    cure = "effective=True (--effective) undoes the interpolation first"
    warnings.warn(f"{interpolated}; {cure}", stacklevel=4)  # the caller of `upscale_file`
    return lambda one: replace(one, notes=(*one.notes, interpolated))
