"""Folders of scans upscaled one after the other, by one process or many: what is done is skipped, what fails is listed.

Names follow BIDS: `sub-01_ses-1_T2w.nii.gz` becomes `sub-01_ses-1_desc-sr_T2w.nii.gz` at the same place below the
output folder, with a JSON sidecar that says what made it. A scan counts as done if its output is there and the sidecar
beside it names the same source (size and time of last change), the same weights (sha256), the same version of this
package and the same settings; the sidecar is written last. So a run that was stopped, however, is simply repeated.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deformmamba import __version__
from deformmamba.errors import InvalidArgument
from deformmamba.inference.drawing import draw_slice
from deformmamba.inference.files import upscale_file
from deformmamba.inference.networks import network
from deformmamba.inference.provenance import (
    generated_by,
    shown_path,
    skull_stripped,
    tensor_digest,
    type_name,
    weights_hash,
    weights_name,
)
from deformmamba.inference.settings import Settings
from deformmamba.volume import (
    MGH_SUFFIXES,
    NIFTI_SUFFIXES,
    PathLike,
    VolumeError,
    holds_dicom,
    scans_below,
    write_text,
)

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

# what a scan can be made into: the label of the BIDS entity `desc-`, and what it means
KINDS = {
    "sr": "Made by super-resolution: what the scanner did not measure is an estimate. No diagnosis.",
    "iso": "Made isotropic: what the scanner did not measure between the slices is an estimate. No diagnosis.",
}
# sub-<label>, then entities, then the suffix that says what kind of image it is
_BIDS = re.compile(r"sub-[A-Za-z0-9]+(_[a-z]+-[A-Za-z0-9+]+)*_[A-Za-z0-9]+")


@dataclass(frozen=True)
class Outcome:
    """What became of one scan; `reason` (why not) and `remark` (`inspection.spacing_remark`) are one line, and hold
    nothing that was read from the scan but its sizes."""

    source: str  # relative to the folder of scans
    output: str  # relative to the output folder
    status: Literal["made", "skipped", "failed", "passed over"]
    reason: str = ""
    seconds: float = 0.0
    remark: str = ""


@dataclass(frozen=True)
class _Task:
    source: Path
    name: Path  # of the source, relative to the folder of scans
    output: Path  # relative to the output folder
    series: str | None = None  # SeriesInstanceUID, where a folder holds several

    @property
    def sidecar(self) -> Path:
        return self.output.with_name(_split(self.output.name)[0] + ".json")


def upscale_cohort(
    model: "SRModel",
    source: PathLike,
    target: PathLike,
    *,
    volume: int | None = None,
    dtype: str | None = None,
    effective: bool = False,
    nan: Literal["refuse", "zero"] = "refuse",
    partial: bool = False,
    uncertainty: PathLike | None = None,
    figure: PathLike | None = None,
    report: PathLike | None = None,
    told: Callable[[Outcome], None] | None = None,
    only: Callable[[Path], bool] | None = None,
    **settings: Any,
) -> list[Outcome]:
    """Upscale every scan below `source` into the same places below `target`.

    A scan is a NIfTI or MGH file, or a DICOM series in a folder (which becomes a folder again; each of several series
    in a folder is a scan of its own). `volume.scans_below` decides: masks, label images, phase images and outputs of
    this package are listed as passed over, with the reason. Hidden names and `target` itself are left out; a link that
    leads out of `source` fails. A scan that cannot be read or upscaled fails, and the others go on.

    Under `torchrun`, `accelerate launch` or `srun` each process takes its share (see `processes`), the largest scans
    first; nothing is done twice, and no two processes write the same file. The folder must not change meanwhile.

    Writes a table of its outcomes, `desc-sr_summary.csv` below `target` (`..._rank-R.csv` of several processes), and
    where `source` is a BIDS data set, the `dataset_description.json` of a derivative.

    Args:
        model: any SRModel.
        source: the folder of scans.
        target: the output folder; made if it is not there.
        volume, dtype, effective, nan, partial, settings: as `inference.upscale_file`.
        uncertainty, figure, report: folders, for a file of each scan: what `upscale_file` gives for `uncertainty`, the
            middle slice before and after as .png, a page for visual checks as .html.
        told: called with each outcome as it comes.
        only: of a scan's path relative to `source`, whether to upscale it; None: all.

    Returns:
        The outcomes of this process, by source.

    Raises:
        VolumeError: `source` is no folder or holds no scan; `target` cannot be made.
        ValueError: an environment that names no valid share.
    """
    chosen = Settings(**settings)
    model = network(model)
    reading = {"volume": volume, "dtype": dtype, "effective": effective}
    further = {"uncertainty": uncertainty, "figure": figure, "report": report}
    made_by = {
        **generated_by(model, chosen, reading),
        **({"nan": nan} if nan != "refuse" else {}),
        **{name: True for name, folder in further.items() if folder is not None},
    }

    def make(scan: Path, output: Path, series: str | None = None) -> tuple[str, dict[str, Any]]:
        name = output.relative_to(target)
        places: dict[str, Any] = {
            kind: _place(folder, name, kind) for kind, folder in further.items() if folder is not None
        }
        drawn = places.pop("figure", None)
        options: dict[str, Any] = {**reading, **places, **vars(chosen), "nan": nan, "partial": partial}
        middle = (lambda n: (n // 2,)) if drawn else (lambda n: ())
        done = upscale_file(model, scan, output, series=series, sidecar=False, as_image=True, keep=middle, **options)
        if drawn:
            title = f"{shown_path(scan.name)}, slice"
            draw_slice(drawn, done, model, title=title, name=weights_name(model) or "output")
        return done.remark, {"Warnings": list(done.cautions)} if done.cautions else {}

    return run_cohort(source, target, "sr", made_by, make, told, only)


def _place(folder: PathLike, name: Path, kind: str) -> Path:
    """Where a further file of the output `name` goes; its folder is made."""
    stem, ending = _split(name.name)
    endings = {"figure": ".png", "report": ".html"}
    path = Path(folder) / name.with_name(stem + endings[kind] if kind in endings else f"{stem}_uncertainty{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def describe_weights(model: "SRModel") -> dict[str, Any]:
    """Class, name and hash of a model, for a sidecar."""
    return {
        "model": type_name(model),
        "weights": weights_name(model),
        "sha256": weights_hash(model) or f"no file: {tensor_digest(model)}",
    }


def run_cohort(
    source: PathLike,
    target: PathLike,
    kind: str,
    made_by: Mapping[str, Any],
    make: Callable[..., tuple[str, dict[str, Any]]],
    told: Callable[[Outcome], None] | None = None,
    only: Callable[[Path], bool] | None = None,
) -> list[Outcome]:
    """What `upscale_cohort` does, with any function from scan to scan.

    Args:
        source, target, told, only: as `upscale_cohort`.
        kind: one of `KINDS`, for names and descriptions.
        made_by: what the outputs depend on, as JSON can hold it; another one makes them again.
        make: called with the paths of a scan and of its output, and with `series` where a folder holds several DICOM
            series; writes the output and returns a remark and further facts for the sidecar.
    """
    source, target = Path(source), Path(target)
    rank, world = processes(os.environ)
    tasks, refused = _tasks(source, target, kind)
    if only is not None:
        tasks = [task for task in tasks if only(task.name)]
        refused = [outcome for outcome in refused if only(Path(outcome.source))]
        if not tasks and not refused:
            raise VolumeError(f"{source}: holds no scan of those that were asked for")
    if not tasks and not refused:
        raise VolumeError(f"{source}: holds no scan; wanted .nii, .nii.gz, .mgh, .mgz or folders of DICOM files")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(f"{target}: cannot be made: {error.strerror}; choose another folder") from None
    # the largest first, so that the shares end at about the same time
    tasks = sorted(tasks, key=lambda task: (-_size(task.source), task.name))
    outcomes: list[Outcome] = []
    try:
        if rank == 0:
            _describe(source, target)
        made = (_done_or_made(task, target, kind, made_by, make) for task in tasks[rank::world])
        for outcome in itertools.chain(refused if rank == 0 else [], made):
            outcomes.append(outcome)
            if told:
                told(outcome)
    finally:
        name = f"{summary(kind)}.csv" if world == 1 else f"{summary(kind)}_rank-{rank}.csv"
        outcomes = sorted(outcomes, key=lambda outcome: outcome.source)
        write_text(target / name, _table(outcomes))
    return outcomes


def summary(kind: str) -> str:
    """The name of the table of outcomes, without its ending."""
    return f"desc-{kind}_summary"


def processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, number of processes): RANK and WORLD_SIZE, which torchrun and accelerate set; else those of `srun`; else
    (0, 1).

    Raises:
        ValueError: they are no numbers, or the rank is not below the number of processes.
    """
    # a batch script that calls no srun has SLURM_NTASKS too, but is one process
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        given = environment.get(rank), environment.get(world)
        if given[0] is None or given[1] is None:
            continue
        if not (given[0].isdecimal() and given[1].isdecimal() and int(given[0]) < int(given[1])):
            raise InvalidArgument(f"{rank}={given[0]} and {world}={given[1]} name no share of the work; unset both")
        return int(given[0]), int(given[1])
    return 0, 1


def is_cohort(path: PathLike) -> bool:
    """Whether a path is a folder of scans: any folder but one that itself holds DICOM images, which is one scan."""
    path = Path(path)
    return path.is_dir() and not holds_dicom(file for file in path.iterdir() if not file.name.startswith("."))


def output_name(name: str, kind: str = "sr") -> str:
    """The name of the output: `desc-<kind>` as the last entity of a BIDS name (joined to a `desc-` that is there), and
    at the end of any other name."""
    stem, ending = _split(name)
    if not _BIDS.fullmatch(stem):
        return f"{stem}_desc-{kind}{ending}"
    *entities, image = stem.split("_")
    last = entities.pop() if entities[-1].startswith("desc-") else "desc-"
    return "_".join([*entities, f"{last}{kind}", image]) + ending


def _split(name: str) -> tuple[str, str]:
    for ending in sorted(NIFTI_SUFFIXES + MGH_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)], name[-len(ending) :]
    return name, ""


def _tasks(root: Path, target: Path, kind: str) -> tuple[list[_Task], list[Outcome]]:
    """What is to be upscaled, by name, and what is passed over or refused before it is opened."""
    if not root.is_dir():
        raise VolumeError(f"{root}: no such folder")
    if not is_cohort(root):
        raise VolumeError(f"{root}: holds DICOM files itself, so it is one scan; give the folder above it")
    found, refused, taken = [], [], set[Path]()
    n_series: dict[Path, int] = {}
    skip = None if target.resolve() == root.resolve() else target
    for candidate in scans_below(root, skip=skip, outside=False):
        path = candidate.path
        name = path.relative_to(root)
        shown = shown_path(name)
        if candidate.reason:
            refused.append(Outcome(shown, "", "passed over", candidate.reason))
            continue
        stem = name.name
        if candidate.series is not None:
            n_series[path] = n_series.get(path, -1) + 1
            stem = f"{stem}_series-{n_series[path]}"
        task = _Task(path, name, name.with_name(output_name(stem, kind)), candidate.series)
        if not path.resolve().is_relative_to(root.resolve()):
            refused.append(Outcome(shown, "", "failed", "a link that leads out of the folder; copy the scan"))
        elif task.sidecar in taken:
            shown_sidecar = shown_path(task.sidecar)
            refused.append(Outcome(shown, "", "failed", f"another scan has the output {shown_sidecar} already"))
        else:
            taken.add(task.sidecar)
            found.append(task)
    return found, refused


def _state(source: Path) -> tuple[int, float]:
    """(bytes, time of the last change), of a folder over its files."""
    files = [path.stat() for path in source.iterdir() if path.is_file()] if source.is_dir() else [source.stat()]
    return sum(file.st_size for file in files), max((file.st_mtime for file in files), default=0.0)


def _size(source: Path) -> int:
    try:
        return _state(source)[0]
    except OSError:
        return 0


def _done_or_made(
    task: _Task,
    target: Path,
    kind: str,
    made_by: Mapping[str, Any],
    make: Callable[..., tuple[str, dict[str, Any]]],
) -> Outcome:
    source, output = shown_path(task.name), shown_path(task.output)
    start = time.perf_counter()
    try:
        size, changed = _state(task.source)
        wanted = {
            "Description": KINDS[kind],
            "Sources": [shown_path(task.name.as_posix())],
            "SourceSize": size,
            "SourceModified": changed,
            "GeneratedBy": [{"Name": "deformmamba", "Version": __version__, **made_by}],
        }
        path, sidecar = target / task.output, target / task.sidecar
        known = _read(sidecar) if path.exists() else None
        found = known if isinstance(known, dict) else {}
        same = {key: found.get(key) for key in wanted} == wanted
        if same and found.get("OutputSha256") == _content_hash(path):
            return Outcome(source, output, "skipped", "done before")
        path.parent.mkdir(parents=True, exist_ok=True)
        remark, facts = make(task.source, path, **({"series": task.series} if task.series is not None else {}))
        stripped = skull_stripped(task.source)
        said = {**wanted, "SkullStripped": stripped, **facts, "OutputSha256": _content_hash(path)}
        write_text(sidecar, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    except Exception as error:  # a scan that nobody foresaw is no reason to leave the others undone
        return Outcome(source, output, "failed", _reason(error), time.perf_counter() - start)
    return Outcome(source, output, "made", "", time.perf_counter() - start, remark)


def _content_hash(path: Path) -> str:
    """Of a file, or of all files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try tiles"
    if isinstance(error, (ValueError, FloatingPointError)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    # the text of a foreign error may quote what it read
    return f"an unexpected {type(error).__name__}; upscale this scan alone to see where"


def _read(sidecar: Path) -> Any:
    try:
        return json.loads(sidecar.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _table(outcomes: list[Outcome]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Outcome)])
    table.writeheader()
    table.writerows({**asdict(outcome), "seconds": f"{outcome.seconds:.1f}"} for outcome in outcomes)
    return text.getvalue()


def _describe(source: Path, target: Path) -> None:
    """What BIDS asks of a folder of derivatives; one that is there stays."""
    path = target / "dataset_description.json"
    if (source / path.name).is_file() and not path.exists():
        described = {
            "Name": "Super-resolution by deformmamba",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "deformmamba", "Version": __version__}],
        }
        write_text(path, json.dumps(described, indent=2) + "\n")
        if not (ignored := target / ".bidsignore").exists():
            write_text(ignored, "desc-*_summary*.csv\n")
