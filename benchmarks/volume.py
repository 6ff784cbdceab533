"""One volume from file to file: wall time and peak memory for whole slices and tiles, batches in parallel or not; time
per slice of other networks; the measured data consistency error.

Run: python benchmarks/volume.py [--scan FILE | --shape 256 256 130] [--model ixi-4x --model ixi-2x] [--threads 2]

Every row runs in a separate process, so that its peak memory can be measured. Peaks exclude the memory with the model
loaded and the input read. Before anything is timed, a slice of the written file is compared with `upscale`. Peers are
spandrel's networks with random weights, which do not affect their speed; one slice each.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deformmamba
from deformmamba import inference
from deformmamba.inference import upscaling
from deformmamba.models import DeformMambaSR, SRModel
from deformmamba.physics import kspace
from deformmamba.volume import Volume, intensity_scale, read_volume, slice_axis, write_volume


def loaded(name: str) -> SRModel:
    """A model by name, or `random-2x`, `random-4x`: the small network with random weights."""
    if name.startswith("random-"):
        torch.manual_seed(0)
        return DeformMambaSR.from_preset("tiny", scale=int(name[7])).eval()
    return deformmamba.from_pretrained(name)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def volume_row(job: dict[str, Any]) -> dict[str, float]:
    """Seconds and MB of one way to upscale one file."""
    torch.set_num_threads(job["threads"])
    if not job["side_by_side"]:
        upscaling.CPU_PARALLEL_PIXELS = 0
    model, settings = loaded(job["model"]), job["settings"]
    scan = read_volume(job["scan"])
    axis = slice_axis(scan)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.nii"
        one = Volume(scan.array.take([0, 1], axis), scan.affine)
        write_volume(Path(folder) / "two.nii", one)
        deformmamba.upscale_file(model, Path(folder) / "two.nii", target, axis=axis, **settings)
        again = inference.upscale(model, one, axis=axis, **settings)
        np.testing.assert_allclose(read_volume(target).array, again.array, rtol=1e-4, atol=1e-3 * again.array.max())
        before = peak_mb()
        start = time.perf_counter()
        done = deformmamba.upscale_file(model, job["scan"], target, **settings)
        seconds = time.perf_counter() - start
        n = done.shape[done.axis]
        return {
            "seconds": seconds,
            "per slice": seconds / n,
            "peak MB": peak_mb() - before,
            "output MB": target.stat().st_size / 2**20,
        }


def peer_row(job: dict[str, Any]) -> dict[str, float]:
    """Seconds and MB for one slice with a peer."""
    from spandrel.architectures.HAT import HAT
    from spandrel.architectures.SwinIR import SwinIR

    torch.set_num_threads(job["threads"])
    scale, size = job["scale"], job["size"]
    if job["peer"] == "HAT":
        model: Any = HAT(
            img_size=64, window_size=16, embed_dim=180, depths=(6,) * 6, num_heads=(6,) * 6, mlp_ratio=2,
            compress_ratio=3, squeeze_factor=30, conv_scale=0.01, overlap_ratio=0.5, upscale=scale, img_range=1.0,
            upsampler="pixelshuffle", resi_connection="1conv",
        )  # fmt: skip
    else:
        model = SwinIR(
            img_size=64, window_size=8, embed_dim=60, depths=(6,) * 4, num_heads=(6,) * 4, mlp_ratio=2, upscale=scale,
            img_range=1.0, upsampler="pixelshuffledirect", resi_connection="1conv",
        )  # fmt: skip
    model.eval()
    with torch.inference_mode():
        model(torch.rand(1, 3, 64, 64))
        before = peak_mb()
        start = time.perf_counter()
        assert model(torch.rand(1, 3, *size)).shape[-1] == scale * size[1]
        return {"per slice": time.perf_counter() - start, "peak MB": peak_mb() - before}


def guarantee_row(job: dict[str, Any]) -> dict[str, float]:
    """Largest |degrade(output) - input| of four slices, as a share of the input's largest value."""
    torch.set_num_threads(job["threads"])
    model, scan = loaded(job["model"]), read_volume(job["scan"])
    axis = slice_axis(scan)
    places = np.linspace(0, scan.array.shape[axis] - 1, 6).round().astype(int)[1:-1]
    slices = torch.from_numpy(np.moveaxis(scan.array.take(places, axis), axis, 0).astype(np.float32))
    lr = (slices / intensity_scale(scan.array, model.intensity))[:, None]
    with torch.inference_mode():
        sr, _ = inference.predict(model, lr)
    tight = kspace.data_consistency(sr, lr, model.scale)

    def off(image: torch.Tensor) -> float:
        return float((kspace.degrade(image, model.scale) - lr).abs().max() / lr.max())

    top = 4095 / float(tight.max())  # integers of a 12-bit scanner
    return {
        "without": off(sr),
        "with": off(tight),
        "negatives cut": off(tight.clamp(min=0)),
        "12-bit integers": off((tight.clamp(min=0) * top).round() / top),
    }


ROWS = {"volume": volume_row, "peer": peer_row, "guarantee": guarantee_row}


def measured(kind: str, **job: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--row", json.dumps({"kind": kind, **job})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise ChildProcessError(done.stderr.splitlines()[-1] if done.stderr else f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def synthetic(shape: tuple[int, int, int]) -> np.ndarray:
    """Smooth ellipses with edges, texture and noise, in arbitrary scanner units."""
    rng = np.random.default_rng(0)
    y, x, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    head = (y**2 / 0.8 + x**2 / 0.6 + z**2 / 2) < 0.9
    inner = ((y - 0.1) ** 2 / 0.1 + (x + 0.1) ** 2 / 0.05 + 0 * z) < 0.9
    texture = np.cos(60 * x + 40 * y) * np.cos(50 * y - 30 * x)
    noise = rng.normal(0, 5, (2, *shape)).astype(np.float32)
    return np.hypot(head * (500 + 120 * texture) + inner * 300 + noise[0], noise[1]).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", help="a scan on disk (default: a synthetic one)")
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 130), help="of the synthetic scan")
    parser.add_argument("--model", action="append", help="names or paths; random-2x and random-4x need no weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        job = json.loads(args.row)
        print(json.dumps(ROWS[job.pop("kind")](job)))
        return
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"
    versions = f"torch {torch.__version__}, deformmamba {deformmamba.__version__}"
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, load {load}, {versions}\n")
    with tempfile.TemporaryDirectory() as folder:
        scan = args.scan or str(Path(folder) / "scan.nii")
        if not args.scan:
            write_volume(scan, Volume(synthetic(tuple(args.shape)), np.diag([0.9, 0.9, 3.0, 1.0])))
        volume = read_volume(scan)
        axis = slice_axis(volume)
        size = [n for a, n in enumerate(volume.array.shape) if a != axis]
        print(f"{' x '.join(map(str, volume.array.shape))} voxels, slices across axis {axis}\n")
        print("| | seconds | a slice | peak memory | output |\n| --- | ---: | ---: | ---: | ---: |")
        names = args.model or ["ixi-4x", "ixi-2x"]
        for name in names:
            ways: list[tuple[str, dict[str, Any], bool]] = [
                ("whole slices", {}, True),
                ("whole slices, one batch at a time", {}, False),
                (f"tiles of {args.tile}", {"tile": args.tile}, True),
            ]
            for label, settings, side in ways:
                job = {"model": name, "scan": scan, "settings": settings, "side_by_side": side}
                row = measured("volume", threads=args.threads, **job)
                times = f"{row['seconds']:.1f} s | {row['per slice']:.2f} s"
                sizes = f"{row['peak MB']:,.0f} MB | {row['output MB']:,.0f} MB"
                print(f"| {name}, {label} | {times} | {sizes} |", flush=True)
        if not args.no_peers:
            for scale in sorted({loaded(name).scale for name in names}):
                for peer in ("SwinIR-light", "HAT"):
                    try:
                        row = measured("peer", peer=peer, scale=scale, size=size, threads=args.threads)
                    except ChildProcessError as error:  # spandrel needs a torchvision that can be imported
                        print(f"| {peer} {scale}x | not measured: {error} | | | |")
                        continue
                    print(
                        f"| {peer} {scale}x, one slice | - | {row['per slice']:.2f} s | {row['peak MB']:,.0f} MB | - |",
                        flush=True,
                    )
        print("\nLargest |degrade(output) - input|, as a share of the input's largest value:\n")
        columns = ["without", "with", "negatives cut", "12-bit integers"]
        print(f"| consistency | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
        for name in names:
            row = measured("guarantee", model=name, scan=scan, threads=args.threads)
            print(f"| {name} | {' | '.join(f'{row[column]:.1e}' for column in columns)} |")


if __name__ == "__main__":
    main()
