"""Adaptation to one scan: threads change gradients by rounding only."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.inference import adaptation
from deformmamba.inference.adaptation import LOSS, _gradients, _twin
from deformmamba.inference.stack import Stack
from deformmamba.models import DeformMambaSR
from deformmamba.volume import Volume


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_give_the_gradients_of_the_batch(parts: int) -> None:
    torch.manual_seed(0)
    network = DeformMambaSR.from_preset("tiny", scale=1, dims=[16], depths=[1])
    torch.nn.init.normal_(network.project.weight, std=0.1)
    lr, hr = torch.rand(2, 4, 1, 24, 24)
    twins = [network, *(_twin(network) for _ in range(parts - 1))]
    with ThreadPoolExecutor(parts) as pool:
        _gradients(twins, pool, lr, hr)
    divided = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    LOSS(network(lr), hr).backward()
    for name, parameter in network.named_parameters():
        assert_close(divided[name], parameter.grad)
    with torch.no_grad():  # all copies share the weights of the first
        network.project.weight.add_(1)
    assert torch.equal(twins[-1].project.weight, network.project.weight)


def test_minutes_include_the_compilation_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which each gradient takes 2 s, a minute has room for 22 steps.

    12 s are for the comparison and the second pass, and two gradients only measure the time.
    """
    clock = [0.0]
    monkeypatch.setattr(adaptation.time, "perf_counter", lambda: clock[0])

    def gradients(*_: object) -> None:
        clock[0] += 2

    monkeypatch.setattr(adaptation, "_gradients", gradients)
    scan = Volume(np.random.default_rng(0).random((16, 16, 12), np.float32), np.diag([1.0, 1.0, 3.0, 1.0]))
    job = Stack.of(scan)
    slices = torch.from_numpy(job.slices)
    counted = []
    train = adaptation.adapted_to
    monkeypatch.setattr(adaptation, "adapted_to", lambda *given: counted.append(train(*given)) or counted[0])
    network = DeformMambaSR.from_preset("tiny", scale=1, dims=[16], depths=[1])
    adaptation.best_of(network, slices[:1], slices[1:], job, 1.0, None, 0, False)
    assert counted[0][1] == 22
