"""A thin training helper: `fit` trains any model on any data set, recipes repeat a run."""

import csv
import inspect
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from deformmamba.data import PatchDataset, find_scans, subjects
from deformmamba.evaluation import evaluate, mean_scores
from deformmamba.extras import require
from deformmamba.losses import LOSSES, SRLoss
from deformmamba.models import MODELS
from deformmamba.models.base import SRModel

Scores = Mapping[str, float]
SECTIONS = ("model", "data", "fit")


class _Stream(Sampler[int]):
    """Indices of one endless stream of shuffled passes over a data set, from position `start` to `stop`."""

    def __init__(self, n: int, seed: int, start: int, stop: int) -> None:
        self.n, self.seed, self.start, self.stop = n, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while position < self.stop:
            order = np.random.default_rng((self.seed, position // self.n)).permutation(self.n)
            for index in order[position % self.n :][: self.stop - position]:
                yield int(index)
                position += 1


def fit(
    model: SRModel,
    dataset: Dataset[Any],
    *,
    out: str | os.PathLike[str],
    steps: int,
    batch: int = 8,
    loss: nn.Module | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: int = 100,
    schedule: str = "cosine",
    clip: float = 1.0,
    ema: float = 0.999,
    precision: str = "no",
    validate: Callable[[SRModel], Scores] | None = None,
    every: int = 500,
    workers: int = 0,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Trains `model` in place and returns the path of its best checkpoint. Started again on the same `out`, it resumes.

    Writes `best.safetensors` (highest "psnr" of `validate`; the last one without it), `last.safetensors`, `log.csv`,
    and `state.pt`, from which it goes on exactly where it was saved: every `every` steps, at the end, and on ctrl-C.

    Args:
        model: trained with its own `forward(lr, base)`.
        dataset: map-style, of (lr, hr) or (lr, hr, base) for models with a global skip. Passed over in shuffled order,
            again and again, until `steps` batches of `batch` have been seen.
        out: folder of this run alone.
        loss: from (sr, hr) to a scalar; `SRLoss()`, the paper's, by default.
        lr, weight_decay: of AdamW (with no weight decay that is the paper's Adam).
        warmup: steps over which the learning rate rises linearly.
        schedule: "cosine" falls to zero at the last step; "constant" stays.
        clip: largest norm of the gradient; 0 for no limit.
        ema: decay of the exponential moving average of the weights, which is what is validated and saved; 0 for none.
        precision: accelerate's mixed precision: "no", "bf16", "fp16"; accelerate allows one a process.
        validate: scores a model, higher "psnr" is better; called every `every` steps.
        workers: processes that load data; 0 loads in this one.
        seed: of the order of samples and of dropped paths.
        provenance: written into every checkpoint beside the steps and scores.
        progress: a bar on the terminal.

    Raises:
        ValueError: `out` holds another run, or an argument is unknown.
        MissingExtra: accelerate is not installed.
        FloatingPointError: the loss is not finite; names the step. The last saved state is left as it was.
    """
    accelerate = require("accelerate", extra="train", what="fit")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import tqdm

    if schedule not in ("cosine", "constant"):
        raise ValueError(f'fit: schedule is {schedule!r}; it must be "cosine" or "constant"')
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = {
        "class": type(model).__name__,
        "config": model.config,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
    }
    state = torch.load(out / "state.pt", weights_only=True) if (out / "state.pt").exists() else None
    if state is not None and state["run"] != json.dumps(run, sort_keys=True):
        raise ValueError(f"fit: {out} holds another run; choose another folder, or delete it: {state['run']}")

    accelerator = accelerate.Accelerator(mixed_precision=precision)
    loss = (loss or SRLoss()).to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warmup, steps, schedule))
    start, best = 0, -math.inf
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if average is not None:
            average.load_state_dict(state["average"])
        start, best = state["step"], state["best"]
    stream = _Stream(len(dataset), seed, start * batch, steps * batch)  # type: ignore[arg-type]
    loader = DataLoader(dataset, batch, sampler=stream, num_workers=workers, persistent_workers=workers > 0)
    network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if average is not None:
        average.to(accelerator.device)
    chosen = model if average is None else cast(SRModel, average.module)

    def save(step: int) -> None:
        _replace(
            out / "state.pt",
            lambda path: torch.save(
                {
                    "run": json.dumps(run, sort_keys=True),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "average": None if average is None else average.state_dict(),
                    "step": step,
                    "best": best,
                },
                path,
            ),
        )

    bar = tqdm(total=steps, initial=start, unit="step", disable=None if progress else True, smoothing=0.05)
    step, recent = start, []
    try:
        for sample in loader:
            network.train()
            torch.manual_seed(seed * 1_000_003 + step)
            image, target, *base = sample
            with accelerator.autocast():
                sr = network(image, *base)
            value = loss(sr.float(), target)
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"fit: the loss is {value.item()} at step {step}; lower lr, or raise precision"
                )
            accelerator.backward(value)
            if clip:
                accelerator.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                # a short memory first, so that the average does not drag the random start along
                average.multi_avg_fn = get_ema_multi_avg_fn(min(ema, (1 + step) / (10 + step)))
                average.update_parameters(model)
            step += 1
            recent.append(value.item())
            bar.update()
            bar.set_postfix(loss=f"{recent[-1]:.4f}", refresh=False)
            if step % every == 0 or step == steps:
                scores = dict(validate(chosen)) if validate else {}
                _log(out / "log.csv", {"step": step, "loss": float(np.mean(recent)), **scores})
                recent = []
                facts = {**(provenance or {}), "steps": step, "batch": batch, "seed": seed, "validation": scores}
                chosen.save_pretrained(out / "last.safetensors", provenance=facts)
                if scores.get("psnr", math.inf) >= best:
                    best = scores.get("psnr", math.inf)
                    chosen.save_pretrained(out / "best.safetensors", provenance=facts)
                save(step)
                if progress and scores:
                    tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    except KeyboardInterrupt:
        save(step)
        raise
    finally:
        bar.close()
    return out / "best.safetensors"


def _rate(step: int, warmup: int, steps: int, schedule: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _log(path: Path, row: Mapping[str, float]) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def load_recipe(name: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """A recipe: the name of one in the package ("ixi-4x"), or the path of a TOML file.

    Sections: [model] name (of MODELS), preset and the constructor's arguments; [data] arguments of `PatchDataset`, and
    `validation`, the groups to validate on; [fit] arguments of `fit`, with `loss` by name (of LOSSES) and `beta`.

    Raises:
        ValueError: no such recipe, an unknown section or key (names the allowed ones), or a value of the wrong type.
    """
    packaged = {path.name.removesuffix(".toml"): path for path in files("deformmamba").joinpath("recipes").iterdir()}
    if str(name) in packaged:
        text = packaged[str(name)].read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise ValueError(f"no recipe {str(name)!r}; recipes: {', '.join(sorted(packaged))}, or the path of a TOML file")
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {name}: not TOML: {error}") from None
    model = recipe.get("model", {}).get("name", "DeformMambaSR")
    if model not in MODELS:
        raise ValueError(f"recipe {name}: no model {model!r}; models: {', '.join(MODELS)}")
    for section in [*recipe, *SECTIONS]:
        if section not in SECTIONS or not isinstance(recipe.setdefault(section, {}), dict):
            raise ValueError(f"recipe {name}: no section [{section}]; sections: {', '.join(SECTIONS)}")
    _check_keys(name, "model", recipe["model"], MODELS[model].__init__, extra={"name": "str", "preset": "str"})
    _check_keys(name, "data", recipe["data"], PatchDataset.__init__, extra={"validation": "list"})
    _check_keys(name, "fit", recipe["fit"], fit, extra={"loss": "str", "beta": "float"})
    return recipe


_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "Sequence": list, "Mapping": dict}
_GIVEN_ELSEWHERE = ("self", "model", "dataset", "out", "scans", "length", "validate", "provenance", "progress")


def _check_keys(name: Any, section: str, values: Mapping[str, Any], of: Any, extra: Mapping[str, str]) -> None:
    kinds = {
        key: getattr(parameter.annotation, "__name__", str(parameter.annotation)).split("[")[0].split(" ")[0]
        for key, parameter in inspect.signature(of).parameters.items()
        if key not in _GIVEN_ELSEWHERE
    }
    kinds.update(extra)
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"recipe {name}: no key {key!r} in [{section}]; keys: {', '.join(sorted(kinds))}")
        kind = _KINDS.get(kinds[key])
        if kind and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):  # type: ignore[arg-type]
            raise ValueError(f"recipe {name}: {key} in [{section}] is {value!r}; wanted {kinds[key]}")


def train_recipe(
    recipe: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Trains by a recipe on the "train" split of the folder `data` and validates on its "val" split; see `load_recipe`.

    `overrides` replace [fit] keys that are not None, such as `steps` or `seed`. Returns the best checkpoint.
    """
    plan = load_recipe(recipe)
    plan["fit"].update({key: value for key, value in overrides.items() if value is not None})
    arguments = dict(plan["model"])
    model_class, preset = MODELS[arguments.pop("name", "DeformMambaSR")], arguments.pop("preset", None)
    seed = plan["fit"].get("seed", 0)
    torch.manual_seed(seed)
    model = model_class.from_preset(preset, **arguments) if preset else model_class(**arguments)  # type: ignore[attr-defined]

    scans = find_scans(data)
    settings = dict(plan["data"])
    wanted = settings.pop("validation", None)
    train = [scan for scan in scans if scan.split == "train"]
    val = [scan for scan in scans if scan.split == "val" and (wanted is None or scan.group in wanted)]
    if not train or not val:
        raise ValueError(
            f"train: {data} has {len(train)} volumes to train on and {len(val)} to validate on; both needed"
        )
    fitting = dict(plan["fit"])
    kind, beta = fitting.pop("loss", "sr"), fitting.pop("beta", 0.1)
    if kind not in LOSSES:
        raise ValueError(f"recipe {recipe}: no loss {kind!r}; losses: {', '.join(LOSSES)}")
    fitting["loss"] = SRLoss(beta=beta) if kind == "sr" else LOSSES[kind]()
    length = fitting["steps"] * fitting.get("batch", 8)
    dataset = PatchDataset(
        train, scale=model.scale, length=length, intensity=model.intensity, seed=seed, progress=progress, **settings
    )
    provenance = {
        "recipe": plan,
        "train": {"subjects": subjects(train), "volumes": len(train)},
        "val": {"subjects": subjects(val), "volumes": len(val)},
        "degradation": "k-space crop, magnitude",
        "spacings_mm": [round(spacing, 2) for spacing in dataset.spacings],
    }
    return fit(
        model,
        dataset,
        out=out,
        validate=lambda candidate: mean_scores(evaluate(candidate, val)),
        provenance=provenance,
        progress=progress,
        **fitting,
    )
