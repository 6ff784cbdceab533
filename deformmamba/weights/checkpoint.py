"""Checkpoint files: safetensors with the model class and config, validated when read and written atomically.

A checkpoint is a safetensors file whose header metadata holds four strings: `format` ("deformmamba-1"), `class` (a name
in `deformmamba.models.MODELS`), `config` (JSON, the constructor's arguments) and `provenance` (JSON, the source of the
weights). A folder, as on the Hub, contains this file as `model.safetensors`, and a readable copy of class and config as
`config.json`; if the two disagree, the folder is refused.

Reading never executes content of a checkpoint and validates everything: a hash is compared before parsing, the header
has a size limit and must describe every byte of the file, and every fault raises a one-line `WeightsError`. Pickle is
not supported. This module does not import models, and imports torch only to make or write tensors.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deformmamba import atomic
from deformmamba.errors import DeformMambaError, InvalidArgument, one_line, shown
from deformmamba.weights.cards import checkpoint_card, is_generated

if TYPE_CHECKING:
    import torch

FORMAT = "deformmamba-1"
_FAMILY = "deformmamba-"  # of the formats of all versions
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"

# Limits, in bytes unless noted otherwise; the `paper` preset has a header of about 0.1 MB.
MAX_FILE = 4 << 30
MAX_HEADER = 4 << 20
MAX_CONFIG = 1 << 14
MAX_CONFIG_FILE = 2 * MAX_CONFIG
MAX_PROVENANCE = 1 << 18
MAX_DEPTH = 8  # nesting levels of lists and objects
MAX_ITEMS = 1 << 12  # characters of a text, or items of a list or object
MAX_CONFIG_ITEMS = 1 << 6
MAX_CONFIG_INT = 1 << 16

# safetensors' names: torch's name, bytes
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar", ".npz", ".npy", ".joblib", ".zip")
CONVERT = (
    "only safetensors is read, because loading a pickle can run code; if you trust the file, build the model, fill it "
    "with model.load_state_dict(torch.load(FILE, weights_only=True)) and call model.save_pretrained(FOLDER)"
)


class WeightsError(DeformMambaError):
    """Weights cannot be found, trusted, read or written; the one-line message includes the next step."""

    def __init__(self, message: str) -> None:
        super().__init__("\\n".join(message.splitlines()))  # a path or a name may contain line breaks


@dataclass(frozen=True)
class Checkpoint:
    """The checked content of a checkpoint file; not yet a model."""

    class_name: str
    config: dict[str, Any]
    tensors: "dict[str, torch.Tensor]"
    provenance: dict[str, Any]
    sha256: str
    source: str  # the path, manifest name or org/repo@commit it came from


def read_checkpoint(path: str | os.PathLike[str], *, digest: str | None = None) -> Checkpoint:
    """Reads one checkpoint: a .safetensors file, or a folder that holds `model.safetensors`.

    `digest`: the expected hexadecimal SHA-256 of the file, or its git blob SHA-1; compared before anything in the file
    is parsed.

    Raises:
        WeightsError: no such file, a pickle, a wrong hash, or anything malformed or out of bounds in the file.
    """
    path = Path(os.path.expanduser(path))
    with _disk("read", path):
        folder = path if path.is_dir() else None
        file = path if folder is None else _weights_in(folder)
        checkpoint = _parse(_read_bytes(file, digest), str(file))
        if folder is not None and (folder / CONFIG_FILE).exists():
            _compare_config(checkpoint, folder / CONFIG_FILE)
    return checkpoint


def write_checkpoint(
    path: str | os.PathLike[str],
    *,
    class_name: str,
    config: Mapping[str, Any],
    tensors: "Mapping[str, torch.Tensor]",
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Writes one checkpoint and returns its sha256; equal contents give equal bytes.

    A `path` that ends in .safetensors is a file, which is replaced if it exists. Any other path is a folder, created if
    necessary, for `model.safetensors`, `config.json` and the model card `README.md` (a card written by a person is
    kept). Files of these names that another program wrote are never replaced. Each file appears complete or not at all:
    it is written under another name in the same folder and renamed.

    Raises:
        WeightsError: the path cannot be written, it is a folder with files of another program, or the contents would
            not be read back (see `check_config`).
    """
    path = Path(os.path.expanduser(path))  # as `load_checkpoint`
    data = _serialise(class_name, config, tensors, provenance or {})
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() == ".safetensors":
        if os.path.isdir(path):
            raise WeightsError(
                f"{path} is a folder; give a file name, or a folder name that does not end in .safetensors"
            )
        write_bytes(path, data)
    else:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise WeightsError(f"{path}: checkpoints are safetensors; name a folder or a file ending in .safetensors")
        with _disk("make the folder", path, "; choose another one"):  # a name that no file can have
            name = path.resolve().name
            _check_replaceable(path)
        files = {WEIGHTS_FILE: data, CONFIG_FILE: config_json(class_name, config)}
        own = read_card(path)
        if not os.path.exists(path / CARD_FILE) or (own is not None and is_generated(own)):
            from deformmamba.weights import terms_of  # which imports this module

            stated = dict(provenance or {})
            stated |= terms_of(digest, stated)  # the headers of published files lack them
            facts: dict[str, Any] = {"class_name": class_name, "config": config, "size": len(data)}
            text = checkpoint_card(name, **facts, provenance=stated, sha256=digest)
            # a name may hold bytes that are not UTF-8
            files[CARD_FILE] = text.encode("utf-8", "backslashreplace")
        write_files(path, files)
    return digest


def read_card(folder: Path) -> str | None:
    """The text of the model card in a folder; None if it is missing or unreadable."""
    try:
        return (folder / CARD_FILE).read_text("utf-8")
    except (OSError, ValueError):  # ValueError: no UTF-8, or a NUL in the path
        return None


def config_json(class_name: str, config: Mapping[str, Any]) -> bytes:
    """The text of the `config.json` beside `model.safetensors`, with the same class and config as its header."""
    beside = {"format": FORMAT, "class": class_name, "config": dict(config)}
    text = json.dumps(beside, indent=2)
    if len(text) >= MAX_CONFIG_FILE:  # nested lists of numbers take several times more with one number per line
        text = json.dumps(beside)
    return (text + "\n").encode()


def _check_replaceable(folder: Path) -> None:
    """Refuses a folder whose `config.json` or `model.safetensors` was not written by this package.

    A damaged file is replaced only if its beginning still shows that this package wrote it; an empty one has nothing to
    lose.
    """
    for name, is_own in ((CONFIG_FILE, _is_own_config), (WEIGHTS_FILE, _is_own_file)):
        path = folder / name
        if path.is_file() and path.stat().st_size and not is_own(path):
            raise WeightsError(
                f"{folder} holds another {name}, which would be replaced; give a new or empty folder, or remove the "
                "file"
            )


def _is_own_config(path: Path) -> bool:
    with open(path, "rb") as file:
        text = file.read(MAX_CONFIG_FILE).decode("utf-8", "replace")
    # the beginning that `config_json` writes, in any spacing; the rest may be damaged
    return re.match(rf'\s*{{\s*"format"\s*:\s*"{_FAMILY}', text) is not None or _has_own_format(text.encode())


def _is_own_file(path: Path) -> bool:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MAX_HEADER else b""
    return _has_own_format(header, "__metadata__")


def _has_own_format(text: bytes, *keys: str) -> bool:
    """Whether the JSON object, or the one under the key, has a format of this package, of whatever version."""
    try:
        found = json.loads(text)
        for key in keys:
            found = found[key]
        return str(found["format"]).startswith(_FAMILY)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Writes files of the given names into a folder, created if necessary; each appears complete or not at all.

    Raises:
        WeightsError: the folder or a file in it cannot be written.
    """
    folder = Path(folder)
    with _disk("make the folder", folder, "; choose another one"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)


def check_config(config: Any, what: str = "config") -> None:
    """Checks that `config` is plain data of limited size, so that it is safe to build a model from it.

    `config` is a dict of argument names. Its values are None, bool, int within +-65536, finite float, str, or lists and
    dicts of at most 64 of these. Its JSON has at most 16 KiB.

    Raises:
        WeightsError: an entry is not allowed; the message names the first one.
    """
    if not isinstance(config, dict):
        raise WeightsError(f"{what} must be a JSON object of constructor arguments, not {type(config).__name__}")
    for key in config:
        if not (isinstance(key, str) and key.isidentifier() and len(key) <= 64):
            raise WeightsError(f"{what} has a key that is not an argument name: {shown(key)}")
    _check_plain(config, what, items=MAX_CONFIG_ITEMS, largest=MAX_CONFIG_INT)
    if len(json.dumps(config)) > MAX_CONFIG:
        raise WeightsError(f"{what} takes more than {MAX_CONFIG} bytes of JSON, far more than any model's arguments")


def _check_plain(value: Any, where: str, items: int = MAX_ITEMS, largest: int = 1 << 63, depth: int = 0) -> None:
    """Refuses a value that is not plain JSON data within the limits; `where` is its name in messages."""
    if depth > MAX_DEPTH:
        raise WeightsError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, (list, dict)):
        if len(value) > items:
            raise WeightsError(f"{where} has {len(value)} items; at most {items} are allowed")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                raise WeightsError(f"{where} has the key {shown(key)}; JSON keys are texts")
            _check_plain(item, f"{where}[{shown(key)}]", items, largest, depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_ITEMS:
            raise WeightsError(f"{where} is a text of {len(value)} characters; at most {MAX_ITEMS} are allowed")
    elif isinstance(value, (int, float)):
        if not abs(value) <= (largest if isinstance(value, int) else sys.float_info.max):
            raise WeightsError(f"{where} is {shown(value)}; integers lie within +-{largest}, and numbers are finite")
    elif value is not None:
        raise WeightsError(f"{where} is a {type(value).__name__}; only JSON values can be stored")


def _serialise(
    class_name: str, config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]", provenance: Mapping[str, Any]
) -> bytes:
    # safetensors' own writer orders the metadata randomly, so equal models would get different sha256s
    import torch

    names = {getattr(torch, name): code for code, (name, _) in _DTYPES.items()}
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in names or tensor.layout != torch.strided or tensor.is_meta:
            raise WeightsError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be stored")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(f"tensor {name!r} holds NaN or infinity and could not be read again")
        arrays[name] = tensor.detach().cpu().contiguous()
    check_config(dict(config))
    _check_plain(dict(provenance), "provenance")
    described = {
        "format": FORMAT,
        "class": class_name,
        "config": json.dumps(dict(config)),
        "provenance": json.dumps(dict(provenance)),
    }
    header: dict[str, Any] = {"__metadata__": described}
    # wide types first: every tensor then starts at a multiple of its own item size
    order = sorted(arrays, key=lambda name: (-arrays[name].element_size(), name))
    end = 0
    for name in order:
        start, end = end, end + arrays[name].numel() * arrays[name].element_size()
        array = arrays[name]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER or len(described["provenance"]) > MAX_PROVENANCE:
        raise WeightsError(f"header of {len(text)} bytes is over the limit of {MAX_HEADER}; shorten the provenance")
    body = (
        arrays[name].reshape(-1).view(torch.uint8).numpy().tobytes() if arrays[name].numel() else b"" for name in order
    )
    data = b"".join([len(text).to_bytes(8, "little"), text, *body])
    try:
        _checked_header(data)
    except WeightsError as error:
        raise WeightsError(f"the checkpoint could not be read again: {error}") from error.__cause__
    return data


def _read_bytes(path: Path, digest: str | None) -> bytes:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise WeightsError(f"{path} is a {path.suffix} file; {CONVERT}")
    if not path.exists():
        raise WeightsError(f"there is no file {path}; give a checkpoint's path, a name or org/repo")
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    if path.stat().st_size > MAX_FILE:
        raise WeightsError(f"{path} has {path.stat().st_size} bytes; more than {MAX_FILE} are not read")
    data = path.read_bytes()
    if digest is not None:
        is_git = len(digest) == 40
        found = hashlib.sha1(b"blob %d\0" % len(data) + data) if is_git else hashlib.sha256(data)
        if found.hexdigest() != digest:
            raise WeightsError(
                f"{path} has {'git blob SHA-1' if is_git else 'sha256'} {found.hexdigest()}, but {digest} was "
                f"expected: the file is damaged or is another one; delete {path.resolve()} and fetch it again"
            )
    return data


def _parse(data: bytes, source: str) -> Checkpoint:
    try:
        class_name, config, provenance = _checked_header(data)
        tensors = _tensors(data)
    except WeightsError as error:
        raise WeightsError(f"{source} is not a usable checkpoint: {error}") from error.__cause__
    return Checkpoint(class_name, config, tensors, provenance, hashlib.sha256(data).hexdigest(), source)


def _checked_header(data: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Class, config and provenance, after everything but the values of the tensors is checked."""
    header = _header(data)
    described = _described(header.pop("__metadata__", None))
    _check_layout(header, len(data) - 8 - int.from_bytes(data[:8], "little"))
    if len(data) > MAX_FILE:
        raise WeightsError(f"it has {len(data)} bytes; more than {MAX_FILE} are not read")
    return described


def _header(data: bytes) -> dict[str, Any]:
    """The JSON header of a safetensors file, as a dict that is not validated yet."""
    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[1:2] <= b"\x05" and data[8:9] != b"{"):
        raise WeightsError(f"it is a pickle or zip archive, not safetensors; {CONVERT}")
    if data.startswith(b"version https://git-lfs"):
        raise WeightsError("it is a pointer of Git LFS, without the weights; run git lfs pull")
    if len(data) < 8:
        raise WeightsError(f"it has only {len(data)} bytes; fetch it again")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise WeightsError(f"its header claims {length} bytes; at most {MAX_HEADER} are allowed (is it safetensors?)")
    if length > len(data) - 8:
        raise WeightsError(
            f"it ends inside its header ({length} bytes announced, {len(data) - 8} there); fetch it again"
        )
    header = _load_json(data[8 : 8 + length], "header")
    if not isinstance(header, dict):
        raise WeightsError("its header is not a JSON object")
    return header


def _described(metadata: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Class, config and provenance from the header's metadata."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError("its header has no text metadata; a state dict alone does not identify its model")
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"its format is {shown(metadata.get('format'))}, this version reads {FORMAT!r}; it may belong to another "
            f"program or to a newer deformmamba"
        )
    missing = {"class", "config", "provenance"} - set(metadata)
    if missing:
        raise WeightsError(f"its header lacks {', '.join(sorted(missing))}")
    class_name = metadata["class"]
    if not (class_name.isidentifier() and class_name.isascii() and len(class_name) <= 64):
        raise WeightsError(f"its class is {shown(class_name)}, which is not a class name")
    for key, limit in (("config", MAX_CONFIG), ("provenance", MAX_PROVENANCE)):
        if len(metadata[key]) > limit:
            raise WeightsError(f"its {key} takes {len(metadata[key])} bytes; at most {limit} are allowed")
    config = _load_json(metadata["config"].encode("utf-8", "surrogatepass"), "config")
    check_config(config)
    provenance = _load_json(metadata["provenance"].encode("utf-8", "surrogatepass"), "provenance")
    if not isinstance(provenance, dict):
        raise WeightsError("its provenance is not a JSON object")
    _check_plain(provenance, "provenance")
    return class_name, config, provenance


def _check_layout(header: dict[str, Any], n_bytes: int) -> None:
    """Checks that the tensors fill the `n_bytes` after the header exactly: no gap, no overlap, nothing left over."""
    spans = []
    for name, entry in header.items():
        if not (isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}):
            raise WeightsError(f"tensor {shown(name)} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and dtype in _DTYPES):
            raise WeightsError(f"tensor {shown(name)} has dtype {shown(dtype)}; allowed are {', '.join(_DTYPES)}")
        if not (_naturals(shape) and len(shape) <= 8):
            raise WeightsError(f"tensor {shown(name)} has shape {shown(shape)}, which is not a shape")
        if not (_naturals(offsets) and len(offsets) == 2):
            raise WeightsError(f"tensor {shown(name)} has data_offsets {shown(offsets)}, which are not two offsets")
        if math.prod(shape) * _DTYPES[dtype][1] != offsets[1] - offsets[0]:
            raise WeightsError(f"tensor {shown(name)}: {dtype} {shown(shape)} does not fill bytes {shown(offsets)}")
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise WeightsError(f"tensor {shown(name)} starts at byte {start} of the data, not at {end}")
        end = stop
    if end != n_bytes:
        raise WeightsError(f"its header describes {end} bytes of tensors, but {n_bytes} are present; fetch it again")


def _tensors(data: bytes) -> "dict[str, torch.Tensor]":
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise WeightsError(f"safetensors refuses it: {one_line(error)}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(
                f"tensor {shown(name)} holds NaN or infinity; the file is damaged or its training failed"
            )
    return tensors


def _load_json(text: bytes, what: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len({key for key, _ in pairs}):
            raise InvalidArgument("a key occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> float:
        raise InvalidArgument(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"its {what} is not valid JSON: {one_line(error)}") from error


def _compare_config(checkpoint: Checkpoint, path: Path) -> None:
    """Checks that a config.json agrees with the header of the weights beside it."""
    if path.stat().st_size > MAX_CONFIG_FILE:
        raise WeightsError(f"{path} has {path.stat().st_size} bytes, far more than any model's arguments take")
    try:
        beside = _load_json(path.read_bytes(), "content")
        _check_plain(beside, "content", depth=-1)  # the config is one level deeper than in the header
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error.__cause__
    said = {"format": FORMAT, "class": checkpoint.class_name, "config": checkpoint.config}
    given = beside if isinstance(beside, dict) else {}
    for key, value in said.items():
        # as text, because 1 == True == 1.0 in Python
        if json.dumps(given.get(key), sort_keys=True) != json.dumps(value, sort_keys=True):
            raise WeightsError(
                f"{path} and the header of {WEIGHTS_FILE} beside it disagree on {key}: {shown(given.get(key))} and "
                f"{shown(value)}; the folder was changed after it was saved, fetch or save it again"
            )


def _weights_in(folder: Path) -> Path:
    """The checkpoint file of a folder."""
    path = folder / WEIGHTS_FILE
    if path.exists():
        return path
    if (folder / "best.safetensors").exists():
        raise WeightsError(f"{folder} is the folder of a training run; give {folder / 'best.safetensors'}")
    pickles = [p.name for p in sorted(folder.iterdir())[:1000] if p.suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        raise WeightsError(f"{folder} holds {shown(pickles[0])} but no {WEIGHTS_FILE}; {CONVERT}")
    raise WeightsError(
        f"{folder} holds no {WEIGHTS_FILE}; give a folder written by save_pretrained, or the file itself"
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Writes one file, which appears under its name complete or not at all.

    Raises:
        WeightsError: it cannot be written.
    """
    with _disk("write", path, "; choose a place that can be written"):
        atomic.write_bytes(path, data)


@contextlib.contextmanager
def _disk(verb: str, path: Path, cure: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or one_line(error)
        raise WeightsError(f"cannot {verb} {path}: {reason}{cure}") from error


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
