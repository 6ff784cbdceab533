"""Writes the files of a run, each completely or not at all, and checks whether a folder holds the same run."""

import csv
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deformmamba.errors import InvalidArgument, one_line, shortened
from deformmamba.training.curves import training_curve
from deformmamba.volume import replacing, write_text
from deformmamba.volume.files import refusals

STATE, RUN, LOG, CURVE, BEST, LAST = (
    "state.pt",
    "run.json",
    "log.csv",
    "curve.png",
    "best.safetensors",
    "last.safetensors",
)

# settings that may differ in a longer run of the same kind
LENGTHS = ("fit.samples", "data.length", "provenance.recipe.fit.steps", "provenance.recipe.fit.epochs")


class RunFolder:
    """The folder of one run: `run.json` (settings), `state.pt` (state to resume from), a log, a curve, two
    checkpoints."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._writer: Any = None

    def known(self) -> dict[str, Any]:
        """The settings of the run in this folder, flattened to keys such as "fit.lr"; empty if there is no run.

        Raises:
            InvalidArgument: it cannot be read.
        """
        if not (self.path / RUN).is_file() or not any((self.path / name).exists() for name in (STATE, BEST, LAST)):
            return {}  # no run, or one that stopped before it saved anything
        try:
            return dict(_flat(json.loads((self.path / RUN).read_text("utf-8"))))
        except ValueError as error:
            raise InvalidArgument(
                f"fit: {self.path / RUN} cannot be read ({one_line(error)}); delete the folder"
            ) from None

    def describes(self, key: str) -> bool:
        """Whether the settings of the run in this folder include `key`, such as "fit.lr"."""
        return key in self.known()

    def records(self, section: str) -> Callable[[str], bool]:
        """Whether the settings of the run in this folder include a key of `section`; always, if they lack the section
        or there is no run."""
        known = self.known()
        begun = any(key.startswith(f"{section}.") for key in known)
        return lambda key: not begun or f"{section}.{key}" in known

    def check(self, run: Mapping[str, Any], *, whole: bool = True) -> None:
        """Compares the settings of the run in this folder, if there is one, with `run`.

        With whole=False only the keys of `run` are compared. A finished run may be continued with more steps or epochs
        and otherwise equal settings.

        Raises:
            InvalidArgument: the settings differ (the message lists them), or there are checkpoints without settings.
        """
        if not (self.path / RUN).is_file():
            strangers = [name for name in (STATE, BEST, LAST) if (self.path / name).exists()]
            if strangers:
                raise InvalidArgument(
                    f"fit: {self.path} holds {', '.join(strangers)} of an unknown run, because {RUN} is missing; "
                    "choose another folder"
                )
            return
        known = self.known()
        if not known:
            return
        wanted = dict(_flat(_plain(run)))
        compared = known.keys() | wanted.keys() if whole else wanted.keys()
        different = sorted(
            key for key in compared if not _same(known.get(key, "not given"), wanted.get(key, "not given"))
        )
        longer = _is_longer(known, wanted, different)
        if different and not (longer and self._finished(known)):
            shown = "; ".join(
                f"{key} was {_short(known, key)}, now it is {_short(wanted, key)}" for key in different[:3]
            )
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            if longer:
                raise InvalidArgument(
                    f"fit: {self.path} holds an unfinished run: {shown}{more}; finish it with its own settings first, "
                    "then continue it"
                )
            raise InvalidArgument(
                f"fit: {self.path} holds another run: {shown}{more}; choose another folder, or delete that one"
            )

    def _finished(self, known: Mapping[str, Any]) -> bool:
        """Whether the run in this folder saved its last step."""
        samples, batch = known.get("fit.samples"), known.get("fit.batch")
        if not isinstance(samples, int) or not isinstance(batch, int) or not (state := self._state()):
            return False
        return int(state["step"]) >= math.ceil(samples / batch)

    def _state(self) -> dict[str, Any] | None:
        """The saved state, or None.

        Raises:
            InvalidArgument: it cannot be read.
        """
        if not (self.path / STATE).is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
            int(state["step"])
        except Exception as error:  # torch.load raises many kinds of errors
            raise InvalidArgument(f"fit: {self.path / STATE} cannot be read ({one_line(error)}); delete it") from None
        return state

    def begin(self, run: Mapping[str, Any], *, writes: bool) -> dict[str, Any] | None:
        """Checks the folder, writes `run.json`, and returns the saved state to resume from, or None.

        Raises:
            InvalidArgument: see `check`; or the state cannot be read.
        """
        self.check(run)
        state = self._state()
        if writes:
            with refusals(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / RUN, json.dumps(_plain(run), indent=2) + "\n")
            step = state["step"] if state else -1  # step 0 is the score of the initial weights
            if (self.path / LOG).is_file():
                self._write_rows([row for row in self.rows() if int(row["step"]) <= step])
            if find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=max(step, 0) + 1)
        return state

    def rows(self) -> list[dict[str, Any]]:
        """The log: one row per validation."""
        if not (self.path / LOG).is_file():
            return []
        with open(self.path / LOG, newline="") as file:
            rows = list(csv.DictReader(file))
        if not all((row.get("step") or "").isdigit() for row in rows):
            raise InvalidArgument(f"fit: {self.path / LOG} is not a training log (no column step); move it away")
        return rows

    def log(self, row: Mapping[str, float]) -> None:
        """Adds a row to the log, and to TensorBoard if it is installed, and redraws the curve.

        The row replaces an earlier one of the same step.
        """
        rows = [*(known for known in self.rows() if int(known["step"]) != row["step"]), dict(row)]
        self._write_rows(rows)
        training_curve(rows, self.path / CURVE)
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()

    def save_state(self, state: Mapping[str, Any]) -> None:
        with replacing(self.path / STATE) as temporary:
            torch.save(_readable(dict(state)), temporary)

    def has_best(self) -> bool:
        return (self.path / BEST).exists()

    def keep(self, model: nn.Module, facts: Mapping[str, Any], score: float | None, least: float) -> bool:
        """Saves `model` as the last one, and as the best if its score is finite and `least` or more; returns whether
        it is the best.

        Without a score (None) every model is the best. If there is no best model yet, any model is saved as the best.
        """
        self.save_model(model, LAST, facts)
        if score is not None and not math.isfinite(score):
            warnings.warn(f"fit: the validation score is {score}, which cannot be compared with others", stacklevel=4)
            is_best = False
        else:
            is_best = score is None or score >= least or not self.has_best()
        if is_best or not self.has_best():
            self.save_model(model, BEST, facts)
        return is_best

    def keep_unscored(self, model: nn.Module, facts: Mapping[str, Any]) -> None:
        """Saves `model` as the last one, and as the best if there is no best model yet."""
        self.save_model(model, LAST, facts)
        if not self.has_best():
            self.save_model(model, BEST, facts)

    def save_model(self, model: nn.Module, name: str, facts: Mapping[str, Any]) -> None:
        """Saves with the model's `save_pretrained` if it has one, else its state as safetensors with `facts` in the
        header."""
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(self.path / name, provenance=facts)  # type: ignore[operator]
            return
        from safetensors.torch import save_model

        with replacing(self.path / name) as temporary:
            save_model(model, str(temporary), metadata={"provenance": json.dumps(_plain(facts))})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        with replacing(self.path / LOG) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
            writer.writeheader()
            writer.writerows(rows)


def described(model: nn.Module) -> dict[str, Any]:
    """Facts that identify a model: its class, its config if it has one, and the shapes of its tensors."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {
        "class": type(model).__name__,
        "config": getattr(model, "config", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12],
    }


def _plain(facts: Any) -> Any:
    """`facts` as after a round trip through JSON: tuples become lists, other types become text."""
    return json.loads(json.dumps(facts, default=str))


def _readable(state: Any) -> Any:
    """`state` with numpy's numbers as Python's: `torch.load` refuses others with weights_only."""
    if type(state) is dict:  # not the state of a module, an OrderedDict with attributes
        return {key: _readable(item) for key, item in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_readable, state))
    return state.item() if isinstance(state, np.generic) else state


def _same(known: Any, wanted: Any) -> bool:
    """Whether two settings are equal. Earlier versions wrote the numbers of numpy as text."""
    return bool(known == wanted) or (isinstance(wanted, int | float) and known == str(wanted))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _is_longer(known: Mapping[str, Any], wanted: Mapping[str, Any], different: Sequence[str]) -> bool:
    """Whether `wanted` differs from `known` only in its length, and is longer.

    The length of the data set may differ too if it equals the length of the run (an endless stream, such as
    `PatchDataset`).
    """
    for key in different:
        before, after = known.get(key), wanted.get(key)
        if key not in LENGTHS or not (isinstance(before, (int, float)) and isinstance(after, (int, float))):
            return False
        stream = key != "data.length" or (before == known.get("fit.samples") and after == wanted.get("fit.samples"))
        if after <= before or not stream:
            return False
    return True


def _short(facts: Mapping[str, Any], key: str) -> str:
    return shortened(json.dumps(facts[key]), 80) if key in facts else "not given"
