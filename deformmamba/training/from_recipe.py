"""`train_recipe`: calls `fit` with the settings of a recipe and a folder of volumes."""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deformmamba.annotations import check_types, is_number
from deformmamba.data.patches import PatchDataset, check_magnitudes
from deformmamba.data.scans import INDEX, Scan, describe_splits, find_scans, load_slices, subjects
from deformmamba.data.thick_slices import ThickSliceDataset, thick_cases
from deformmamba.errors import DeformMambaError, InvalidArgument, counted, one_line
from deformmamba.evaluation.compare import evaluate, mean_scores
from deformmamba.losses import LOSSES, SRLoss
from deformmamba.metrics import WINDOW, psnr, ssim
from deformmamba.models import MODELS
from deformmamba.models.base import SRModel
from deformmamba.training.folder import RunFolder
from deformmamba.training.heritage import INHERITED, inherited_facts, predecessors
from deformmamba.training.loop import Loss, fit
from deformmamba.training.recipe import check_recipe, load_recipe
from deformmamba.training.sample import sample_picture
from deformmamba.training.settings import plain_number
from deformmamba.volume import VolumeError
from deformmamba.weights import load_checkpoint
from deformmamba.weights.checkpoint import Checkpoint

SAMPLE = "sample.png"
# settings that change how a run is computed but not its result
INDIFFERENT = ("workers",)
# arguments of a network that do not change what it computes from initial weights; further blocks of a level start as
# the identity, see `DeformMambaSR.load_initial`
SAME_RESULTS = ("depths", "checkpointing", "drop_path")
Plan = dict[str, dict[str, Any]]
Validate = Callable[[Any], Mapping[str, float]]


def train_recipe(
    recipe: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    init: str | os.PathLike[str] | None = None,
    subject: str | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Trains with a recipe on the "train" split of the folder `data` and validates on its "val" split.

    Args:
        recipe: see `load_recipe`.
        data: see `deformmamba.data.scans.find_scans`.
        out: see `fit`; also receives `sample.png`, a picture of a validation slice.
        init: replaces the recipe's `init`, see `load_recipe`.
        subject: a regular expression that finds the subject in the path of a scan, see `find_scans`.
        say: called with one line of text for each split, which lists its subjects.
        progress: see `fit`.
        overrides: replace [fit] keys if they are not None, such as `steps` (which replaces `epochs`) or `seed`.

    Initial weights are validated first, as step 0, and stay the best checkpoint until a validation scores higher. Their
    data consistency, licence and acknowledgements are inherited.

    Returns the best checkpoint.

    Raises:
        InvalidArgument: the recipe, the data, the initial weights or the folder do not fit; raised before anything is
            computed.
    """
    check_types(train_recipe, locals())
    plan = _plan(recipe, None if init is None else os.fspath(init), overrides)
    loss = _loss(plan["fit"])
    scans = find_scans(data, subject=subject)
    train, val = _split(scans, plan, data)
    if say is not None:
        for line in describe_splits([*train, *val, *(scan for scan in scans if scan.split == "test")]):
            say(line)
    start = load_checkpoint(plan["model"]["init"]) if "init" in plan["model"] else None
    folder = RunFolder(out)
    # a run started by an earlier version continues with its settings
    scored = start is not None and not (folder.describes("fit.samples") and not folder.describes("fit.score_start"))
    run = _run_facts(plan, train, val)
    if start is not None:
        run |= _inherited(start, folder) if scored else {}
        run["init"] = predecessors(start.sha256, start.provenance)
    folder.check({"provenance": run}, whole=False)

    seed = plan["fit"].get("seed", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        model = _model(recipe, plan["model"], start)
    model.provenance = {key: run[key] for key in INHERITED if key in run}
    quiet = os.environ.get("RANK", "0") != "0" or not progress
    dataset, validate = _data(recipe, plan, model, train, val, Path(out) / SAMPLE, progress=not quiet)
    fitting = {key: value for key, value in plan["fit"].items() if key not in ("loss", "beta", "steps", "epochs")}
    return fit(
        model,
        dataset,
        out=out,
        steps=math.ceil(len(dataset) / fitting.get("batch", 8)),
        loss=loss,
        validate=validate,
        score_start=scored,
        provenance={**run, "spacings_mm": [round(spacing, 2) for spacing in dataset.spacings]},
        progress=progress,
        **fitting,
    )


def _plan(recipe: str | os.PathLike[str], init: str | None, overrides: Mapping[str, Any]) -> Plan:
    """The recipe with the caller's replacements, checked as the recipe is."""
    plan = load_recipe(recipe)
    given = {key: _as_in_toml(value) for key, value in overrides.items() if value is not None}
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in given:
            plan["fit"].pop(other, None)
    plan["fit"].update(given)
    if init is not None:
        plan["model"]["init"] = init
    continues = plan["model"].pop("continues", False)
    if not plan["model"] or (continues and "init" not in plan["model"]):
        raise InvalidArgument(
            f"recipe {recipe}: no weights to start from; give them: --init FILE_OR_NAME (init= in Python). "
            "A later stage continues the best.safetensors of the stage before"
        )
    if ("steps" in plan["fit"]) == ("epochs" in plan["fit"]):
        raise InvalidArgument(f"recipe {recipe}: [fit] must contain either steps or epochs")
    check_recipe(recipe, plan)
    return plan


def _as_in_toml(value: Any) -> Any:
    """An argument as TOML gives it: lists instead of tuples, and numbers of Python instead of numpy's."""
    if isinstance(value, list | tuple):
        return [_as_in_toml(item) for item in value]
    return plain_number(value) if is_number(value) else value


def _loss(settings: Mapping[str, Any]) -> Loss:
    kind = settings.get("loss", "sr")
    return SRLoss(beta=settings.get("beta", 0.1)) if kind == "sr" else LOSSES[kind]()


def _run_facts(plan: Plan, train: Sequence[Scan], val: Sequence[Scan]) -> dict[str, Any]:
    """The facts about a training that are written into checkpoints and must be equal for two runs in one folder."""
    model = dict(plan["model"])
    if "init" in model:
        model["init"] = Path(model["init"]).name  # a path may contain a person's name
    return {
        "recipe": {
            "model": model,
            "data": plan["data"],
            "fit": {key: value for key, value in plan["fit"].items() if key not in INDIFFERENT},
        },
        "train": _described(train),
        "val": _described(val),
        "degradation": _degradation(plan["data"]),
    }


def _data(
    recipe: str | os.PathLike[str],
    plan: Plan,
    model: SRModel,
    train: Sequence[Scan],
    val: Sequence[Scan],
    picture: Path,
    *,
    progress: bool,
) -> tuple[PatchDataset | ThickSliceDataset, Validate]:
    """The training samples of a run, and the function that scores a model; it also draws `picture`."""
    if getattr(model, "channels", None) not in (None, 1):
        raise InvalidArgument(
            f"recipe {recipe}: {type(model).__name__} takes {model.channels} channels, and slices have one; set "
            "in_channels = 1, or give fit your own data set"
        )
    batch, epochs, seed = plan["fit"].get("batch", 8), plan["fit"].get("epochs"), plan["fit"].get("seed", 0)
    length = plan["fit"].get("steps", 1) * batch
    settings = {key: value for key, value in plan["data"].items() if key not in ("validation", "kind")}
    if plan["data"].get("kind") == "thick":
        if model.scale != 1 or epochs is not None:
            wrong = f"{type(model).__name__} has scale {model.scale}" if model.scale != 1 else "epochs are given"
            raise InvalidArgument(f"recipe {recipe}: kind = 'thick' needs scale = 1 and steps, but {wrong}")
        thick = ThickSliceDataset(train, length=length, seed=seed, progress=progress, **settings)
        return thick, _thick_scores(val)
    if model.scale == 1:
        raise InvalidArgument(
            f"recipe {recipe}: {type(model).__name__} has scale 1, as networks for the slice direction, and the data "
            "are for in-plane super-resolution; train it with a recipe of kind = 'thick', such as thick-stage3"
        )
    dataset = PatchDataset(
        train,
        scale=model.scale,
        length=length,
        intensity=model.intensity,
        base=getattr(model, "skip", None) or "zero-fill",
        seed=seed,
        progress=progress,
        **settings,
    )
    if epochs is not None:
        dataset.length = math.ceil(epochs * sum(len(slices) for slices in dataset.groups) / batch) * batch
    degradation = dataset.degradation
    if (degradation.scale, degradation.grid) != (model.scale, model.grid):
        raise InvalidArgument(
            f"recipe {recipe}: degradation {degradation} gives the {degradation.grid} grid, and "
            f"{type(model).__name__} works on the {model.grid} grid"
        )
    for scan in val:  # else a damaged or empty volume would end the training at its first validation
        check_validation(scan, model.scale)

    def validate(candidate: SRModel) -> dict[str, float]:
        title = f"{val[0].subject}, validation"
        try:
            sample_picture(candidate, val[0], picture, degradation=degradation, title=title)
        except DeformMambaError as error:  # a picture does not stop a training
            warnings.warn(f"{val[0].path}: no picture of it: {error}", stacklevel=2)
        return mean_scores(evaluate(candidate, val, degradation=degradation))

    return dataset, validate


def check_validation(scan: Scan, scale: int) -> None:
    """Raises VolumeError for a scan that no training can be validated on; `load_slices` raises others."""
    slices = load_slices(scan, scale, phase=True).array
    wrong = "no voxel above 0" if not np.abs(slices).max() > 0 else ""
    if min(slices.shape[1:]) < WINDOW:
        wrong = f"slices of {slices.shape[1]}x{slices.shape[2]} pixels"
    if wrong:
        raise VolumeError(f"{scan.path}: {wrong}, so nothing can be validated on it; leave the scan out")
    check_magnitudes(scan, slices)


def forget_groups(scans: Sequence[Scan], settings: dict[str, Any], data: Any) -> None:
    """Removes the groups of a recipe from its `settings` of data, with a warning, if the scans in `data` have none."""
    if not any(scan.group for scan in scans) and (settings.get("weights") or settings.get("validation")):
        warnings.warn(
            f"{data}: contrast and anatomy of the volumes are unknown (no volumes.tsv with these columns), so the "
            "group weights of the recipe are ignored and all volumes count equally",
            stacklevel=4,
        )
        settings.pop("weights", None)
        settings.pop("validation", None)


def _split(scans: Sequence[Scan], plan: dict[str, dict[str, Any]], data: Any) -> tuple[list[Scan], list[Scan]]:
    """The scans to train and to validate on. Without groups in the folder all scans are used, and `plan` is changed."""
    settings = plan["data"]
    forget_groups(scans, settings, data)
    weights, wanted = settings.get("weights"), settings.get("validation")
    train = [scan for scan in scans if scan.split == "train" and (weights is None or scan.group in weights)]
    val = [scan for scan in scans if scan.split == "val" and (wanted is None or scan.group in wanted)]
    missing = sorted(set(weights or ()) - {scan.group for scan in train})
    if missing and train:
        warnings.warn(
            f"{data} has no training volumes of {', '.join(missing)}; the other groups of the recipe replace them",
            stacklevel=3,
        )
    if not train or not val:
        groups = ", ".join(sorted({f"{scan.group or 'no group'} ({scan.split})" for scan in scans}))
        raise InvalidArgument(
            f"train: {data}: {counted(len(train), 'volume')} to train on and {len(val)} to validate on; both are "
            f"needed, from different subjects. The recipe needs {', '.join(weights or ['any'])} and "
            f"{', '.join(wanted or ['any'])}; "
            f"available: {groups}. A {INDEX} in the folder (columns participant_id, file, split) sets the splits"
        )
    return train, val


def _described(scans: Sequence[Scan]) -> dict[str, Any]:
    """The numbers of subjects and volumes, and a hash of the subject names. The names are not stored, because they may
    identify a person and checkpoints are published."""
    names = subjects(scans)
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return {"subjects": len(names), "volumes": len(scans), "subjects_sha256": digest}


def _thick_scores(val: Sequence[Scan]) -> Callable[[SRModel], dict[str, float]]:
    """A function that scores a network for the slice direction, and the cubic spline, on in-plane images of `val`."""
    cases = thick_cases(val)

    def scores(model: SRModel) -> dict[str, float]:
        rows = []
        with torch.inference_mode():
            for case in cases:
                pair = [(model(case.lr.to(model.device)).cpu(), case.hr), (case.lr, case.hr)]
                rows.append([f(sr[0], hr[0]) for f in (psnr, ssim) for sr, hr in pair])
        names = ("psnr", "psnr_spline", "ssim", "ssim_spline")
        return {name: float(value) for name, value in zip(names, torch.tensor(rows).mean(0), strict=True)}

    return scores


def _degradation(settings: Mapping[str, Any]) -> str:
    """The degradations of a training, as text: "k-space crop, magnitude; 10 % k-space >> rician:snr=30"."""
    if settings.get("kind") == "thick":
        return "slice profiles, " + ", ".join(
            f"{key} {'-'.join(f'{value:g}' for value in settings[key])}"
            for key in ("ratio", "thickness")
            if key in settings
        )
    others = [f"{100 * share:g} % {text}" for text, share in settings.get("jitter", {}).items()]
    return "; ".join([settings.get("degradation", "k-space crop, magnitude"), *others])


def _inherited(start: Checkpoint, folder: RunFolder) -> dict[str, Any]:
    """The facts about the initial weights that also hold for the trained weights.

    A run in `folder` that was started by an earlier version, which knew fewer of them, keeps its facts.
    """
    begun = folder.known()
    new = ("license", "acknowledgements")  # which the runs of earlier versions lack
    facts = inherited_facts(start.sha256, start.provenance)
    return {
        key: value
        for key, value in facts.items()
        if key in start.provenance or key not in new or not begun or f"provenance.{key}" in begun
    }


def _model(recipe: str | os.PathLike[str], arguments: Mapping[str, Any], start: Checkpoint | None) -> SRModel:
    """The model of a recipe's [model] section, with new weights or those of `start`."""
    if start is not None and arguments.keys() == {"init"}:
        if start.class_name not in MODELS:
            raise InvalidArgument(
                f"recipe {recipe}: {start.source} is a {start.class_name}; models: {', '.join(MODELS)}"
            )
        return MODELS[start.class_name].from_checkpoint(start)
    plain = {key: value for key, value in arguments.items() if key != "init"}
    made, preset = MODELS[plain.pop("name", "DeformMambaSR")], plain.pop("preset", None)
    if preset is not None and not hasattr(made, "from_preset"):
        raise InvalidArgument(f"train: {made.__name__} has no presets; leave `preset` out")
    model: SRModel = made.from_preset(preset, **plain) if preset is not None else made(**plain)  # type: ignore[attr-defined]
    if start is not None:
        try:
            model.load_initial(start.tensors)
        except RuntimeError as error:
            settings = _differences(model, start) if start.class_name == made.__name__ else None
            reason = one_line(error)
            if settings is not None:
                reason = (
                    f"the recipe's network has {settings[0]}, the weights are for {settings[1]}; a [model] section "
                    "with init (or continues = true) alone takes the network of the weights"
                )
            raise InvalidArgument(
                f"train: init = {str(arguments['init'])!r} ({start.class_name}) does not fit the recipe's "
                f"{type(model).__name__}: {reason}"
            ) from None
        _warn_if_unlike(model, start)
    return model


def _warn_if_unlike(model: SRModel, start: Checkpoint) -> None:
    """Warns if the network computes something else from the weights of `start` than the network that they were for."""
    settings = _differences(model, start, ignored=SAME_RESULTS)
    if settings is not None:
        warnings.warn(
            f"train: the recipe's network has {settings[0]}, and the network of init {start.source} has {settings[1]}: "
            "the training does not start from the results of these weights; make [model] equal unless you want this",
            stacklevel=4,
        )


def _differences(model: SRModel, start: Checkpoint, ignored: Sequence[str] = ()) -> tuple[str, str] | None:
    """The settings, except those `ignored`, in which a network and the one that the weights of `start` are for differ:
    "depths = [2, 1, 1]", "depths = [4, 2, 2]"."""
    # of a class that is not in the list, the settings that the file does not name are unknown and count as equal
    known = start.class_name in MODELS
    theirs = MODELS[start.class_name].from_checkpoint(start).config if known else {**model.config, **start.config}
    unlike = [key for key, value in model.config.items() if theirs.get(key) != value and key not in ignored]
    if not unlike:
        return None
    ours, before = (", ".join(f"{key} = {of.get(key)!r}" for key in unlike) for of in (model.config, theirs))
    return ours, before
