"""Adaptation of a network to the slices of one scan, and the comparison with the cubic spline on held-out slices.

The scan's in-plane slices, blurred and downsampled along one axis to the slice thickness, are training data with the
right anatomy and contrast.

Source: Zhao et al., SMORE, IEEE TMI 40 (2021); Remedios et al., ECLARE, arXiv 2503.10822.
"""

import copy
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from deformmamba.data.thick_slices import EMPTY, n_slices, thick_matrix
from deformmamba.errors import InvalidArgument, shown
from deformmamba.inference.sharing import shared_threads
from deformmamba.inference.stack import Stack
from deformmamba.losses import SSIMLoss
from deformmamba.metrics import psnr, ssim
from deformmamba.physics.slice_profile import along

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

HELD_OUT = 6  # number of in-plane slices that are held out from adaptation
FEWEST_ACROSS = 4  # smallest number of thick slices across an image for a meaningful comparison
PATCH, BATCH, RATE = 96, 4, 4e-3
LOSS = SSIMLoss()
TRAINING_SHARE = 0.8  # of the minutes; the rest is for the comparison afterwards and the second pass of `TwoWays`
REPLAN = 10  # steps after which the number of steps that fit the minutes is computed again


@dataclass(frozen=True)
class Gain:
    """Comparison of network and cubic spline on in-plane slices of the scan held out from adaptation."""

    slices: int
    psnr: float
    psnr_spline: float
    ssim: float
    ssim_spline: float

    @property
    def db(self) -> float:
        """PSNR of the network minus that of the spline."""
        return self.psnr - self.psnr_spline


def parse_adapt(adapt: float | str) -> tuple[float, int | None]:
    """Parses "3", 3 or "400 steps" to (minutes, steps); steps is None for minutes.

    Raises:
        InvalidArgument: anything else, or a negative number.
    """

    text = str(adapt).strip()
    number, _, unit = text.partition(" ")
    try:
        value = float(number)
        if not 0 <= value < math.inf or unit not in ("", "steps", "minutes") or (unit == "steps" and value % 1):
            raise ValueError
    except ValueError:
        raise InvalidArgument(
            f'adapt is {shown(adapt)}; it must be minutes, 0 or more, or a number of steps such as "400 steps"'
        ) from None
    return (0.0, int(value)) if unit == "steps" else (value, None)


def split_slices(slices: torch.Tensor, job: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """In-plane slices (k, h, w) for the comparison, and those for adaptation; both empty if slices are too small."""
    full = (slices.clamp(0, 1).mean((1, 2)) > EMPTY).nonzero()[:, 0]
    if n_slices(min(slices.shape[1:]), job.ratio) < FEWEST_ACROSS or not len(full):
        return slices[:0], slices[:0]
    middle = full[len(full) // 10 : len(full) - len(full) // 10]
    inner = middle if len(middle) >= 2 else full
    some = max(1, min(HELD_OUT, len(full) // 4))
    # the middles of equal parts; the first and last slices show little anatomy
    held = inner[[int((number + 0.5) * len(inner) / some) for number in range(some)]]
    rest = torch.tensor([k for k in full.tolist() if k not in set(held.tolist())], dtype=torch.long)
    return slices[held], slices[rest]


def best_of(
    network: "SRModel",
    held: torch.Tensor,
    own: torch.Tensor,
    job: Stack,
    minutes: float,
    steps: int | None,
    seed: int,
    progress: bool,
) -> tuple[nn.Module | None, Gain | None, int]:
    """The network to use (None: the spline), the gain of the better network on the held-out slices, and the number of
    adaptation steps of the network to use."""
    if not len(held):
        return network, None, 0
    gain = measured(network, held, job)
    chosen: nn.Module
    chosen, best, adapted = network, gain, 0
    if (minutes or steps) and len(own):
        seconds = 60 * minutes * TRAINING_SHARE
        tuned, done = adapted_to(network, own, job, seconds, steps, seed, progress)
        ensemble = TwoWays(tuned)
        after = measured(ensemble, held, job)
        if after.db > gain.db:
            chosen, best, adapted = ensemble, after, done
    return (chosen, best, adapted) if best.db > 0 else (None, best, 0)


class TwoWays(nn.Module):
    """The mean of a network's results on an image and on the image rotated by 180 degrees.

    It is more accurate and takes twice the time. It is used for adapted networks only, because without adaptation a
    short time is more important.
    """

    def __init__(self, network: "SRModel") -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        rotated: torch.Tensor = self.network(image.flip(2, 3)).flip(2, 3)
        return (self.network(image) + rotated) / 2


def measured(network: nn.Module, held: torch.Tensor, job: Stack) -> Gain:
    """Compares network and spline on in-plane slices (k, h, w), degraded along their rows, then along their columns."""
    rows = []
    for images in (held, held.mT):
        phase = 0.5 * ((images.shape[1] - 1) % job.ratio)  # equal distances to both ends
        spline = along(thick_matrix(images.shape[1], job.ratio, job.in_rows, phase), images, 1)
        sharp = run(network, spline)
        rows.append([f(image, images) for f in (psnr, ssim) for image in (sharp, spline)])
    a, b, c, d = np.mean(rows, 0).tolist()
    return Gain(len(held), a, b, c, d)


def device_of(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def run(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The network on images (k, n, w), whose second axis is the coarse one; a CPU computes several at once."""
    device = device_of(network)
    workers = min(torch.get_num_threads(), len(images)) if device.type == "cpu" else 1

    def sharp(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            done: torch.Tensor = network(image[None, None].to(device))[0].cpu()
        return done

    with shared_threads(workers), ThreadPoolExecutor(workers, "deformmamba-comparing") as pool:
        return torch.cat(list(pool.map(sharp, images)))


def adapted_to(
    network: "SRModel",
    own: torch.Tensor,
    job: Stack,
    seconds: float,
    steps: int | None,
    seed: int,
    progress: bool,
) -> tuple["SRModel", int]:
    """A copy of the network, trained on degraded slices `own` (k, h, w); and the number of steps.

    The learning rate falls along a cosine of the number of steps. For `steps=None` the number of steps that fit into
    `seconds` is found by timing one step, and again after every few steps; the seconds include the compilation of
    kernels. On a CPU the batch is divided among torch's threads.
    """
    from tqdm import tqdm

    begin = time.perf_counter()
    tuned = copy.deepcopy(network).train().requires_grad_(True)
    fused = device_of(network).type in ("cpu", "cuda")  # one pass over the weights: a few ms instead of 18 on a CPU
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=RATE, weight_decay=0.01, fused=fused)
    parts = min(torch.get_num_threads(), BATCH) if device_of(network).type == "cpu" else 1
    twins = [tuned, *(_twin(tuned) for _ in range(parts - 1))]
    with (
        torch.random.fork_rng(devices=[]),
        shared_threads(parts),
        ThreadPoolExecutor(parts, "deformmamba-adapting") as pool,
        ThreadPoolExecutor(1, "deformmamba-patches") as ahead,
    ):
        torch.manual_seed(seed)

        def gradients(lr: torch.Tensor, hr: torch.Tensor) -> None:
            _gradients(twins, pool, lr, hr)
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)

        start, total = time.perf_counter(), steps or 0
        batch = ahead.submit(patches, own, job, seed, 0)
        if steps is None:
            gradients(*batch.result())  # compiles the kernels and fills caches
            start = time.perf_counter()
            gradients(*batch.result())
            now = time.perf_counter()
            total = max(1, round((seconds - (now - begin)) / (now - start)))
            optimizer.zero_grad(set_to_none=True)
            start = time.perf_counter()
        number = 0
        with tqdm(total=total, unit="step", desc="adapting", disable=None if progress else True) as bar:
            while number < total:
                lr, hr = batch.result()
                batch = ahead.submit(patches, own, job, seed, number + 1)  # made while the gradients are computed
                gradients(lr, hr)
                for group in optimizer.param_groups:
                    warm = min(1.0, (number + 1) / 20)
                    group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * number / total))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                number += 1
                if steps is None and number % REPLAN == 0:  # a busy machine does fewer steps in the same time
                    now = time.perf_counter()
                    bar.total = total = number + max(0, round((seconds - (now - begin)) * number / (now - start)))
                bar.update()
    return tuned.eval(), number


def _twin(network: "SRModel") -> "SRModel":
    """A copy that shares the parameters of `network` but has separate gradients."""
    twin = copy.deepcopy(network)
    for copied, parameter in zip(twin.parameters(), network.parameters(), strict=True):
        copied.data = parameter.data
    return twin


def _gradients(twins: Sequence["SRModel"], pool: ThreadPoolExecutor, lr: torch.Tensor, hr: torch.Tensor) -> None:
    """Adds the gradients of the loss of a batch to the first network; each network computes a part of the batch."""
    device = device_of(twins[0])

    def part(twin: "SRModel", lr_part: torch.Tensor, hr_part: torch.Tensor) -> None:
        loss = LOSS(twin(lr_part.to(device)), hr_part.to(device))
        (loss * (len(lr_part) / len(lr))).backward()

    sizes = [len(part) for part in torch.arange(len(lr)).tensor_split(len(twins))]
    list(pool.map(part, twins, lr.split(sizes), hr.split(sizes)))
    for parameters in zip(*(twin.parameters() for twin in twins), strict=True):
        for other in parameters[1:]:  # in a fixed order: equal numbers of threads give equal sums
            if other.grad is not None:
                parameters[0].grad = other.grad if parameters[0].grad is None else parameters[0].grad + other.grad
            other.grad = None


def patches(own: torch.Tensor, job: Stack, seed: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of patches (b, 1, p, p), degraded and true, for step `number`; depends on `seed` and `number` only."""
    rng = np.random.default_rng((seed, number))
    side = min(PATCH, *own.shape[1:])
    lr, hr = [], []
    for _ in range(BATCH):
        image = own[rng.integers(len(own))]
        image = image.mT if rng.random() < 0.5 else image
        image = image.flip([axis for axis in (0, 1) if rng.random() < 0.5])
        n, w = image.shape
        left, top = int(rng.integers(w - side + 1)), int(rng.integers(n - side + 1))
        columns = image[:, left : left + side]
        matrix = thick_matrix(n, job.ratio, job.in_rows, job.ratio * rng.random())
        lr.append((matrix[top : top + side] @ columns)[None])
        hr.append(columns[top : top + side][None])
    return torch.stack(lr), torch.stack(hr)
