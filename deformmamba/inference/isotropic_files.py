"""Makes scan files isotropic, one or a folder of them, with a report and a figure."""

import hashlib
import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from deformmamba import __version__
from deformmamba.annotations import check_seed, check_types
from deformmamba.errors import counted
from deformmamba.inference.adaptation import parse_adapt
from deformmamba.inference.cohort import Outcome, run_cohort
from deformmamba.inference.files import check_paths
from deformmamba.inference.inputs import rounding_notes
from deformmamba.inference.isotropic import MODEL, IsotropicReport, derivation, isotropic, loaded, without_spread
from deformmamba.inference.provenance import describe_weights, unusual, write_sidecar
from deformmamba.inference.settings import check_names
from deformmamba.inference.stack import Stack, check_voxel, given_profile
from deformmamba.physics.consistency import check_consistency
from deformmamba.pictures.report import write_report
from deformmamba.tensors import on_cpu_by_default
from deformmamba.volume import (
    PathLike,
    Volume,
    VolumeError,
    check_output,
    in_plane,
    no_scan,
    read_volume,
    write_volume,
)

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

# the keyword arguments of `isotropic` that change the result
SHAPING = ("to", "thickness", "profile", "adapt", "seed", "consistency", "axis")


class Isotropic(NamedTuple):
    """The result of `isotropic_file`: the scan from the file, the result, and its report without the uncertainty."""

    source: Volume
    result: Volume
    report: IsotropicReport


@on_cpu_by_default
def isotropic_file(
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
    **settings: Any,
) -> Isotropic:
    """Read `source`, make it isotropic, write `target`. The file appears when it is complete.

    Beside a NIfTI or MGH output a JSON file is written, with provenance, warnings and the facts of the report.

    Args:
        source, volume, series, stack, nan, partial: as `read_volume`.
        as_image: also accept files that `volume.not_a_scan` rejects: a mask, a phase image, an output of this package.
        target, dtype: as `volume.writing`; if the input is DICOM, the output can be a DICOM series with more slices.
        uncertainty: another file, for half the difference of the two orientations, in the scan's units. It is not
            written if the spline is the result.
        report: .html, a report for visual checks, see `report.write_report`: sections across the slices.
        sidecar: write the JSON file. An existing file that this package did not write is not changed.
        settings: as `isotropic`.

    Raises:
        VolumeError, InvalidArgument: as the functions named above; or two of the files are the same.
    """
    check_types(isotropic_file, locals())
    check_paths(source, target, uncertainty, report)
    check_settings(settings)
    scan = read_volume(source, volume=volume, series=series, stack=stack, nan=nan, partial=partial)
    if not as_image and (reason := no_scan(source, scan)):
        raise VolumeError(f"{source}: {reason}; as_image=True (--as-image) makes it isotropic anyway")
    check_output(target, source=scan, dtype=dtype)
    if uncertainty is not None:
        check_output(uncertainty, source=scan)
    result, made = isotropic(scan, **settings)
    made = replace(made, notes=(*made.notes, *rounding_notes(scan.array, dtype)))
    write_volume(target, result, dtype=dtype, derivation=derivation(made))
    spread = None if made.uncertainty is None else replace(result, array=made.uncertainty)
    if uncertainty is not None and spread is not None:
        write_volume(uncertainty, spread, derivation=derivation(made), deviation=True)
    if report is not None:
        before = in_plane_as(result, scan, settings)
        across = in_plane(made.axis)[0]
        write_report(
            report,
            before,
            result,
            axis=across,
            grid="origin",
            facts=report_facts(made),
            cautions=made.warned,
            uncertainty=spread,
        )
    if sidecar:
        reading = {"volume": volume, "dtype": dtype, **unusual(nan, partial)}
        made_by = {"weights": made.weights, "sha256": made.sha256, **reading, **shaping(settings)}
        write_sidecar(target, source, "iso", made_by, made.warned, {"Isotropic": made.facts()})
    return Isotropic(scan, result, without_spread(made))


def shaping(settings: dict[str, Any]) -> dict[str, str]:
    """The settings that change the result, as text for a sidecar; of a profile from a file also a hash of its table."""
    found = {key: str(value) for key in SHAPING if (value := settings.get(key)) is not None}
    profile = given_profile(settings.get("profile", "gaussian"), settings.get("thickness"))
    if profile.table is not None:
        found["profile"] += f", sha256 {hashlib.sha256(repr(profile.table).encode()).hexdigest()[:12]}"
    return found


def check_settings(settings: dict[str, Any]) -> None:
    """Refuses settings that no scan can have, before the first scan is read. Raises as `isotropic`.

    Raises InvalidType for a name that is no argument of `isotropic`.
    """
    check_names(settings, [name for name in inspect.signature(isotropic).parameters if name != "scan"])
    parse_adapt(settings.get("adapt", 0))
    check_seed(settings.get("seed", 0))
    check_consistency(settings.get("consistency", "object"))
    given_profile(settings.get("profile", "gaussian"), settings.get("thickness"))
    check_voxel(settings.get("to"))


def in_plane_as(result: Volume, scan: Volume, settings: dict[str, Any]) -> Volume:
    """The scan resampled to the in-plane pixels of the result, so that both have the same sections."""
    keys = ("to", "thickness", "profile", "axis")
    job = Stack.of(scan, **{key: settings[key] for key in keys if key in settings})
    array = np.moveaxis(job.slices + job.spots, 0, job.axis)
    return result.resampled(array, 1 / job.ratio, (job.axis,), "origin")


def report_facts(made: IsotropicReport) -> dict[str, str]:
    """Provenance as names and values, for a report."""
    weights = f"{made.weights or 'weights without a file'}, sha256 {made.sha256 or 'none: adapted or without a file'}"
    facts = {
        "result": str(made),
        "method": f"network, {weights}" if made.method == "network" else "cubic spline: the network was not better",
        "adaptation": f"{counted(made.adapted, 'step')} on this scan, seed {made.seed}" if made.adapted else "none",
        "slice profile": f"{made.profile}, {made.thickness:.3g} mm ({made.thickness_from})",
        "slices": f"{made.spacing:.3g} mm apart before, {made.to:.3g} mm after",
        "consistency": f"the slices of the result differ from the input's by {made.inconsistency[1]:.2%} of the range",
        "orientations": "none were compared, because the spline is the result"
        if made.method == "spline"
        else f"differ by {made.disagreement:.2%} of the range inside the anatomy",
        "version": f"deformmamba {__version__}",
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "time taken": f"{made.seconds:.1f} s",
    }
    return facts | {f"remark {number}": remark for number, remark in enumerate(made.remarks, 1)}


def isotropic_cohort(
    source: PathLike,
    target: PathLike,
    *,
    model: "str | os.PathLike[str] | SRModel" = MODEL,
    volume: int | None = None,
    dtype: str | None = None,
    nan: Literal["refuse", "zero"] = "refuse",
    partial: bool = False,
    told: Callable[[Outcome], None] | None = None,
    **settings: Any,
) -> list[Outcome]:
    """Makes every scan below `source` isotropic, in the same subfolders of `target`, named `desc-iso`.

    Everything else is as in `cohort.upscale_cohort`: resuming, several processes, the table of outcomes, several DICOM
    series in a folder. The sidecar of each scan holds the facts of its `IsotropicReport` under "Isotropic".
    """
    check_settings(settings)
    network = loaded(model, settings.get("device"))
    made_by = {
        **describe_weights(network),
        "volume": volume,
        "dtype": dtype,
        **unusual(nan, partial),
        **shaping(settings),
    }
    reading: dict[str, Any] = {"volume": volume, "dtype": dtype, "nan": nan, "partial": partial}

    def make(scan: Path, output: Path, series: str | None = None) -> tuple[str, dict[str, Any]]:
        options = {**reading, **settings, "sidecar": False}
        done = isotropic_file(scan, output, series=series, model=network, **options)
        warned = {"Warnings": list(done.report.warned)} if done.report.warned else {}
        return str(done.report), {**warned, "Isotropic": done.report.facts()}

    return run_cohort(source, target, "iso", made_by, make, told)
