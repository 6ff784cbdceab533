"""Carries out a plan: reads each source, writes its slices and the manifest."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba import __version__
from deformmamba.data.prepare.plan import PathLike, Plan, Source, Unusable, chosen_slices, file_digest
from deformmamba.data.prepared import MANIFEST, SUFFIX, begun, read_prepared, write_manifest, write_prepared
from deformmamba.data.splits import SPLITS
from deformmamba.volume import VolumeError, intensity_scale
from deformmamba.volume.files import make_folder


def prepare(plan: Plan, out: PathLike, *, skip_unusable: bool | None = None, progress: bool = False) -> dict[str, Any]:
    """Carries out a plan into the folder `out` and returns its manifest.

    An interrupted preparation resumes: volumes that were already made from the same file with the same options are
    kept. Outputs of source files that no longer exist are removed. An unusable file raises a one-line error, and the
    finished volumes stay. With `skip_unusable` it is skipped instead, and the manifest records the reason (None: True
    for "folder" only, since any file may lie there).

    Raises:
        VolumeError: an unusable file, no usable file, an `out` that holds something else, or a full disk.
    """
    out = Path(out)
    skip_unusable = plan.kind == "folder" if skip_unusable is None else skip_unusable
    chosen_slices(plan.options["slices"], 1)  # raises for an invalid rule before anything is written
    facts = {"version": __version__, "kind": plan.kind, "options": dict(plan.options), "rule": plan.rule}
    _check_target(out, plan, facts)
    make_folder(out)
    for leftover in (*out.glob(f".*{SUFFIX}"), *out.glob(".*.json")):  # left by a killed run
        leftover.unlink(missing_ok=True)
    write_manifest(out, {"complete": False, **facts})
    skipped = list(plan.skipped)
    rows = []
    sources: Iterable[Source] = sorted(plan.sources, key=lambda source: source.name)
    if progress:
        from tqdm import tqdm

        sources = tqdm(sources, desc=f"preparing {plan.kind}", unit="volume", disable=None)
    for source in sources:
        try:
            rows.append(_prepare_one(source, out, plan))
        except Unusable as error:
            if not skip_unusable:
                raise VolumeError(
                    f"{error}; repair or remove the file, and run the command again: it resumes"
                ) from None
            skipped.append((source.source, str(error).replace(str(source.path), source.path.name)))
    if not rows:
        reason = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise VolumeError(f"{out}: no usable volume, {len(skipped)} skipped{reason}")
    for orphan in set(out.glob(f"*{SUFFIX}")) - {out / row["file"] for row in rows}:
        if _is_made(orphan, {}):  # not a user's file
            orphan.unlink(missing_ok=True)
    manifest = {
        "complete": True,
        **facts,
        "subjects": {
            split: sorted({row["subject"] for row in rows if row["split"] == split})
            for split in SPLITS
            if any(row["split"] == split for row in rows)
        },
        "volumes": rows,
        "skipped": [{"source": name, "reason": reason} for name, reason in sorted(skipped)],
    }
    write_manifest(out, manifest)
    return manifest


def _prepare_one(source: Source, out: Path, plan: Plan) -> dict[str, Any]:
    """Writes the file of one source and returns its row of the manifest."""
    target = out / f"{source.name}{SUFFIX}"
    made_of = {"source": source.source, "source_sha256": file_digest(source.path), "options": dict(plan.options)}
    if _is_made(target, made_of):
        digest = file_digest(target)
    else:
        try:
            slices, spacing, axis = source.read()
            kept = chosen_slices(plan.options["slices"], len(slices))
            if not len(kept):
                raise VolumeError(
                    f"{source.path}: none of its {len(slices)} slices is in the range {plan.options['slices']}"
                )
            slices = slices[kept.start : kept.stop]
            if not slices.any():
                raise VolumeError(f"{source.path}: all voxels of its slices are 0")
            unit = intensity_scale(np.abs(slices) if np.iscomplexobj(slices) else slices)
        except VolumeError as error:
            raise Unusable(str(error)) from None
        facts = {
            **made_of,
            "axis": axis,
            "first": kept.start,
            "unit": unit,
            "spacing_mm": [round(size, 6) for size in spacing],
        }
        digest = write_prepared(target, slices / np.float32(unit), facts)
    read = read_prepared(target)
    n, h, w = read.slices.shape
    row = {"file": target.name, "subject": source.subject, "split": source.split, "group": source.group}
    row |= {key: read.facts[key] for key in ("source", "source_sha256", "axis", "first", "unit", "spacing_mm")}
    return row | {"slices": n, "size": [h, w], "complex": read.facts["complex"], "sha256": digest}


def _is_made(target: Path, made_of: Mapping[str, Any]) -> bool:
    try:
        facts = read_prepared(target).facts
    except VolumeError:
        return False
    return all(facts.get(key) == value for key, value in made_of.items())


def _check_target(out: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Refuses a folder that holds the sources, a data set prepared with other options, or anything else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise VolumeError(f"{out}: is a file; give a folder")
    known = begun(out)
    if not known and any(out.iterdir()):
        raise VolumeError(f"{out}: is not empty and holds no prepared data set; give a new folder")
    inside = os.path.realpath(out)
    for source in plan.sources:
        if Path(os.path.realpath(source.path)).is_relative_to(inside):
            raise VolumeError(f"{out}: holds the source {source.path}; give a new folder for the data set")
    if all(path.name == MANIFEST for path in out.iterdir()):
        return  # nothing was prepared yet
    for key in ("kind", "options"):
        if known.get(key) != facts[key]:
            raise VolumeError(f"{out}: was prepared with {key} {known.get(key)}, not {facts[key]}; give a new folder")
