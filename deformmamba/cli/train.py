"""train: trains a model from a recipe."""

import argparse
import os
from pathlib import Path
from typing import Any

from deformmamba.cli.arguments import add_command, add_subject, is_quiet, positive, say

RECIPES = Path(__file__).parents[1] / "recipes"


def add(commands: Any) -> None:
    parser = add_command(
        commands, "train", _train, "train a model with a recipe", "train ixi-4x --data scans/ --out runs/mine"
    )
    parser.description = (
        "Train a model with a recipe on the training subjects of a folder of volumes; other subjects validate it. "
        "Ctrl-C finishes the step and saves; the same command resumes and ends with the same weights. The folder of "
        "--out gets the checkpoints best and last, log.csv, curve.png, sample.png, and run.json with all settings."
    )
    parser.epilog = (
        f"{parser.epilog}\nfor several GPUs: accelerate launch -m deformmamba train ...; --batch is then the total "
        "over all processes"
    )
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    parser.add_argument("recipe", metavar="RECIPE", help=f"{names}, or the path of a TOML file")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder of volumes; a volumes.tsv in it assigns subjects and splits (default: a tenth of the subjects "
        "validates, and a tenth is kept for a test)",
    )
    add_subject(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for checkpoints and logs; an interrupted run resumes"
    )
    parser.add_argument("--init", metavar="WEIGHTS", help="weights to start from: a name or a path")
    instead = parser.add_argument_group("replace values of the recipe")
    length = instead.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="optimizer steps")
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the training slices")
    instead.add_argument("--batch", type=positive, metavar="N", help="samples per step")
    instead.add_argument(
        "--accumulate", type=positive, metavar="N", help="compute each batch in N parts, which needs less memory"
    )
    instead.add_argument("--lr", type=float, metavar="RATE", help="largest learning rate")
    instead.add_argument("--precision", choices=("no", "bf16", "fp16"), help="mixed precision")
    instead.add_argument("--every", type=positive, metavar="N", help="steps between validations")
    instead.add_argument("--workers", type=int, metavar="N", help="data loading processes")
    instead.add_argument("--seed", type=int, metavar="N", help="random seed")


OVERRIDES = ("steps", "epochs", "batch", "accumulate", "lr", "precision", "every", "workers", "seed")


def _train(args: argparse.Namespace) -> None:
    from deformmamba.training import train_recipe

    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that prints
    told = say if first else None
    given |= {"init": args.init, "subject": args.subject, "say": told, "progress": not is_quiet()}
    best = train_recipe(args.recipe, args.data, args.out, **given)
    if first:
        say(f"{best}: the best checkpoint on the validation split")
