"""`fit`: the training loop, in one process or several, with exact resumption."""

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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from deformmamba.annotations import check_types, is_number
from deformmamba.errors import DeformMambaError, InvalidArgument, InvalidType, one_line, shown
from deformmamba.extras import require
from deformmamba.inference.networks import evaluating, modes_kept
from deformmamba.losses import SRLoss
from deformmamba.models.base import SRModel
from deformmamba.training.batches import Batches, Piece
from deformmamba.training.folder import BEST, RunFolder, described
from deformmamba.training.heritage import heritage
from deformmamba.training.optimizer import MakeOptimizer, build_optimizer, optimizer_facts, parameter_groups
from deformmamba.training.settings import FitSettings, n_samples

Scores = Mapping[str, float]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LONGEST_VALIDATION = timedelta(hours=6)


class NotFinite(DeformMambaError, FloatingPointError):
    """A loss or its gradient is NaN or infinite."""


class LoadingEnded(DeformMambaError, RuntimeError):
    """A data loading process was killed."""


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
    optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
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
    score_start: bool = False,
    workers: int = 0,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Trains `model` in place and returns the path of its best checkpoint. Started again on the same `out`, it resumes.

    Writes into `out`, each file completely or not at all: `run.json` (settings), `best.safetensors` (highest "psnr" of
    `validate`; the last one without it), `last.safetensors`, `log.csv`, `curve.png`, `tensorboard/` if it is installed,
    and `state.pt`, the state to resume from. It saves every `every` steps, at the end, and on ctrl-C or SIGTERM after
    the current step (a second ctrl-C stops at once). On the CPU in float32, an interrupted run gives the same bits as
    an uninterrupted one if samples are functions of their index alone.

    A finished run that is started again with more steps or epochs continues from its end, with the schedule of the
    longer run. If `validate` raises an exception, the same call validates again before it continues. The global random
    state, the mode (training or evaluation) of each module and the learning rates of a given optimizer are restored;
    submodules in evaluation mode inside a model in training mode keep their mode.

    Under `accelerate launch` each process computes its share of every batch, and the result equals that of one process
    up to rounding, unless the model draws random numbers, such as `drop_path`: what it draws depends on the number of
    processes and on `accumulate`. Only the main process writes and validates; the others wait.

    Args:
        model: any module from lr to sr, (lr, base) or (lr, base, norm); saved by its own `save_pretrained` if it
            has one, as plain safetensors otherwise.
        dataset: map-style, of (lr, hr), (lr, hr, base) or (lr, hr, base, norm); a model gets as many inputs as it
            takes. Repeated in shuffled order until `steps` batches are done. Its `describe(index) -> str`, if present,
            names the samples of a batch whose loss is not finite.
        out: folder for this run only.
        steps, epochs: length of the run in optimizer steps, or in passes over `dataset`; give exactly one.
        batch: samples per step, over all processes and accumulated pieces.
        accumulate: number of pieces in which a process computes its share of a batch; more pieces need less memory.
        loss: function of (sr, hr) that returns a scalar, a mean over samples; default: `SRLoss()`, the paper's loss.
        lr, weight_decay: learning rate and weight decay of AdamW (without weight decay it is the paper's Adam). Biases,
            normalisations, and `A_log` and `D` of a scan do not decay, see `optimizer.decays`.
        optimizer: another optimizer of this model's parameters, or a function that builds one from parameter groups
            (dictionaries of params, lr and weight_decay). `schedule` multiplies the rate of each of its groups.
        warmup: steps over which the learning rate rises linearly.
        schedule: "cosine" falls to zero at the last step; "step" is multiplied by `gamma` at each of `milestones`,
            fractions of the run; "constant" stays.
        clip: largest norm of the gradient; 0 for no limit.
        ema: decay of the exponential moving average of the weights, which is validated and saved; 0 for no average.
        precision: accelerate's mixed precision: "no", "bf16", "fp16"; accelerate allows one per process.
        validate: returns the scores of a model in evaluation mode, numbers by name, and is called every `every` steps.
            The model with the highest finite "psnr" is the best. In the log, a score with the name of another column,
            such as "loss", is in the column "validation_loss".
        score_start: also validates the model before the first step, as step 0, so that fine-tuning never returns worse
            weights than the initial ones: if no validation scores higher, `best.safetensors` holds the initial weights,
            and a warning is issued.
        workers: number of data loading processes; 0 loads in this process.
        seed: random seed for the order of samples and for dropped paths.
        provenance: facts for the header of every checkpoint, in addition to steps and scores, and to the consistency,
            licence and acknowledgements of published or saved weights that `model` was loaded from.
        progress: show a progress bar with the loss and the samples per second.

    Raises:
        InvalidArgument: an argument out of range, a model without parameters to train, or `out` holds another run (the
            message lists the differences).
        InvalidType: an argument of a wrong type, samples that are not tensors, or scores that are not numbers.
        MissingExtra: accelerate is not installed.
        WeightsError: the model could not be saved, see `SRModel.check_savable`.
        NotFinite: the loss or its gradient is not finite; the message gives step and samples. The last saved state is
            kept.
        LoadingEnded: one of the `workers` was killed. The last saved state is kept.
    """
    check_types(fit, locals())
    settings = FitSettings(
        samples=n_samples(_length(dataset), steps, epochs, max(batch, 1)),
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        milestones=milestones,
        gamma=gamma,
        clip=clip,
        ema=ema,
        precision=precision,
        every=every,
        workers=workers,
        seed=seed,
    )
    accelerator = _accelerator(precision)
    folder, loss = RunFolder(out), loss or SRLoss()
    _check_savable(model)
    # runs of earlier versions, whose settings lack this entry, decayed every parameter
    all_decay = folder.describes("fit.weight_decay") and not folder.describes("fit.undecayed")
    groups = parameter_groups(model, lr=settings.lr, weight_decay=settings.weight_decay, all_decay=all_decay)
    made = build_optimizer(model, optimizer, groups)
    facts = None if optimizer is None else optimizer_facts(made, folder.records("fit.optimizer"))
    undecayed = bool(weight_decay) and not all_decay
    run = _described_run(model, dataset, settings, provenance, loss, facts, undecayed, score_start)
    state = folder.begin(run, writes=accelerator.is_main_process)
    with _random_state_kept(accelerator.device), modes_kept(model), _rates_kept(made):
        parts = accelerator, model, dataset, loss, made, settings, folder, validate, provenance or {}, progress
        _Training(*parts).restored(state).run(score_start=score_start and state is None)
    return folder.path / BEST


def _check_savable(model: nn.Module) -> None:
    if isinstance(model, SRModel):
        model.check_savable()


def _length(dataset: Any) -> int:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InvalidType(
            f"fit: dataset is a {type(dataset).__name__}; wanted a map-style data set (length, samples by index)"
        )
    return len(dataset)


def _accelerator(precision: str) -> Any:
    """accelerate's `Accelerator`, if it is set up for a kind of training that `fit` supports.

    Raises:
        InvalidArgument: it would divide the model among processes, use one of several processes only, or ignore the
            precision.
        MissingExtra: accelerate is not installed.
    """
    accelerate = require("accelerate", extra="train", what="fit")
    try:
        accelerator = accelerate.Accelerator(
            mixed_precision=precision,
            kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=LONGEST_VALIDATION)],
        )
    except ValueError as error:  # accelerate keeps one precision for each process
        if "already been initialized" not in str(error):
            raise
        raise InvalidArgument(
            f"fit: precision is {precision!r}, and this process has trained with another one; start a new process"
        ) from None
    if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would compute in float32
        raise InvalidArgument('fit: precision "fp16" needs a GPU; use "bf16" or "no"')
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise InvalidArgument(
            f"fit: accelerate is configured for {kind}; fit keeps whole models: use MULTI_GPU or MULTI_CPU"
        )
    if accelerator.num_processes == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InvalidArgument(
            f"fit: started as one of {os.environ['WORLD_SIZE']} processes, but accelerate trains in one; without a GPU "
            "set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def _described_run(
    model: nn.Module,
    dataset: Any,
    settings: FitSettings,
    provenance: Mapping[str, Any] | None,
    loss: Loss,
    optimizer: Mapping[str, Any] | None,
    undecayed: bool,
    score_start: bool,
) -> dict[str, Any]:
    """The content of run.json. Options that are off have no entry, as in runs of versions that did not have them."""
    return {
        "model": described(model),
        "fit": {
            **settings.facts(),
            "loss": _named(loss),
            **({"undecayed": True} if undecayed else {}),
            **({"optimizer": optimizer} if optimizer is not None else {}),
            **({"score_start": True} if score_start else {}),
        },
        "data": {"class": type(dataset).__name__, "length": len(dataset)},
        "provenance": provenance,
    }


@dataclass
class _Progress:
    """The progress of a run; a part of its saved state.

    Attributes:
        step: number of finished steps.
        best: the highest score so far; -inf before the first score.
        best_step: the step of the highest score; None before the first score.
        recent, seen: sum and number of the losses since the last validation.
        due: whether the validation of this step failed, so that it comes before the next step.
    """

    step: int = 0
    best: float = -math.inf
    best_step: int | None = None
    recent: float = 0.0
    seen: int = 0
    due: bool = False


class _Training:
    """One run of `fit`: the loop, its computations and its saved state."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        dataset: Dataset[Any],
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        settings: FitSettings,
        folder: RunFolder,
        validate: Callable[[Any], Scores] | None,
        provenance: Mapping[str, Any],
        progress: bool,
    ) -> None:
        if isinstance(loss, nn.Module):
            loss.to(accelerator.device)
        self.accelerator, self.model, self.dataset, self.loss = accelerator, model, dataset, loss
        self.settings, self.folder, self.validate = settings, folder, validate
        self.provenance, self.progress = {**heritage(model), **provenance}, progress
        self.main: bool = accelerator.is_main_process
        self.n_further = _n_further(model)
        self.largest_rates = [group["lr"] for group in optimizer.param_groups]
        self.average = _Average(model, settings.ema)
        self.network, self.optimizer = accelerator.prepare(model, optimizer)
        self.average.model.to(accelerator.device)
        self.at = _Progress()
        self.speed = _Speed()

    @property
    def parts(self) -> dict[str, Any]:
        """The objects with a `state_dict` that are saved in addition to the progress."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.average.model is not self.model:
            parts["average"] = self.average.model
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return parts

    def restored(self, state: Mapping[str, Any] | None) -> "_Training":
        """This run, at a saved state, which must be the same in every process."""
        if state is not None:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.at = _Progress(**{name: state[name] for name in vars(_Progress()) if name in state})
            is_last = self.at.step >= self.settings.n_steps
            if "due" not in state and (is_last or self.at.step % self.settings.every == 0):
                # an earlier version; it logged every validation that did not fail
                self.at.due = all(int(row["step"]) != self.at.step for row in self.folder.rows())
            if is_last and not self.folder.has_best():
                self.at.due = True
        steps = self.accelerator.gather(torch.tensor([self.at.step], device=self.accelerator.device))
        if len(set(steps.tolist())) > 1:
            raise InvalidArgument(
                f"fit: not every process sees the same {self.folder.path}; it must be on a disk that all share"
            )
        return self

    def save(self) -> None:
        if self.main:
            self.folder.save_state({**{name: part.state_dict() for name, part in self.parts.items()}, **vars(self.at)})

    def batches(self) -> Batches:
        """Which samples this process gets, from the next step on."""
        settings = self.settings
        return Batches(
            len(self.dataset),  # type: ignore[arg-type]
            samples=settings.samples,
            batch=settings.batch,
            seed=settings.seed,
            accumulate=settings.accumulate,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            start=self.at.step,
        )

    def run(self, *, score_start: bool) -> None:
        """Runs all remaining steps.

        Raises:
            KeyboardInterrupt: the run was asked to stop; raised after the current step is finished and saved.
        """
        from tqdm import tqdm

        settings, processes, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        if processes > 1:
            # the weights of depthwise convolutions: with one channel both layouts have the same memory order
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        batches = self.batches()
        pinned = self.accelerator.device.type == "cuda"
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=settings.workers,
            pin_memory=pinned,
            worker_init_fn=_left_to_main,
        )
        bar = tqdm(
            total=settings.samples,
            initial=min(self.at.step * settings.batch, settings.samples),
            unit="image",
            disable=None if self.progress and self.main else True,
            smoothing=0.05,
        )
        if not self.model.training:
            self.model.train()
        with closing(self.folder), bar, _ended_loading_named(), _asked_to_stop() as asked, ExitStack() as stack:
            # else accelerate's autocast would stay on the model
            stack.callback(self.accelerator.unwrap_model, self.network, keep_fp32_wrapper=False)
            if score_start:
                self.validated(bar)
            if self.at.due:
                self.validated_and_saved(bar)
            samples = iter(loader)
            while self.at.step < batches.n_steps:
                torch.manual_seed(((settings.seed * 1_000_003 + self.at.step) * processes + rank) % 2**63)
                loss, stopping = self.step(samples, batches, asked)
                images = min(settings.batch, settings.samples - (self.at.step - 1) * settings.batch)
                self.speed.count(images)
                bar.set_postfix(step=self.at.step, loss=f"{loss:.4f}", refresh=False)
                bar.update(images)
                last = self.at.step == batches.n_steps
                if last or self.at.step % settings.every == 0:
                    self.validated_and_saved(bar)
                elif stopping:
                    self.save()
                if stopping and not last:
                    self.stopped(bar)
        if self.at.best_step == 0 and self.main:
            warnings.warn(
                f"fit: no validation was better than the start's ({self.at.best:.4g}); {self.folder.path / BEST} holds "
                "the weights that the training started from",
                stacklevel=3,
            )

    def step(self, samples: Iterator[Any], batches: Batches, asked: threading.Event) -> tuple[float, bool]:
        """Updates the weights once; returns the mean loss, and whether a process was asked to stop."""
        accelerator, step = self.accelerator, self.at.step
        pieces = batches.pieces(step)
        values = []
        for number, piece in enumerate(pieces, 1):
            with accelerator.no_sync(self.network) if number < len(pieces) else nullcontext():
                values.append(self.gradient(next(samples), piece))
        processes = accelerator.num_processes
        share = sum(value * piece.weight for value, piece in zip(values, pieces, strict=True)) / processes
        shared = torch.stack([share, share.new_tensor(float(asked.is_set()))])
        loss, stopping = accelerator.reduce(shared, "sum").tolist()
        norm = float(accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip or math.inf))
        if not math.isfinite(loss):
            wrong = [i for v, piece in zip(values, pieces, strict=True) if not v.isfinite() for i in piece.indices]
            raise NotFinite(_not_finite(f"the loss is {loss}", step, wrong, self.dataset))
        if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips such a step
            what = f"the norm of the gradient is {norm}"
            raise NotFinite(_not_finite(what, step, batches.indices(step), self.dataset))
        for group, largest in zip(self.optimizer.param_groups, self.largest_rates, strict=True):
            group["lr"] = largest * self.settings.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model, step)
        self.at.step, self.at.recent, self.at.seen = step + 1, self.at.recent + loss, self.at.seen + 1
        return loss, bool(stopping)

    def gradient(self, sample: Any, piece: Piece) -> torch.Tensor:
        """Adds the gradient of a piece; returns its mean loss."""
        tensors = sample if isinstance(sample, tuple | list) else ()
        if len(tensors) < 2 or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise InvalidType(
                "fit: a sample of the data set must be tensors or arrays (lr, hr), (lr, hr, base) or (lr, hr, base, "
                f"norm), not {_kinds(sample)}; a small data set around yours can return them"
            )
        lr, target, *further = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in tensors)
        value = self.loss(self.network(lr, *further[: self.n_further]), target)
        self.accelerator.backward(value * piece.weight)
        return value.detach().float()

    def validated(self, bar: Any) -> None:
        """Scores the averaged weights, logs the row, and saves them as the last and, if they are, the best ones."""
        at = self.at
        if self.main:
            try:
                with evaluating(self.average.model):
                    scores = _numbers(self.validate(self.average.model)) if self.validate else {}
            except Exception:
                if at.step:  # save the training so far, so that the same call resumes with this validation
                    at.due = True
                    self.save()
                raise
            row: dict[str, Any] = {"step": at.step, "loss": "", "lr": "", "images_per_second": ""}
            if at.seen:
                row |= {"loss": at.recent / at.seen, "lr": self.optimizer.param_groups[0]["lr"]}
                row["images_per_second"] = self.speed.per_second()
            self.folder.log(row | {f"validation_{name}" if name in row else name: n for name, n in scores.items()})
            score = scores.get("psnr")
            # the initial weights stay the best if another score is only equal
            least = math.nextafter(at.best, math.inf) if at.best_step == 0 else at.best
            if self.folder.keep(self.average.model, self.facts(scores), score, least) and score is not None:
                at.best, at.best_step = score, at.step
            if scores and self.progress:
                bar.write(f"step {at.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        at.recent, at.seen, at.due = 0.0, 0, False

    def validated_and_saved(self, bar: Any) -> None:
        """Validates, saves the state, and waits for the other processes."""
        self.validated(bar)
        self.save()
        self.accelerator.wait_for_everyone()
        self.speed = _Speed()

    def stopped(self, bar: Any) -> None:
        """Ends a run that was asked to stop; saves the weights even if none was validated yet."""
        if self.main:
            self.folder.keep_unscored(self.average.model, self.facts({}))
            if self.progress:
                bar.write(f"stopped after step {self.at.step}; the same call on {self.folder.path} resumes")
        raise KeyboardInterrupt

    def facts(self, scores: Scores) -> dict[str, Any]:
        """The facts for the header of a checkpoint; infinite scores become None, because JSON has no infinity."""
        plain = {name: value if math.isfinite(value) else str(value) for name, value in scores.items()}
        settings = self.settings
        own = {"steps": self.at.step, "batch": settings.batch, "seed": settings.seed, "validation": plain}
        return {**self.provenance, **own}


def _left_to_main(_: int) -> None:
    """Makes a data loading process ignore the signals that stop a run.

    Ctrl-C, and the SIGTERM of a scheduler, are sent to these processes too; the main one needs them for its last step.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _ended_loading_named() -> Iterator[None]:
    """Turns PyTorch's error about a killed data loading process, which can come at any moment, into `LoadingEnded`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise LoadingEnded(
            f"fit: a data loading process ended ({one_line(error)}); the memory, or the shared memory of a container, "
            "may be too small: give fewer workers, or workers=0 (--workers 0), and the same call resumes"
        ) from None


class _Speed:
    """Images per second since this object was created."""

    def __init__(self) -> None:
        self.began, self.images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        self.images += images

    def per_second(self) -> float:
        return round(self.images / (time.perf_counter() - self.began), 2)


class _Average:
    """The exponential moving average of a model's weights; with a decay of 0, the model itself."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False) if decay else model

    def update(self, model: nn.Module, step: int) -> None:
        if self.model is model:
            return
        # a smaller decay in the first steps, so that the random initial weights do not stay in the average
        blend = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        blend(list(self.model.parameters()), list(model.parameters()), step)
        for mine, current in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(current)


def _numbers(scores: Any) -> dict[str, float]:
    """Scores as Python's numbers, which a saved state can hold; those of numpy and PyTorch are converted.

    Raises:
        InvalidType: no dictionary, or a score that is not a number.
    """
    if not isinstance(scores, Mapping):
        raise InvalidType(f"fit: validate returned {shown(scores)}; wanted a dictionary of scores such as 'psnr'")
    for name, value in scores.items():
        if not is_number(value):
            raise InvalidType(f"fit: validate returned {shown(value)} as {name}; wanted a number")
    return {str(name): float(value) for name, value in scores.items()}


@contextmanager
def _rates_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """After the block, the groups of the optimizer have the learning rates of before, which the schedule changed."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Restores the global random state, of the CPU and of the CUDA devices in use, after the block."""
    cuda = device.type == "cuda" or torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        yield


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that the first ctrl-C or SIGTERM sets; a second one raises KeyboardInterrupt at once.

    After a block that ended with KeyboardInterrupt, the handler that was there before gets the signal.
    """
    asked, received = threading.Event(), list[signal.Signals]()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield asked
        return

    def ask(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except KeyboardInterrupt:
        if received and callable(handler := before[received[0]]):
            handler(received[0], None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kinds(sample: Any) -> str:
    """The types in a collated sample, for a message."""
    if isinstance(sample, Mapping):
        return f"a dictionary of {', '.join(map(shown, sample))}"
    if isinstance(sample, tuple | list):
        return f"({', '.join(type(item).__name__ for item in sample)})"
    return f"a {type(sample).__name__}"


def _named(loss: Any) -> str:
    """A text that identifies a loss: a module's arguments, or a function's name."""
    if isinstance(loss, nn.Module):
        return " ".join(repr(loss).split())
    return str(getattr(loss, "__qualname__", type(loss).__name__))


def _n_further(model: nn.Module) -> int | None:
    """The number of positional arguments of a model after lr; None: any number."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in positional for kind in kinds) - 1


def _not_finite(what: str, step: int, indices: Sequence[int], dataset: Any) -> str:
    if not indices:
        return f"fit: {what} at step {step}, for samples of another process; its message lists them"
    names = [f"{i} ({dataset.describe(i)})" if hasattr(dataset, "describe") else str(i) for i in indices[:8]]
    more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    return f"fit: {what} at step {step}, samples {', '.join(names)}{more}; check these, lower lr, or raise precision"
