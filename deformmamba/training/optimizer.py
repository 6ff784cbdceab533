"""The optimizer of a training: parameter groups for weight decay, and optimizers given by the user."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deformmamba.errors import InvalidArgument, InvalidType
from deformmamba.layers import NO_WEIGHT_DECAY

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], torch.optim.Optimizer]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is applied to a parameter.

    It is not applied to parameters marked by their layer (`_no_weight_decay`, as in Mamba's code), to `A_log`, `D` and
    `dt_bias` of a selective scan, to biases, and to 1-D parameters, which are gains and offsets of normalisations.
    """
    last = name.rpartition(".")[2]
    marked = getattr(parameter, "_no_weight_decay", False)
    return not (marked or last in NO_WEIGHT_DECAY or last.endswith("bias") or parameter.ndim <= 1)


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float, all_decay: bool = False) -> Groups:
    """The model's parameters as groups for an optimizer: those that decay and those that do not, see `decays`.

    Without weight decay, or with `all_decay`, there is one group.
    """
    named = list(model.named_parameters())
    if all_decay or not weight_decay:
        return [{"params": [parameter for _, parameter in named], "lr": lr, "weight_decay": weight_decay}]
    chosen = [(parameter, decays(name, parameter)) for name, parameter in named]
    groups: Groups = [
        {"params": [p for p, decay in chosen if decay], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p, decay in chosen if not decay], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, given: torch.optim.Optimizer | MakeOptimizer | None, groups: Groups
) -> torch.optim.Optimizer:
    """AdamW over `groups`, or the user's optimizer, given as an object or as a function of `groups`.

    Raises:
        InvalidType: `given` is neither an optimizer nor a function that returns one.
        InvalidArgument: the optimizer holds parameters that are not the model's, or the model has none to train.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidArgument(
            f"fit: {type(model).__name__} has no parameters to train; give a model with parameters whose requires_grad "
            "is True"
        )
    if given is None:
        return torch.optim.AdamW(groups)
    made = given if isinstance(given, torch.optim.Optimizer) else given(groups) if callable(given) else given
    if not isinstance(made, torch.optim.Optimizer):
        raise InvalidType(
            f"fit: optimizer is a {type(made).__name__}; wanted a torch.optim.Optimizer, or a function that makes one "
            "from parameter groups, such as lambda groups: torch.optim.SGD(groups)"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in own for group in made.param_groups for parameter in group["params"]):
        raise InvalidArgument("fit: optimizer holds parameters that are not the model's; build it from this model's")
    return made


def optimizer_facts(optimizer: torch.optim.Optimizer, known: Callable[[str], bool]) -> dict[str, Any]:
    """Facts that identify the user's optimizer: its class, its settings, and the learning rate of each group.

    `known`: whether a run that is resumed recorded a setting. Runs of earlier versions did not record those with
    several numbers, such as `betas`.
    """
    plain = {
        key: value
        for key, value in optimizer.defaults.items()
        if isinstance(value, bool | int | float | str) or (_is_numbers(value) and known(key))
    }
    return {"class": type(optimizer).__name__, **plain, "rates": [group["lr"] for group in optimizer.param_groups]}


def _is_numbers(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(item, bool | int | float) for item in value)
