"""Upscales folders of scans, in one process or many. Finished scans are skipped, and failures are listed.

Names follow BIDS: `sub-01_ses-1_T2w.nii.gz` becomes `sub-01_ses-1_desc-sr_T2w.nii.gz` in the same subfolder of the
output folder, with a JSON sidecar that records the provenance. A scan counts as done if its output and all further
files of it exist, and its sidecar names the same source (size and time of last change), the same weights (sha256), the
same version of this package and the same settings. The sidecar is complete only when all these files are, so an
interrupted run resumes when the command is repeated.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deformmamba import __version__
from deformmamba.annotations import check_types
from deformmamba.errors import DeformMambaError, InvalidArgument
from deformmamba.inference.drawing import draw_slice
from deformmamba.inference.files import upscale_file
from deformmamba.inference.networks import network
from deformmamba.inference.provenance import (
    KINDS,
    generated_by,
    json_text,
    shown_path,
    skull_stripped,
    unusual,
    weights_name,
)
from deformmamba.inference.settings import Settings
from deformmamba.tensors import check_device
from deformmamba.volume import (
    MGH_SUFFIXES,
    NIFTI_SUFFIXES,
    ChoiceNeeded,
    NothingToDo,
    PathLike,
    VolumeError,
    holds_dicom,
    scans_below,
    write_text,
)
from deformmamba.volume.files import make_folder
from deformmamba.volume.selection import is_generated, is_own_file, is_sidecar_of, read_json

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

# sub-<label>, then entities, then the suffix for the kind of image
_BIDS = re.compile(r"sub-[A-Za-z0-9]+(_[a-z]+-[A-Za-z0-9+]+)*_[A-Za-z0-9]+")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one scan.

    `reason` (why the scan failed, or was skipped or ignored), `remark` (`inspection.spacing_remark`) and `warnings`
    (separated by "; ") are one line each. They contain no information from the scan except its sizes, and shares of its
    voxels.
    """

    source: str  # relative to the folder of scans
    output: str  # relative to the output folder
    status: Literal["made", "skipped", "failed", "ignored"]
    reason: str = ""
    seconds: float = 0.0
    remark: str = ""
    warnings: str = ""


@dataclass(frozen=True)
class _Task:
    source: Path
    name: Path  # of the source, relative to the folder of scans
    output: Path  # relative to the output folder
    series: str | None = None  # SeriesInstanceUID, if a folder holds several

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
    """Upscale every scan below `source` into the same subfolders of `target`.

    A scan is a NIfTI or MGH file, or a DICOM series in a folder (the output is also a folder; each of several series
    in a folder is a separate scan). `volume.scans_below` finds the scans. Masks, label images, phase images and outputs
    of this package are listed as ignored, with the reason. Hidden files and `target` itself are not listed; a link to
    a file outside `source` fails. If a scan cannot be read or upscaled, it fails and the run continues. It also fails
    if a file has the name of its output, and this package did not write that file.

    Under `torchrun`, `accelerate launch` or `srun` each process takes its share (see `processes`), the largest scans
    first. No scan is processed twice, and no two processes write the same file. The folder must not change meanwhile.

    Writes a table of outcomes, `desc-sr_summary.csv` below `target` (`..._rank-R.csv` with several processes). If
    `source` is a BIDS data set, also writes the `dataset_description.json` of a derivative.

    Args:
        model: any SRModel.
        source: the folder of scans.
        target: the output folder; created if missing.
        volume, dtype, effective, nan, partial, settings: as `inference.upscale_file`.
        uncertainty, figure, report: folders for one file per scan: the `uncertainty` of `upscale_file`, the middle
            slice before and after as .png, an HTML report for visual checks.
        told: called with each `Outcome` as soon as its scan is finished.
        only: takes a scan's path relative to `source` and returns whether to upscale it; None: all.

    Returns:
        The outcomes of this process, by source.

    Raises:
        VolumeError: `source` is not a folder or contains no scan; `target` cannot be created.
        ValueError: the environment variables of `processes` are invalid.
    """
    check_types(upscale_cohort, locals())
    chosen = Settings.of(settings)
    if chosen.device is not None:
        check_device(chosen.device)
    model = network(model)
    reading = {"volume": volume, "dtype": dtype, "effective": effective}
    further = {"uncertainty": uncertainty, "figure": figure, "report": report}
    made_by = {
        **generated_by(model, chosen, reading),
        **unusual(nan, partial),
        **{name: True for name, folder in further.items() if folder is not None},
    }

    def beside(output: Path) -> dict[str, Path]:
        name = output.relative_to(target)
        return {kind: _place(folder, name, kind) for kind, folder in further.items() if folder is not None}

    def make(scan: Path, output: Path, series: str | None = None) -> tuple[str, dict[str, Any]]:
        places = beside(output)
        for path in places.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        drawn = places.pop("figure", None)
        options: dict[str, Any] = {**reading, **places, **vars(chosen), "nan": nan, "partial": partial}
        middle = (lambda n: (n // 2,)) if drawn else (lambda n: ())
        done = upscale_file(model, scan, output, series=series, sidecar=False, keep=middle, **options)
        if drawn:
            title = f"{shown_path(scan.name)}, slice"
            draw_slice(drawn, done, model, title=title, name=weights_name(model) or "output")
        return done.remark, {"Warnings": list(done.cautions)} if done.cautions else {}

    return run_cohort(source, target, "sr", made_by, make, told, only, beside)


def _place(folder: PathLike, name: Path, kind: str) -> Path:
    """The path of a further file of the output `name`."""
    stem, ending = _split(name.name)
    endings = {"figure": ".png", "report": ".html"}
    return Path(folder) / name.with_name(stem + endings[kind] if kind in endings else f"{stem}_uncertainty{ending}")


def run_cohort(
    source: PathLike,
    target: PathLike,
    kind: str,
    made_by: Mapping[str, Any],
    make: Callable[..., tuple[str, dict[str, Any]]],
    told: Callable[[Outcome], None] | None = None,
    only: Callable[[Path], bool] | None = None,
    beside: Callable[[Path], Mapping[str, Path]] = lambda output: {},
) -> list[Outcome]:
    """As `upscale_cohort`, with any function from scan to scan.

    Args:
        source, target, told, only: as `upscale_cohort`.
        kind: one of `provenance.KINDS`: the label of the BIDS entity `desc-`, and the description of the output.
        made_by: everything that the outputs depend on, as JSON; if it changes, all outputs are made again.
        make: called with the paths of a scan and of its output, and with `series` if a folder holds several DICOM
            series; writes the output and returns a remark and further facts for the sidecar.
        beside: the further files that `make` writes for an output.
    """
    source, target = Path(source), Path(target)
    rank, world = processes(os.environ)
    tasks, refused = _tasks(source, target, kind)
    if only is not None:
        tasks = [task for task in tasks if only(task.name)]
        refused = [outcome for outcome in refused if only(Path(outcome.source))]
        if not tasks and not refused:
            raise VolumeError(f"{source}: contains none of the requested scans; widen the selection")
    if not tasks and not refused:
        raise VolumeError(f"{source}: contains no scan; wanted .nii, .nii.gz, .mgh, .mgz or folders of DICOM files")
    make_folder(target)
    # the largest first, so that all processes finish at about the same time
    tasks = sorted(tasks, key=lambda task: (-_size(task.source), task.name))
    outcomes: list[Outcome] = []
    try:
        if rank == 0:
            _describe(source, target)
        made = (_done_or_made(task, target, kind, made_by, make, beside) for task in tasks[rank::world])
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
        ValueError: they are not numbers, or the rank is not below the number of processes.
    """
    # SLURM_NTASKS is also set in a batch script without srun, which is one process
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        given = environment.get(rank), environment.get(world)
        if given[0] is None or given[1] is None:
            continue
        if not (given[0].isdecimal() and given[1].isdecimal() and int(given[0]) < int(given[1])):
            raise InvalidArgument(
                f"{rank}={given[0]} and {world}={given[1]} do not describe one of several processes; unset both"
            )
        return int(given[0]), int(given[1])
    return 0, 1


def is_cohort(path: PathLike) -> bool:
    """Whether a path is a folder of scans. A folder that directly holds DICOM images is one scan instead."""
    path = Path(path)
    return path.is_dir() and not holds_dicom(file for file in path.iterdir() if not file.name.startswith("."))


def output_name(name: str, kind: str = "sr") -> str:
    """The name of the output: `desc-<kind>` as the last entity of a BIDS name (joined to an existing `desc-`), and
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
    """The scans to upscale, by name, and the files that are ignored or refused before they are opened."""
    if not root.is_dir():
        raise VolumeError(f"{root}: no such folder")
    if not is_cohort(root):
        raise VolumeError(
            f"{root}: contains DICOM files, so it is one scan, not a folder of scans; give its parent folder"
        )
    found, refused, taken = [], [], set[Path]()
    n_series: dict[Path, int] = {}
    inside = Path(os.path.realpath(root))  # unlike Path.resolve, realpath allows a link to itself
    skip = None if os.path.realpath(target) == str(inside) else target
    for candidate in scans_below(root, skip=skip, outside=False):
        path = candidate.path
        name = path.relative_to(root)
        shown = shown_path(name)
        if candidate.reason:
            refused.append(Outcome(shown, "", "ignored", candidate.reason))
            continue
        stem = name.name
        if candidate.series is not None:
            n_series[path] = n_series.get(path, -1) + 1
            stem = f"{stem}_series-{n_series[path]}"
        task = _Task(path, name, name.with_name(output_name(stem, kind)), candidate.series)
        if not Path(os.path.realpath(path)).is_relative_to(inside):
            refused.append(Outcome(shown, "", "failed", "a link to a file outside the folder; copy the scan"))
        elif task.sidecar in taken:
            shown_sidecar = shown_path(task.sidecar)
            refused.append(Outcome(shown, "", "failed", f"another scan has the output {shown_sidecar} already"))
        else:
            taken.add(task.sidecar)
            found.append(task)
    return found, refused


def _state(source: Path) -> tuple[int, float]:
    """(bytes, time of the last change); for a folder, over all its files."""
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
    beside: Callable[[Path], Mapping[str, Path]],
) -> Outcome:
    source, output = shown_path(task.name), shown_path(task.output)
    start = time.perf_counter()
    added: list[Path] = []  # folders, the innermost first
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
        known = read_json(sidecar) if path.exists() else None
        found = known if isinstance(known, dict) else {}
        same = {key: found.get(key) for key in wanted} == wanted
        complete = same and all(further.exists() for further in beside(path).values())
        if complete and found.get("OutputSha256") == _content_hash(path):
            return Outcome(source, output, "skipped", "done before")
        if (other := _of_others(path, sidecar)) is not None:
            raise VolumeError(
                f"{shown_path(other)}: exists and was not written by this package; move it, or choose another output "
                "folder"
            )
        added = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        claim = {**wanted, "OutputFile": shown_path(path.name)}
        with _claimed(sidecar, path, claim), _collected(task.source) as warned:
            remark, facts = make(task.source, path, **({"series": task.series} if task.series is not None else {}))
        said = {**claim, "SkullStripped": skull_stripped(task.source), **facts, "OutputSha256": _content_hash(path)}
        write_text(sidecar, json_text(said))
    except NothingToDo as reason:
        _remove_empty(added)
        return Outcome(source, output, "ignored", _reason(reason), time.perf_counter() - start)
    except Exception as error:  # an unforeseen error in one scan must not stop the others
        _remove_empty(added)
        return Outcome(source, output, "failed", _reason(error), time.perf_counter() - start)
    for text in warned:
        warnings.warn(f"{source}: {text}", stacklevel=4)  # the caller of `upscale_cohort`
    return Outcome(source, output, "made", "", time.perf_counter() - start, remark, "; ".join(warned))


@contextmanager
def _claimed(sidecar: Path, output: Path, claim: Mapping[str, Any]) -> Iterator[None]:
    """Within the block a sidecar states that this package makes `output`: an MGH file itself cannot, and a run that
    stops between output and sidecar would not recognise it. It disappears if the block fails without an output."""
    is_new = not is_sidecar_of(read_json(sidecar), output)
    if is_new:
        write_text(sidecar, json_text(claim))
    try:
        yield
    except BaseException:
        if is_new and not output.exists():
            sidecar.unlink(missing_ok=True)
        raise


@contextmanager
def _collected(path: Path) -> Iterator[list[str]]:
    """The texts of this package's warnings, without the path of the scan, each once; complete when the block ends."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield found
    texts = (str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    found += dict.fromkeys(text.removeprefix(f"{path}: ") for text in texts)


def _of_others(output: Path, sidecar: Path) -> Path | None:
    """The file among these that exists and that this package did not write. A folder (DICOM) is checked when it is
    written."""
    facts = read_json(sidecar)
    if is_sidecar_of(facts, output):
        return None
    if output.is_file() and not is_own_file(output):
        return output
    # a damaged one is made again
    return sidecar if facts is not None and not is_generated(facts) else None


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, the innermost first, up to the first that is not empty. With several processes all stay, because
    another process may be about to write there."""
    if processes(os.environ)[1] > 1:
        return
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _content_hash(path: Path) -> str:
    """The hash of a file, or of all files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in path.glob("[!.]*") if file.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try tiles"
    if isinstance(error, ChoiceNeeded):
        if error.argument == "volume":
            return f"{error.problem}; choose one with volume=K (--volume K), {error.which}"
        return f"{error.problem}; run the command on this scan alone"  # a run over a folder has no such argument
    if isinstance(error, (DeformMambaError, FloatingPointError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # the text of a foreign error may quote patient data
    return f"an unexpected {type(error).__name__}; run the command on this scan alone to see where"


def _table(outcomes: list[Outcome]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Outcome)])
    table.writeheader()
    table.writerows({**asdict(outcome), "seconds": f"{outcome.seconds:.1f}"} for outcome in outcomes)
    return text.getvalue()


def _describe(source: Path, target: Path) -> None:
    """Writes the description that BIDS requires for a folder of derivatives; an existing one is kept."""
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
