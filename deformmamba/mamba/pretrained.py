"""Reading the files of a language model, from a folder or the Hugging Face Hub: mamba-ssm's `utils.hf`."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from deformmamba.annotations import check_types
from deformmamba.errors import one_line, shown
from deformmamba.mamba.arguments import check_parameters
from deformmamba.weights import WeightsError

_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _file(model_name: str | os.PathLike[str], name: str) -> Path:
    """A file of a folder, or of a repository on the Hugging Face Hub, which is downloaded."""
    text = os.fspath(model_name)
    folder = Path(os.path.expanduser(text))
    if os.path.isdir(folder):
        if not os.path.isfile(folder / name):
            raise WeightsError(f"the folder {folder} has no {name}; give a folder that save_pretrained wrote")
        return folder / name
    if os.path.exists(folder) or not isinstance(model_name, str) or not _REPOSITORY.fullmatch(text):
        raise WeightsError(
            f"there is no folder {shown(text)}; check the path, or give a name of the Hub, such as "
            "state-spaces/mamba-130m"
        )
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(text, name))
    except Exception as error:  # the client does not catch the errors of its HTTP library and of the disk
        raise WeightsError(
            f"cannot fetch {name} of {text} from the Hub ({type(error).__name__}: {one_line(error)}); check the name "
            "and the network, or give a folder"
        ) from error


def load_config_hf(model_name: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of `config.json` of a folder or of a name on the Hugging Face Hub.

    Raises:
        WeightsError: there is no such file, or it is not a JSON object.
    """
    check_types(load_config_hf, locals())
    path = _file(model_name, "config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise WeightsError(f"cannot read {path} as JSON: {reason}; save or fetch the model again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} must hold a JSON object of settings, not {shown(config)}")
    return config


def load_state_dict_hf(
    model_name: str | os.PathLike[str], device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of `pytorch_model.bin` of a folder or of a name on the Hugging Face Hub.

    Raises:
        WeightsError: there is no such file, or it holds something else than tensors.
    """
    check_types(load_state_dict_hf, locals())
    check_parameters("load_state_dict_hf", device, dtype)
    path = _file(model_name, "pytorch_model.bin")
    try:
        tensors = torch.load(path, map_location="cpu" if device is None else device, weights_only=True)
    except Exception as error:  # a damaged file raises errors of many kinds
        raise WeightsError(
            f"cannot read {path} ({type(error).__name__}: {one_line(error)}); save or fetch the model again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise WeightsError(f"{path} must hold a dictionary of tensors, not {shown(type(tensors).__name__)}")
    return tensors if dtype is None else {name: value.to(dtype) for name, value in tensors.items()}
