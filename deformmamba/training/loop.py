"""`fit`: the training loop, in one process or several, that goes on exactly where it was stopped."""

import copy
import inspect
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from deformmamba.errors import InvalidArgument
from deformmamba.extras import require
from deformmamba.losses import SRLoss
from deformmamba.training.batches import Batches
from deformmamba.training.folder import BEST, RunFolder, described

Scores = Mapping[str, float]
SCHEDULES = ("cosine", "step", "constant")
LONGEST_VALIDATION = timedelta(hours=6)


def fit(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    out: str | os.PathLike[str],
    steps: int | None = None,
    epochs: float | None = None,
    batch: int = 8,
    accumulate: int = 1,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: int = 100,
    schedule: str = "cosine",
    milestones: Sequence[float] = (0.5, 0.8),
    gamma: float = 0.1,
    clip: float = 1.0,
    ema: float = 0.999,
    precision: str = "no",
    validate: Callable[[Any], Scores] | None = None,
    every: int = 500,
    workers: int = 0,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Trains `model` in place and returns the path of its best checkpoint. Started again on the same `out`, it resumes.

    Writes into `out`, each file complete or not at all: `run.json` (which run this is), `best.safetensors` (highest
    "psnr" of `validate`; the last one without it), `last.safetensors`, `log.csv`, `curve.png`, `tensorboard/` where
    that is installed, and `state.pt`, from which it goes on exactly: every `every` steps, at the end, and on ctrl-C or
    SIGTERM, which end the step first (a second ctrl-C does not). On the CPU in float32 a run that was stopped, however
    it was, ends in the same bits as one that was not, if samples are functions of their index alone.

    Under `accelerate launch` each process computes its share of every batch and the result is that of one process, up
    to rounding. The main process alone writes and validates, while the others wait.

    Args:
        model: any module from lr to sr, (lr, base) or (lr, base, norm); saved by its own `save_pretrained` if it
            has one, as plain safetensors otherwise.
        dataset: map-style, of (lr, hr), (lr, hr, base) or (lr, hr, base, norm); a model gets as many as it takes.
            Passed over in shuffled order, again and again, until `steps` batches have been seen. If it has
            `describe(index) -> str`, that names the samples of a batch whose loss is not finite.
        out: folder of this run alone.
        steps, epochs: how long: updates of the weights, or passes over `dataset`; one of the two.
        batch: samples a step, over all processes and accumulated pieces.
        accumulate: in how many pieces a process computes its share of a batch, which saves memory.
        loss: from (sr, hr) to a scalar, a mean over samples; `SRLoss()`, the paper's, by default.
        lr, weight_decay: of AdamW (with no weight decay that is the paper's Adam).
        warmup: steps over which the learning rate rises linearly.
        schedule: "cosine" falls to zero at the last step; "step" is multiplied by `gamma` at each of `milestones`,
            fractions of the run; "constant" stays.
        clip: largest norm of the gradient; 0 for no limit.
        ema: decay of the exponential moving average of the weights, which is what is validated and saved; 0 for none.
        precision: accelerate's mixed precision: "no", "bf16", "fp16"; accelerate allows one a process.
        validate: scores a model, higher "psnr" is better; called every `every` steps.
        workers: processes that load data; 0 loads in this one.
        seed: of the order of samples and of dropped paths.
        provenance: written into every checkpoint beside the steps and scores.
        progress: a bar on the terminal, with the loss and samples per second.

    Raises:
        ValueError: an argument out of range, or `out` holds another run (names what differs).
        MissingExtra: accelerate is not installed.
        FloatingPointError: the loss or its gradient is not finite; names step and samples. The last saved state is
            left as it was.
    """
    accelerate = require("accelerate", extra="train", what="fit")
    from tqdm import tqdm

    numbers = {"accumulate": accumulate, "clip": clip, "ema": ema, "lr": lr, "seed": seed, "warmup": warmup}
    _check(schedule, milestones, batch=batch, every=every, weight_decay=weight_decay, workers=workers, **numbers)
    n = len(dataset)  # type: ignore[arg-type]
    samples = _samples(n, steps, epochs, batch)
    loss = loss or SRLoss()
    run = {
        "model": described(model),
        "fit": {
            "samples": samples,
            "batch": batch,
            "accumulate": accumulate,
            "loss": _named(loss),
            "lr": lr,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "schedule": [schedule, *([list(milestones), gamma] if schedule == "step" else [])],
            "clip": clip,
            "ema": ema,
            "precision": precision,
            "every": every,
            "seed": seed,
        },
        "data": {"class": type(dataset).__name__, "length": n},
        "provenance": provenance,
    }
    accelerator = accelerate.Accelerator(
        mixed_precision=precision,
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=LONGEST_VALIDATION)],
    )
    _refuse_sharding(accelerator)
    if accelerator.num_processes == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InvalidArgument(
            f"fit: started as one of {os.environ['WORLD_SIZE']} processes, but accelerate trains in one; without a GPU "
            "set ACCELERATE_USE_CPU=true"
        )
    main = accelerator.is_main_process
    folder = RunFolder(out)
    state = folder.begin(run, writes=main)

    if isinstance(loss, nn.Module):
        loss.to(accelerator.device)
    n_further = _n_further(model)
    average = _Average(model, ema)
    network, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    )
    average.model.to(accelerator.device)
    kept: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if ema:
        kept["average"] = average.model
    if accelerator.scaler is not None:
        kept["scaler"] = accelerator.scaler
    step, best, recent, seen = 0, -math.inf, 0.0, 0
    if state is not None:
        for name, part in kept.items():
            part.load_state_dict(state[name])
        step, best, recent, seen = (state[name] for name in ("step", "best", "recent", "seen"))
    if len(set(accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist())) > 1:
        raise InvalidArgument(
            f"fit: not every process sees the same {folder.path}; it must be on a disk that all share"
        )

    processes, rank = accelerator.num_processes, accelerator.process_index
    if processes > 1:  # the weights of depthwise convolutions: for one channel both layouts are the same memory
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    batches = Batches(
        n,
        samples=samples,
        batch=batch,
        seed=seed,
        accumulate=accumulate,
        processes=processes,
        rank=rank,
        start=step,
    )
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=accelerator.device.type == "cuda"
    )
    pieces = iter(loader)

    def save() -> None:
        if main:
            facts = {"step": step, "best": best, "recent": recent, "seen": seen}
            folder.save_state({**{name: part.state_dict() for name, part in kept.items()}, **facts})

    bar = tqdm(
        total=samples, initial=step * batch, unit="image", disable=None if progress and main else True, smoothing=0.05
    )
    began, computed = time.perf_counter(), 0
    with closing(folder), bar, _asked_to_stop() as asked, ExitStack() as stack:
        # accelerate's autocast would stay on the model otherwise
        stack.callback(accelerator.unwrap_model, network, keep_fp32_wrapper=False)
        while step < batches.n_steps:
            torch.manual_seed((seed * 1_000_003 + step) * processes + rank)
            network.train()
            values, mine = [], batches.pieces(step)
            for number, piece in enumerate(mine, 1):
                image, target, *further = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(pieces))
                with accelerator.no_sync(network) if number < len(mine) else nullcontext():
                    value = loss(network(image, *further[:n_further]), target)
                    accelerator.backward(value * piece.weight)
                values.append(value.detach().float())
            share = sum(value * piece.weight for value, piece in zip(values, mine, strict=True)) / processes
            shared = torch.stack([share, share.new_tensor(float(asked.is_set()))])
            total, stopping = accelerator.reduce(shared, "sum").tolist()
            norm = float(accelerator.clip_grad_norm_(network.parameters(), clip or math.inf))
            if not math.isfinite(total):
                wrong = [i for v, piece in zip(values, mine, strict=True) if not v.isfinite() for i in piece.indices]
                raise FloatingPointError(_not_finite(f"the loss is {total}", step, wrong, dataset))
            if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler leaves such a step out
                what = f"the norm of the gradient is {norm}"
                raise FloatingPointError(_not_finite(what, step, batches.indices(step), dataset))
            rate = lr * _rate(step, warmup, batches.n_steps, schedule, milestones, gamma)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(model, step)
            images = min(batch, samples - step * batch)
            step, recent, seen, computed = step + 1, recent + total, seen + 1, computed + images
            bar.set_postfix(step=step, loss=f"{total:.4f}", refresh=False)
            bar.update(images)

            if step % every == 0 or step == batches.n_steps:
                speed = round(computed / (time.perf_counter() - began), 2)
                if main:
                    scores = dict(validate(average.model)) if validate else {}
                    folder.log({"step": step, "loss": recent / seen, "lr": rate, "images_per_second": speed, **scores})
                    facts = {**(provenance or {}), "steps": step, "batch": batch, "seed": seed, "validation": scores}
                    best = folder.keep(average.model, facts, scores.get("psnr", math.inf), best)
                    if scores and progress:
                        bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
                recent, seen = 0.0, 0
                save()
                accelerator.wait_for_everyone()
                began, computed = time.perf_counter(), 0
            elif stopping:
                save()
            if stopping and step < batches.n_steps:
                if main and progress:
                    bar.write(f"stopped after step {step}; started again on {folder.path}, it goes on there")
                raise KeyboardInterrupt
    return folder.path / BEST


class _Average:
    """The exponential moving average of a model's weights; the model itself at a decay of 0."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False) if decay else model

    def update(self, model: nn.Module, step: int) -> None:
        if self.model is model:
            return
        # a short memory first, so that the average does not drag the random start along
        blend = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        blend(list(self.model.parameters()), list(model.parameters()), step)
        for mine, current in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(current)


def _rate(step: int, warmup: int, steps: int, schedule: str, milestones: Sequence[float], gamma: float) -> float:
    """The learning rate at `step` as a share of its largest."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "step":
        return float(gamma ** sum(step >= milestone * steps for milestone in milestones))
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that the first ctrl-C or SIGTERM sets; a second one raises KeyboardInterrupt wherever it comes."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked
        return

    def ask(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named(loss: Any) -> str:
    """What a loss is, for comparison: a module shows its arguments, a function its name."""
    if isinstance(loss, nn.Module):
        return " ".join(repr(loss).split())
    return str(getattr(loss, "__qualname__", type(loss).__name__))


def _n_further(model: nn.Module) -> int | None:
    """How many positional arguments a model takes beside lr; None: any number."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in positional for kind in kinds) - 1


def _check(schedule: str, milestones: Sequence[float], **numbers: float) -> None:
    if schedule not in SCHEDULES:
        raise InvalidArgument(f"fit: schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    if not all(0 < milestone < 1 for milestone in milestones):
        raise InvalidArgument(f"fit: milestones are {list(milestones)}; they are fractions of the run, between 0 and 1")
    lowest = {"batch": 1, "accumulate": 1, "every": 1}
    for name, value in numbers.items():
        if not lowest.get(name, 0) <= value < (1 if name == "ema" else math.inf):
            raise InvalidArgument(
                f"fit: {name} is {value}; it must be {lowest.get(name, 0)} or more{', and below 1' * (name == 'ema')}"
            )


def _samples(n: int, steps: int | None, epochs: float | None, batch: int) -> int:
    """How many samples a run sees."""
    if not n:
        raise InvalidArgument("fit: the data set is empty")
    if (steps is None) == (epochs is None):
        raise InvalidArgument(f"fit: steps is {steps} and epochs is {epochs}; give one of the two")
    samples = steps * batch if steps is not None else round(epochs * n)  # type: ignore[operator]
    if samples < 1:
        raise InvalidArgument(f"fit: steps is {steps} and epochs is {epochs}; there is nothing to train")
    return samples


def _refuse_sharding(accelerator: Any) -> None:
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise InvalidArgument(
            f"fit: accelerate is configured for {kind}; fit keeps whole models: use MULTI_GPU or MULTI_CPU"
        )


def _not_finite(what: str, step: int, indices: Sequence[int], dataset: Any) -> str:
    if not indices:
        return f"fit: {what} at step {step}, for samples of another process, which names them"
    names = [f"{i} ({dataset.describe(i)})" if hasattr(dataset, "describe") else str(i) for i in indices[:8]]
    more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    return f"fit: {what} at step {step}, samples {', '.join(names)}{more}; check these, lower lr, or raise precision"
