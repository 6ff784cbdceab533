"""The gain of the self-ensemble of eight, and the correlation of its spread with the error.

Run: python benchmarks/uncertainty.py ixi-4x --data FOLDER --split test [--group "T2 brain"] [--every 1]

Each HR volume is degraded (k-space crop, magnitude), upscaled alone and as an ensemble, and scored (volume protocol).
Correlations are those of spread and absolute error over voxels: all of them, and the object (above 5 % of the volume's
99.9th percentile), where the empty background does not count. Means over the volumes of a subject, then over subjects.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch

import deformmamba
from deformmamba.data.patches import find_scans, load_slices
from deformmamba.inference import weights_hash
from deformmamba.metrics import psnr, ssim
from deformmamba.models import SRModel
from deformmamba.physics.kspace import degrade
from deformmamba.volume import intensity_scale


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def measured(model: SRModel, hr: torch.Tensor) -> dict[str, float]:
    lr = degrade(hr, model.scale)
    alone = deformmamba.upscale(model, lr, axis=0)
    mean, spread = deformmamba.upscale_with_uncertainty(model, lr, axis=0)
    error = (mean - hr).abs().numpy()
    inside = hr.numpy() > 0.05 * intensity_scale(hr.numpy())
    e, s = error[inside], spread.numpy()[inside]
    worst = s >= np.quantile(s, 0.9)
    return {
        "psnr": psnr(alone, hr, protocol="volume"),
        "psnr, ensemble": psnr(mean, hr, protocol="volume"),
        "ssim": ssim(alone, hr, protocol="volume"),
        "ssim, ensemble": ssim(mean, hr, protocol="volume"),
        "correlation, all voxels": correlation(spread.numpy().ravel(), error.ravel()),
        "correlation, object": correlation(s, e),
        "rank correlation, object": correlation(ranks(s), ranks(e)),
        "error where the spread is largest (a tenth), by the mean error": float(e[worst].mean() / e.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ixi-4x")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val", choices=("val", "test", "external"))
    parser.add_argument("--group", help="only scans of this group, such as 'T2 brain'")
    parser.add_argument("--every", type=int, default=1, help="only every n-th slice")
    args = parser.parse_args()
    model = deformmamba.from_pretrained(args.model)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    scans = [s for s in find_scans(args.data) if s.split == args.split and args.group in (None, s.group)]
    if not scans:
        raise SystemExit(f"no scan of split {args.split} and group {args.group} in {args.data}")
    for scan in scans:
        hr = torch.from_numpy(load_slices(scan.path, model.scale).array[:: args.every].copy())
        rows[scan.subject].append(measured(model, hr))
    print(f"{args.model}, sha256 {weights_hash(model)}; {args.split}: {len(scans)} volumes of {len(rows)} subjects")
    for name in next(iter(rows.values()))[0]:
        by_subject = [np.mean([row[name] for row in volumes]) for volumes in rows.values()]
        print(f"{name}: {np.mean(by_subject):.4f}")


if __name__ == "__main__":
    main()
