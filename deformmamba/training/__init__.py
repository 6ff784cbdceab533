"""A thin training helper: `fit` trains any model on any data set, recipes repeat a run.

`loop.py` is the training itself; `batches.py` says which samples a step sees, `folder.py` keeps what a run writes, and
`recipe.py` turns a TOML file and a folder of volumes into a call of `fit`.
"""

from deformmamba.training.loop import fit
from deformmamba.training.recipe import load_recipe, train_recipe

__all__ = ["fit", "load_recipe", "train_recipe"]
