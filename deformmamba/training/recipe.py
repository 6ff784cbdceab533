"""Recipes: the settings of a run in a TOML file, so that it can be repeated on another folder of volumes."""

import inspect
import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from deformmamba.annotations import check_types, described, fits
from deformmamba.data.patches import PatchDataset
from deformmamba.data.thick_slices import ThickSliceDataset
from deformmamba.errors import InvalidArgument, did_you_mean
from deformmamba.losses import LOSSES
from deformmamba.models import MODELS
from deformmamba.training.loop import fit

SECTIONS = ("model", "data", "fit")
# the data sets that a recipe can use
KINDS: dict[str, type[PatchDataset] | type[ThickSliceDataset]] = {"in-plane": PatchDataset, "thick": ThickSliceDataset}


def load_recipe(name: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads a recipe: the name of one in the package ("ixi-4x"), or the path of a TOML file.

    Sections:
        [model]: `name` (of MODELS), `preset`, `init` (name or path of weights to start from) and the constructor's
            arguments. With `init` alone, class and arguments are those of these weights.
        [data]: `kind` ("in-plane", the default, or "thick", the slice direction), arguments of `PatchDataset` or of
            `ThickSliceDataset`, and `validation`, the groups to validate on.
        [fit]: arguments of `fit`, with `loss` by name (of LOSSES) and `beta`; `epochs` counts passes over the training
            slices, one patch of each.

    Raises:
        InvalidArgument: an unknown recipe, section or key (the message lists the allowed ones), or a value of a wrong
            type.
    """
    check_types(load_recipe, locals())
    packaged = {path.name.removesuffix(".toml"): path for path in files("deformmamba").joinpath("recipes").iterdir()}
    if str(name) in packaged:
        text = packaged[str(name)].read_text("utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text("utf-8")
    else:
        raise InvalidArgument(
            f"no recipe {str(name)!r}{did_you_mean(str(name), packaged)}; recipes: {', '.join(sorted(packaged))}, or "
            "the path of a TOML file"
        )
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"recipe {name}: not valid TOML: {error}") from None
    for section in [*recipe, *SECTIONS]:
        if section not in SECTIONS or not isinstance(recipe.setdefault(section, {}), dict):
            raise InvalidArgument(f"recipe {name}: unknown section [{section}]; sections: {', '.join(SECTIONS)}")
    model = recipe["model"].get("name", "DeformMambaSR")
    if model not in MODELS:
        raise InvalidArgument(f"recipe {name}: unknown model {model!r}; models: {', '.join(MODELS)}")
    _check_keys(name, "model", recipe["model"], MODELS[model].__init__, extra={"name": str, "preset": str, "init": str})
    kind = recipe["data"].get("kind", "in-plane")
    if kind not in KINDS:
        raise InvalidArgument(f"recipe {name}: kind in [data] is {kind!r}; wanted {' or '.join(map(repr, KINDS))}")
    _check_keys(name, "data", recipe["data"], KINDS[kind].__init__, extra={"validation": Sequence[str], "kind": str})
    _check_keys(name, "fit", recipe["fit"], fit, extra={"loss": str, "beta": float})
    loss = recipe["fit"].get("loss", "sr")
    if loss not in LOSSES:
        raise InvalidArgument(f"recipe {name}: unknown loss {loss!r}; losses: {', '.join(LOSSES)}")
    if loss != "sr" and "beta" in recipe["fit"]:
        raise InvalidArgument(f"recipe {name}: beta in [fit] needs loss = 'sr', but loss is {loss!r}; leave beta out")
    return recipe


_GIVEN_ELSEWHERE = (
    "self", "model", "dataset", "out", "scans", "length", "intensity", "seed", "validate", "provenance", "progress",
    "base", "optimizer", "score_start",
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
            raise InvalidArgument(
                f"recipe {name}: unknown key {key!r} in [{section}]; keys: {', '.join(sorted(kinds))}"
            )
        if not fits(value, kinds[key]):
            raise InvalidArgument(f"recipe {name}: {key} in [{section}] is {value!r}; wanted {described(kinds[key])}")
