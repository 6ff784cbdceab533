"""Trains a network on a folder of scans: `python examples/train_on_a_folder.py scans/ runs/mine [steps]`.

Subjects are split as a whole (see `find_scans`); the network is the preset `tiny`, validated on held-out subjects.
`deformmamba train RECIPE --data scans/ --out runs/mine` does the same with a recipe, and draws a figure at each
validation.
"""

import argparse
import sys

from deformmamba import DeformMambaSR, evaluate, fit
from deformmamba.data.patches import PatchDataset, find_scans
from deformmamba.evaluation.compare import mean_scores

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("scans")
parser.add_argument("out")
parser.add_argument("steps", type=int, nargs="?", default=2000)
args = parser.parse_args()
scans = find_scans(args.scans, val=0.2, test=0.0)
train, val = ([scan for scan in scans if scan.split == split] for split in ("train", "val"))
if not train or not val:
    sys.exit(f"{args.scans}: {len(train)} volumes to train on and {len(val)} to validate on; more subjects are needed")
dataset = PatchDataset(train, scale=2, patch=16, length=8 * args.steps, contrast=1.3)
best = fit(
    DeformMambaSR.from_preset("tiny", scale=2),
    dataset,
    out=args.out,
    steps=args.steps,
    every=min(250, args.steps),
    validate=lambda model: mean_scores(evaluate(model, val)),
)
print(f"{best}: the best on {len(val)} validation volumes")
