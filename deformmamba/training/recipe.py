"""Recipes: the settings of a run in a TOML file, so that it can be repeated on another folder of volumes."""

import inspect
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from deformmamba.annotations import check_types, described, fits, is_one_of
from deformmamba.data.patches import PatchDataset
from deformmamba.data.thick_slices import ThickSliceDataset
from deformmamba.errors import InvalidArgument, did_you_mean, one_line, shown
from deformmamba.losses import LOSSES
from deformmamba.models import MODELS
from deformmamba.training.loop import fit
from deformmamba.training.settings import check_settings

SECTIONS = ("model", "data", "fit")
# the data sets that a recipe can use
KINDS: dict[str, type[PatchDataset] | type[ThickSliceDataset]] = {"in-plane": PatchDataset, "thick": ThickSliceDataset}


def load_recipe(name: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads a recipe: the name of one in the package ("ixi-4x"), or the path of a TOML file.

    Sections:
        [model]: `name` (of MODELS), `preset`, `init` (name or path of weights to start from), `continues` (true: there
            must be such weights) and the constructor's arguments. With `init` alone, class and arguments are those of
            these weights.
        [data]: `kind` ("in-plane", the default, or "thick", the slice direction), arguments of `PatchDataset` or of
            `ThickSliceDataset`, and `validation`, the groups to validate on.
        [fit]: arguments of `fit`, with `loss` by name (of LOSSES) and `beta`; `epochs` counts passes over the training
            slices, one patch of each.

    Raises:
        InvalidArgument: an unknown recipe, section or key (the message lists the allowed ones), a file that cannot be
            read, a value of a wrong type, or a number out of range in [fit].
    """
    check_types(load_recipe, locals())
    try:
        recipe: dict[str, Any] = tomllib.loads(_text(name))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidArgument(f"recipe {name}: not valid TOML: {one_line(error)}") from None
    for section, content in recipe.items():
        if not isinstance(content, dict):
            raise InvalidArgument(
                f"recipe {name}: {shown(section)} is {shown(content)}, outside of a section; every key belongs to one "
                f"of the sections {', '.join(f'[{one}]' for one in SECTIONS)}"
            )
        if section not in SECTIONS:
            raise InvalidArgument(f"recipe {name}: unknown section [{section}]; sections: {', '.join(SECTIONS)}")
    recipe = {**{section: {} for section in SECTIONS}, **recipe}
    check_recipe(name, recipe)
    return recipe


def _text(name: str | os.PathLike[str]) -> str:
    """The content of a recipe in the package, or of a file.

    Raises:
        InvalidArgument: there is no such recipe, or it cannot be read.
    """
    packaged = {path.name.removesuffix(".toml"): path for path in files("deformmamba").joinpath("recipes").iterdir()}
    if str(name) in packaged:
        return packaged[str(name)].read_text("utf-8")
    try:
        if Path(name).is_file():
            return Path(name).read_text("utf-8")
    except (OSError, ValueError) as error:  # no permission, a name that is too long, no UTF-8
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InvalidArgument(f"recipe {shown(str(name))} cannot be read ({reason}); wanted a TOML file") from None
    raise InvalidArgument(
        f"no recipe {str(name)!r}{did_you_mean(str(name), packaged)}; recipes: {', '.join(sorted(packaged))}, or "
        "the path of a TOML file"
    )


def check_recipe(name: Any, recipe: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks keys, types and numbers of a recipe's sections; `name` is for messages.

    Raises:
        InvalidArgument: see `load_recipe`.
    """
    model = recipe["model"].get("name", "DeformMambaSR")
    if not is_one_of(model, MODELS):
        raise InvalidArgument(f"recipe {name}: unknown model {shown(model)}; models: {', '.join(MODELS)}")
    _check_keys(name, "model", recipe["model"], MODELS[model].__init__, extra=_MODEL_KEYS)
    kind = recipe["data"].get("kind", "in-plane")
    if not is_one_of(kind, KINDS):
        raise InvalidArgument(f"recipe {name}: kind in [data] is {shown(kind)}; wanted {' or '.join(map(repr, KINDS))}")
    _check_keys(name, "data", recipe["data"], KINDS[kind].__init__, extra={"validation": Sequence[str], "kind": str})
    _check_keys(name, "fit", recipe["fit"], fit, extra={"loss": str, "beta": float})
    loss = recipe["fit"].get("loss", "sr")
    if not is_one_of(loss, LOSSES):
        raise InvalidArgument(f"recipe {name}: unknown loss {shown(loss)}; losses: {', '.join(LOSSES)}")
    if loss != "sr" and "beta" in recipe["fit"]:
        raise InvalidArgument(f"recipe {name}: beta in [fit] needs loss = 'sr', but loss is {loss!r}; leave beta out")
    for key in ("steps", "epochs"):
        if not 0 < recipe["fit"].get(key, 1) < math.inf:
            raise InvalidArgument(f"recipe {name}: {key} in [fit] is {recipe['fit'][key]}; wanted a number above 0")
    defaults = {key: parameter.default for key, parameter in inspect.signature(fit).parameters.items()}
    try:
        check_settings(recipe["fit"], defaults)
    except InvalidArgument as error:
        raise InvalidArgument(f"recipe {name}: {error}") from None


_MODEL_KEYS = {"name": str, "preset": str, "init": str, "continues": bool}
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
                f"recipe {name}: unknown key {key!r} in [{section}]{did_you_mean(key, kinds)}; keys: "
                f"{', '.join(sorted(kinds))}"
            )
        if not fits(value, kinds[key]):
            raise InvalidArgument(f"recipe {name}: {key} in [{section}] is {value!r}; wanted {described(kinds[key])}")
