"""Runs a network on the sections across the slices of an interpolated stack, in both directions."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from deformmamba.data.thick_slices import EMPTY
from deformmamba.inference.adaptation import device_of
from deformmamba.inference.sharing import shared_threads
from deformmamba.inference.slice_consistency import TISSUE
from deformmamba.models.normalise import keep_constant

BATCH_PIXELS = 1 << 17  # pixels of the sections in one batch, per thread
MARGIN = 8  # pixels of air around the anatomy that are passed to the network


def by_sections(network: nn.Module, fine: torch.Tensor, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the network on both kinds of sections through an interpolated stack (n, h, w): along w, and along h.

    The air around the anatomy and empty sections are unchanged. A CPU runs several batches in parallel, each with its
    share of torch's threads.
    """
    from tqdm import tqdm

    device = device_of(network)
    outs = fine.clone(), fine.clone()
    rows, columns = _anatomy_box(fine)
    inner, into = fine[:, rows, columns], [out[:, rows, columns] for out in outs]
    # (n, h) sections at each w, and (n, w) sections at each h
    views = [(inner.permute(2, 0, 1), into[0].permute(2, 0, 1)), (inner.permute(1, 0, 2), into[1].permute(1, 0, 2))]
    work: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []
    for source, target in views:
        full = (source.clamp(0, 1).mean((1, 2)) > EMPTY / 4).nonzero()[:, 0].tolist()
        some = max(1, BATCH_PIXELS // (source.shape[1] * source.shape[2]))
        work += [(source, target, full[start : start + some]) for start in range(0, len(full), some)]

    def sharpen(item: tuple[torch.Tensor, torch.Tensor, list[int]]) -> int:
        source, target, numbers = item
        with torch.inference_mode():
            given = source[numbers][:, None].contiguous()
            target[numbers] = keep_constant(network(given.to(device)).cpu(), given, 1)[:, 0]
        return len(numbers)

    total = sum(len(numbers) for _, _, numbers in work)
    with tqdm(total=total, unit="section", desc="sharpening", disable=None if progress else True) as bar:
        for done in _in_parallel(sharpen, work, device):
            bar.update(done)
    return outs


def _anatomy_box(fine: torch.Tensor) -> tuple[slice, slice]:
    """The rows and columns of (n, h, w) with anatomy, and MARGIN more on each side."""
    signal = (fine > TISSUE / 2).float().mean(0)
    spans = []
    for profile in (signal.mean(1), signal.mean(0)):
        full = (profile > 0.002).nonzero()[:, 0]
        first, last = (int(full[0]), int(full[-1])) if len(full) else (0, len(profile) - 1)
        spans.append(slice(max(0, first - MARGIN), last + MARGIN + 1))
    return spans[0], spans[1]


def _in_parallel(job: Callable[[Any], int], work: Sequence[Any], device: torch.device) -> Iterator[int]:
    """The results of `job`, in order; computed in parallel on a CPU."""
    workers = min(torch.get_num_threads(), len(work)) if device.type == "cpu" else 1
    if workers <= 1:
        yield from map(job, work)
        return
    with shared_threads(workers), ThreadPoolExecutor(workers, "deformmamba-sections") as pool:
        futures = [pool.submit(job, item) for item in work]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
