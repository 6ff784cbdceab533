"""One and two threads on two cores, quiet and with one core busy, for two settings of PyTorch's threads.

Run: python benchmarks/shared.py [--seconds 2]

Uses two of the CPUs of this process. "busy" runs a loop in another process that is bound to the first of them. Each
setting is a separate process, because the OpenMP library reads its settings when it is loaded: "python" keeps the
defaults, "command" is what the command `deformmamba` sets (docs/threads.md). One and two threads take turns. The table
gives the median time in milliseconds, and two threads divided by the better of one and two. The last column does the
same for the number of threads that the command chooses, which is below 2 only for training.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SETTINGS = ("python", "command")
TRAINING = "training step"


def tasks() -> dict[str, Callable[[], object]]:
    """The operations that are timed, on inputs of their usual sizes."""
    import torch

    from deformmamba import DeformMambaSR, modulated_deform_conv2d, selective_scan

    torch.manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=True)

    scan = (leaf(1, 768, 1024), leaf(1, 768, 1024), -torch.rand(768, 16), leaf(1, 16, 1024), leaf(1, 16, 1024))
    image, offset, mask, weight = leaf(1, 96, 64, 64), leaf(1, 18, 64, 64), leaf(1, 9, 64, 64), leaf(96, 96, 3, 3)
    network = DeformMambaSR.from_preset("tiny", scale=4)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    whole, patches = torch.rand(1, 1, 64, 64), torch.rand(2, 1, 32, 32)

    def scan_both_ways() -> None:
        y = selective_scan(*scan, delta_softplus=True)
        assert isinstance(y, torch.Tensor)
        y.sum().backward()

    def slice_of_a_scan() -> None:
        with torch.inference_mode():
            network(whole)

    def training_step() -> None:
        optimizer.zero_grad()
        network(patches).square().mean().backward()
        optimizer.step()

    return {
        "scan, both passes": scan_both_ways,
        "deformable convolution, both passes": lambda: modulated_deform_conv2d(
            image, offset, mask, weight, padding=1
        ).sum().backward(),
        "slice": slice_of_a_scan,
        TRAINING: training_step,
    }  # fmt: skip


def measure(seconds: float) -> dict[str, list[float]]:
    """The median milliseconds of each task with one and with two threads, which take turns."""
    import torch

    found = {}
    for name, task in tasks().items():
        times: dict[int, list[float]] = {1: [], 2: []}
        stop = None
        while stop is None or len(times[1]) < 3 or time.perf_counter() < stop:
            for threads, mine in times.items():
                torch.set_num_threads(threads)
                task()  # compiles, allocates memory, starts threads
                start = time.perf_counter()
                task()
                if stop is not None:
                    mine.append(1e3 * (time.perf_counter() - start))
            stop = stop or time.perf_counter() + seconds
        found[name] = [statistics.median(mine) for mine in times.values()]
    return found


def occupy(cpu: int) -> None:
    """Keeps one CPU busy; never returns."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})
    while True:
        pass


def run(setting: str, cpus: list[int], seconds: float) -> dict[str, Any]:
    """`child` in a separate process."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, __file__, "--child", setting, "--seconds", str(seconds), "--cpus", *map(str, cpus)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def child(setting: str, cpus: list[int], seconds: float) -> dict[str, Any]:
    """The number of threads that training gets, and the times of `measure`."""
    from deformmamba.cli import cores

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(cpus))
    chosen = None
    if setting == "command":
        cores.limit_spinning()
        cores.take_short_turns()
        chosen = cores.use_threads(None, idle_only=True)
        os.environ["OMP_NUM_THREADS"] = "2"
    return {"chosen": chosen or 2, "times": measure(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2, help="for each operation of each case")
    parser.add_argument("--child", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--cpus", type=int, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.cpus, args.seconds)))
        return
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(cpus) < 2:
        raise SystemExit("this needs two CPUs")
    cpus = cpus[:2]
    print(f"load average before: {os.getloadavg()[0]:.1f} (below 0.3 on a quiet machine)")
    print("| machine | setting | operation | 1 thread | 2 threads | 2 / best | threads, time / best |")
    print("|---|---|---|---|---|---|---|")
    for machine in ("quiet", "busy"):
        other = multiprocessing.Process(target=occupy, args=(cpus[0],), daemon=True)
        if machine == "busy":
            other.start()
        try:
            for setting in SETTINGS:
                found = run(setting, cpus, args.seconds)
                for name, (one, two) in found["times"].items():
                    best, chosen = min(one, two), found["chosen"] if name == TRAINING else 2
                    ratio = (two if chosen == 2 else one) / best
                    row = (machine, setting, name, f"{one:.1f}", f"{two:.1f}", f"{two / best:.2f}")
                    print(f"| {' | '.join(row)} | {chosen}, {ratio:.2f} |", flush=True)
        finally:
            if machine == "busy":
                other.kill()
                other.join()


if __name__ == "__main__":
    main()
