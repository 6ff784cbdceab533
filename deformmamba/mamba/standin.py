"""`install` lets programs import this package's functions as mamba_ssm and causal_conv1d.

Only packages that cannot be imported are replaced.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from multiprocessing import spawn
from types import FunctionType, ModuleType
from typing import Any

from deformmamba.mamba import (
    blocks,
    causal_conv,
    extensions,
    generation,
    language,
    mamba2,
    mamba_simple,
    norm,
    selective_scan,
    ssd,
    state_update,
)
from deformmamba.threads import ForkLock

_SCANS = {"fwd": extensions.scan_fwd, "bwd": extensions.scan_bwd}
_CROSS_SCANS = {"fwd": extensions.cross_scan_fwd, "bwd": extensions.cross_scan_bwd}
_ONE_STATE_SCANS = {"fwd": extensions.one_state_fwd, "bwd": extensions.one_state_bwd}


def _of(module: ModuleType, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


_CONVOLUTIONS = _of(causal_conv, "causal_conv1d_fn", "causal_conv1d_update")
_NORMS = _of(norm, "RMSNorm", "layer_norm_fn", "rms_norm_fn", "layer_norm_ref", "rms_norm_ref")


# The replacements: by module, then by name. Extensions come first, because packages look for them.
NAMES: dict[str, dict[str, Any]] = {
    "selective_scan_cuda": _SCANS,
    "selective_scan_cuda_core": _CROSS_SCANS,
    "selective_scan_cuda_oflex": _CROSS_SCANS,
    "selective_scan_cuda_nrow": _CROSS_SCANS,
    "selective_scan_cuda_ndstate": _ONE_STATE_SCANS,
    "causal_conv1d_cuda": {
        "causal_conv1d_fwd": extensions.conv_fwd,
        "causal_conv1d_bwd": extensions.conv_bwd,
        "causal_conv1d_update": extensions.conv_update_function,
    },
    "causal_conv1d": {"__version__": "1.6.1", **_CONVOLUTIONS},
    "causal_conv1d.causal_conv1d_interface": {
        **_CONVOLUTIONS,
        **_of(causal_conv, "causal_conv1d_ref", "causal_conv1d_update_ref"),
    },
    "causal_conv1d.causal_conv1d_varlen": _of(
        causal_conv, "causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"
    ),
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": extensions.conv_fwd_function,
        "causal_conv1d_bwd_function": extensions.conv_bwd_function,
        "causal_conv1d_update_function": extensions.conv_update_function,
    },
    "mamba_ssm": {
        "__version__": "2.3.2",
        **_of(selective_scan, "selective_scan_fn", "mamba_inner_fn"),
        **_of(mamba_simple, "Mamba"),
        **_of(mamba2, "Mamba2"),
        **_of(language, "MambaLMHeadModel"),
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {**_of(mamba_simple, "Mamba"), "Block": blocks.BlockWithoutMLP},
    "mamba_ssm.modules.mamba2": _of(mamba2, "Mamba2"),
    "mamba_ssm.modules.block": _of(blocks, "Block"),
    "mamba_ssm.modules.mlp": _of(blocks, "GatedMLP"),
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _of(language, "MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": {
        **_of(language, "MambaLMHeadModel", "MixerModel", "create_block", "MambaConfig"),
        "_init_weights": language.init_weights,
    },
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _of(generation, "GenerationMixin", "InferenceParams", "sample"),
    "mamba_ssm.utils.hf": _of(language, "load_config_hf", "load_state_dict_hf"),
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _of(
        selective_scan,
        "selective_scan_fn",
        "selective_scan_ref",
        "mamba_inner_fn",
        "mamba_inner_ref",
        "mamba_inner_fn_no_out_proj",
        "bimamba_inner_fn",
    ),
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": _of(
        state_update, "selective_state_update", "selective_state_update_ref"
    ),
    "mamba_ssm.ops.triton.layer_norm": _NORMS,
    "mamba_ssm.ops.triton.layernorm": _NORMS,  # its name before mamba-ssm 2
    "mamba_ssm.ops.triton.layernorm_gated": {
        "RMSNorm": norm.RMSNormGated,
        "LayerNorm": norm.LayerNormGated,
        "rms_norm_ref": norm.gated_norm_ref,
        **_of(norm, "rmsnorm_fn", "layernorm_fn"),
    },
    "mamba_ssm.ops.triton.ssd_combined": _of(
        ssd,
        "mamba_chunk_scan",
        "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined",
        "mamba_split_conv1d_scan_ref",
    ),
    "selective_scan": _of(selective_scan, "selective_scan_fn", "selective_scan_ref"),  # VMamba's first package
}

_installed: dict[str, ModuleType | None] = {}  # the replacements in sys.modules, and the modules that they replaced
_lock = ForkLock()


class _StandIn(ModuleType):
    """A module of `NAMES`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"The names of {name} that deformmamba.mamba has.")
        package = any(other.startswith(f"{name}.") for other in NAMES)
        self.__spec__ = ModuleSpec(name, None, is_package=package)
        self.__file__ = __file__
        if package:
            self.__path__: list[str] = []
        self.__dict__.update(NAMES[name])

    def __getattr__(self, name: str) -> Any:
        known = ", ".join(sorted(given for given in NAMES[self.__name__] if not given.startswith("_"))) or "no names"
        raise AttributeError(f"{self.__name__} is a stand-in by deformmamba and has no {name!r}; available: {known}")


def install(*, quiet: bool = False) -> list[str]:
    """Let `import mamba_ssm`, `import causal_conv1d` and the extensions behind them give this package's functions.

    Only packages that cannot be imported are replaced, and one line on stderr lists them (not with `quiet`). Call it
    before the program imports its model; transformers' models use the replacements even if they are already imported. A
    second call does nothing. Nothing is written to disk.

    Returns:
        The packages and extensions that are replaced now.
    """
    with _lock:
        reasons = _replace()
        _rebind_transformers()
        spawn.get_preparation_data = _with_stand_ins
        roots = [name for name in _installed if "." not in name]
    if reasons and not quiet:
        others = [root for root in _roots() if root not in roots]
        left = f"; left alone, because they can be imported: {', '.join(others)}" if others else ""
        print(f"deformmamba: deformmamba.mamba replaces {', '.join(reasons)} (not importable){left}", file=sys.stderr)
    return roots


def uninstall() -> None:
    """Undoes `install`. Programs keep the names that they imported from a replacement, except transformers' models."""
    with _lock:
        for name, before in _installed.items():
            if isinstance(sys.modules.get(name), _StandIn):
                del sys.modules[name]
                if before is not None:
                    sys.modules[name] = before
        _installed.clear()
        _rebind_transformers()
        spawn.get_preparation_data = _preparation_data


def _roots() -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in NAMES))


def _replace() -> list[str]:
    """Puts the replacements into sys.modules; returns the packages and extensions that it replaced now."""
    replaced = []
    for root in _roots():
        if isinstance(sys.modules.get(root), _StandIn):
            continue
        before = set(sys.modules)
        try:
            module = importlib.import_module(root)
        except Exception:  # not installed, built for another torch, or in need of a GPU
            usable = False
        else:  # a folder of the same name, such as a checkout's, can be imported as an empty namespace
            usable = getattr(module, "__file__", None) is not None or not hasattr(module, "__path__")
        if not usable:
            for name in set(sys.modules) - before:
                if name.startswith(f"{root}."):  # parts that were imported before the package failed
                    del sys.modules[name]
            _put(root)
            replaced.append(root)
    return replaced


def _put(root: str) -> None:
    for name in NAMES:
        if name.split(".")[0] == root:
            _installed[name] = sys.modules.get(name)
            sys.modules[name] = _StandIn(name)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, sys.modules[name])


# ----------------------------------------------------------------------------------------------------- other processes

_preparation_data = spawn.get_preparation_data


def _with_stand_ins(name: str) -> dict[str, Any]:
    """What multiprocessing sends to a process that it starts anew (spawn, forkserver), where nothing is installed."""
    return {**_preparation_data(name), "deformmamba": _InstallWhenUnpickled()}


class _InstallWhenUnpickled:
    """The new process unpickles it before it imports the program's main module."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _install_in_child, ()


def _install_in_child() -> None:
    install(quiet=True)


# -------------------------------------------------------------------------------------------------------- transformers
#
# From version 5.16 on, each operation of its Mamba models is a function that looks for mamba_ssm or causal_conv1d
# once, when its module is imported, and keeps what it found in its closure.

_CLOSURE = {"implementation", "applicable_params", "is_new_implementation", "torch_function", "package"}


def _rebind_transformers() -> None:
    """Make functions that exist before `install` use the stand-ins, and stop using them after `uninstall`."""
    for function in _transformers_functions():
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        found = cells["implementation"].cell_contents
        own = getattr(found, "__module__", "").startswith("deformmamba.")
        package = cells["package"].cell_contents
        name = cells["func_name"].cell_contents if "func_name" in cells else function.__name__
        if package in _installed and not cells["is_new_implementation"].cell_contents:
            wanted = _lookup(package, name)
        elif own and package not in _installed:
            wanted = cells["torch_function"].cell_contents
        else:
            continue
        if wanted is not None:
            cells["implementation"].cell_contents = wanted
            cells["applicable_params"].cell_contents = tuple(inspect.signature(wanted).parameters)
            cells["is_new_implementation"].cell_contents = wanted is not cells["torch_function"].cell_contents


def _lookup(package: str, name: str) -> Callable[..., Any] | None:
    inside = (given for module, given in NAMES.items() if module.split(".")[0] == package)
    return next((given[name] for given in inside if name in given), None)


def _transformers_functions() -> Iterator[FunctionType]:
    for name, module in list(sys.modules.items()):
        if not name.startswith("transformers.models."):
            continue
        for value in list(vars(module).values()):
            for _ in range(10):  # wrappers around the function; objects that have every attribute never end
                if isinstance(value, FunctionType) and set(value.__code__.co_freevars) >= _CLOSURE:
                    yield value
                value = getattr(value, "__wrapped__", None) if callable(value) else None
