"""The scan's CPU backends compared with a loop over steps and mambapy's parallel scan; SS2D with its plain composition.

Run: python benchmarks/scan.py [--threads 2] [--repeats 7] [--quick] [--alone] [--write]

`OMP_WAIT_POLICY` determines how PyTorch's threads wait between operations; the table notes whether it was set.

Every result is verified before it is timed; a wrong one is not timed. Values and gradients are compared with the eager
backend in float64, whose values are compared with the reference. Sequences that are too long for this are compared with
the reference (values) and with this backend in float64 (gradients). Contenders run in turns, so that other work slows
all of them. Each turn has three runs, because the first one suffers from the caches and the memory of the previous
contender. The best time counts. Extra memory is the growth of the process's peak memory. `--write` replaces the section
"Scan" of benchmarks/README.md up to its first remark.

The floor. A step of one state of one channel takes nine multiplications or fused multiply-adds in the forward pass:
delta A, five for the exponential by a polynomial, delta u B, h and y. The backward pass computes h again (eight) and
needs eight for the gradients. The floor is their number divided by the rate of fused multiply-adds, measured in turns
with the scan and with the same number of threads. It excludes softplus, sums over channels and memory access. (With
AVX-512 our kernels take part of the exponential from a table, which saves two of the nine; the floor still counts nine,
so that machines can be compared.) Both are compiled for the same target, so that `NUMBA_CPU_NAME=haswell
NUMBA_CPU_FEATURES=+avx2,+fma` and `NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=` measure older processors' code against
its own floor.
"""

import argparse
import ctypes
import datetime
import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from step_by_step import step_by_step

import deformmamba
from deformmamba.layers import SS2D
from deformmamba.scan import selective_scan
from deformmamba.scan.cpu import compiled_for

N, GROUPS, CHANNELS = 16, 4, 768
FORWARD, BACKWARD = 9, 16
IN_A_ROW = 3
WRONG = 1e-4  # relative to the largest number of a result, in float32

Run = Callable[[], Any]


# ------------------------------------------------------------------------------------------------------------ measuring


def take_turns(contenders: dict[str, Run], repeats: int, seconds: float = 8) -> dict[str, float]:
    """The best time of each in seconds, over `repeats` turns; a contender that has used `seconds` in total is not run
    again."""
    best = dict.fromkeys(contenders, math.inf)
    spent = dict.fromkeys(contenders, 0.0)
    for _ in range(repeats):
        for name, run in [one for one in contenders.items() for _ in range(IN_A_ROW)]:
            if spent[name] < seconds:
                start = time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
                best[name], spent[name] = min(best[name], elapsed), spent[name] + elapsed
    return best


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_memory(run: Run) -> int | None:
    """The growth of the process's peak memory during `run`, in bytes; None on other systems than Linux."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        result = run()
        del result
        return max(0, status("VmHWM") - before)
    except OSError:
        return None


@cache
def multiply_adds(threads: int) -> tuple[Run, int]:
    """A function that does float32 fused multiply-adds on this number of threads, and their number."""
    import numba
    from numba.core.registry import cpu_target

    from deformmamba.scan.cpu_kernels import LANES, fma, like, load, store

    # as many chains as registers hold; each is LANES wide
    @numba.njit(nogil=True)
    def three(x: Any, rounds: int) -> None:
        a, b, c = load(x, (0,)), load(x, (1,)), load(x, (2,))
        p, q = like(a, x[16]), like(a, x[17])
        for _ in range(rounds):
            a, b, c = fma(a, p, q), fma(b, p, q), fma(c, p, q)
        store(x, (0,), a + b + c)

    @numba.njit(nogil=True)
    def six(x: Any, rounds: int) -> None:
        a, b, c, d, e, f = load(x, (0,)), load(x, (1,)), load(x, (2,)), load(x, (3,)), load(x, (4,)), load(x, (5,))
        p, q = like(a, x[16]), like(a, x[17])
        for _ in range(rounds):
            a, b, c, d, e, f = fma(a, p, q), fma(b, p, q), fma(c, p, q), fma(d, p, q), fma(e, p, q), fma(f, p, q)
        store(x, (0,), a + b + c + d + e + f)

    @numba.njit(nogil=True)
    def twelve(x: Any, rounds: int) -> None:
        a, b, c, d, e, f = load(x, (0,)), load(x, (1,)), load(x, (2,)), load(x, (3,)), load(x, (4,)), load(x, (5,))
        g, h, i, j, k, m = load(x, (6,)), load(x, (7,)), load(x, (8,)), load(x, (9,)), load(x, (10,)), load(x, (11,))
        p, q = like(a, x[16]), like(a, x[17])
        for _ in range(rounds):
            a, b, c, d, e, f = fma(a, p, q), fma(b, p, q), fma(c, p, q), fma(d, p, q), fma(e, p, q), fma(f, p, q)
            g, h, i, j, k, m = fma(g, p, q), fma(h, p, q), fma(i, p, q), fma(j, p, q), fma(k, p, q), fma(m, p, q)
        store(x, (0,), a + b + c + d + e + f + g + h + i + j + k + m)

    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    kernel, chains = (twelve, 12) if "+avx512f" in features else (six, 6) if "+avx2" in features else (three, 3)
    rounds = 400_000
    x = torch.full((64,), 0.5).numpy()
    kernel(x, 1)
    pool = ThreadPoolExecutor(threads)
    numbers = [x.copy() for _ in range(threads)]
    return lambda: list(pool.map(lambda mine: kernel(mine, rounds), numbers)), threads * rounds * chains * LANES


def turns_and_rate(contenders: dict[str, Run], repeats: int) -> tuple[dict[str, float], float]:
    """`take_turns`, and the rate of multiply-adds in the same turns, because the clock of a machine varies."""
    run, count = multiply_adds(torch.get_num_threads())
    best = take_turns({**contenders, "multiply-adds": run}, repeats)
    return best, count / best.pop("multiply-adds")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.0f}" if ratio > 20 else f"{ratio:.2f}"


class Row(NamedTuple):
    """A row of the table: the ratios to other contenders, and the ratio to half the length."""

    what: str
    size: str
    passes: str
    seconds: float
    reference: float | None = None
    loop: float | None = None
    mambapy: float | None = None
    plain: float | None = None
    growth: float | None = None
    floor: float | None = None
    memory: int | None = None


HEAD = "contender, size, pass, time, x reference, x loop, x mambapy, x plain, a doubling, of the floor, extra memory"


def table(rows: list[Row]) -> str:
    """The rows in Markdown, without empty columns."""
    cells = [HEAD.split(", ")]
    cells.append(["---"] * 3 + ["---:"] * (len(cells[0]) - 3))
    for row in rows:
        ratios = (row.reference, row.loop, row.mambapy, row.plain)
        growth = "-" if row.growth is None else f"{row.growth:.2f}"
        floor = "-" if row.floor is None else f"{row.floor:.1%}"
        rest = milliseconds(row.seconds), *map(times, ratios), growth, floor, megabytes(row.memory)
        cells.append([row.what, row.size, row.passes, *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def check(name: str, got: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Stop unless every tensor in `got` is right."""
    for x, y in zip(got, exact, strict=False):
        error = ((x.double() - y.double()).abs().max() / y.abs().max()).item()
        if not error < WRONG:
            raise SystemExit(f"{name} is wrong by {error:.1e}: it is not timed")


# ----------------------------------------------------------------------------------------------------------- contenders


def arguments(length: int, dtype: torch.dtype = torch.float32, n: int = N) -> list[torch.Tensor]:
    """u, delta, A, B, C, D, bias as in a Mamba network."""
    make = torch.Generator().manual_seed(0)
    sizes = ((1, CHANNELS, length),) * 2 + ((CHANNELS, n),) + ((1, GROUPS, n, length),) * 2 + ((CHANNELS,),) * 2
    u, delta, A, B, C, D, bias = (torch.randn(size, generator=make) for size in sizes)
    return [x.to(dtype) for x in (u, delta / 2, -torch.exp(A / 2), B, C, D, bias.sigmoid() - 4)]


def ours(backend: str) -> Callable[..., torch.Tensor]:
    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any) -> torch.Tensor:
        y = selective_scan(u, delta, A, B, C, D, None, bias, True, backend=backend)
        assert isinstance(y, torch.Tensor)
        return y

    return scan


def mambapy_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any) -> torch.Tensor:
    """mambapy's parallel scan, with the surrounding steps of mambapy's block."""
    from mambapy.pscan import pscan

    each = CHANNELS // GROUPS
    dt = F.softplus(delta + bias[:, None]).transpose(1, 2)
    decay = torch.exp(dt[..., None] * A)
    B, C = (x.repeat_interleave(each, 1).permute(0, 3, 1, 2) for x in (B, C))
    states = pscan(decay, dt[..., None] * B * u.transpose(1, 2)[..., None])
    return ((states * C).sum(-1) + D * u.transpose(1, 2)).transpose(1, 2)


def with_gradients(
    scan: Callable[..., torch.Tensor], given: list[torch.Tensor], dy: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


class PlainSS2D(SS2D):
    """SS2D as it is usually composed: four permuted copies, one scan over all of them, four copies back, a sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d, h, w = x.shape[1:]
        k, n, r = self.directions, self.d_state, self.dt_rank
        xs = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
        xs = torch.cat([xs, xs.flip(-1)], 1)
        projected = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj)
        dt, B, C = projected.split([r, n, n], 2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj)
        y = selective_scan(
            xs.flatten(1, 2), delta.flatten(1, 2), -self.A_log.exp(), B, C, self.D, None, self.dt_bias.flatten(), True
        )
        assert isinstance(y, torch.Tensor)
        y = y.unflatten(1, (k, d))
        y = y[:, :2] + y[:, 2:].flip(-1)
        return y[:, 0].unflatten(-1, (h, w)) + y[:, 1].unflatten(-1, (w, h)).transpose(2, 3)


# ----------------------------------------------------------------------------------------------------------------- rows

PASSES = ("forward", "forward + backward")


def inference(scan: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> Run:
    return torch.no_grad()(lambda: scan(*given))


def training(scan: Callable[..., torch.Tensor], given: list[torch.Tensor], dy: torch.Tensor) -> Run:
    return lambda: with_gradients(scan, given, dy)


def both_passes(given: list[torch.Tensor], dy: torch.Tensor) -> dict[str, Run]:
    """The CPU backend's, by name."""
    return dict(zip(PASSES, (inference(ours("cpu"), given), training(ours("cpu"), given, dy)), strict=True))


def share(passes: str, length: int, seconds: float, rate: float, n: int = N) -> float:
    """The floor as a share of the time."""
    each = FORWARD if passes == PASSES[0] else FORWARD + BACKWARD
    return each * CHANNELS * length * n / rate / seconds


def sequences(lengths: list[int], repeats: int) -> Iterator[Row]:
    """The rows that compare all contenders."""
    contenders: dict[str, Callable[..., torch.Tensor]] = {
        **{name: ours(name) for name in ("cpu", "eager", "reference")},
        "loop over steps": step_by_step,
        "mambapy": mambapy_scan,
    }
    trained = [name for name in contenders if name != "loop over steps"]  # its gradients take minutes
    for length in lengths:
        given = arguments(length)
        dy = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
        exact = with_gradients(ours("eager"), arguments(length, torch.float64), dy.double())
        check("the eager backend in float64", [ours("reference")(*arguments(length, torch.float64))], exact[:1])
        for name, scan in contenders.items():
            check(name, with_gradients(scan, given, dy) if name in trained else [inference(scan, given)()], exact)
        del exact
        runs: list[dict[str, Run]] = [
            {name: inference(scan, given) for name, scan in contenders.items()},
            {name: training(contenders[name], given, dy) for name in trained},
        ]
        for passes, run in zip(PASSES, runs, strict=True):
            best, rate = turns_and_rate(run, repeats)
            for name, seconds in best.items():
                ratios = [best[other] / seconds if other in best else None for other in list(contenders)[2:]]
                of_floor = share(passes, length, seconds, rate)
                memory = extra_memory(run[name])
                yield Row(name, f"L = {length:,}", passes, seconds, *ratios, floor=of_floor, memory=memory)


def maps(sizes: list[tuple[int, int, int]], repeats: int) -> Iterator[Row]:
    for channels, height, width in sizes:
        torch.manual_seed(0)
        fused, plain = SS2D(channels), PlainSS2D(channels)
        plain.load_state_dict(fused.state_dict())
        modules = {"SS2D": fused, "SS2D, plain": plain}
        x = torch.randn(1, channels, height, width)
        inputs = {"SS2D": x.contiguous(memory_format=torch.channels_last), "SS2D, plain": x}
        dy = torch.randn_like(x)
        gradients = {"SS2D": dy.contiguous(memory_format=torch.channels_last), "SS2D, plain": dy}

        def results(
            name: str, modules: Any = modules, inputs: Any = inputs, gradients: Any = gradients
        ) -> list[torch.Tensor]:
            leaf = inputs[name].detach().requires_grad_()
            y = modules[name](leaf)
            return [y.detach(), *torch.autograd.grad(y, [leaf, *modules[name].parameters()], gradients[name])]

        check("the plain composition", results("SS2D, plain"), results("SS2D"))
        runs: list[dict[str, Run]] = [
            {name: torch.no_grad()(partial(module, inputs[name])) for name, module in modules.items()},
            {name: partial(results, name) for name in modules},
        ]
        for passes, run in zip(PASSES, runs, strict=True):
            best = take_turns(run, repeats)
            for name, seconds in best.items():
                size = f"{channels} x {height} x {width}"
                faster = best["SS2D, plain"] / seconds
                yield Row(name, size, passes, seconds, plain=faster, memory=extra_memory(run[name]))


def alone(lengths: list[int], counts: list[int], repeats: int) -> Iterator[Row]:
    """The CPU backend alone: for several lengths, and at the second length for other numbers of states, for the numbers
    of threads in `counts`, and with channels consecutive in memory, as in `SS2D`."""
    all_threads = torch.get_num_threads()
    before: dict[str, float] = {}
    for length in lengths:
        given = arguments(length)
        double = arguments(length, torch.float64)
        dy = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
        exact = with_gradients(ours("cpu"), double, dy.double())
        check("the CPU backend in float64", [ours("reference")(*double)], exact[:1])
        check("the CPU backend", with_gradients(ours("cpu"), given, dy), exact)
        del exact, double
        runs = both_passes(given, dy)
        best, rate = turns_and_rate(runs, repeats)
        for passes, seconds in best.items():
            doublings = math.log2(length / lengths[lengths.index(length) - 1]) if before else 1
            growth = (seconds / before[passes]) ** (1 / doublings) if before else None
            of_floor = share(passes, length, seconds, rate)
            yield Row("cpu alone", f"L = {length:,}", passes, seconds, growth=growth, floor=of_floor)
        before = best
        if length != lengths[1]:
            continue
        for n in (8, 32):
            others = arguments(length, n=n)
            exact = with_gradients(ours("cpu"), arguments(length, torch.float64, n), dy.double())
            check(f"the CPU backend with {n} states", with_gradients(ours("cpu"), others, dy), exact)
            found, rate = turns_and_rate(both_passes(others, dy), repeats)
            for passes, seconds in found.items():
                of_floor = share(passes, length, seconds, rate, n)
                yield Row(f"cpu alone, N = {n}", f"L = {length:,}", passes, seconds, floor=of_floor)
        last = [x.mT.contiguous().mT if x.ndim > 2 else x for x in given]
        channels_last = both_passes(last, dy.mT.contiguous().mT)
        for count in counts:
            torch.set_num_threads(count)
            for how, contenders in (("", runs), (", channels last", channels_last)):
                if count == all_threads and not how:
                    continue
                what = f"cpu alone{how}" + (f", {count} thread{'s' * (count > 1)}" if count < all_threads else "")
                found, rate = turns_and_rate(contenders, repeats)
                for passes, seconds in found.items():
                    of_floor = share(passes, length, seconds, rate)
                    yield Row(what, f"L = {length:,}", passes, seconds, floor=of_floor)
        torch.set_num_threads(all_threads)


def machine(threads: int, rate: float) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"
    return (
        f"{datetime.date.today():%d %B %Y}, {model}, kernels for {compiled_for()}, {threads} threads, "
        f"load {load} before the run, torch {torch.__version__}, "
        f"deformmamba {deformmamba.__version__}. "
        f"One image or sequence, {CHANNELS} channels, {GROUPS} groups, N = {N}, float32. "
        f"{rate / 1e9:,.0f} billion fused multiply-adds a "
        f"second before the run, with which the floor of the forward pass at L = 4,096 is "
        f"{FORWARD * CHANNELS * 4096 * N / rate * 1e3:.2f} ms."
    )


def write(text: str) -> None:
    """Replace this benchmark's section in the README beside it, up to the first paragraph after the table."""
    readme = Path(__file__).with_name("README.md")
    old = readme.read_text() if readme.exists() else "# Benchmarks\n"
    before, _, rest = old.partition("\n## Scan\n")
    section, _, after = rest.partition("\n## ")
    remarks = section.rpartition(" |\n")[2].strip() if "|" in section else ""
    parts = [before.rstrip(), "## Scan", text, remarks, f"## {after.strip()}" if after else ""]
    readme.write_text("\n\n".join(filter(None, parts)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes: does the benchmark run at all")
    parser.add_argument("--alone", action="store_true", help="without the eager backend, the loop and mambapy")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = turns_and_rate({}, 30)[1]
    with_others = [] if args.alone else [64] if args.quick else [1024, 4096]
    rows = [
        *sequences(with_others, args.repeats),
        *maps([(48, 12, 20)] if args.quick else [(192, 64, 64), (96, 128, 128)], args.repeats),
        *alone(
            [64, 128] if args.quick else [1024, 4096, 16384] if args.alone else [1024, 4096, 16384, 65536],
            sorted({1, args.threads}),
            args.repeats,
        ),
    ]
    waiting = os.environ.get("OMP_WAIT_POLICY")
    target = os.environ.get("NUMBA_CPU_NAME")
    command = (
        f"{f'OMP_WAIT_POLICY={waiting} ' if waiting else ''}{f'NUMBA_CPU_NAME={target} ' if target else ''}"
        f"python benchmarks/scan.py{' --alone' if args.alone else ''}"
    )
    text = f"`{command}`, " + machine(args.threads, rate) + "\n\n" + table(rows)
    print(text)
    if args.write:
        write(text)


if __name__ == "__main__":
    main()
