"""Training: `fit` trains any model on any data set; recipes make a run repeatable.

`loop.py` is the training itself, `settings.py` its numbers, `optimizer.py` says which parameters decay, `batches.py`
which samples a step sees, `folder.py` writes what a run leaves. `recipe.py` reads a TOML file, and `from_recipe.py`
turns it and a folder of volumes into a call of `fit`. `comparison.py` trains and scores the rows of the paper's tables.
"""

from deformmamba.training.from_recipe import train_recipe
from deformmamba.training.loop import fit
from deformmamba.training.recipe import load_recipe

__all__ = ["fit", "load_recipe", "train_recipe"]
