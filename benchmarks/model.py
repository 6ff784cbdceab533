"""The shipped network compared with spandrel's HAT and SwinIR-light: parameters, one slice, one training step.

Run: python benchmarks/model.py [--model ixi-4x] [--threads 2]

The peers have random weights, which do not affect their speed. First the result of our network is compared with that of
the readable scan (`reference`); if they differ, nothing is timed.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import deformmamba


def peers() -> dict[str, nn.Module]:
    from spandrel.architectures.HAT import HAT
    from spandrel.architectures.SwinIR import SwinIR

    hat = HAT(
        img_size=64, window_size=16, embed_dim=180, depths=(6,) * 6, num_heads=(6,) * 6, mlp_ratio=2, compress_ratio=3,
        squeeze_factor=30, conv_scale=0.01, overlap_ratio=0.5, upscale=4, img_range=1.0, upsampler="pixelshuffle",
        resi_connection="1conv",
    )  # fmt: skip
    light = SwinIR(
        img_size=64, window_size=8, embed_dim=60, depths=(6,) * 4, num_heads=(6,) * 4, mlp_ratio=2, upscale=4,
        img_range=1.0, upsampler="pixelshuffledirect", resi_connection="1conv",
    )  # fmt: skip
    return {"HAT": hat, "SwinIR-light": light}


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def slice_seconds(model: nn.Module, channels: int, repeats: int) -> float:
    lr = torch.rand(1, channels, 64, 64)
    with torch.inference_mode():
        return median_seconds(lambda: model.eval()(lr), repeats)


def step_seconds(model: nn.Module, channels: int, repeats: int) -> float:
    lr, hr = torch.rand(1, channels, 64, 64), torch.rand(1, channels, 256, 256)

    def step() -> None:
        (model(lr) - hr).abs().mean().backward()
        model.zero_grad(set_to_none=True)

    model.train()
    return median_seconds(step, repeats)


def check(model: nn.Module) -> float:
    lr = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        fast = model(lr)
        with deformmamba.scan_backend("reference"):
            difference = float((model(lr) - fast).abs().max())
    if not difference < 1e-4:
        raise SystemExit(f"the fast scan differs from the reference by {difference}: nothing was timed")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ixi-4x")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    ours = deformmamba.from_pretrained(args.model)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    print(f"{args.model}: largest difference from the readable scan {check(ours):.1e}")
    rows = {}
    for name, model in {args.model: ours, **peers()}.items():
        channels, repeats = (1, 9) if model is ours else (3, 5 if name != "HAT" else 2)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        rows[name] = (
            count,
            slice_seconds(model, channels, repeats),
            step_seconds(model, channels, max(2, repeats // 2)),
        )
    own = rows[args.model]
    print("\n| network | parameters (M) | 64x64 to 256x256 (s) | ratio | forward + backward, same slice (s) | ratio |")
    print("|---|---|---|---|---|---|")
    for name, (count, forward, step) in rows.items():
        print(f"| {name} | {count:.2f} | {forward:.3f} | {forward / own[1]:.1f} | {step:.2f} | {step / own[2]:.1f} |")


if __name__ == "__main__":
    main()
