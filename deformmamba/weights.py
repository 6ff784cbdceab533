"""Checkpoints: one safetensors file that says what it is, and the ways to name one.

A checkpoint is a safetensors file whose header metadata holds four strings: `format` ("deformmamba-1"), `class` (a name
in `deformmamba.models.MODELS`), `config` (JSON, the constructor's arguments) and `provenance` (JSON, where the numbers
come from). A folder, as on the Hub, holds that file as `model.safetensors` and, for people, class and config once more
as `config.json`; if the two disagree the folder is refused.

Nothing in a checkpoint is ever run, and nothing is believed: the hash is compared before anything is parsed, the header
is bounded and must account for every byte of the file, and what is wrong ends in a `WeightsError` of one line. There is
no pickle path. This module never imports a model, and imports torch only to make or write tensors.
"""

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FORMAT = "deformmamba-1"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

# Bounds. The `paper` preset has a header of about 0.3 MB, and no argument of any model comes near MAX_INT.
MAX_FILE = 4 << 30
MAX_HEADER = 4 << 20
MAX_CONFIG = 1 << 14
MAX_PROVENANCE = 1 << 18
MAX_DEPTH = 8
MAX_LENGTH = 1 << 12
MAX_INT = 1 << 16

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar", ".npz", ".npy", ".joblib", ".zip")
_CONVERT = (
    "only safetensors is read, because loading a pickle can run code; if you trust the file, build the model, fill it "
    "with model.load_state_dict(torch.load(FILE, weights_only=True)) and call model.save_pretrained(FOLDER)"
)
_REPO = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


class WeightsError(Exception):
    """Weights that cannot be found, trusted, read or written; the message is one line with what to do next."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds, checked but not yet a model."""

    class_name: str
    config: dict[str, Any]
    tensors: "dict[str, torch.Tensor]"
    provenance: dict[str, Any]
    sha256: str
    source: str  # the path, manifest name or org/repo@commit it came from


# ------------------------------------------------------------------------------------------------ one file


def read_checkpoint(path: str | os.PathLike[str], *, sha256: str | None = None) -> Checkpoint:
    """Reads one checkpoint: a .safetensors file, or a folder that holds `model.safetensors`.

    `sha256`: what the file must hash to; compared before anything in the file is parsed.

    Raises:
        WeightsError: no such file, a pickle, a wrong hash, or anything malformed or out of bounds in the file.
    """
    path = Path(path)
    if path.is_dir():
        config_file, path = path / CONFIG_FILE, _weights_in(path)
        beside = _read_config_file(config_file) if config_file.exists() else None
    else:
        beside = None
    checkpoint = _parse(_read_bytes(path, sha256), str(path))
    if beside is not None:
        for key, said in (("class", checkpoint.class_name), ("config", checkpoint.config)):
            if not _same(beside.get(key), said):
                raise WeightsError(
                    f"{path}: its header and {CONFIG_FILE} beside it disagree on {key}: {_short(said)} and "
                    f"{_short(beside.get(key))}; the folder was changed after it was saved, fetch or save it again"
                )
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

    A `path` that ends in .safetensors is the file; any other is a folder, made if it is missing, that gets
    `model.safetensors` and `config.json`. Each file appears complete or not at all: it is written under another name
    in the same folder and renamed.

    Raises:
        WeightsError: the path cannot be written, or the contents would not be read back (see `check_config`).
    """
    path = Path(path)
    data = _serialise(class_name, config, tensors, provenance or {})
    if path.suffix == ".safetensors":
        if path.is_dir():
            raise WeightsError(
                f"{path} is a folder; give a file name, or a folder name that does not end in .safetensors"
            )
        _write_bytes(path, data)
    else:
        if path.suffix in _PICKLE_SUFFIXES:
            raise WeightsError(f"{path}: checkpoints are safetensors; name a folder or a file ending in .safetensors")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeightsError(f"cannot make the folder {path}: {_reason(error)}; choose another one") from error
        _write_bytes(path / WEIGHTS_FILE, data)
        beside = {"format": FORMAT, "class": class_name, "config": dict(config)}
        _write_bytes(path / CONFIG_FILE, (json.dumps(beside, indent=2) + "\n").encode())
    return hashlib.sha256(data).hexdigest()


def check_config(config: Any, what: str = "config") -> None:
    """Checks that `config` is plain data of a sane size, so that a model may be built from it.

    A dict of argument names; values None, bool, int within +-65536, finite float, str, and lists and dicts of these;
    at most 16 KiB of JSON, 8 levels and 4096 items a level.

    Raises:
        WeightsError: naming the first entry that is not.
    """
    if not isinstance(config, dict):
        raise WeightsError(f"{what} must be a JSON object of constructor arguments, not {type(config).__name__}")
    for key in config:
        if not (isinstance(key, str) and key.isidentifier() and len(key) <= 64):
            raise WeightsError(f"{what} has a key that is not an argument name: {_short(key)}")
    _check_plain(config, what, max_int=MAX_INT)
    if len(json.dumps(config)) > MAX_CONFIG:
        raise WeightsError(f"{what} takes more than {MAX_CONFIG} bytes of JSON, far more than any model's arguments")


def _check_plain(value: Any, where: str, *, max_int: int | None = None, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise WeightsError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if max_int is not None and abs(value) > max_int:
            raise WeightsError(f"{where} is {_short(value)}; integers in a config lie within +-{max_int}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise WeightsError(f"{where} is {value}; numbers must be finite")
    elif isinstance(value, str):
        if len(value) > MAX_LENGTH:
            raise WeightsError(f"{where} is a text of {len(value)} characters; at most {MAX_LENGTH} are allowed")
    elif isinstance(value, (list, dict)):
        if len(value) > MAX_LENGTH:
            raise WeightsError(f"{where} has {len(value)} items; at most {MAX_LENGTH} are allowed")
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            if isinstance(value, dict) and not isinstance(key, str):
                raise WeightsError(f"{where} has the key {_short(key)}; JSON keys are texts")
            _check_plain(item, f"{where}[{_short(key)}]", max_int=max_int, depth=depth + 1)
    else:
        raise WeightsError(f"{where} is a {type(value).__name__}; only JSON values can be stored")


def _serialise(
    class_name: str, config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]", provenance: Mapping[str, Any]
) -> bytes:
    # safetensors' own writer orders the metadata by a random hash, so the same model would get a new sha256 each time
    import torch

    names = {getattr(torch, name): code for name, code in _torch_dtypes().items()}
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in names or tensor.layout != torch.strided or tensor.is_meta:
            raise WeightsError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be stored")
        arrays[name] = tensor.detach().cpu().contiguous()
    check_config(dict(config))
    _check_plain(dict(provenance), "provenance")
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "class": class_name,
            "config": json.dumps(dict(config)),
            "provenance": json.dumps(dict(provenance)),
        }
    }
    # wide types first: every tensor then starts at a multiple of its own item size
    order = sorted(arrays, key=lambda name: (-arrays[name].element_size(), name))
    end = 0
    for name in order:
        start, end = end, end + arrays[name].numel() * arrays[name].element_size()
        array = arrays[name]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER or len(header["__metadata__"]["provenance"]) > MAX_PROVENANCE:
        raise WeightsError(f"header of {len(text)} bytes is over the limit of {MAX_HEADER}; shorten the provenance")
    body = (
        arrays[name].reshape(-1).view(torch.uint8).numpy().tobytes() if arrays[name].numel() else b"" for name in order
    )
    return b"".join([len(text).to_bytes(8, "little"), text, *body])


def _torch_dtypes() -> dict[str, str]:
    return {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint8": "U8",
        "bool": "BOOL",
    }


def _read_bytes(path: Path, sha256: str | None = None) -> bytes:
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise WeightsError(f"{path} is a {path.suffix} file; {_CONVERT}")
    try:
        if not path.exists():
            raise WeightsError(f"there is no file {path}; give a checkpoint's path, a name or org/repo")
        if not path.is_file():
            raise WeightsError(f"{path} is not a regular file")
        size = path.stat().st_size
        if size > MAX_FILE:
            raise WeightsError(f"{path} has {size} bytes; checkpoints of more than {MAX_FILE} are not read")
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {_reason(error)}") from error
    if sha256 is not None:
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise WeightsError(
                f"{path} has sha256 {found}, but {sha256} was expected: the file is damaged or is another one; "
                f"delete it and fetch it again"
            )
    return data


def _parse(data: bytes, source: str) -> Checkpoint:
    try:
        header = _header(data)
        metadata = header.pop("__metadata__", None)
        class_name, config, provenance = _described(metadata)
        _check_layout(header, len(data) - 8 - int.from_bytes(data[:8], "little"))
        tensors = _tensors(data)
    except WeightsError as error:
        raise WeightsError(f"{source} is not a usable checkpoint: {error}") from error.__cause__
    return Checkpoint(class_name, config, tensors, provenance, hashlib.sha256(data).hexdigest(), source)


def _header(data: bytes) -> dict[str, Any]:
    """The JSON header of a safetensors file, as a dict, before any of it is believed."""
    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[1:2] <= b"\x05" and data[8:9] != b"{"):
        raise WeightsError(f"it is a pickle or zip archive whatever its name says; {_CONVERT}")
    if len(data) < 8:
        raise WeightsError(f"it has only {len(data)} bytes")
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
    """Class, config and provenance of the header's metadata."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError("its header has no metadata of texts; a state dict alone does not say which model it fits")
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"its format is {_short(metadata.get('format'))}, this version reads {FORMAT!r}; it may belong to another "
            f"program or to a newer deformmamba"
        )
    missing = {"class", "config", "provenance"} - set(metadata)
    if missing:
        raise WeightsError(f"its header lacks {', '.join(sorted(missing))}")
    class_name = metadata["class"]
    if not (class_name.isidentifier() and len(class_name) <= 64):
        raise WeightsError(f"its class is {_short(class_name)}, which is not a class name")
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
            raise WeightsError(f"tensor {_short(name)} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and dtype in _BYTES):
            raise WeightsError(f"tensor {_short(name)} has dtype {_short(dtype)}; allowed are {', '.join(_BYTES)}")
        if not (_naturals(shape) and len(shape) <= 8):
            raise WeightsError(f"tensor {_short(name)} has shape {_short(shape)}, which is not a shape")
        if not (_naturals(offsets) and len(offsets) == 2):
            raise WeightsError(f"tensor {_short(name)} has data_offsets {_short(offsets)}, which are no two offsets")
        if math.prod(shape) * _BYTES[dtype] != offsets[1] - offsets[0]:
            raise WeightsError(f"tensor {_short(name)}: {dtype} {_short(shape)} does not fill bytes {_short(offsets)}")
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise WeightsError(f"tensor {_short(name)} starts at byte {start} of the data, not at {end}")
        end = stop
    if end != n_bytes:
        raise WeightsError(f"its header describes {end} bytes of tensors, but {n_bytes} are there; fetch it again")


def _tensors(data: bytes) -> "dict[str, torch.Tensor]":
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise WeightsError(f"safetensors refuses it: {_one_line(error)}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(
                f"tensor {_short(name)} holds NaN or infinity; the file is damaged or its training failed"
            )
    return tensors


def _load_json(text: bytes, what: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len({key for key, _ in pairs}):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"its {what} is not valid JSON: {_one_line(error)}") from error


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG * 2:
            raise WeightsError(f"{path} is larger than any model's arguments ({MAX_CONFIG * 2} bytes)")
        config = _load_json(path.read_bytes(), CONFIG_FILE)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {_reason(error)}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return config


def _weights_in(folder: Path) -> Path:
    """The checkpoint file of a folder."""
    path = folder / WEIGHTS_FILE
    if path.exists():
        return path
    pickles = [p.name for p in sorted(folder.iterdir())[:1000] if p.suffix.lower() in _PICKLE_SUFFIXES]
    if pickles:
        raise WeightsError(f"{folder} holds {pickles[0]} but no {WEIGHTS_FILE}; {_CONVERT}")
    raise WeightsError(
        f"{folder} holds no {WEIGHTS_FILE}; give a folder written by save_pretrained, or the file itself"
    )


def _write_bytes(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {_reason(error)}; choose a folder that can be written") from error


# ------------------------------------------------------------------------------------------------ names


def manifest() -> dict[str, Any]:
    """The manifest of published weights: {"format": 1, "weights": {name: entry}, "planned": {name: entry}}."""
    loaded: dict[str, Any] = json.loads(files("deformmamba").joinpath("weights_manifest.json").read_text("utf-8"))
    return loaded


def list_weights() -> list[dict[str, Any]]:
    """The entries of every published checkpoint, each with its `name`, in the manifest's order."""
    return [{"name": name, **entry} for name, entry in manifest()["weights"].items()]


def weights_entry(name: str) -> dict[str, Any]:
    """The manifest entry of one published checkpoint, with its `name`.

    Raises:
        WeightsError: no such weights; names the nearest and all, or says that they are planned and how to make them.
    """
    known = manifest()
    if name in known["weights"]:
        return {"name": name, **known["weights"][name]}
    names = ", ".join(known["weights"]) or "none yet"
    if name in known["planned"]:
        plan = known["planned"][name]
        raise WeightsError(
            f"no weights {name!r} exist yet ({plan['why']}); train them with {plan['recipe']}. Published: {names}"
        )
    near = difflib.get_close_matches(name, [*known["weights"], *known["planned"]], n=1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else ","
    raise WeightsError(
        f"unknown weights {_short(name)}{hint} published are: {names}; a path to a file or folder and org/repo work too"
    )


def load_checkpoint(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Finds and reads a checkpoint.

    `name` is, in this order: a path that exists (file or folder); a name of the manifest (the file that rides in the
    package, else the Hub repository and commit that the entry pins), its sha256 checked before it is parsed; or a Hub
    repository `org/repo` or `org/repo@commit` (a tag or branch works where a commit does; the file is checked against
    the Hub's own hash and `source` records the commit).

    `revision`: the same as `@commit`, for a Hub repository only. `cache_dir`, `local_files_only`: as in
    huggingface_hub; HF_HUB_OFFLINE=1 and HF_HOME work as they do there.

    Raises:
        WeightsError: whatever goes wrong, in one line.
    """
    text = os.fspath(name)
    if _exists(text):
        if revision is not None:
            raise WeightsError(f"revision {revision!r} was given, but {text} is a local path; leave the revision out")
        return read_checkpoint(Path(text).expanduser())
    match = _REPO.fullmatch(text)
    like_a_file = not isinstance(name, str) or text.lower().endswith((".safetensors", *_PICKLE_SUFFIXES))
    if like_a_file or (match is None and ("/" in text or os.sep in text)):
        raise WeightsError(f"there is no file or folder {_short(text)}; check the path, or give a name or org/repo")
    if match is None:
        return _load_named(text, revision, cache_dir, local_files_only)
    pinned = match["revision"]
    if pinned and revision and pinned != revision:
        raise WeightsError(f"{text} names one revision and revision={revision!r} another; give one of them")
    return _load_from_hub(match["repo"], pinned or revision, None, cache_dir, local_files_only)


def verify(name: str) -> str:
    """The sha256 of the packaged or cached file of a manifest name, after it was compared and the file was read.

    Raises:
        WeightsError: unknown name, missing file, wrong hash, or a file that cannot be read.
    """
    return _load_named(name, None, None, True).sha256


def card(entry: Mapping[str, Any]) -> str:
    """The model card of a manifest entry: Markdown with the front matter that the Hub reads."""
    front = {"license": entry.get("license", "other"), "library_name": "deformmamba", "pipeline_tag": "image-to-image"}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "tags: [mri, super-resolution]", "---", ""]
    lines += [f"# {entry['name']}", "", str(entry.get("summary", "")), ""]
    told = {"name", "summary", "license", "scores"}
    lines += [f"- **{key.replace('_', ' ')}**: {_prose(value)}" for key, value in entry.items() if key not in told]
    lines += [f"- **license**: {front['license']}", ""]
    if entry.get("scores"):
        lines += ["## Scores", ""]
        lines += [f"- {_prose(score)}" for score in entry["scores"]] + [""]
    lines += ["```python", "import deformmamba", f'model = deformmamba.from_pretrained("{entry["name"]}")', "```", ""]
    return "\n".join(lines)


def _load_named(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> Checkpoint:
    entry = weights_entry(name)
    if revision is not None:
        raise WeightsError(f"revision {revision!r} was given, but the manifest pins the file of {name!r}; leave it out")
    packaged = Path(str(files("deformmamba").joinpath("checkpoints", entry["file"])))
    if packaged.is_file():
        checkpoint = read_checkpoint(packaged, sha256=entry["sha256"])
    elif entry.get("repo") and entry.get("revision"):
        checkpoint = _load_from_hub(entry["repo"], entry["revision"], entry["sha256"], cache_dir, local_files_only)
    else:
        raise WeightsError(
            f"the file of {name!r}, {packaged}, is missing from this installation; reinstall deformmamba"
        )
    return Checkpoint(**{**vars(checkpoint), "source": name})


def _load_from_hub(
    repo: str,
    revision: str | None,
    sha256: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Checkpoint:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    cache = None if cache_dir is None else os.fspath(cache_dir)

    def fetch(file: str, revision: str | None) -> Path:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache, local_files_only=local_files_only))

    with _hub_errors(repo, revision):
        path = fetch(WEIGHTS_FILE, revision)
        commit = path.parent.name
        with contextlib.suppress(
            EntryNotFoundError
        ):  # config.json is for people; where it is missing nothing disagrees
            fetch(CONFIG_FILE, commit)
    # the cache names a file by the Hub's own hash of it: SHA-256 for a large file, git's SHA-1 for a small one
    blob = path.resolve().name
    if sha256 is None and re.fullmatch(r"[0-9a-f]{64}", blob):
        sha256 = blob
    data = _read_bytes(path, sha256)
    if re.fullmatch(r"[0-9a-f]{40}", blob) and hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != blob:
        raise WeightsError(
            f"{path} does not hash to the Hub's own {blob}: the file is damaged; delete it and fetch again"
        )
    checkpoint = read_checkpoint(path.parent)
    return Checkpoint(**{**vars(checkpoint), "source": f"{repo}@{commit}"})


@contextlib.contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turns whatever the Hub client raises into one line with a cure."""
    from huggingface_hub import errors

    where = repo if revision is None else f"{repo}@{revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{where} is gated; ask for access on the Hub, then `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"the Hub has no repository {repo} that you may read; check the name, and for a private one "
            f"`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo} has no revision {revision!r}; give a commit, tag or branch that it has") from error
    except errors.LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{where} is not in the local cache and the Hub was not asked or not reached; connect, unset "
            f"HF_HUB_OFFLINE, or copy the folder here and give its path"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{where} has no {WEIGHTS_FILE}; {_CONVERT}") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{where} is not a repository name: {_one_line(error)}") from error
    except Exception as error:  # the client passes on what its HTTP library, its Xet library and the disk raise
        raise WeightsError(
            f"fetching {where} failed ({type(error).__name__}: {_one_line(error)}); try again, or fetch the files by "
            f"other means and give the folder's path"
        ) from error


# ------------------------------------------------------------------------------------------------ words


def _same(left: Any, right: Any) -> bool:
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a NUL in it, the home of nobody
        return False


def _short(value: Any) -> str:
    """`value` as a message may show it: escaped, one line, at most 80 characters, whatever a file put into it."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 300 else text[:297] + "..."


def _reason(error: OSError) -> str:
    return error.strerror or _one_line(error)


def _prose(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_prose(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_prose, value))
    return str(value)
