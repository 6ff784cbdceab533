"""Weights by name: the manifest, the files in the package, the cache, and the Hub.

A name in the manifest always means the manifest's file and hash: from the package, the cache of huggingface_hub or the
Hub. Any other name is a path on this machine (such as `./ixi-4x`) or a repository of the Hub. `load_checkpoint` loads a
checkpoint by name; `fetch` downloads one from the Hub and `publish` uploads one. `checkpoint.py` reads and writes the
files, `hub.py` communicates with the Hub. A checkpoint is always one folder of three files, which huggingface_hub alone
can also list and fetch: `model.safetensors`, `config.json` and `README.md`, the model card.

A checkpoint of another size or for other data has another name (`ixi-4x-large`).

This module never imports a model.
"""

import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from deformmamba.annotations import check_types
from deformmamba.errors import InvalidType, did_you_mean, shown
from deformmamba.weights.cards import acknowledgements, card, checkpoint_card, is_generated, stated_hash, stated_license
from deformmamba.weights.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    PICKLE_SUFFIXES,
    WEIGHTS_FILE,
    Checkpoint,
    WeightsError,
    check_config,
    config_json,
    read_card,
    read_checkpoint,
    write_checkpoint,
    write_files,
)
from deformmamba.weights.hub import checked_license, download, hub_hash, upload

__all__ = [
    "Checkpoint",
    "Published",
    "WeightsError",
    "acknowledgements_of",
    "card",
    "check_config",
    "describe",
    "fetch",
    "license_of",
    "list_weights",
    "load_checkpoint",
    "manifest",
    "publish",
    "read_checkpoint",
    "verify",
    "weights_entry",
    "write_checkpoint",
]

# first parts that are more often a path than an organisation on the Hub
_FOLDERS = (
    "run",
    "runs",
    "checkpoint",
    "checkpoints",
    "weights",
    "models",
    "out",
    "output",
    "outputs",
    "results",
    "data",
)
_REPO = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


def manifest() -> dict[str, Any]:
    """The manifest of published weights: {"format": 1, "weights": {name: entry}, "planned": {name: entry}}."""
    loaded: dict[str, Any] = json.loads(files("deformmamba").joinpath("weights_manifest.json").read_text("utf-8"))
    return loaded


def list_weights() -> list[dict[str, Any]]:
    """The entries of every published checkpoint, in the manifest's order.

    Keys: `name`, `file`, `sha256`, `license`, `meant_for`, `scale`, `spacings_mm` (smallest and largest pixel of the
    training input, mm), `scores` and others, see `weights_manifest.json`.
    """
    return [{"name": name, **entry} for name, entry in manifest()["weights"].items()]


def weights_entry(name: str) -> dict[str, Any]:
    """The manifest entry of one published checkpoint, with its `name`.

    Raises:
        WeightsError: no such weights. The message lists the nearest name and all names, or how to train planned
            weights.
    """
    known = manifest()
    if name in known["weights"]:
        return {"name": name, **known["weights"][name]}
    names = ", ".join(known["weights"]) or "none yet"
    if name in known["planned"]:
        plan = known["planned"][name]
        raise WeightsError(
            f"weights {name!r} do not exist yet ({plan['why']}); train them with {plan['recipe']}. Published: {names}"
        )
    hint = did_you_mean(name[:100], [*known["weights"], *known["planned"]], cutoff=0.5)
    raise WeightsError(
        f"unknown weights {shown(name)}{hint}; published are: {names}; a path to a file or folder and org/repo work too"
    )


def license_of(sha256: str | None, provenance: Mapping[str, Any]) -> str | None:
    """The licence of weights, by the hash of their file and their provenance; None if it is unknown.

    The manifest has the licences of the published files, whose headers lack them.
    """
    stated = (_entry_with(sha256) or {}).get("license") or provenance.get("license")
    return str(stated) if stated else None


def acknowledgements_of(sha256: str | None, provenance: Mapping[str, Any]) -> list[str]:
    """The acknowledgements that weights require, by the hash of their file and their provenance, as in `license_of`."""
    return acknowledgements(_entry_with(sha256) or provenance)


def terms_of(sha256: str | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """`license` and `acknowledgements` of weights, as far as they are known, as `license_of` finds them."""
    found = {
        "license": license_of(sha256, provenance),
        "acknowledgements": acknowledgements_of(sha256, provenance),
    }
    return {key: value for key, value in found.items() if value}


def _entry_with(sha256: str | None) -> dict[str, Any] | None:
    """The manifest's entry for the file with this hash, wherever the file is."""
    return next((entry for entry in list_weights() if entry["sha256"] == sha256), None)


@dataclass(frozen=True)
class Published:
    """The files that `publish` uploaded to the Hub, or would upload."""

    repo: str
    revision: str | None  # the commit; None for a dry run
    files: dict[str, tuple[int, str]]  # name: bytes, sha256


@dataclass(frozen=True)
class _Found:
    """A checkpoint on this machine, not yet read."""

    path: Path  # the file, or a folder that holds it
    digest: str | None  # the expected hash of the file
    source: str  # the text for `Checkpoint.source`
    entry: dict[str, Any] | None = None  # of the manifest
    hub: str | None = None  # org/repo@commit, of a repository outside the manifest

    def read(self) -> Checkpoint:
        checkpoint = read_checkpoint(self.path, digest=self.digest)
        provenance = {**checkpoint.provenance, "hub": self.hub} if self.hub else checkpoint.provenance
        return replace(checkpoint, source=self.source, provenance=provenance)

    @property
    def file(self) -> Path:
        return self.path / WEIGHTS_FILE if self.path.is_dir() else self.path


def load_checkpoint(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Checkpoint:
    """Finds and reads a checkpoint.

    `name` is resolved in this order:

    1. a name in the manifest: the file in the package, or the pinned Hub repository and commit, from the cache if
       possible; its sha256 is checked before parsing;
    2. an existing path, file or folder (for a name in the manifest, write `./ixi-4x` or pass a `Path`);
    3. a Hub repository `org/repo` or `org/repo@commit` (or a tag or branch). A name that looks like a mistyped path is
       not sent to the Hub unless a revision such as `@main` is given. A file from a repository outside the manifest is
       checked against the Hub's hash, and its commit is recorded in `source` and, as `hub`, in `provenance`.

    `revision`: the same as `@commit`, for a Hub repository only. `cache_dir`, `token`, `local_files_only` and
    `force_download` (download again although the file is in the cache) are as in huggingface_hub. Its variables
    HF_HUB_OFFLINE=1, HF_HOME, HF_ENDPOINT and HF_TOKEN are respected.

    Raises:
        WeightsError: whatever goes wrong, in one line.
    """
    check_types(load_checkpoint, {**locals(), "name": ""})  # `_find` checks the name
    return _find(name, revision, cache_dir, local_files_only, token=token, force_download=force_download).read()


def fetch(
    name: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Downloads a checkpoint, verifies it, and returns the path of its file.

    With `folder`, writes `model.safetensors`, `config.json` and `README.md` there, unless it holds other files of these
    names. Copy this folder to an offline machine and pass it to `from_pretrained`. Without `folder`, a
    checkpoint on the Hub is downloaded into the cache of huggingface_hub, and a local one stays in place. `name`,
    `revision` and `cache_dir` as in `load_checkpoint`.

    Raises:
        WeightsError: whatever goes wrong, in one line.
    """
    check_types(fetch, locals())
    found = _find(name, revision, cache_dir, False, with_card=folder is not None)
    checkpoint = found.read()
    if folder is None:
        return found.file
    content = _repository(found, checkpoint, repo=None)
    folder = Path(os.path.expanduser(folder))
    _check_folder(folder, content, checkpoint.sha256)
    write_files(folder, content)
    read_checkpoint(folder, digest=checkpoint.sha256)
    return folder / WEIGHTS_FILE


def _check_folder(folder: Path, content: Mapping[str, bytes], sha256: str) -> None:
    """Refuses a folder with other files of the same names, unless they are an earlier download of this checkpoint."""
    if not folder.is_dir():
        return
    there = {name: (folder / name).read_bytes() for name in content if (folder / name).is_file()}
    own = read_card(folder)
    if there.get(CARD_FILE) == content[CARD_FILE] or (own is not None and stated_hash(own) == sha256):
        return
    for name, data in there.items():
        if data != content[name]:
            raise WeightsError(f"{folder} holds another {name}, which would be replaced; give a new or empty folder")


def publish(
    source: str | os.PathLike[str],
    repo: str,
    *,
    license: str | None = None,
    dry_run: bool = False,
    private: bool = False,
) -> Published:
    """Uploads a checkpoint as one commit to a Hub repository, which is created if it does not exist.

    The repository gets `model.safetensors`, byte for byte, `config.json` and `README.md`: the folder's own model card,
    or one generated from the manifest entry or from the provenance. Afterwards the Hub's hash of the file is checked.
    To list the repository in the manifest, write its name and the commit as `repo` and `revision` of the entry.

    Args:
        source: a folder or file, or a name of the manifest whose file is on this machine.
        repo: org/name.
        license: identifier of the licence, such as "cc-by-4.0"; required unless the manifest, the provenance or the
            folder's own card has one. A share-alike licence of training data also applies to the weights.
        dry_run: send nothing, and return the files that would be uploaded.
        private: whether a newly created repository is private.

    Raises:
        WeightsError: a checkpoint that cannot be read, no licence, no permission, no internet access, in one line.
    """
    check_types(publish, locals())
    if not (match := _REPO.fullmatch(repo)) or match["revision"]:
        raise WeightsError(f"{shown(repo)} is not a repository name; wanted org/name")
    wanted = None if license is None else checked_license(license)
    found = _find(source, None, None, True, with_card=True)
    content = _licensed(found, repo, wanted, os.fspath(source))
    sizes = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
    if dry_run:
        return Published(repo, None, sizes)
    message = f"Checkpoint {sizes[WEIGHTS_FILE][1][:12]}"
    return Published(repo, upload(repo, content, private=private, message=message), sizes)


def _licensed(found: _Found, repo: str, license: str | None, source: str) -> dict[str, bytes]:
    """The files for the Hub, whose card states `license`, or without one the licence that the checkpoint has.

    Raises:
        WeightsError: no licence, one that the Hub does not have, or a card written by a person that states another.
    """
    checkpoint = found.read()
    entry = _entry_of(found, checkpoint)
    if license and entry and license != checked_license(entry["license"]):
        raise WeightsError(
            f"{shown(source)}: the licence of {entry['name']} is {entry['license']}, not {license}; leave license= "
            "(--license) out"
        )
    inherited = license_of(checkpoint.sha256, checkpoint.provenance)
    if license and inherited and "init" in checkpoint.provenance and license != checked_license(inherited):
        raise WeightsError(
            f"{shown(source)}: its training started from weights under {inherited}, not {license}; leave license= "
            "(--license) out"
        )
    content = _repository(found, checkpoint, repo, license)
    stated = stated_license(content[CARD_FILE].decode("utf-8", "replace"))
    if license is None and stated is None:
        raise WeightsError(
            f"{shown(source)} has no licence; give license= (--license cc-by-4.0, apache-2.0 ...), one that the "
            "licences of its training data allow"
        )
    wanted = license or checked_license(stated or "")
    if stated != wanted:
        content = _repository(found, checkpoint, repo, wanted)
        stated = stated_license(content[CARD_FILE].decode("utf-8", "replace"))
    if stated != wanted:
        raise WeightsError(
            f"the {CARD_FILE} of {shown(source)} was written by a person and states "
            f"{'no licence' if stated is None else f'the licence {shown(stated)}'}; write `license: {wanted}` between "
            "two lines --- at its start"
        )
    return content


def verify(name: str | os.PathLike[str], *, sha256: str | None = None) -> str:
    """Compares the sha256 of a checkpoint on this machine with a known one, reads the file, and returns the sha256.

    `name` as in `load_checkpoint`. A file in the manifest is compared with its entry, and a file in the cache with the
    Hub's hash. Any other file or folder is compared with `sha256`, the manifest's files, and the hash in the folder's
    model card.

    Raises:
        WeightsError: unknown name, missing file, wrong hash, a file that cannot be read, or no known hash.
    """
    check_types(verify, locals())
    found = _find(name, None, None, True)
    if found.hub and found.digest is None:  # a cache without links does not record the hash
        repo, _, commit = found.hub.partition("@")
        found = replace(found, digest=hub_hash(found.file, repo, commit, local_files_only=False))
    checkpoint = found.read()
    if sha256 is not None and checkpoint.sha256 != sha256.lower():
        raise WeightsError(f"{found.source} has sha256 {checkpoint.sha256}, but {shown(sha256)} was expected")
    if found.digest is not None or sha256 is not None:
        return checkpoint.sha256
    text = read_card(found.file.parent) if found.path.is_dir() else None
    stated = stated_hash(text) if text else None
    if stated is not None and stated != checkpoint.sha256:
        raise WeightsError(
            f"{found.file} has sha256 {checkpoint.sha256}, but the {CARD_FILE} beside it states {stated}: the file was "
            "changed after it was saved or fetched; fetch it again"
        )
    if stated is None and _entry_with(checkpoint.sha256) is None:
        raise WeightsError(
            f"{found.source} has sha256 {checkpoint.sha256}, but no expected hash is known; give it with --sha256 HASH "
            "(sha256= in Python)"
        )
    return checkpoint.sha256


def describe(name: str | os.PathLike[str]) -> str:
    """The model card of a checkpoint, found as in `load_checkpoint`: from the manifest, from the folder, or generated
    from the file's header.

    Raises:
        WeightsError: no such weights, or an unreadable file.
    """
    check_types(describe, locals())
    known = manifest()
    if isinstance(name, str) and name in {**known["weights"], **known["planned"]}:
        return card(weights_entry(name))
    found = _find(name, None, None, False, with_card=True)
    return _repository(found, found.read(), None)[CARD_FILE].decode("utf-8", "replace")


def _find(
    name: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    with_card: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
) -> _Found:
    """Finds a checkpoint; downloads it into the cache if it is only on the Hub."""
    if not isinstance(name, (str, os.PathLike)) or not isinstance(os.fspath(name), str):
        raise InvalidType(f"weights are a name, a path or org/repo, not {shown(name)}")
    text = os.fspath(name)
    path = os.path.expanduser(text)
    known = isinstance(name, str) and text in manifest()["weights"]
    if known and os.path.exists(path):
        warnings.warn(
            f"{text} means the published weights of that name; for the file or folder here give ./{text}", stacklevel=4
        )
    if not known and os.path.exists(path):
        if revision is not None:
            raise WeightsError(f"revision {revision!r} was given, but {text} is a local path; leave the revision out")
        return _Found(Path(path), None, path)
    where: Any = {
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "token": token,
        "force_download": force_download,
    }
    match = _REPO.fullmatch(text)
    if not isinstance(name, str) or _looks_like_a_path(text, match):
        hint = f"; for the repository of the Hub give {text}@main" if match and isinstance(name, str) else ""
        if (known_name := text.removesuffix(".safetensors")) in manifest()["weights"]:
            hint = f"; the published weights have the name {known_name!r}"
        raise WeightsError(
            f"there is no file or folder {shown(text)}; check the path, or give a name or org/repo{hint}"
        )
    if match is not None:
        pinned = match["revision"]
        if pinned and revision and pinned != revision:
            raise WeightsError(f"{text} contains a revision, but revision={revision!r} is another; give only one")
        repo = match["repo"]
        file, commit = download(repo, pinned or revision, with_card=with_card, **where)
        source = f"{repo}@{commit}"
        digest = hub_hash(file, repo, commit, local_files_only=local_files_only, token=token)
        return _Found(file.parent, digest, source, hub=source)
    entry = weights_entry(text)
    if revision is not None:
        raise WeightsError(f"revision {revision!r} was given, but the manifest pins the file of {text!r}; leave it out")
    packaged = Path(str(files("deformmamba").joinpath("checkpoints", entry["file"])))
    if packaged.is_file():
        return _Found(packaged, entry["sha256"], text, entry)
    if entry.get("repo") and entry.get("revision"):
        file, _ = download(entry["repo"], entry["revision"], with_card=with_card, **where)
        return _Found(file.parent, entry["sha256"], text, entry)
    raise WeightsError(f"the file of {text!r}, {packaged}, is missing from this installation; reinstall deformmamba")


def _looks_like_a_path(text: str, match: re.Match[str] | None) -> bool:
    """Whether a name that is neither in the manifest nor a local file is probably a path and not org/repo."""
    if match is None:
        return (
            "/" in text or os.sep in text or "\\" in text or text.lower().endswith((".safetensors", *PICKLE_SUFFIXES))
        )
    if match["revision"]:
        return False
    first, last = text.split("/")
    ending = Path(last).suffix.lower()
    return (
        os.path.isdir(first)
        or first.lower() in _FOLDERS
        or ending in PICKLE_SUFFIXES
        or difflib.SequenceMatcher(None, ending, ".safetensors").ratio() > 0.6
    )


def _entry_of(found: _Found, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The manifest's entry for a checkpoint, also if it was found under another name."""
    return found.entry or _entry_with(checkpoint.sha256)


def _repository(
    found: _Found, checkpoint: Checkpoint, repo: str | None, license: str | None = None
) -> dict[str, bytes]:
    """The three files of a checkpoint in a Hub repository or a folder, by name."""
    data = found.file.read_bytes()
    entry = _entry_of(found, checkpoint)
    own = read_card(found.file.parent) if found.path.is_dir() else None
    if own is not None and not (repo and is_generated(own)):
        text = own
    elif entry is not None:
        changed = {**entry, **({"license": license} if license else {})}
        text = card({**changed, "repo": repo, "revision": None} if repo else changed)
    else:
        stem = found.file.resolve().parent.name if found.file.name == WEIGHTS_FILE else found.file.stem
        text = checkpoint_card(
            (repo or found.hub or stem).partition("@")[0].rpartition("/")[2],
            class_name=checkpoint.class_name,
            config=checkpoint.config,
            provenance=checkpoint.provenance,
            size=len(data),
            sha256=checkpoint.sha256,
            repo=repo or found.hub,
            license=license or (stated_license(own) if own else None),
        )
    config = config_json(checkpoint.class_name, checkpoint.config)
    return {WEIGHTS_FILE: data, CONFIG_FILE: config, CARD_FILE: text.encode("utf-8", "backslashreplace")}
