"""The time of each part of a training step, the speed of data loading, and the gain of a second process.

Run: python benchmarks/training.py [--recipe ixi-4x] [--steps 20] [--threads 1] [--write]

Everything runs on synthetic volumes of 256 x 256 with the recipe's model, data and batch. The parts of a step are timed
within the same steps; the kinds of operation come from torch's profiler. Then `fit` runs in turns in one process, in
one process with a data loading process, and in two processes (gloo; the same samples per step), and the best speed of
each counts. All losses must agree, or nothing is reported. `--write` replaces the section "Training" of
benchmarks/README.md.
"""

import argparse
import csv
import datetime
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

import deformmamba
from deformmamba.data.patches import PatchDataset, Scan
from deformmamba.losses import SRLoss
from deformmamba.models import MODELS, SRModel
from deformmamba.training import fit, load_recipe

README = Path(__file__).parent / "README.md"


def made_up(folder: Path, n: int = 3) -> list[Scan]:
    """Volumes of 256 x 256 x 8 with edges and texture."""
    y, x, z = np.meshgrid(np.linspace(-1, 1, 256), np.linspace(-1, 1, 256), np.arange(8), indexing="ij")
    scans = []
    for k in range(n):
        rng = np.random.default_rng(k)
        a, b, c = rng.uniform(5, 40, 3)
        image = (np.hypot(y, x) < 0.9) * (500 + 200 * np.cos(a * x + z) * np.cos(b * y) + 100 * (np.sin(c * x * y) > 0))
        path = folder / f"{k}.nii"
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), np.diag([0.9, 0.9, 3, 1])), path)
        scans.append(Scan(path, f"sub-{k}", "train", "T2 brain"))
    return scans


def prepared(plan: dict[str, dict[str, Any]], folder: Path, length: int) -> tuple[SRModel, PatchDataset]:
    arguments = dict(plan["model"])
    made, preset = MODELS[arguments.pop("name", "DeformMambaSR")], arguments.pop("preset", None)
    torch.manual_seed(0)
    model = made.from_preset(preset, **arguments) if preset else made(**arguments)  # type: ignore[attr-defined]
    settings = {key: value for key, value in plan["data"].items() if key not in ("validation", "weights")}
    return model, PatchDataset(made_up(folder), scale=model.scale, length=length, **settings)


def parts_of_a_step(model: SRModel, dataset: PatchDataset, batch: int, steps: int) -> dict[str, float]:
    """Seconds per step, by part, as in `fit`, without the first step."""
    spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent[part] += time.perf_counter() - start

    loss, optimizer = SRLoss(), torch.optim.AdamW(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    model.train()
    for step in range(steps + 1):
        if step == 1:
            spent.clear()
        with timed("loading"):
            samples = [dataset[(step * batch + k) % len(dataset)] for k in range(batch)]
            lr, hr, base, _ = (torch.stack(images) for images in zip(*samples, strict=True))
        with timed("forward"):
            sr = model(lr, base)
        with timed("loss"):
            value = loss(sr, hr)
        with timed("backward"):
            value.backward()
        with timed("clipping and AdamW"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with timed("moving average"):
            average.update_parameters(model)
    return {part: seconds / steps for part, seconds in spent.items()}


def operations(model: SRModel, dataset: PatchDataset, batch: int) -> dict[str, float]:
    """The share of each kind of operation in a step (without loading), without its callees, largest first."""
    lr, hr, base, _ = (torch.stack(images) for images in zip(*(dataset[k] for k in range(batch)), strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        SRLoss()(model(lr, base), hr).backward()
    model.zero_grad(set_to_none=True)
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(own.values())
    return {key: value / total for key, value in sorted(own.items(), key=lambda item: -item[1])}


def run_fit(plan: dict[str, dict[str, Any]], folder: Path, out: Path, steps: int, workers: int) -> None:
    """One short run of `fit`; its log contains the speed."""
    batch = plan["fit"].get("batch", 8)
    model, dataset = prepared(plan, folder, steps * batch)
    fit(model, dataset, out=out, steps=steps, batch=batch, every=steps, workers=workers, progress=False)


def logged(out: Path) -> tuple[float, float]:
    """Images per second and the mean loss."""
    with open(out / "log.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return float(row["images_per_second"]), float(row["loss"])


def processes(recipe: str, steps: int, threads: int, repeats: int) -> dict[str, tuple[float, float]]:
    """The best (images per second, loss) of each way of running `fit`."""
    # accelerate's option for two CPU processes needs MPI; its launcher for GPUs can start them too
    two = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
           "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    ways = {"one process": ([], 0), "one, and one that loads": ([], 1), "two processes": (two, 0)}
    best: dict[str, tuple[float, float]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    for _ in range(repeats):
        for name, (launcher, workers) in ways.items():
            with tempfile.TemporaryDirectory() as out:
                own = ["--recipe", recipe, "--steps", str(steps), "--threads", str(threads), "--fit", out]
                command = [sys.executable, *launcher, __file__, *own, "--workers", str(workers)]
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                best[name] = max(best.get(name, (0.0, 0.0)), logged(Path(out)))
    losses = [loss for _, loss in best.values()]
    if not all(math.isclose(loss, losses[0], rel_tol=1e-3) for loss in losses):
        raise SystemExit(f"the losses differ, {losses}: nothing is reported")
    return best


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] + ["---:"] * (len(head) - 1), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="ixi-4x")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="replace the section of benchmarks/README.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = load_recipe(args.recipe)
    batch = plan["fit"].get("batch", 8)
    with tempfile.TemporaryDirectory() as name:
        if args.fit:
            run_fit(plan, Path(name), args.fit, args.steps, args.workers)
            return
        model, dataset = prepared(plan, Path(name), args.steps * batch)
        parts = parts_of_a_step(model, dataset, batch, args.steps)
        shares = operations(model, dataset, batch)
    speeds = processes(args.recipe, args.steps, args.threads, args.repeats)

    whole = sum(parts.values())
    first = speeds["one process"][0]
    computing = whole - parts["loading"]
    text = "\n".join(
        [
            f"`python benchmarks/training.py --recipe {args.recipe} --steps {args.steps} --threads {args.threads}`, "
            f"{datetime.date.today():%-d %B %Y}, {platform.processor() or platform.machine()}, load "
            f"{os.getloadavg()[0]:.2f} at the end, torch {torch.__version__}, deformmamba {deformmamba.__version__}. "
            f"Batches of {batch}, {model.num_parameters() / 1e6:.2f} M parameters, float32.",
            "",
            table(
                ["part of a step", "time", "share"],
                [[part, f"{1000 * s:.1f} ms", f"{s / whole:.1%}"] for part, s in parts.items()],
            ),
            "",
            f"Loading delivers {batch / parts['loading']:.0f} images per second, the rest of the step processes "
            f"{batch / computing:.1f}, so loading is {computing / parts['loading']:.0f} times as fast.",
            "",
            table(
                ["operation, forward and backward", "share without callees"],
                [[f"`{key}`", f"{share:.1%}"] for key, share in list(shares.items())[:12]],
            ),
            "",
            table(
                ["`fit`", "images per second", "x one process"],
                [[way, f"{speed:.2f}", f"{speed / first:.2f}"] for way, (speed, _) in speeds.items()],
            ),
        ]
    )
    print(text)
    if args.write:
        old = README.read_text("utf-8")
        kept = re.sub(r"\n## Training\n.*?(?=\n## |\Z)", "", old, flags=re.DOTALL).rstrip("\n")
        README.write_text(f"{kept}\n\n## Training\n\n{text}\n", "utf-8")


if __name__ == "__main__":
    main()
