"""Modulated deformable convolution against torchvision's operator and a grid_sample version: time and peak memory.

    python benchmarks/deform.py [--device cuda] [--threads N] [--sizes 1,96,64,64 8,40,32,32] [--repeats N]

Prints Markdown. 3x3 kernels, equal numbers of input and output channels, float32, channels-last tensors, offsets of
about a pixel. Every implementation is compared with the float64 result before it is timed. They are timed in turns; the
table has the median of the repeats, with the best in brackets. On a busy machine use the ratios. Peak memory is the
memory that a call adds (without inputs, with result and gradients), measured in a separate process (Linux).
"""

import argparse
import math
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from deformmamba.deform import modulated_deform_conv2d

SIZES = ["1,40,8,8", "8,40,32,32", "1,96,64,64", "1,96,256,256"]
Tensors = list[torch.Tensor]


def ours(implementation: str) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
        return modulated_deform_conv2d(x, offset, mask, weight, bias, padding=1, implementation=implementation)

    return run


def torchvision(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def grid_sample(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The shortest fast version in plain PyTorch: nine taps as rows of one sampling grid."""
    b, c, h, w = x.shape
    taps = torch.arange(9, device=x.device)
    offset = offset.view(b, 9, 2, h, w)
    y = torch.arange(h, device=x.device).view(1, 1, h, 1) + (taps // 3 - 1).view(1, 9, 1, 1) + offset[:, :, 0]
    x_at = torch.arange(w, device=x.device) + (taps % 3 - 1).view(1, 9, 1, 1) + offset[:, :, 1]
    grid = torch.stack([2 * x_at / (w - 1) - 1, 2 * y / (h - 1) - 1], dim=-1).view(b, 9 * h, w, 2)
    samples = F.grid_sample(x, grid, align_corners=True).view(b, c, 9, h * w) * mask.reshape(b, 1, 9, h * w)
    out = torch.einsum("bckp,ock->bop", samples, weight.reshape(-1, c, 9))
    return (out + bias.view(-1, 1)).view(b, -1, h, w)


def plain_conv2d(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=1)


RUN = {
    "cpu": ours("cpu"),
    "gather": ours("gather"),
    "grid_sample": grid_sample,
    "torchvision": torchvision,
    "conv2d (no offsets)": plain_conv2d,
}


def tensors(size: tuple[int, ...], device: str) -> Tensors:
    torch.manual_seed(0)
    b, c, h, w = size
    shapes = [(b, c, h, w), (b, 18, h, w), (b, 9, h, w), (c, c, 3, 3)]
    made = [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for shape in shapes]
    made[2] = made[2].sigmoid()
    made[3] = made[3] / math.sqrt(9 * c)
    return [t.requires_grad_() for t in (*made, torch.randn(c, device=device))]


def both_ways(run: Callable[..., torch.Tensor], given: Tensors) -> None:
    run(*given).backward(torch.ones_like(given[0]))
    for t in given:
        t.grad = None


def only_forward(run: Callable[..., torch.Tensor], given: Tensors) -> None:
    with torch.no_grad():
        run(*given)


WAYS = {"forward": only_forward, "forward + backward": both_ways}


def runnable(device: str) -> list[str]:
    names = [name for name in RUN if name != "cpu" or device == "cpu"]
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchvision is skipped, because it cannot be imported ({error})\n")
        names.remove("torchvision")
    return names


def check(name: str, size: tuple[int, ...], device: str) -> float:
    """Largest difference from the float64 result, relative to its largest value."""
    given = tensors(size, device)
    expected = modulated_deform_conv2d(*(t.detach().double() for t in given), padding=1)
    difference = float((RUN[name](*given).detach().double() - expected).abs().max() / expected.abs().max())
    if difference > 1e-4:
        raise SystemExit(f"{name} at {size} differs from the float64 result by {difference:.1e}: nothing is timed")
    return difference


def seconds(names: list[str], size: tuple[int, ...], device: str, repeats: int) -> dict[tuple[str, str], list[float]]:
    """Sorted times of single calls, in rounds of all implementations."""
    times: dict[tuple[str, str], list[float]] = {(name, way): [] for name in names for way in WAYS}
    given = tensors(size, device)
    for turn in range(repeats + 1):
        for way, call in WAYS.items():
            for name in names:
                n, spent = 0, 0.0
                while spent < 0.02 and n < 100:  # short calls are repeated several times per round
                    if device != "cpu":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    call(RUN[name], given)
                    if device != "cpu":
                        torch.cuda.synchronize()
                    took = time.perf_counter() - start
                    if turn:  # the first round warms up
                        times[name, way].append(took)
                    n, spent = n + 1, spent + took
    return {key: sorted(found) for key, found in times.items()}


def resident(key: str) -> float:
    """MiB of this process: current ("VmRSS") or peak ("VmHWM"), from Linux."""
    found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**10


def _peak(name: str, way: str, size: tuple[int, ...], device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    WAYS[way](RUN[name], tensors((1, size[1], 8, 8), device))
    given = tensors(size, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[way](RUN[name], given)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
    before = resident("VmRSS")
    WAYS[way](RUN[name], given)
    return resident("VmHWM") - before


def peak(*args: object) -> float:
    """MiB that the call adds at its peak, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, args)


def duration(s: float) -> str:
    return f"{s * 1e6:,.0f} µs" if s < 1e-3 else f"{s * 1e3:,.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="B,C,H,W")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = runnable(args.device)

    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, float32; median (best) of a call\n")
    for text in args.sizes:
        size = tuple(int(n) for n in text.split(","))
        error = {name: "" if "conv2d" in name else f"{check(name, size, args.device):.0e}" for name in names}
        times = seconds(names, size, args.device, args.repeats)
        print(f"x {'x'.join(map(str, size))}: nine taps are {9 * math.prod(size) * 4 / 2**20:,.1f} MiB\n")
        print("| | " + " | ".join(f"{way} | ratio | peak memory" for way in WAYS) + " | largest error |")
        print("|---" * (3 * len(WAYS) + 2) + "|")
        for name in names:
            cells = [name]
            for way in WAYS:
                all_, first = times[name, way], times[names[0], way]
                middle, reference = all_[len(all_) // 2], first[len(first) // 2]
                cells += [f"{duration(middle)} ({duration(all_[0])})", f"{middle / reference:.2g}"]
                cells += [f"{peak(name, way, size, args.device, args.threads):,.0f} MiB"]
            print("| " + " | ".join([*cells, error[name]]) + " |")
        print()


if __name__ == "__main__":
    main()
