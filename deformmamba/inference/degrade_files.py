"""Reduces the resolution of scan files."""

from typing import Any, Literal

from deformmamba import __version__
from deformmamba.annotations import check_types
from deformmamba.inference.effective import coarsen, k_space_crop
from deformmamba.inference.files import check_paths
from deformmamba.inference.inputs import rounding_notes
from deformmamba.inference.provenance import distrust, unusual, write_sidecar
from deformmamba.physics.degradations import Degradation
from deformmamba.volume import PathLike, Volume, VolumeError, check_output, no_scan, read_volume, write_volume
from deformmamba.volume.selection import OWN_OUTPUT


def degrade_file(
    source: PathLike,
    target: PathLike,
    degradation: Degradation | int,
    *,
    volume: int | None = None,
    series: int | str | None = None,
    stack: int | None = None,
    nan: Literal["refuse", "zero"] = "refuse",
    partial: bool = False,
    as_image: bool = False,
    dtype: str | None = None,
    **settings: Any,
) -> tuple[Volume, Volume]:
    """Read `source`, simulate a coarser measurement, write `target`. The file appears when it is complete.

    Beside a NIfTI or MGH output a JSON file is written, with provenance and warnings.

    Args:
        source, volume, series, stack, nan, partial: as `read_volume`.
        degradation, settings: as `coarsen`; an integer is the scale of a k-space crop.
        target, dtype: as `volume.writing`.
        as_image: also accept a mask, a label image and a phase image; outputs of this package are always accepted.

    Returns:
        The scan from the file, and the result.

    Raises:
        VolumeError, InvalidArgument: as the functions named above; or the output is the input.
    """
    check_types(degrade_file, locals())
    check_paths(source, target, None, None)
    scan = read_volume(source, volume=volume, series=series, stack=stack, nan=nan, partial=partial)
    reason = no_scan(source, scan)
    if reason and not as_image and not reason.startswith(OWN_OUTPUT):
        raise VolumeError(f"{source}: {reason}; as_image=True (--as-image) degrades it anyway")
    check_output(target, source=scan, dtype=dtype)
    made = degradation if isinstance(degradation, Degradation) else k_space_crop(scan, degradation)
    coarse = coarsen(scan, made, **settings)
    notes = (*coarse.notes, *rounding_notes(scan.array, dtype))
    write_volume(
        target, coarse, dtype=dtype, derivation=f"deformmamba {__version__}, {distrust((), notes)}degrade {made}"
    )
    reading = {"volume": volume, "dtype": dtype, **unusual(nan, partial)}
    write_sidecar(target, source, "degrade", {"degradation": str(made), **reading, **settings}, notes)
    return scan, coarse
