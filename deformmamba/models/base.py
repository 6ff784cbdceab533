"""Base class of all super-resolution models: one config, strict loading, one input check."""

import copy
import inspect
import itertools
import json
import operator
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar, get_type_hints

import torch
from torch import nn

from deformmamba.annotations import check_types, described, fits, is_integer
from deformmamba.errors import InvalidArgument, InvalidType, one_line, shown
from deformmamba.physics.consistency import Consistency, stored_consistency
from deformmamba.physics.kspace import Grid, zero_fill
from deformmamba.tensors import check_device, has_values, in_autocast
from deformmamba.torch_private import limited_registration
from deformmamba.weights import Published, load_checkpoint, publish
from deformmamba.weights.cards import pixel_range
from deformmamba.weights.checkpoint import Checkpoint, WeightsError, check_config, write_checkpoint

Model = TypeVar("Model", bound="SRModel")

# larger |x| is not "about [0, 1]": probably an image in scanner units
FAR_OUTSIDE = 8.0

# bytes of buffers that a constructor may compute because no checkpoint stores them
MAX_BUFFERS = 1 << 26


class SRModel(nn.Module):
    """Takes an LR image (b, c, h, w) of about [0, 1], and returns an image of `scale` times its height and width.

    A subclass takes keyword-only, JSON-able arguments with annotations, and calls
    `super().__init__(scale=scale, intensity=intensity)` in its first line. `config` is recorded from the call itself:
    it has exactly the keys of the subclass's signature, defaults included, and `type(model)(**model.config)` builds the
    same model with new weights. (A subclass may also pass its other arguments in that line; this has no effect.) A
    value that does not fit its annotation is a ValueError. A class with other arguments, such as a tensor, works but
    cannot be saved.

    The constructor must work on the meta device, where tensors have shapes but no values. Buffers that are not stored
    (`persistent=False`) are allowed, but make loading build the model twice.

    Args:
        scale: the factor of height and width, an integer.
        intensity: the name of the rule that scales an image to about [0, 1] before `forward`
            (`deformmamba.volume.intensity_scale`); "p99.9" divides by that percentile of the LR volume.

    Attributes:
        config: the constructor's arguments as JSON values (a tuple is a list).
        grid: the grid of the output, see `deformmamba.physics.kspace.Grid`.
        minimum_size: the smallest h and w of an input.
        multiple: `forward` pads h and w to a multiple of this and crops back, so that any size works.
        channels: the c that `forward` takes; None for any.
        any_intensity: whether `forward` takes images of any gain and offset; else they must be about [0, 1].
        robust_edges: whether data consistency treats edges and outliers as the skip "zero-fill-robust" does.
        precisions: the dtypes in which `forward` may run; "autocast" ones under `torch.autocast`, with float32 weights.
        tiles: how to cut a slice that does not fit into memory, in a sentence.
        provenance: of loaded weights (training data, split, degradation, scores); empty otherwise.
        source: the path, manifest name or org/repo@commit of loaded weights; None otherwise.
        sha256: of the file of loaded weights; None otherwise. It does not change with the weights;
            `inference.weights_hash` gives the hash of the current weights.
    """

    grid: Grid = "origin"
    minimum_size: int = 1
    multiple: int = 1
    channels: int | None = None
    any_intensity: bool = False
    robust_edges: bool = False
    precisions: tuple[str, ...] = ("float32", "float64", "bfloat16 autocast", "float16 autocast")
    tiles: str = "not needed: memory grows with the number of pixels only"

    def __new__(cls, *args: Any, **arguments: Any) -> Self:
        """Records the arguments of the call for `config`, so that no constructor has to list them a second time."""
        model = super().__new__(cls)
        model.__dict__["_arguments"] = args, arguments
        return model

    def __init__(self, *, scale: int, intensity: str = "p99.9", **named_again: Any) -> None:
        args, arguments = self.__dict__.pop("_arguments")
        super().__init__()
        name = type(self).__name__
        if is_integer(scale):
            scale = operator.index(scale)  # numpy's integers
        if not isinstance(scale, int) or isinstance(scale, bool) or not 1 <= scale <= 16:
            raise InvalidArgument(f"{name}: scale must be an integer from 1 to 16, not {shown(scale)}")
        if not isinstance(intensity, str):
            raise InvalidType(f'{name}: intensity must be the name of a rule such as "p99.9", not {shown(intensity)}')
        given = _bound(type(self), args, arguments)
        given = {key: given[key] for key in ("scale", "intensity") if key in given} | given  # these two first
        self.config: dict[str, Any] = {}
        self._not_plain: dict[str, Any] = {}  # arguments of a user's class that cannot be stored in a file
        for key, value in given.items():
            try:
                # through JSON, so that a tuple is a list before it is saved as well as after
                self.config[key] = json.loads(json.dumps(value, allow_nan=False, default=_plain))
            except TypeError:
                self._not_plain[key] = value
            except ValueError as error:
                raise InvalidArgument(
                    f"{name}: arguments must be plain values that JSON can hold: {key}: {error}"
                ) from error
        try:
            check_config(self.config)
        except WeightsError as error:
            raise InvalidArgument(f"{name}: arguments must be plain values that JSON can hold: {error}") from error
        for key in named_again.keys() & self._not_plain.keys():
            raise InvalidArgument(
                f"{name}: arguments must be plain values that JSON can hold, not {key}={shown(given[key])}"
            )
        mistyped = _mistyped(type(self), {**self.config, **self._not_plain})
        if mistyped:
            raise InvalidArgument(f"{name}: {mistyped}")
        for key, value in self.config.items():
            if key.endswith(("channels", "width")) and isinstance(value, int) and value < 1:
                raise InvalidArgument(f"{name}: {key} must be at least 1, not {value}")
        self.scale = scale
        self.intensity = intensity
        self.provenance: dict[str, Any] = {}
        self.source: str | None = None
        self.sha256: str | None = None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Model:
        """The model of a checkpoint, in eval mode.

        Args:
            name: a manifest name, a path, or `org/repo[@commit]`.
            device: where to put it; the CPU if None.
            dtype: of its weights, as in `Module.to`; float32 if None. For float16 and bfloat16 keep float32 weights and
                run the model under `torch.autocast`, unless `supports_half` or `supports_bfloat16` is True.
            revision, cache_dir, token, local_files_only, force_download: see `deformmamba.weights.load_checkpoint`.

        Raises:
            WeightsError: no such weights, an unusable file, or a checkpoint of another class than this one.
            InvalidArgument: the device is not available, or the model does not support the dtype.
        """
        checkpoint = load_checkpoint(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls.from_checkpoint(checkpoint).placed(device, dtype)

    @classmethod
    def from_checkpoint(cls: type[Model], checkpoint: Checkpoint) -> Model:
        """The model of a checkpoint that was read already, in eval mode.

        The model is first built on the meta device, where a tensor needs no memory, and every name, shape and dtype is
        compared with the file. Only then does it get copies of the file's tensors as its weights. A config that needs
        more tensors than the file contains is refused before anything is allocated.

        Raises:
            WeightsError: the checkpoint's class is neither this one nor derived from it, no model can be built from
                its config, or its tensors are not exactly the model's.
        """
        # the first of a name, so that a class derived from it under the same name does not replace it
        found = next((family for family in _family(cls) if family.__name__ == checkpoint.class_name), None)
        if found is None:
            raise WeightsError(
                f"{checkpoint.source} holds a {checkpoint.class_name}, not a {cls.__name__}; load it with "
                f"{checkpoint.class_name}.from_pretrained or deformmamba.from_pretrained"
            )
        mistyped = _mistyped(found, checkpoint.config)
        if mistyped:
            raise WeightsError(f"{checkpoint.source}: its config does not build a {checkpoint.class_name}: {mistyped}")
        n = len(checkpoint.tensors)  # a constructor that registers far more needs more than the file contains
        try:
            with limited_registration(parameters=2 * n + 64, buffers=2 * n + 64, modules=8 * n + 256):
                model = _built(found, checkpoint.config, "meta")
        except Exception as error:  # a constructor may raise anything for unintended arguments
            raise WeightsError(
                f"{checkpoint.source}: its config does not build a {checkpoint.class_name}: {one_line(error)}"
            ) from error
        problem = _difference(model, checkpoint.tensors)
        if problem:
            raise WeightsError(f"{checkpoint.source}: its tensors are not those of its config: {problem}")
        unstored = [buffer for buffer in _unstored(model) if buffer.is_meta]
        if unstored:
            n_bytes = sum(buffer.numel() * buffer.element_size() for buffer in unstored)
            if n_bytes > MAX_BUFFERS:
                raise WeightsError(
                    f"{checkpoint.source}: its config asks for {n_bytes} bytes of tables beside the weights; at most "
                    f"{MAX_BUFFERS} are allowed"
                )
            model = _built(found, checkpoint.config, "cpu")
        _load(model, checkpoint.tensors)
        model.provenance = copy.deepcopy(checkpoint.provenance)
        model.source = checkpoint.source
        model.sha256 = checkpoint.sha256
        return model.eval()

    def load_initial(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights that a training of this network starts from.

        Raises:
            RuntimeError: names or shapes that are not this network's.
        """
        self.load_state_dict(weights, strict=True)

    def save_pretrained(self, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None) -> str:
        """Writes the model and returns the file's sha256.

        Args:
            path: ends in .safetensors: that one file, which is replaced if it exists. Otherwise a folder, which gets
                `model.safetensors` and `config.json` as the Hub expects them. Former ones of this package are replaced;
                those of another program are not.
            provenance: facts about the weights that JSON can represent; by default, those of the loaded weights.

        Raises:
            WeightsError: the path cannot be written, the folder holds files of another program, or the model differs
                from the one that its config builds (half precision, added or removed layers, NaN), so it could not be
                loaded again.
        """
        check_types(SRModel.save_pretrained, locals())
        if not os.fspath(path):
            raise WeightsError("the path is empty; give a folder, or a file name ending in .safetensors")
        if provenance is not None and not isinstance(provenance, Mapping):
            raise WeightsError(f"provenance must be a dictionary, not a {type(provenance).__name__}")
        self.check_savable()
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        return write_checkpoint(
            path,
            class_name=type(self).__name__,
            config=self.config,
            tensors=tensors,
            provenance=self.provenance if provenance is None else provenance,
        )

    def check_savable(self) -> None:
        """Checks, without a look at the values, that a saved file could be loaded again.

        `fit` calls it before the first step, so that a training does not end without a file.

        Raises:
            WeightsError: the weights have no values, or the config does not build this model: a constructor that needs
                values of tensors, an argument that JSON cannot represent, half precision, added or removed layers.
        """
        name = type(self).__name__
        if any(tensor.is_meta for tensor in self.state_dict().values()):
            raise WeightsError(f'{name} cannot be saved: on the device "meta" weights have no values')
        for key, value in self._not_plain.items():
            raise WeightsError(
                f"{name} cannot be saved: its argument {key} is a {type(value).__name__}; a checkpoint holds numbers, "
                "texts, and lists and dictionaries of them"
            )
        try:
            fresh = _built(type(self), self.config, "meta")
        except Exception as error:  # a constructor may raise anything where tensors have no values
            raise WeightsError(
                f"{name} cannot be saved: its constructor must work on the meta device, where tensors have no values, "
                f"but it raised {type(error).__name__}: {one_line(error)}; change it, and meanwhile save the weights "
                "with torch.save(model.state_dict(), FILE)"
            ) from error
        if problem := _difference(fresh, {name: tensor.detach() for name, tensor in self.state_dict().items()}):
            raise WeightsError(f"{name} cannot be saved as its config describes it: {problem}")

    def push_to_hub(self, repo: str, *, private: bool = False, dry_run: bool = False, **options: Any) -> Published:
        """Saves the model and uploads it with its card as one commit to the Hub repository `repo` ("org/name").

        Arguments and errors as in `deformmamba.weights.publish`, which does the same for a file.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return publish(folder, repo, private=private, dry_run=dry_run, **options)

    def placed(self: Model, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """The model itself, moved to `device` and `dtype` as `Module.to` does; None changes nothing.

        Raises:
            InvalidArgument: the device is not available, or the model does not support the dtype.
        """
        name = type(self).__name__
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise InvalidType(f"{name}: dtype must be a torch.dtype such as torch.float32, not {shown(dtype)}")
        if dtype is not None and str(dtype).removeprefix("torch.") not in self.precisions:
            raise InvalidArgument(
                f"{name} does not run in {dtype}; it runs in {', '.join(self.precisions)} (autocast: weights stay in "
                "float32, and the call stands under torch.autocast)"
            )
        try:
            return self.to(device=device, dtype=dtype)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            check_device(device)
            raise InvalidArgument(f"{name} cannot be put on device {shown(str(device))}: {one_line(error)}") from None

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU for a model without weights, which follows its input."""
        return next((tensor.device for tensor in self._floats()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; float32 for a model without weights, which follows its input."""
        return next((tensor.dtype for tensor in self._floats()), torch.float32)

    def _floats(self) -> Iterator[torch.Tensor]:
        return (x for x in itertools.chain(self.parameters(), self.buffers()) if x.is_floating_point())

    @property
    def supports_half(self) -> bool:
        """Whether `forward` runs with weights and images in float16; see `precisions` for autocast."""
        return "float16" in self.precisions

    @property
    def supports_bfloat16(self) -> bool:
        """Whether `forward` runs with weights and images in bfloat16; see `precisions` for autocast."""
        return "bfloat16" in self.precisions

    def extra_repr(self) -> str:
        """The first line of the model's repr: name, scale, size, and the voxel sizes of its training data."""
        n = self.num_parameters()
        parts = [f"{shown(self.source)}"] if self.source else []
        parts += [f"{self.scale}x", f"{n / 1e6:.2f} M parameters" if n >= 10_000 else f"{n} parameters"]
        trained = self.provenance.get("spacings_mm")
        if isinstance(trained, list) and len(trained) == 2 and all(isinstance(x, int | float) for x in trained):
            parts.append(f"trained on pixels of {pixel_range(*trained)}")
        return ", ".join(parts)

    def num_parameters(self) -> int:
        """The number of elements of all parameters, trainable or frozen."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def consistency(self) -> Consistency:
        """The data consistency that was best for these weights on validation data; the default of `upscale`."""
        return stored_consistency(self.provenance.get("consistency"))

    @property
    def info(self) -> dict[str, Any]:
        """Facts to check before using the model on an image; `spacings_mm`: voxel sizes of the training data."""
        return {
            "class": type(self).__name__,
            "scale": self.scale,
            "channels": self.channels,
            "grid": self.grid,
            "minimum_size": self.minimum_size,
            "multiple": self.multiple,
            "precisions": list(self.precisions),
            "supports_half": self.supports_half,
            "supports_bfloat16": self.supports_bfloat16,
            "tiles": self.tiles,
            "intensity": self.intensity,
            "parameters": self.num_parameters(),
            "spacings_mm": self.provenance.get("spacings_mm"),
            "source": self.source,
        }

    def whole_slice(self, lr: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arguments of `forward` that depend on the WHOLE slices `lr` (b, c, h, w), for callers that cut tiles.

        A tile gets the matching part of "base" (b, c, scale * h, scale * w), and all other arguments unchanged.
        """
        if self.grid != "origin":
            return {}
        return {"base": zero_fill(lr.to(torch.promote_types(lr.dtype, torch.float32)), self.scale)}

    def check_lr(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> None:
        """Checks the arguments of `forward`, and in eval mode warns if a network gets images far from [0, 1].

        `base`: None, or the part of an image of the whole slice that matches `lr`: (b, c, scale * h, scale * w).

        Raises:
            TypeError: not a floating-point tensor, a dtype that does not go with that of the weights, or weights in a
                half precision that the model does not support.
            ValueError: `lr` is not (b, c, h, w), empty, of another channel count, or smaller than `minimum_size`; or
                `base` has another shape.
        """
        name = type(self).__name__
        if not isinstance(lr, torch.Tensor) or not lr.is_floating_point():
            given = lr.dtype if isinstance(lr, torch.Tensor) else type(lr).__name__
            raise InvalidType(f"{name}: the image must be a floating-point tensor, not {given}; see volume.normalise")
        if lr.ndim != 4:
            raise InvalidArgument(f"{name}: the image must be (batch, channel, height, width), not {tuple(lr.shape)}")
        if not lr.numel():
            raise InvalidArgument(f"{name}: the image is empty, {tuple(lr.shape)}")
        if self.channels is not None and lr.shape[1] != self.channels:
            raise InvalidArgument(f"{name}: the image has {lr.shape[1]} channels; the model takes {self.channels}")
        if min(lr.shape[-2:]) < self.minimum_size:
            raise InvalidArgument(
                f"{name}: the image is {lr.shape[-2]}x{lr.shape[-1]}; wanted at least "
                f"{self.minimum_size}x{self.minimum_size}; pad it and crop the result"
            )
        b, c, h, w = lr.shape
        check_part(name, "base", base, (b, c, self.scale * h, self.scale * w))
        self._check_precision(lr)
        linear = next(self.parameters(), None) is None  # interpolation takes any unit
        if self.training or self.any_intensity or linear or not has_values(lr):
            return
        if lr.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        peak = float(lr.detach().abs().amax())
        if not peak <= FAR_OUTSIDE:
            warnings.warn(
                f"{name}: the image reaches {peak:.4g}, but models expect about [0, 1]; divide it by "
                f"volume.intensity_scale(lr, {self.intensity!r}) and multiply the result",
                stacklevel=5,  # the model's caller, above forward and two frames of nn.Module
            )

    def _check_precision(self, lr: torch.Tensor) -> None:
        """Raises InvalidType where PyTorch would raise, or compute in a precision that the model does not support."""
        if torch.compiler.is_compiling():
            return
        weights = next((x.dtype for x in self.parameters() if x.is_floating_point()), None)
        if weights is None:
            return
        name, own, given = type(self).__name__, *(str(dtype).removeprefix("torch.") for dtype in (weights, lr.dtype))
        if own not in self.precisions and own in ("float16", "bfloat16"):
            raise InvalidType(
                f"{name}: the weights are {own}, in which this model does not run: it runs in "
                f"{', '.join(self.precisions)}; call model.float(), and for half precision use torch.autocast"
            )
        computed = torch.promote_types(lr.dtype, torch.float32) if self.any_intensity else lr.dtype
        if weights in (computed, lr.dtype):
            return
        if in_autocast(lr.device.type) and torch.float64 not in (weights, lr.dtype):
            return
        raise InvalidType(
            f"{name}: the image is {given} and the weights are {own}; convert it first: lr.to(model.dtype)"
        )


def check_part(name: str, argument: str, value: object, shape: Sequence[int]) -> None:
    """Checks that `value`, given to the model `name` as `argument`, is None or a real floating-point tensor of `shape`.

    Raises:
        InvalidType, InvalidArgument: it is neither.
    """
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        raise InvalidType(f"{name}: {argument} must be a tensor of shape {tuple(shape)}, not {shown(value)}")
    if not value.is_floating_point():
        raise InvalidType(f"{name}: {argument} is {value.dtype}; wanted a real floating-point tensor")
    if value.shape != tuple(shape):
        raise InvalidArgument(f"{name}: {argument} is {tuple(value.shape)}; wanted {tuple(shape)}")


def check_scale_of_shuffles(model: SRModel) -> None:
    """Checks the scale of a network that upsamples by pixel shuffles of 2, or by one of 3.

    Raises:
        InvalidArgument: the scale is neither a power of 2 nor 3.
    """
    if model.scale & (model.scale - 1) and model.scale != 3:
        raise InvalidArgument(f"{type(model).__name__}: scale must be a power of two or 3, not {model.scale}")


def _family(cls: type[Model]) -> Iterator[type[Model]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)


def _bound(cls: type[nn.Module], args: Sequence[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every argument of the constructor of `cls`, by name: those given and the defaults of the others.

    Arguments that a subclass passes on as `**rest` are separate entries.
    """
    signature = inspect.signature(cls.__init__)
    bound = signature.bind(None, *args, **arguments)
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise InvalidType(f"{cls.__name__}: constructors take every argument by name, not as *{parameter.name}")
        values |= value if parameter.kind is parameter.VAR_KEYWORD else {parameter.name: value}
    return values


def _plain(value: Any) -> list[Any] | int:
    """Sequences without a JSON type, such as a range, as lists; numpy's integers as int."""
    if isinstance(value, Sequence):
        return list(value)
    if hasattr(value, "__index__") and not isinstance(value, torch.Tensor):
        return operator.index(value)
    raise InvalidType(f"{shown(value)} is a {type(value).__name__}")


def _mistyped(cls: type[nn.Module], config: Mapping[str, Any]) -> str | None:
    """The first argument in `config` whose type differs from the annotation in the constructor of `cls`, or None."""
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:  # a user's class, whose annotations only type checkers can resolve
        return None
    for name, value in config.items():
        if name in hints and not fits(value, hints[name]):
            return f"{name} must be {described(hints[name])}, not {shown(value)}"
    return None


def _difference(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The first difference between `tensors` and the stored tensors of `model`, or None."""
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {word} ({', '.join(ascii(n)[:80] for n in names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, word in ((missing, "missing"), (extra, "too many"))
            if names
        ]
        return " and ".join(parts)
    for name, tensor in wanted.items():
        given = tensors[name]
        if given.shape != tensor.shape:
            return f"{name!r} is {tuple(given.shape)}, should be {tuple(tensor.shape)}"
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if given.dtype != dtype:
            return f"{name!r} is {given.dtype}, checkpoints hold {dtype}: call model.float() before saving"
    for first, *others in _tied(model):
        for name in others:
            # NaN, which equals nothing, has its own message
            if name in wanted and not torch.equal(*(tensors[n].cpu().nan_to_num() for n in (first, name))):
                return f"{first!r} and {name!r} are one parameter of the model, but have different values"
    return None


def _built(cls: type[Model], config: Mapping[str, Any], device: str) -> Model:
    """A new model; its tensors are on `device` unless the constructor names another one."""
    with torch.device(device):
        return cls(**copy.deepcopy(dict(config)))


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _load(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives the model copies of `tensors` in place of its own; a parameter with several names stays one parameter."""
    groups = _tied(model)
    with torch.inference_mode(False):  # otherwise the weights could never be trained
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(copies, strict=True, assign=True)
    for first, *others in groups:
        parameter = model.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)


def _unstored(model: nn.Module) -> Iterator[torch.Tensor]:
    stored = model.state_dict()
    return (buffer for name, buffer in model.named_buffers() if name not in stored)
