"""fit: it learns, stops, resumes to the same weights, refuses another run's folder; two processes give the same."""

import csv
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from deformmamba.errors import InvalidType
from deformmamba.extras import MissingExtra
from deformmamba.losses import L1Loss
from deformmamba.models.base import SRModel
from deformmamba.models.deform_mamba import DeformMambaSR
from deformmamba.physics.kspace import degrade, zero_fill
from deformmamba.training import fit
from deformmamba.training.batches import Batches
from deformmamba.training.loop import LoadingEnded
from deformmamba.training.optimizer import parameter_groups
from deformmamba.training.settings import FitSettings
from deformmamba.weights import WeightsError

accelerate_state = pytest.importorskip("accelerate.state")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The rows of every requested curve. Nothing is drawn, which would take longer than the training."""
    curves = []
    monkeypatch.setattr("deformmamba.training.folder.training_curve", lambda rows, path: curves.append(list(rows)))
    return curves


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate allows one mixed precision per process; this resets it after each test."""
    yield
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)


def network():
    torch.manual_seed(0)
    return DeformMambaSR(scale=2, dims=[8, 12], depths=[1, 1], patch=2, d_state=2, stem_channels=2, skip="zero-fill")


def samples(n=6):
    hr = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0)).round()
    lr = degrade(hr, 2)
    return TensorDataset(lr, hr, zero_fill(lr, 2))


def run(out, *, model=None, data=None, **options):
    options = {"batch": 2, "every": 2, "warmup": 2, "progress": False, **options}
    if "epochs" not in options:
        options.setdefault("steps", 6)
    return fit(model or network(), data or samples(), out=out, **options)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def log(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "log.csv").read_text().splitlines()))


class Signalling(Dataset):
    """Sends signal `number` to this process at the `at`-th requested sample."""

    def __init__(self, at: int, number: int) -> None:
        self.data, self.left, self.number = samples(), at, number

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.data[index]


class Plain(nn.Module):
    """A user's network: no config, no save_pretrained, no base."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(self.conv(lr), 2)


# ---------------------------------------------------------------------------------------------------------- one process


def test_it_learns_and_writes_what_it_says(tmp_path, drawn):
    best = run(
        tmp_path, steps=24, lr=1e-2, ema=0, every=12, validate=lambda model: {"psnr": -1.0}, provenance={"who": "us"}
    )
    rows = log(tmp_path)
    assert [int(row["step"]) for row in rows] == [12, 24]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[1]["psnr"]) == -1
    assert float(rows[1]["images_per_second"]) > 0
    model = DeformMambaSR.from_pretrained(best)
    assert model.provenance["who"] == "us"
    assert model.provenance["steps"] == 24
    assert [len(rows) for rows in drawn] == [1, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.portable
def test_the_best_checkpoint_is_the_one_that_validates_best(tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    best = run(tmp_path, validate=lambda model: {"psnr": next(scores)})
    assert DeformMambaSR.from_pretrained(best).provenance["steps"] == 4
    assert DeformMambaSR.from_pretrained(tmp_path / "last.safetensors").provenance["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_weights(tmp_path, number):
    whole = digest(run(tmp_path / "whole", accumulate=2))
    seen = []
    before = signal.signal(signal.SIGTERM, lambda received, _: seen.append(received))
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", data=Signalling(9, number), accumulate=2)  # the first sample of step 4
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] * (number == signal.SIGTERM), "an earlier handler gets the signal at the end"
    assert torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)["step"] == 5
    resumed = run(tmp_path / "stopped", data=Signalling(-1, number), accumulate=2)
    assert digest(resumed) == digest(run(tmp_path / "whole", accumulate=2)) == whole
    assert [row["step"] for row in log(tmp_path / "stopped")] == ["2", "4", "6"]
    first, second = ([row["loss"] for row in log(tmp_path / name)] for name in ("whole", "stopped"))
    assert first == second
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_loading_process_does_not_end_the_run(tmp_path, number):
    whole = digest(run(tmp_path / "whole", model=Plain()))
    assert digest(run(tmp_path / "sent", model=Plain(), data=Signalling(3, number), workers=1)) == whole


@pytest.mark.slow
def test_a_loading_process_that_was_killed_is_named(tmp_path):
    with pytest.raises(LoadingEnded, match=r"ended \(DataLoader worker \(pid.*--workers 0"):
        run(tmp_path, model=Plain(), data=Signalling(9, signal.SIGKILL), workers=1)
    assert run(tmp_path, model=Plain(), data=Signalling(-1, 0)).is_file(), "the same call resumes"


class Given(Dataset):
    """Four samples made by a function of the tensors (lr, hr, base)."""

    def __init__(self, make) -> None:
        self.make, self.data = make, samples()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return self.make(*self.data[index])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lr, hr, base: {"lr": lr, "hr": hr}, "not a dictionary of 'lr', 'hr'; a small data set"),
        (lambda lr, hr, base: (lr,), r"\(lr, hr, base, norm\), not \(Tensor\)"),
        (lambda lr, hr, base: (lr, "scan.nii"), r"not \(Tensor, tuple\)"),
        (lambda lr, hr, base: lr, "not a Tensor"),
    ],
)
def test_samples_that_are_no_pairs_of_tensors_are_refused(tmp_path, make, message):
    with pytest.raises(InvalidType, match=message):
        run(tmp_path, model=Plain(), data=Given(make))


def test_scores_do_not_replace_columns_of_the_log(tmp_path):
    run(tmp_path, model=Plain(), steps=2, every=1, validate=lambda model: {"psnr": 1.0, "loss": -5.0, "step": 7.0})
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(float(row["loss"]) > 0 for row in rows)
    assert [(row["validation_loss"], row["validation_step"]) for row in rows] == [("-5.0", "7.0")] * 2


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def validate(model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validate=validate)
    assert not (tmp_path / "state.pt").exists()


def subprocess_of(code: str, *launcher: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a separate process, in which this module is `t`."""
    script = folder / "script.py"
    script.write_text(f"import torch\ntorch.set_num_threads(1)\nimport test_training as t\n{code}\n")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *launcher, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path):
    at = random.Random().randrange(5, 13)  # a sample of steps 2 to 5, after the first saved state
    whole = digest(run(tmp_path / "whole", data=Signalling(-1, 0)))
    out = tmp_path / "killed"
    done = subprocess_of(f"t.run({str(out)!r}, data=t.Signalling({at}, {int(signal.SIGKILL)}))", folder=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(out / "state.pt", weights_only=True)["step"] in (2, 4)
    assert digest(run(out, data=Signalling(-1, 0))) == whole, f"killed at sample {at}"
    assert digest(out / "last.safetensors") == digest(tmp_path / "whole" / "last.safetensors")


@pytest.mark.slow
def test_rows_beyond_the_saved_step_are_cut(tmp_path):
    run(tmp_path, steps=4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "step": 2}, tmp_path / "state.pt")  # like a kill between writing log and state
    run(tmp_path, steps=4)
    assert [row["step"] for row in log(tmp_path)] == ["2", "4"]


@pytest.mark.slow
def test_epochs_end_with_an_uneven_batch(tmp_path):
    model = DeformMambaSR.from_pretrained(run(tmp_path, epochs=1.5, batch=4))
    assert model.provenance["steps"] == 3
    assert float(log(tmp_path)[-1]["loss"]) > 0


@pytest.mark.parametrize(
    "precision", ["no", pytest.param("bf16", marks=pytest.mark.slow), pytest.param("fp16", marks=pytest.mark.slow)]
)
def test_precisions(tmp_path, precision):
    if precision == "fp16" and not torch.cuda.is_available():
        with pytest.raises(ValueError, match='precision "fp16" needs a GPU; use "bf16" or "no"'):
            run(tmp_path, steps=2, precision=precision)
        return
    model = network()
    forward = type(model).forward
    best = DeformMambaSR.from_pretrained(run(tmp_path, model=model, steps=2, precision=precision))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in best.parameters())
    assert model.forward.__func__ is forward  # accelerate's autocast is off again


def test_accumulated_pieces_are_the_batch(tmp_path):
    at_once, in_pieces = (run(tmp_path / str(n), model=Plain(), batch=5, accumulate=n, ema=0) for n in (1, 3))
    a, b = load_file(at_once), load_file(in_pieces)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-6


def test_the_gradient_is_clipped(tmp_path):
    # a step of Adam does not depend on the size of the gradient, unless eps is comparable to it
    start = Plain().conv.weight
    model = Plain()
    run(tmp_path, model=model, steps=1, clip=1e-9, warmup=0, schedule="constant", lr=1e-3, ema=0)
    assert (model.conv.weight - start).abs().max() < 2e-4  # instead of 1e-3: eps is large compared with the gradient


def test_the_average_follows_the_weights(tmp_path):
    averaged, plain = (
        load_file(run(tmp_path / str(ema), model=Plain(), steps=8, lr=1e-2, ema=ema)) for ema in (0.9, 0)
    )
    start = Plain().state_dict()

    def distance(weights):
        return sum((weights[name] - start[name]).square().sum() for name in start).item()

    assert 0 < distance(averaged) < distance(plain)


def test_schedules():
    numbers = {"batch": 1, "accumulate": 1, "lr": 1.0, "weight_decay": 0, "clip": 1, "ema": 0, "every": 1, "workers": 0}

    def rates(schedule):
        settings = FitSettings(
            samples=10, warmup=2, schedule=schedule, milestones=(0.5, 0.8), gamma=0.1, precision="no", seed=0, **numbers
        )
        return [settings.rate(step) for step in range(10)]

    assert rates("constant") == [0.5] + [1.0] * 9
    assert rates("step") == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates("cosine")
    assert cosine[1] == cosine[2] == 1.0
    assert cosine[6] == 0.5
    assert 0 < cosine[9] < 0.05


def test_ones_own_model_data_and_loss(tmp_path):
    from safetensors import safe_open

    def loss(sr, hr):
        return (sr - hr).square().mean()

    best = run(tmp_path, model=Plain(), loss=loss, provenance={"who": "us"}, ema=0)
    with safe_open(best, "pt") as file:
        assert set(file.keys()) == {"conv.weight", "conv.bias"}
        assert '"who": "us"' in file.metadata()["provenance"]
    run(tmp_path, model=Plain(), loss=loss, provenance={"who": "us"}, ema=0)  # finished: nothing runs
    with pytest.raises(ValueError, match=r'fit\.loss was "test_ones_own.*loss", now it is "L1Loss\( beta=0\.0 .*"'):
        run(tmp_path, model=Plain(), loss=L1Loss(), provenance={"who": "us"}, ema=0)


def test_tensorboard_gets_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, steps=2)
    assert list((tmp_path / "tensorboard").glob("events.*"))


# -------------------------------------------------------------------------------------------- starts, ends and the best


@pytest.mark.slow
def test_the_start_is_scored_and_can_win(tmp_path):
    model = network()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = iter([5.0, 1.0, 3.0, 2.0])
    with pytest.warns(UserWarning, match=r"no validation was better than the start's \(5\)"):
        best = run(tmp_path, model=model, validate=lambda model: {"psnr": next(scores)}, score_start=True)
    kept = DeformMambaSR.from_pretrained(best)
    assert kept.provenance["steps"] == 0
    assert all(torch.equal(kept.state_dict()[name], tensor) for name, tensor in start.items())
    assert [row["step"] for row in log(tmp_path)] == ["0", "2", "4", "6"]
    assert log(tmp_path)[0]["psnr"] == "5.0"


@pytest.mark.slow
def test_a_better_validation_beats_the_start(tmp_path):
    scores = iter([5.0, 6.0, 3.0, 2.0])
    best = run(tmp_path, validate=lambda model: {"psnr": next(scores)}, score_start=True)
    assert DeformMambaSR.from_pretrained(best).provenance["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "strange", [float("nan"), *(pytest.param(x, marks=pytest.mark.slow) for x in (math.inf, -math.inf))]
)
def test_a_score_that_is_not_finite_ends_nothing_and_is_never_the_best(tmp_path, strange):
    scores = iter([strange, 3.0, strange])
    with pytest.warns(UserWarning, match="cannot be compared"):
        best = run(tmp_path, validate=lambda model: {"psnr": next(scores)})
    assert DeformMambaSR.from_pretrained(best).provenance["steps"] == 4
    last = DeformMambaSR.from_pretrained(tmp_path / "last.safetensors").provenance
    assert (last["steps"], last["validation"]["psnr"]) == (6, str(strange))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 6


@pytest.mark.parametrize("failing", [2, 6])
def test_a_validation_that_fails_loses_no_step_and_is_repeated_first(tmp_path, failing):
    steps, options = [], {"model": Plain(), "ema": 0}

    def fails(model):
        steps.append(2 * len(steps) + 2)
        if steps[-1] == failing:
            raise RuntimeError("no disk")
        return {"psnr": float(steps[-1])}

    with pytest.raises(RuntimeError, match="no disk"):
        run(tmp_path / "a", validate=fails, **options)
    assert torch.load(tmp_path / "a" / "state.pt", weights_only=True)["step"] == failing
    best = run(tmp_path / "a", validate=lambda model: {"psnr": 9.0}, **(options | {"model": Plain()}))
    assert [row["step"] for row in log(tmp_path / "a")] == ["2", "4", "6"]
    assert log(tmp_path / "a")[failing // 2 - 1]["psnr"] == "9.0"
    whole = load_file(run(tmp_path / "b", **(options | {"model": Plain()})))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(best).items())


def test_a_run_whose_last_validation_failed_can_be_made_longer(tmp_path):
    def fails(model):
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        run(tmp_path, model=Plain(), ema=0, steps=2, validate=fails)
    run(tmp_path, model=Plain(), ema=0, steps=4)
    assert [row["step"] for row in log(tmp_path)] == ["2", "4"]


def test_a_finished_run_without_its_best_checkpoint_writes_it_again(tmp_path):
    options = {"steps": 2, "ema": 0, "validate": lambda model: {"psnr": 3.0}}
    run(tmp_path, model=Plain(), **options).unlink()
    assert run(tmp_path, model=Plain(), **options).is_file()
    assert [row["step"] for row in log(tmp_path)] == ["2"]


def test_a_failed_validation_of_an_earlier_version_is_repeated_too(tmp_path):
    scores = iter([1.0, 2.0, 3.0])
    options = {"steps": 4, "ema": 0, "validate": lambda model: {"psnr": next(scores)}}
    run(tmp_path, model=Plain(), **options)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state.pop("due") is False
    torch.save(state, tmp_path / "state.pt")
    run(tmp_path, model=Plain(), **options)  # the last validation is in the log, so nothing is repeated
    (tmp_path / "log.csv").write_text("step,psnr\n2,1.0\n")
    torch.save(state, tmp_path / "state.pt")
    run(tmp_path, model=Plain(), **options)
    assert [(row["step"], row["psnr"]) for row in log(tmp_path)] == [("2", "1.0"), ("4", "3.0")]


def test_scores_of_numpy_and_pytorch_become_numbers_of_python(tmp_path):
    scores = {"psnr": np.float64(30.0), "ssim": torch.tensor(0.5), "count": np.int64(3)}
    run(tmp_path, model=Plain(), ema=0, validate=lambda model: scores)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["best"], type(state["best"])) == (30.0, float)
    assert log(tmp_path)[-1]["ssim"] == "0.5"
    run(tmp_path, model=Plain(), ema=0, steps=8, validate=lambda model: scores)  # the state is readable
    for wrong, message in ((None, "returned None; wanted a dictionary"), ({"psnr": "x"}, "returned 'x' as psnr")):
        with pytest.raises(TypeError, match=message):
            run(tmp_path / message[-4:], model=Plain(), ema=0, validate=lambda model, wrong=wrong: wrong)


def test_a_tie_keeps_the_initial_weights_and_says_so(tmp_path):
    from safetensors import safe_open

    with pytest.warns(UserWarning, match=r"no validation was better than the start's \(5\)"):
        best = run(tmp_path, model=Plain(), ema=0, validate=lambda model: {"psnr": 5.0}, score_start=True)
    assert all(torch.equal(tensor, Plain().state_dict()[name]) for name, tensor in load_file(best).items())
    with safe_open(tmp_path / "last.safetensors", "pt") as file:
        assert '"steps": 6' in file.metadata()["provenance"]


@pytest.mark.slow
def test_an_interrupt_before_the_first_validation_keeps_the_weights(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=Signalling(3, signal.SIGINT), every=100)
    for name in ("best", "last"):
        assert DeformMambaSR.from_pretrained(tmp_path / f"{name}.safetensors").provenance["steps"] == 2


@pytest.mark.slow
def test_a_finished_run_that_is_made_longer_goes_on(tmp_path):
    run(tmp_path, steps=4)
    best = DeformMambaSR.from_pretrained(run(tmp_path, steps=8))
    assert best.provenance["steps"] == 8
    assert [row["step"] for row in log(tmp_path)] == ["2", "4", "6", "8"]
    with pytest.raises(ValueError, match=r"fit\.samples was 16, now it is 8"):
        run(tmp_path, steps=4)


@pytest.mark.slow
def test_a_stopped_run_of_another_length_is_another_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=Signalling(3, signal.SIGINT))
    with pytest.raises(ValueError, match=r"fit\.samples was 12, now it is 16"):
        run(tmp_path, data=Signalling(-1, 0), steps=8)


# --------------------------------------------------------------------------------------------- what is left as it was


def test_the_global_random_state_is_left_as_it_was(tmp_path):
    model, data = network(), samples()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    run(tmp_path, model=model, data=data, steps=2)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("ema", [0, 0.9])
def test_validation_sees_a_model_in_evaluation_mode_and_modes_are_restored(tmp_path, ema):
    model, seen = Plain(), []
    model.add_module("frozen", nn.Dropout().eval())
    run(tmp_path, model=model, ema=ema, steps=2, validate=lambda m: seen.append(m.training) or {"psnr": 1.0})
    assert seen == [False]
    assert [module.training for module in model.modules()] == [True, True, False]
    run(tmp_path / "again", model=model.eval(), ema=ema, steps=2)
    assert not any(module.training for module in model.modules())


def test_a_frozen_submodule_stays_in_evaluation_mode(tmp_path):
    class Watching(Plain):
        def forward(self, lr):
            seen.append((self.training, self.frozen.training))
            return super().forward(lr)

    model, seen = Watching(), []
    model.add_module("frozen", nn.Dropout().eval())
    run(tmp_path, model=model, ema=0, steps=1)
    assert set(seen) == {(True, False)}


def test_a_given_optimizer_gets_its_learning_rates_back(tmp_path):
    model = Plain()
    given = torch.optim.SGD(model.parameters(), lr=np.float64(0.1))
    for steps in (2, 4):  # the second call resumes the first, with the same object
        run(tmp_path, model=model, optimizer=given, ema=0, steps=steps)
        assert given.param_groups[0]["lr"] == 0.1
    assert float(log(tmp_path)[-1]["lr"]) < 0.1

    def fails(model):
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        run(tmp_path / "failed", model=model, optimizer=given, ema=0, validate=fails)
    assert given.param_groups[0]["lr"] == 0.1


# ----------------------------------------------------------------------------------------------------------- optimizers


def test_rates_of_the_scan_norms_and_biases_do_not_decay():
    model = network()
    decaying, rest = parameter_groups(model, lr=1e-3, weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(parameter)] for parameter in rest["params"]}
    assert rest["weight_decay"] == 0
    assert {name.rpartition(".")[2] for name in kept} >= {"A_log", "D", "bias"}
    assert all(parameter.ndim > 1 for parameter in decaying["params"])
    assert not any(names[id(p)].endswith(("A_log", ".D", "bias", "norm.weight")) for p in decaying["params"])
    assert len(decaying["params"]) + len(rest["params"]) == len(names)
    marked = Plain()
    marked.conv.weight._no_weight_decay = True
    (group,) = parameter_groups(marked, lr=1.0, weight_decay=0.01)
    assert group["weight_decay"] == 0
    assert len(parameter_groups(model, lr=1e-3, weight_decay=0.0)) == 1


def test_weight_decay_moves_what_decays_alone(tmp_path):
    plain, decayed = Plain(), Plain()
    for name, model, decay in (("a", plain, 0.0), ("b", decayed, 0.5)):
        run(tmp_path / name, model=model, lr=1e-2, weight_decay=decay, ema=0, steps=1, schedule="constant", warmup=0)
    assert torch.equal(plain.conv.bias, decayed.conv.bias)
    assert not torch.equal(plain.conv.weight, decayed.conv.weight)


def test_an_optimizer_of_the_users_own(tmp_path):
    model = Plain()
    given = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(tmp_path, model=model, optimizer=given, ema=0, schedule="constant", warmup=0)
    assert given.state
    assert float(log(tmp_path)[-1]["lr"]) == 0.1
    made = []

    def make(groups):
        made.append(groups)
        return torch.optim.SGD(groups)

    run(tmp_path / "made", model=Plain(), optimizer=make, lr=0.2, weight_decay=0.1, ema=0)
    assert [group["weight_decay"] for group in made[0]] == [0.1, 0.0]
    with pytest.raises(ValueError, match=r"holds another run: fit\.optimizer"):
        run(tmp_path / "made", model=Plain(), lr=0.2, weight_decay=0.1, ema=0)
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        run(tmp_path / "other", model=Plain(), optimizer=torch.optim.SGD(Plain().parameters()), ema=0)
    with pytest.raises(TypeError, match="optimizer must be an instance of Optimizer or a function or None, not 'adam'"):
        run(tmp_path / "text", model=Plain(), optimizer="adam", ema=0)


def test_several_numbers_of_an_optimizer_are_compared_if_the_run_recorded_them(tmp_path):
    def with_betas(*betas):
        return lambda groups: torch.optim.Adam(groups, betas=betas)

    options = {"model": Plain(), "ema": 0, "steps": 2}
    run(tmp_path, optimizer=with_betas(0.9, 0.99), **options)
    run(tmp_path, optimizer=with_betas(0.9, 0.99), **options)
    with pytest.raises(ValueError, match=r"fit\.optimizer\.betas was \[0\.9, 0\.99\], now it is \[0\.5, 0\.99\]"):
        run(tmp_path, optimizer=with_betas(0.5, 0.99), **options)
    facts = json.loads((tmp_path / "run.json").read_text())
    del facts["fit"]["optimizer"]["betas"]  # like versions without this entry
    (tmp_path / "run.json").write_text(json.dumps(facts))
    run(tmp_path, optimizer=with_betas(0.9, 0.99), **options)


@pytest.mark.slow
def test_a_run_that_decayed_everything_goes_on_as_it_began(tmp_path):
    options = {"steps": 4, "weight_decay": 0.1}
    run(tmp_path, **options)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["fit"].pop("undecayed")  # like versions without this entry
    (tmp_path / "run.json").write_text(json.dumps(facts))
    model, state = network(), torch.load(tmp_path / "state.pt", weights_only=True)
    old = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.save({**state, "step": 2, "optimizer": old.state_dict()}, tmp_path / "state.pt")
    run(tmp_path, **options)
    groups = torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, r"fit\.samples was 12, now it is 8"),
        ({"lr": 2e-3}, r"fit\.lr was 0\.001, now it is 0\.002"),
        ({"accumulate": 2}, r"fit\.accumulate was 1, now"),
        ({"schedule": "step"}, r"fit\.schedule was \[\"cosine\"\], now"),
        ({"clip": 2.0}, r"fit\.clip was 1\.0, now"),
        ({"loss": L1Loss()}, r"fit\.loss was \"SRLoss"),
        ({"provenance": {"data": "mine"}}, r"provenance was null, now it is not given; provenance\.data was not"),
        ({"model": Plain()}, r'model\.class was "DeformMambaSR", now it is "Plain"'),
        ({"data": samples(5)}, r"data\.length was 6, now it is 5"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path_factory, finished, options, message):
    with pytest.raises(ValueError, match=r"holds another run: .*choose another folder") as error:
        run(finished, **options)
    assert error.match(message)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run(out)
    return out


def test_numbers_of_numpy_are_the_same_run_as_those_of_python(tmp_path):
    options = {"model": Plain(), "ema": 0}
    given = {
        "steps": np.int64(4),
        "batch": np.int64(2),
        "every": np.int32(2),
        "lr": np.float32(0.5),
        "seed": np.uint8(3),
    }
    run(tmp_path, **options, **given)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["fit"]["samples"], facts["fit"]["batch"], facts["fit"]["seed"]) == (8, 2, 3)
    facts["fit"] |= {"batch": "2", "samples": "8"}  # as earlier versions wrote them
    (tmp_path / "run.json").write_text(json.dumps(facts))
    run(tmp_path, **options, steps=4, batch=2, every=2, lr=0.5, seed=3)


def test_a_seed_of_any_size_trains(tmp_path):
    assert run(tmp_path, model=Plain(), ema=0, steps=1, seed=1_900_000_000_000_000_000).is_file()


def test_a_folder_with_strange_checkpoints_is_refused(tmp_path):
    network().save_pretrained(tmp_path / "best.safetensors")
    with pytest.raises(ValueError, match=r"holds best\.safetensors of an unknown run"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_broken_state_is_one_line(tmp_path):
    run(tmp_path, steps=2)
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(ValueError, match=r"^fit: .*state\.pt cannot be read \(.*\); delete it$"):
        run(tmp_path, steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "schedule is 'linear'; it must be one of cosine, step, constant"),
        ({"batch": 0}, "batch is 0; it must be 1 or more"),
        ({"ema": 1}, "ema is 1; it must be 0 or more, and below 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"steps": 2, "epochs": 1}, "steps is 2 and epochs is 1; give exactly one"),
        ({"steps": 0}, "there is nothing to train"),
        ({"epochs": math.nan}, "epochs is nan; it must be a finite number"),
        ({"epochs": math.inf}, "epochs is inf; it must be a finite number"),
        ({"gamma": math.nan}, "gamma is nan; it must be 0 or more"),
        ({"model": nn.Identity()}, "Identity has no parameters to train"),
        ({"model": Plain().requires_grad_(False)}, "Plain has no parameters to train"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_milestones_are_numbers(tmp_path):
    with pytest.raises(TypeError, match="a milestone is 'a'; milestones are numbers"):
        run(tmp_path / "out", milestones=("a",), schedule="step")


class Described(TensorDataset):
    def describe(self, index: int) -> str:
        return f"scan-{index}.nii"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(tmp_path):
    data = Described(*samples().tensors)
    data.tensors[1][3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step [0-5], samples 3 \(scan-3.nii\); check"):
        run(tmp_path, data=data, accumulate=2)


class Root(Plain):
    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return super().forward(lr * 0).mul(0).sqrt()  # zero, with an infinite derivative


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_touched(tmp_path):
    model = Root()
    with pytest.raises(FloatingPointError, match="the norm of the gradient is nan at step 0"):
        run(tmp_path, model=model, clip=0, ema=0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Plain().parameters(), strict=True))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"fit needs accelerate .*pip install 'deformmamba\[train\]'"):
        run(tmp_path)


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.mark.parametrize(("n", "batch", "accumulate", "processes"), [(7, 5, 1, 2), (10, 4, 3, 2), (6, 1, 1, 3)])
def test_every_sample_of_a_step_is_computed_once_whoever_does(n, batch, accumulate, processes):
    total = 2 * n + 1
    settings = {"samples": total, "batch": batch, "seed": 3}
    alone = Batches(n, **settings)
    together = [
        Batches(n, accumulate=accumulate, processes=processes, rank=rank, **settings) for rank in range(processes)
    ]
    assert sorted(i for step in range(alone.n_steps) for i in alone.indices(step)) == sorted(
        [*range(n)] * 2 + [alone.indices(alone.n_steps - 1)[-1]]
    )
    for step in range(alone.n_steps):
        pieces = [piece for part in together for piece in part.pieces(step)]
        counted = sorted(i for piece in pieces if piece.weight for i in piece.indices)
        assert counted == sorted(alone.indices(step))
        values = np.random.default_rng(step).random(n)  # one loss per sample
        mean = sum(piece.weight * values[piece.indices].mean() for piece in pieces) / processes
        assert mean == pytest.approx(values[alone.indices(step)].mean())
    assert list(together[0]) == [piece.indices for s in range(alone.n_steps) for piece in together[0].pieces(s)]


# accelerate's launcher for CPUs needs MPI; its launcher for GPUs also starts CPU processes, with ACCELERATE_USE_CPU
TWO = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
       "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path):
    options = "epochs=1.5, batch=4, every=1, ema=0, lr=1e-2"  # 9 samples: 4, 4 and an uneven 1
    alone = eval(f"run(tmp_path / 'alone', {options})")
    out = tmp_path / "two"
    done = subprocess_of(
        "import accelerate, pathlib\n"
        "said = lambda model: print('validated among', accelerate.PartialState().num_processes) or {}\n"
        f"t.run(pathlib.Path({str(out)!r}), {options}, validate=said)",
        *TWO,
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validated among 2") == 3  # in the main process only
    ours, theirs = ([float(row["loss"]) for row in log(path.parent)] for path in (alone, out / "best.safetensors"))
    assert theirs == pytest.approx(ours, rel=1e-5)
    a, b = (DeformMambaSR.from_pretrained(path).state_dict() for path in (alone, out / "best.safetensors"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3


@pytest.mark.long
def test_if_one_of_two_processes_is_asked_to_stop_both_do_and_one_goes_on(tmp_path):
    options = {"steps": 5, "batch": 4, "ema": 0, "lr": 1e-2}
    alone = run(tmp_path / "alone", data=Signalling(-1, 0), **options)
    out = tmp_path / "two"
    done = subprocess_of(
        "import os, pathlib, signal\n"
        "at = 5 if os.environ['RANK'] == '1' else -1  # the first of its samples at step 2\n"
        f"t.run(pathlib.Path({str(out)!r}), data=t.Signalling(at, signal.SIGINT), **{options})",
        *TWO,
        folder=tmp_path,
    )
    assert done.returncode != 0
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 3, done.stderr
    resumed = run(out, data=Signalling(-1, 0), **options)
    a, b = (DeformMambaSR.from_pretrained(path).state_dict() for path in (alone, resumed))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3
    assert [row["step"] for row in log(out)] == ["2", "4", "5"]


def test_weights_trained_from_a_file_inherit_what_it_states(tmp_path):
    facts = {"consistency": "object", "license": "cc-by-4.0", "acknowledgements": ["thanks"], "steps": 7}
    sha256 = network().save_pretrained(tmp_path / "a.safetensors", provenance=facts)
    model = DeformMambaSR.from_pretrained(tmp_path / "a.safetensors")
    made = DeformMambaSR.from_pretrained(run(tmp_path / "out", model=model, steps=1))
    assert made.consistency == "object"
    assert {key: made.provenance[key] for key in ("license", "acknowledgements")} == {
        key: facts[key] for key in ("license", "acknowledgements")
    }
    assert [(one["sha256"], one["steps"]) for one in made.provenance["init"]] == [(sha256, 7)]
    own = DeformMambaSR.from_pretrained(
        run(tmp_path / "own", model=DeformMambaSR.from_pretrained(tmp_path / "a.safetensors"), steps=1,
            provenance={"license": "mit"})
    )  # fmt: skip
    assert own.provenance["license"] == "mit"
    assert "init" not in DeformMambaSR.from_pretrained(run(tmp_path / "new", steps=1)).provenance


def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Reads(SRModel):
        def __init__(self, *, scale: int = 2) -> None:
            super().__init__(scale=scale)
            self.rates = torch.linspace(0, 1, 3).tolist()
            self.conv = nn.Conv2d(1, 4, 1)

        def forward(self, lr, base=None):
            return torch.nn.functional.pixel_shuffle(self.conv(lr), 2)

    data = Counting(samples())
    with pytest.raises(WeightsError, match=r"Reads cannot be saved: its constructor must work on the meta device"):
        run(tmp_path / "out", model=Reads(), data=data)
    with pytest.raises(WeightsError, match="float64"):
        run(tmp_path / "out", model=network().double(), data=data)
    assert data.asked == 0
    assert not (tmp_path / "out").exists()


class Counting(Dataset):
    """Counts the requested samples."""

    def __init__(self, inside):
        self.inside, self.asked = inside, 0

    def __len__(self):
        return len(self.inside)

    def __getitem__(self, index):
        self.asked += 1
        return self.inside[index]
