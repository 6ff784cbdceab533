"""Runs eclare 1.0.1 for a given time. benchmarks/isotropic.py calls it with the Python of eclare's own environment.

Run: python benchmarks/eclare_timed.py IN.nii OUT_FOLDER RELATIVE_THICKNESS MINUTES THREADS BATCH MARGIN_I MARGIN_J

eclare's number of training steps is its `--n-patches` divided by `--batch-size`, and its learning rate follows from
that number. So the time of one step is measured first: CPU time divided by THREADS, which is the wall time of a quiet
machine. MINUTES are those of training; applying the trained network to the scan comes on top of them. All other
settings are eclare's defaults, with two exceptions. The slice thickness is given, so that eclare does not estimate the
profile. Its mixed precision, which eclare 1.0.1 uses on GPUs only, is also used on a CPU that computes in bfloat16:
with matrix units it makes eclare several times faster. A CPU that only emulates bfloat16 takes float32, which is ten
times as fast there.

The trained network is applied to the sections that are MARGIN_I and MARGIN_J or more from the ends of the first two
axes; only voxels in both ranges are complete in the output. With margins of 0 these are all voxels.

The last line of the output is JSON: steps, seconds of a step, CPU and wall seconds of everything, the written file.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch

PATCH = 8  # pixels of a thick-slice patch, in `eclare.eclare.run_eclare`


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def seconds_a_step(separation: float, batch: int) -> float:
    """Seconds of one training step of eclare's network on a quiet machine."""
    from eclare.models.wdsr import WDSR

    network = WDSR(n_resblocks=16, num_channels=256, scale=separation)
    optimizer = torch.optim.Adam(network.parameters())
    for number in range(3):
        if number == 1:  # the first step fills caches
            start = time.process_time()
        with torch.amp.autocast("cuda"):
            sr = network(torch.rand(batch, 1, PATCH, PATCH))
            loss = torch.nn.functional.mse_loss(sr, torch.rand(sr.shape))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.process_time() - start) / 2 / torch.get_num_threads()


def restrict(margins: list[int]) -> None:
    """Lets eclare skip sections. It calls `apply_to_vol` for the sections of the first axis, then for the second's."""
    import eclare.eclare as module

    whole = module.apply_to_vol

    def apply_to_vol(model: torch.nn.Module, image: torch.Tensor, batch_size: int) -> torch.Tensor:
        margin = margins.pop(0)
        inner = whole(model, image[margin : len(image) - margin], batch_size)
        out = inner.new_zeros(len(image), *inner.shape[1:])
        out[margin : len(image) - margin] = inner
        return out

    module.apply_to_vol = apply_to_vol


def main() -> None:
    source, folder, thickness, minutes, threads, batch, *margins = sys.argv[1:]
    import nibabel
    from eclare.main import main as eclare

    restrict([int(margin) for margin in margins])
    torch.set_num_threads(int(threads))
    autocast = torch.amp.autocast
    bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    torch.amp.autocast = lambda device: autocast("cpu", torch.bfloat16, enabled=bfloat16)  # eclare asks for "cuda"
    zooms = sorted(map(float, nibabel.load(source).header.get_zooms()))
    step = seconds_a_step(round(zooms[2] / zooms[0], 3), int(batch))
    steps = max(1, math.floor(60 * float(minutes) / step))
    start, began = cpu_seconds(), time.perf_counter()
    given = ["--in-fpath", source, "--out-dir", folder, "--relative-slice-thickness", thickness]
    eclare([*given, "--batch-size", batch, "--n-patches", str(steps * int(batch))])
    name = Path(source).name.replace(".nii", "_eclare.nii")
    facts = {"steps": steps, "step_s": step, "cpu_s": cpu_seconds() - start, "wall_s": time.perf_counter() - began}
    print(json.dumps({**facts, "out": str(Path(folder) / name)}))


if __name__ == "__main__":
    main()
