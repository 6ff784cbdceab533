"""train: by a recipe."""

import argparse
from typing import Any

from deformmamba.cli.arguments import add_command, positive, say


def add(commands: Any) -> None:
    parser = add_command(
        commands, "train", _train, "train a model by a recipe", "train ixi-4x --data scans/ --out runs/mine"
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a name, or the path of a TOML file")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of volumes, split by subject")
    parser.add_argument("--out", required=True, metavar="DIR", help="where checkpoints go; resumes what is there")
    parser.add_argument("--steps", type=positive, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")


def _train(args: argparse.Namespace) -> None:
    from deformmamba.training import train_recipe

    best = train_recipe(args.recipe, args.data, args.out, steps=args.steps, seed=args.seed)
    say(f"{best}: the best checkpoint on the validation split")
