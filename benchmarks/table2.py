"""Seconds per training step of each network of the paper's table 2.

Run: python benchmarks/table2.py [--preset tiny] [--threads 1]

Batches of 8 patches, 32x32 to 128x128, from synthetic volumes. The networks run in turns, twice, and the best time
counts.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from training import made_up

from deformmamba.data.patches import PatchDataset
from deformmamba.evaluation.tables import SIZES, TABLES
from deformmamba.losses import SRLoss
from deformmamba.training.budget import seconds_a_step
from deformmamba.training.comparison import Plan

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--preset", default="tiny", choices=list(SIZES))
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)
plan = Plan(preset=args.preset, steps=1)
with tempfile.TemporaryDirectory() as folder:
    dataset = PatchDataset(made_up(Path(folder)), scale=plan.scale, patch=32, length=8, contrast=1.3)
best: dict[str, float] = {}
for _ in range(2):
    for row in TABLES["table2"]:
        if row.trained:
            seconds = seconds_a_step(plan.build(row), dataset, SRLoss(beta=row.beta), batch=plan.batch)
            best[row.name] = min(seconds, best.get(row.name, seconds))
for name, seconds in best.items():
    print(f"{name:14} {seconds:6.3f} s")
