"""Training: `fit` trains any model on any data set; recipes make a run repeatable.

`loop.py` has the training loop, `settings.py` its settings, `optimizer.py` the parameter groups for weight decay, and
`batches.py` the samples of each step; `folder.py` writes the run's files. `recipe.py` reads a TOML file, and
`from_recipe.py` calls `fit` with the recipe and a folder of volumes. `comparison.py` trains and scores the rows of the
paper's tables.
"""

from deformmamba.training.from_recipe import train_recipe
from deformmamba.training.loop import fit
from deformmamba.training.recipe import load_recipe

__all__ = ["fit", "load_recipe", "train_recipe"]
