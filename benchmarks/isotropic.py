"""Thick slices made isotropic, compared with the truth: nearest, linear, cubic spline and network.

Run: python benchmarks/isotropic.py --data DIR [--subjects T2,T1] [--mm 3,4,5,6] [--gaps 0,0.2] [--adapt "400 steps"]
         [--eclare PYTHON --eclare-minutes 3]

Truth: a T2 of 1 mm isotropic voxels (sub-arc2208) and a T1 of 0.94 x 0.94 x 1.2 mm (sub-ixi002), neither used for
training. They are made T mm thick along the last axis with a Gaussian profile, T mm apart or, with a gap, 1.2 T mm.
Every method is evaluated at the truth's own positions, from the first slice centre to the last: PSNR / SSIM by the
volume protocol over sections that contain the slice direction. Stripes: power at the slice period along the slice
direction, divided by that of the truth.

It first verifies that the slices of a constant are constant and that the spline passes through the slices. Rows are
printed as soon as they are finished; --out appends them to a CSV file. CPU time depends less on other work on the
machine than the wall time.

--eclare PYTHON compares with eclare 1.0.1, which needs a separate environment:
`python3.11 -m venv ~/eclare && ~/eclare/bin/pip install torch==2.13.0 eclare==1.0.1`, then `--eclare
~/eclare/bin/python`. It trains for --eclare-minutes (eclare_timed.py); applying its network comes on top.
eclare keeps the middle of the field of view and not the first slice centre, so its voxels lie elsewhere than ours. Its
output is interpolated to the truth's positions by a cubic spline, shifted by -1, -0.5, 0, 0.5 or 1 voxel, whichever
fits the truth best. Its application to a whole scan takes minutes; with --block 32 it is applied only to the sections
through a block in the middle, and all methods are also scored there.
"""

import argparse
import csv
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from deformmamba.inference.isotropic import isotropic, loaded
from deformmamba.metrics import psnr, ssim
from deformmamba.physics.slice_profile import SliceProfile, ThickSlices, along, slice_positions, spline_matrix
from deformmamba.volume import Volume, read_volume

COLUMNS = ("expected", "chosen", "adapted", "cpu_s", "wall_s", "peak_mb", "sha256")
SUBJECTS = {
    "T2": ("sub-arc2208/anat/sub-arc2208_T2w.nii.gz", 1.0),
    "T1": ("sub-ixi002/anat/sub-ixi002_T1w.nii.gz", 0.9375),
}


def made_thick(truth: np.ndarray, voxel: float, thickness: float, spacing: float) -> tuple[np.ndarray, float, int]:
    """(i, j, slices), the first slice's centre in mm, which lies on a voxel, and the number of slices."""
    first = round(spacing / 2 / voxel) * voxel
    n = int(((truth.shape[2] - 1) * voxel - first) / spacing + 1e-9) + 1
    operator = ThickSlices(
        truth.shape[2], voxel, slice_positions(n, spacing, first), SliceProfile("gaussian", thickness)
    )
    ones = operator(torch.ones(truth.shape[2], dtype=torch.float64))
    assert torch.allclose(ones, torch.ones_like(ones)), "a constant did not stay"
    return operator(torch.from_numpy(truth), 2).numpy(), first, n


def middle(shape: tuple[int, ...], size: int) -> tuple[slice, slice]:
    """The middle of the first two axes, `size` voxels long or one more; everything for 0."""
    margins = [(n - size) // 2 if 0 < size < n else 0 for n in shape[:2]]
    first, second = (slice(margin, n - margin) for margin, n in zip(margins, shape, strict=False))
    return first, second


def at_positions(slices: np.ndarray, at: np.ndarray, how: str) -> np.ndarray:
    """`slices` (i, j, n) at the positions `at`, in slices from the first."""
    n = slices.shape[2]
    if how == "cubic spline":
        matrix = spline_matrix(n, torch.from_numpy(at))
    else:
        low = np.clip(np.floor(at).astype(int), 0, n - 2)
        share = np.round(at - low) if how == "nearest" else at - low
        dense = np.zeros((len(at), n))
        np.add.at(dense, (np.arange(len(at)), low), 1 - share)
        np.add.at(dense, (np.arange(len(at)), low + 1), share)
        matrix = torch.from_numpy(dense)
    return along(matrix, torch.from_numpy(np.ascontiguousarray(slices)), 2).numpy()


def power_at_period(image: np.ndarray, voxel: float, spacing: float) -> float:
    """Mean power along the last axis at the frequency of the slices, under a Hann window."""
    n = image.shape[2]
    z = np.arange(n) * voxel
    wave = np.hanning(n) * np.exp(-2j * np.pi * z / spacing)
    return float(np.mean(np.abs(image @ wave) ** 2))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a CSV file; a new file gets the header first."""
    new = not path.exists()
    with open(path, "a", newline="") as table:
        writer = csv.DictWriter(table, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def by_eclare(
    volume: Volume,
    thickness: float,
    at: np.ndarray,
    wanted: np.ndarray,
    block: tuple[slice, slice],
    args: argparse.Namespace,
) -> tuple[np.ndarray, dict[str, Any]]:
    """eclare's result in a block at the positions `at` (mm from the first slice centre), and its steps and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "thick.nii"
        nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), source)
        script, relative = Path(__file__).with_name("eclare_timed.py"), thickness / min(volume.spacing)
        given = [source, folder, relative, args.eclare_minutes, torch.get_num_threads(), args.eclare_batch]
        given += [part.start for part in block]
        command = [args.eclare, str(script), *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"eclare failed:\n{done.stderr[-2000:]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        image = nibabel.load(facts["out"])
        array = np.asarray(image.dataobj, np.float32)[block]
    spacing, middle = float(image.header.get_zooms()[2]), (volume.array.shape[2] - 1) / 2 * volume.spacing[2]

    def placed(shift: float) -> np.ndarray:
        inside = (at - middle) / spacing + (array.shape[2] - 1) / 2 + shift
        return at_positions(array, np.clip(inside, 0, array.shape[2] - 1), "cubic spline")

    fits = {shift: psnr(placed(shift), wanted[block]) for shift in (-1.0, -0.5, 0.0, 0.5, 1.0)}
    best = max(fits, key=fits.__getitem__)
    return placed(best), {**facts, "shift": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--subjects", default="T2,T1")
    parser.add_argument("--mm", default="3,4,5,6")
    parser.add_argument("--gaps", default="0,0.2")
    parser.add_argument("--model", default="thick")
    parser.add_argument("--adapt", default="0")
    parser.add_argument("--consistency", default="object", choices=["object", "exact", "off"])
    parser.add_argument("--eclare", metavar="PYTHON", help="also eclare, by the Python of its environment")
    parser.add_argument("--eclare-minutes", type=float, default=3.0, help="of training (default: 3)")
    parser.add_argument("--eclare-batch", type=int, default=128, help="patches a step (default: 128, as eclare's)")
    parser.add_argument(
        "--block", type=int, default=0, help="also score a block in the middle, so many voxels in i and j"
    )
    parser.add_argument("--only-eclare", action="store_true", help="leave out our network")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    network = loaded(args.model, None)
    for name in args.subjects.split(","):
        file, to = SUBJECTS[name]
        scan = read_volume(args.data / file)
        truth, voxel = scan.array.astype(np.float32), scan.spacing[2]
        for thickness in map(float, args.mm.split(",")):
            for gap in map(float, args.gaps.split(",")):
                spacing = thickness * (1 + gap)
                slices, first, n = made_thick(truth, voxel, thickness, spacing)
                z = np.arange(truth.shape[2]) * voxel - first  # mm from the first slice centre
                seen = (z >= -1e-6) & (z <= (n - 1) * spacing + 1e-6)
                wanted, at = truth[:, :, seen], z[seen]
                through = at_positions(slices, np.arange(n, dtype=float), "cubic spline")
                assert np.abs(through - slices).max() < 1e-4 * slices.max(), "the spline left the slices"
                volume = Volume(slices, np.diag([*scan.spacing[:2], spacing, 1.0]))
                block = middle(wanted.shape, args.block)
                results: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
                    how: (at_positions(slices, at / spacing, how), {}) for how in ("nearest", "linear", "cubic spline")
                }
                if not args.only_eclare:
                    start, began = time.process_time(), time.perf_counter()
                    options = {"model": network, "adapt": args.adapt, "consistency": args.consistency}
                    out, report = isotropic(volume, to=to, thickness=thickness, axis=2, **options)
                    facts = {
                        "expected": "" if report.expected is None else f"{report.expected.db:+.2f}",
                        "chosen": report.method,
                        "adapted": report.adapted,
                        "cpu_s": round(time.process_time() - start, 1),
                        "wall_s": round(time.perf_counter() - began, 1),
                        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                        "sha256": (report.sha256 or network.sha256 or "")[:12],
                    }
                    results["network"] = at_positions(out.array, at / report.to, "cubic spline"), facts
                if args.eclare:
                    image, facts = by_eclare(volume, thickness, at, wanted, block, args)
                    facts = {"adapted": facts["steps"]} | {key: round(facts[key], 1) for key in ("cpu_s", "wall_s")}
                    results["eclare"] = image, facts
                sizes = sorted({0, args.block})
                # eclare has the voxels of the block only
                scored = [(how, size) for how in results for size in sizes if how != "eclare" or size == args.block]
                for how, size in scored:
                    image, facts = results[how]
                    part = middle(wanted.shape, size)
                    image = image if how == "eclare" else image[part]
                    power = power_at_period(wanted[part], voxel, spacing)
                    row: dict[str, Any] = {
                        "subject": name,
                        "mm": thickness,
                        "gap": gap,
                        "block": size,
                        "method": how,
                        "psnr": round(psnr(image, wanted[part]), 3),
                        "ssim": round(ssim(image, wanted[part]), 4),
                        "stripes": round(power_at_period(image, voxel, spacing) / power, 3),
                    } | {key: facts.get(key, "") for key in COLUMNS}
                    print(*row.values(), sep="\t", flush=True)
                    if args.out:
                        append_row(args.out, row)


if __name__ == "__main__":
    main()
