"""Recipes: a run as a TOML file, so that it can be repeated on another folder of volumes."""

import hashlib
import inspect
import math
import os
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from deformmamba.annotations import described, fits
from deformmamba.data.patches import PatchDataset
from deformmamba.data.scans import Scan, describe_splits, find_scans, load_slices, subjects
from deformmamba.data.thick_slices import ThickSliceDataset, thick_cases
from deformmamba.errors import InvalidArgument, one_line
from deformmamba.evaluation.compare import evaluate, mean_scores
from deformmamba.losses import LOSSES, SRLoss
from deformmamba.metrics import psnr, ssim
from deformmamba.models import MODELS
from deformmamba.models.base import SRModel
from deformmamba.training.curves import sample_picture
from deformmamba.training.folder import RunFolder
from deformmamba.training.loop import fit
from deformmamba.weights import load_checkpoint
from deformmamba.weights.checkpoint import Checkpoint

SECTIONS = ("model", "data", "fit")
# the data sets that a recipe can ask for
KINDS: dict[str, type[PatchDataset] | type[ThickSliceDataset]] = {"in-plane": PatchDataset, "thick": ThickSliceDataset}
SAMPLE = "sample.png"
# what changes how a run is computed but not what comes out
INDIFFERENT = ("workers",)


def load_recipe(name: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """A recipe: the name of one in the package ("ixi-4x"), or the path of a TOML file.

    Sections: [model] name (of MODELS), preset, init (a checkpoint's name or path whose weights to start from) and the
    constructor's arguments; [data] `kind` ("in-plane", the default, or "thick", the slice direction), arguments of
    `PatchDataset` or of `ThickSliceDataset`, and `validation`, the groups to validate on; [fit] arguments of `fit`,
    with `loss` by name (of LOSSES) and `beta`; `epochs` counts passes over the training slices, one patch of each.

    Raises:
        ValueError: no such recipe, an unknown section or key (names the allowed ones), or a value of the wrong type.
    """
    packaged = {path.name.removesuffix(".toml"): path for path in files("deformmamba").joinpath("recipes").iterdir()}
    if str(name) in packaged:
        text = packaged[str(name)].read_text("utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text("utf-8")
    else:
        raise InvalidArgument(
            f"no recipe {str(name)!r}; recipes: {', '.join(sorted(packaged))}, or the path of a TOML file"
        )
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"recipe {name}: not TOML: {error}") from None
    for section in [*recipe, *SECTIONS]:
        if section not in SECTIONS or not isinstance(recipe.setdefault(section, {}), dict):
            raise InvalidArgument(f"recipe {name}: no section [{section}]; sections: {', '.join(SECTIONS)}")
    model = recipe["model"].get("name", "DeformMambaSR")
    if model not in MODELS:
        raise InvalidArgument(f"recipe {name}: no model {model!r}; models: {', '.join(MODELS)}")
    _check_keys(name, "model", recipe["model"], MODELS[model].__init__, extra={"name": str, "preset": str, "init": str})
    kind = recipe["data"].get("kind", "in-plane")
    if kind not in KINDS:
        raise InvalidArgument(f"recipe {name}: kind in [data] is {kind!r}; wanted {' or '.join(map(repr, KINDS))}")
    _check_keys(name, "data", recipe["data"], KINDS[kind].__init__, extra={"validation": Sequence[str], "kind": str})
    _check_keys(name, "fit", recipe["fit"], fit, extra={"loss": str, "beta": float})
    loss = recipe["fit"].get("loss", "sr")
    if loss not in LOSSES:
        raise InvalidArgument(f"recipe {name}: no loss {loss!r}; losses: {', '.join(LOSSES)}")
    if loss != "sr" and "beta" in recipe["fit"]:
        raise InvalidArgument(f"recipe {name}: beta in [fit] weighs the edges of loss = 'sr', and loss is {loss!r}")
    return recipe


_GIVEN_ELSEWHERE = (
    "self", "model", "dataset", "out", "scans", "length", "intensity", "seed", "validate", "provenance", "progress",
    "base",
)  # fmt: skip


def _check_keys(name: Any, section: str, values: Mapping[str, Any], of: Any, extra: Mapping[str, Any]) -> None:
    kinds = {
        key: parameter.annotation
        for key, parameter in inspect.signature(of).parameters.items()
        if key not in _GIVEN_ELSEWHERE or (key == "seed" and section == "fit")
    }
    kinds.update(extra)
    for key, value in values.items():
        if key not in kinds:
            raise InvalidArgument(f"recipe {name}: no key {key!r} in [{section}]; keys: {', '.join(sorted(kinds))}")
        if not fits(value, kinds[key]):
            raise InvalidArgument(f"recipe {name}: {key} in [{section}] is {value!r}; wanted {described(kinds[key])}")


def train_recipe(
    recipe: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    init: str | None = None,
    subject: str | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Trains by a recipe on the "train" split of the folder `data` and validates on its "val" split; see `load_recipe`.

    Args:
        recipe: see `load_recipe`.
        data: see `deformmamba.data.patches.find_scans`.
        out: see `fit`; a picture of a validation slice, `sample.png`, comes there as well.
        init: see `load_recipe`; instead of the recipe's.
        subject: a regular expression that finds the subject in the path of a scan, see `find_scans`.
        say: called with a line for each split: its subjects.
        progress: see `fit`.
        overrides: replace [fit] keys if they are not None, such as `steps` (which replaces `epochs`) or `seed`.

    Returns the best checkpoint.

    Raises:
        ValueError: a recipe, data, weights to start from, or a folder that do not fit; before anything is computed.
    """
    plan = load_recipe(recipe)
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in given:
            plan["fit"].pop(other, None)
    plan["fit"].update(given)
    if init is not None:
        plan["model"]["init"] = init
    if ("steps" in plan["fit"]) == ("epochs" in plan["fit"]):
        raise InvalidArgument(f"recipe {recipe}: [fit] needs either steps or epochs")
    for key in ("steps", "epochs"):
        if key in plan["fit"] and not 0 < plan["fit"][key] < math.inf:
            raise InvalidArgument(f"recipe {recipe}: {key} in [fit] is {plan['fit'][key]}; wanted a number above 0")
    train, val = _split(find_scans(data, subject=subject), plan, data)
    if say is not None:
        for line in describe_splits([*train, *val]):
            say(line)
    fitting = dict(plan["fit"])
    start = load_checkpoint(plan["model"]["init"]) if "init" in plan["model"] else None
    named = {**plan["model"], "init": Path(plan["model"]["init"]).name} if start is not None else plan["model"]
    compared = {key: value for key, value in fitting.items() if key not in INDIFFERENT}
    run: dict[str, Any] = {
        "recipe": {"model": named, "data": plan["data"], "fit": compared},
        "train": _described(train),
        "val": _described(val),
        "degradation": _degradation(plan["data"]),
        **({} if start is None else {"init": _inherited(start)}),
    }
    RunFolder(out).check({"provenance": run}, whole=False)
    seed = fitting.get("seed", 0)
    torch.manual_seed(seed)
    model = _model(plan["model"], start)

    kind, beta = fitting.pop("loss", "sr"), fitting.pop("beta", 0.1)
    loss = SRLoss(beta=beta) if kind == "sr" else LOSSES[kind]()
    batch, epochs = fitting.get("batch", 8), fitting.pop("epochs", None)
    settings = {key: value for key, value in plan["data"].items() if key not in ("validation", "kind")}
    quiet = os.environ.get("RANK", "0") != "0" or not progress
    if plan["data"].get("kind") == "thick":
        if model.scale != 1 or epochs is not None:
            raise InvalidArgument(f"recipe {recipe}: kind = 'thick' wants scale = 1 and steps, not epochs")
        thick = ThickSliceDataset(train, length=fitting["steps"] * batch, seed=seed, progress=not quiet, **settings)
        return fit(
            model,
            thick,
            out=out,
            loss=loss,
            validate=_thick_scores(val),
            provenance={**run, "spacings_mm": [round(spacing, 2) for spacing in thick.spacings]},
            progress=progress,
            **fitting,
        )
    dataset = PatchDataset(
        train,
        scale=model.scale,
        length=fitting.get("steps", 1) * batch,
        intensity=model.intensity,
        base=getattr(model, "skip", None) or "zero-fill",
        seed=seed,
        progress=not quiet,
        **settings,
    )
    if epochs is not None:
        fitting["steps"] = math.ceil(epochs * sum(len(slices) for slices in dataset.groups) / batch)
        dataset.length = fitting["steps"] * batch
    if (dataset.degradation.scale, dataset.degradation.grid) != (model.scale, model.grid):
        raise InvalidArgument(
            f"recipe {recipe}: degradation {dataset.degradation} gives the {dataset.degradation.grid} grid, and "
            f"{type(model).__name__} works on the {model.grid} grid"
        )
    for scan in val:  # or a damaged one would end the training at its first validation
        load_slices(scan.path, model.scale)
    picture = Path(out) / SAMPLE

    def validate(candidate: SRModel) -> dict[str, float]:
        sample_picture(
            candidate, val[0].path, picture, degradation=dataset.degradation, title=f"{val[0].subject}, validation"
        )
        return mean_scores(evaluate(candidate, val, degradation=dataset.degradation))

    return fit(
        model,
        dataset,
        out=out,
        loss=loss,
        validate=validate,
        provenance={**run, "spacings_mm": [round(spacing, 2) for spacing in dataset.spacings]},
        progress=progress,
        **fitting,
    )


def _split(scans: Sequence[Scan], plan: dict[str, dict[str, Any]], data: Any) -> tuple[list[Scan], list[Scan]]:
    """The scans to train and to validate on; a folder that names no groups is taken whole, and `plan` says so then."""
    settings = plan["data"]
    if not any(scan.group for scan in scans) and (settings.get("weights") or settings.get("validation")):
        warnings.warn(
            f"{data} does not say what its volumes show (no contrast and anatomy in a volumes.tsv): all count alike, "
            "where the recipe has shares of groups",
            stacklevel=3,
        )
        settings.pop("weights", None)
        settings.pop("validation", None)
    weights, wanted = settings.get("weights"), settings.get("validation")
    train = [scan for scan in scans if scan.split == "train" and (weights is None or scan.group in weights)]
    val = [scan for scan in scans if scan.split == "val" and (wanted is None or scan.group in wanted)]
    missing = sorted(set(weights or ()) - {scan.group for scan in train})
    if missing and train:
        warnings.warn(
            f"{data} has no training volumes of {', '.join(missing)}; the recipe's other groups take their share",
            stacklevel=3,
        )
    if not train or not val:
        groups = ", ".join(sorted({f"{scan.group or 'no group'} ({scan.split})" for scan in scans}))
        raise InvalidArgument(
            f"train: {data} has {len(train)} volumes to train on and {len(val)} to validate on, both needed, of "
            f"different subjects; the recipe wants {', '.join(weights or ['any'])} and {', '.join(wanted or ['any'])}; "
            f"there are: {groups}"
        )
    return train, val


def _described(scans: Sequence[Scan]) -> dict[str, Any]:
    """How many subjects and volumes, and a hash of the subjects' names: a name may be a person's, and checkpoints are
    given away."""
    names = subjects(scans)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"subjects": len(names), "volumes": len(scans), "subjects_sha256": digest}


def _thick_scores(val: Sequence[Scan]) -> Callable[[SRModel], dict[str, float]]:
    """What a network for the slice direction reaches on in-plane images of `val`, and the cubic spline beside it."""
    cases = thick_cases(val)

    def scores(model: SRModel) -> dict[str, float]:
        rows = []
        with torch.inference_mode():
            for case in cases:
                pair = [(model(case.lr), case.hr), (case.lr, case.hr)]
                rows.append([f(sr[0], hr[0]) for f in (psnr, ssim) for sr, hr in pair])
        names = ("psnr", "psnr_spline", "ssim", "ssim_spline")
        return {name: float(value) for name, value in zip(names, torch.tensor(rows).mean(0), strict=True)}

    return scores


def _degradation(settings: Mapping[str, Any]) -> str:
    """What made the LR of a training, in words: "k-space crop, magnitude; 10 % k-space >> rician:snr=30"."""
    if settings.get("kind") == "thick":
        return "slice profiles, " + ", ".join(
            f"{key} {'-'.join(f'{value:g}' for value in settings[key])}"
            for key in ("ratio", "thickness")
            if key in settings
        )
    others = [f"{100 * share:g} % {text}" for text, share in settings.get("jitter", {}).items()]
    return "; ".join([settings.get("degradation", "k-space crop, magnitude"), *others])


def _inherited(start: Checkpoint) -> list[dict[str, Any]]:
    """What is known of the weights that a training began with, and of those before them, oldest first."""
    kept = ("name", "steps", "batch", "seed", "spacings_mm", "recipe")
    before = start.provenance.get("init")
    own = {"sha256": start.sha256, **{key: start.provenance[key] for key in kept if key in start.provenance}}
    return [*(before if isinstance(before, list) else []), own]


def _model(arguments: Mapping[str, Any], start: Checkpoint | None) -> SRModel:
    """The model of a recipe's [model] section, with new weights or those of `start`."""
    plain = {key: value for key, value in arguments.items() if key != "init"}
    made, preset = MODELS[plain.pop("name", "DeformMambaSR")], plain.pop("preset", None)
    if preset is not None and not hasattr(made, "from_preset"):
        raise InvalidArgument(f"train: {made.__name__} has no presets; leave `preset` out")
    model: SRModel = made.from_preset(preset, **plain) if preset is not None else made(**plain)  # type: ignore[attr-defined]
    if start is not None:
        try:
            model.load_state_dict(start.tensors, strict=True)
        except RuntimeError as error:
            raise InvalidArgument(
                f"train: init = {str(arguments['init'])!r} ({start.class_name}) does not fit the recipe's "
                f"{type(model).__name__}: {one_line(error)}"
            ) from None
    return model
