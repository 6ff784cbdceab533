"""The selective scan on a GPU: Triton compared with plain PyTorch, with mamba-ssm if installed, and with the memory
bandwidth.

    python benchmarks/scan_gpu.py [--backends triton,eager,mamba_ssm] [--dtypes float32,bfloat16]

Prints Markdown. Values and gradients are compared with a float64 result first; a wrong backend is not timed. The floor
is the time in which the GPU copies as many bytes as the operation must move: every input read once, every result
written once. Its bandwidth is measured by a copy. Times are medians.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deformmamba.scan import operator, selective_scan, selective_scan_2d

Tensors = dict[str, torch.Tensor]

SEQUENCES = [(8, 768, 4096), (1, 768, 4096), (1, 768, 65536)]  # b, d, l
MAPS = [(8, 64, 64, 192), (1, 64, 64, 192), (1, 256, 256, 192)]  # b, h, w, d; four directions
STATES = 16


def arguments(size: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """The arguments for `selective_scan` (three sizes) or `selective_scan_2d` (four sizes); parameters in float32."""
    make = torch.Generator("cuda").manual_seed(0)
    if len(size) == 3:
        b, d, length = size
        shapes = {"u": size, "delta": size, "B": (b, 1, STATES, length), "C": (b, 1, STATES, length)}
    else:
        b, h, w, d = size
        shapes = {"u": size, "delta": (4, *size), "B": (b, h, w, 4, STATES), "C": (b, h, w, 4, STATES)}
        d *= 4
    given = {name: torch.randn(shape, generator=make, device="cuda").to(dtype) for name, shape in shapes.items()}
    given["A"] = -torch.arange(1.0, STATES + 1, device="cuda").repeat(d, 1)
    given["D"], given["delta_bias"] = torch.ones(d, device="cuda"), torch.full((d,), -4.0, device="cuda")
    return {name: x.requires_grad_() for name, x in given.items()}


def scan(backend: str, **given: Any) -> torch.Tensor:
    """One forward pass."""
    if given["u"].ndim == 4:
        return selective_scan_2d(**given, backend=backend)
    if backend == "mamba_ssm":  # without our adapter around it
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return selective_scan_fn(**given, delta_softplus=True)
    y = selective_scan(**given, delta_softplus=True, backend=backend)
    assert isinstance(y, torch.Tensor)
    return y


def forward_and_backward(run: Callable[..., torch.Tensor], given: Tensors, dy: torch.Tensor) -> Tensors:
    y = run(**given)
    return {"y": y, **dict(zip(given, torch.autograd.grad(y, list(given.values()), dy.to(y.dtype)), strict=True))}


def error(backend: str, given: Tensors, dy: torch.Tensor, exact: Tensors) -> float:
    """The largest difference from the float64 result, relative to the largest number of each value or gradient."""
    got = forward_and_backward(partial(scan, backend), given, dy)
    return max(((got[k].double() - x).abs().max() / x.abs().max()).item() for k, x in exact.items())


def milliseconds(run: Callable[[], Any], budget: float = 2000) -> float:
    """The median over the runs that fit into the budget, at least 3, after a warm-up."""
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 100):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def bandwidth() -> float:
    """Bytes per millisecond of a large copy, read and written."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def floors(given: Tensors, rate: float) -> tuple[float, float]:
    """Milliseconds to move what forward, and forward and backward together, must move."""
    inputs = sum(x.nbytes for x in given.values())
    y = given["u"].nbytes
    return (inputs + y) / rate, (inputs + y + 2 * inputs + y) / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="triton,eager,mamba_ssm")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    if reason := operator.MODULES["triton"].unusable():
        print(f"nothing measured: {reason}")
        return
    if not torch.cuda.is_available():
        print("nothing measured: PyTorch finds no CUDA device, and times of Triton's interpreter are meaningless")
        return
    rate = bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies at {rate / 1e6:.0f} GB/s, PyTorch {torch.__version__}\n")
    print("| size | dtype | backend | error | forward ms | of the floor | forward + backward ms | of the floor |")
    print("|---|---|---|---|---|---|---|---|")
    for size in (*SEQUENCES, *MAPS):
        for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
            given = arguments(size, dtype)
            dy = torch.randn(given["u"].shape, device="cuda").to(dtype)
            double = {k: x.detach().double().requires_grad_() for k, x in given.items()}
            exact = forward_and_backward(partial(scan, "eager"), double, dy)
            for name in options.backends.split(","):
                start = f"| {' x '.join(map(str, size))} | {str(dtype)[6:]} | {name} |"
                if reason := operator.MODULES[name].unusable(given["u"]):
                    print(f"{start} {reason} | | | | |")
                    continue
                if (off := error(name, given, dy, exact)) > (1e-4 if dtype == torch.float32 else 2e-2):
                    print(f"{start} {off:.0e}: wrong, not timed | | | | |")
                    continue
                with torch.no_grad():
                    forward = milliseconds(partial(scan, name, **given))
                both = milliseconds(partial(forward_and_backward, partial(scan, name), given, dy))
                lowest, lowest_both = floors(given, rate)
                print(f"{start} {off:.0e} | {forward:.3f} | {lowest / forward:.0%}", end=" | ")
                print(f"{both:.3f} | {lowest_both / both:.0%} |")


if __name__ == "__main__":
    main()
