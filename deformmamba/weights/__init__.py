"""Weights by name: the manifest, what rides in the package, the cache, and the Hub.

A name is looked for in this order: a path on this machine, the package, the cache of huggingface_hub, the Hub.
`load_checkpoint` turns whatever names a checkpoint into one; `fetch` and `publish` carry one from and to the Hub.
`checkpoint.py` reads and writes the files, `hub.py` talks to the Hub. Everywhere a checkpoint is one folder of three
files, which huggingface_hub alone can list and fetch too: `model.safetensors`, `config.json` and `README.md`, the model
card.

A checkpoint of another size or for other data is another name (`ixi-4x-large`), so that a name says everything.

This module never imports a model.
"""

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from deformmamba.errors import shown
from deformmamba.weights.cards import card
from deformmamba.weights.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    PICKLE_SUFFIXES,
    WEIGHTS_FILE,
    Checkpoint,
    WeightsError,
    check_config,
    config_json,
    read_checkpoint,
    write_checkpoint,
    write_files,
)
from deformmamba.weights.hub import download, hub_hash, upload

__all__ = [
    "Checkpoint",
    "Published",
    "WeightsError",
    "card",
    "check_config",
    "fetch",
    "list_weights",
    "load_checkpoint",
    "manifest",
    "publish",
    "read_checkpoint",
    "verify",
    "weights_entry",
    "write_checkpoint",
]

_REPO = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


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
        f"unknown weights {shown(name)}{hint} published are: {names}; a path to a file or folder and org/repo work too"
    )


@dataclass(frozen=True)
class Published:
    """What `publish` put on the Hub, or would put there."""

    repo: str
    revision: str | None  # the commit; None where nothing was sent
    files: dict[str, tuple[int, str]]  # name: bytes, sha256


@dataclass(frozen=True)
class _Found:
    """A checkpoint on this machine, not yet read."""

    path: Path  # the file, or a folder that holds it
    digest: str | None  # what the file must hash to
    source: str  # what `Checkpoint.source` will say
    entry: dict[str, Any] | None = None  # of the manifest
    hub: str | None = None  # org/repo@commit, of a repository that the manifest does not know

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

    `name` is, in this order: a path that exists (file or folder); a name of the manifest (the file that rides in the
    package, else the Hub repository and commit that the entry pins, from the cache if it is there), its sha256 checked
    before it is parsed; or a Hub repository `org/repo` or `org/repo@commit` (a tag or branch works where a commit
    does). What comes from a repository that the manifest does not know is checked against the Hub's own hash of the
    file, and the commit stands in `source` and, as `hub`, in `provenance`.

    `revision`: the same as `@commit`, for a Hub repository only. `cache_dir`, `token`, `local_files_only` and
    `force_download` (fetch again what is in the cache; nothing else changes): as in
    huggingface_hub; its HF_HUB_OFFLINE=1, HF_HOME, HF_ENDPOINT and HF_TOKEN work here too.

    Raises:
        WeightsError: whatever goes wrong, in one line.
    """
    return _find(name, revision, cache_dir, local_files_only, token=token, force_download=force_download).read()


def fetch(
    name: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Brings a checkpoint to this machine, verifies it, and returns the path of its file.

    With `folder`, its `model.safetensors`, `config.json` and `README.md` are written there: the folder to carry to a
    machine without a network, and to give to `from_pretrained` on it. Without, a checkpoint of the Hub comes into the
    cache of huggingface_hub, and any other stays where it is. `name`, `revision` and `cache_dir` as in
    `load_checkpoint`.

    Raises:
        WeightsError: whatever goes wrong, in one line.
    """
    found = _find(name, revision, cache_dir, False, with_card=folder is not None)
    checkpoint = found.read()
    if folder is None:
        return found.file
    write_files(folder, _repository(found, checkpoint, repo=None))
    read_checkpoint(folder, digest=checkpoint.sha256)
    return Path(folder) / WEIGHTS_FILE


def publish(source: str | os.PathLike[str], repo: str, *, dry_run: bool = False, private: bool = False) -> Published:
    """Uploads a checkpoint as one commit to a Hub repository, which is made if it is missing.

    The repository gets `model.safetensors`, byte for byte, `config.json` and `README.md`: the folder's own model card,
    or one generated from the manifest entry or from the provenance. Afterwards the Hub is asked for its hash of the
    file. To list the repository in the manifest, write its name and the commit as `repo` and `revision` of the entry.

    Args:
        source: a folder or file, or a name of the manifest whose file is on this machine.
        repo: org/name.
        dry_run: nothing is sent; returns what would be.
        private: whether a repository that this makes is private.

    Raises:
        WeightsError: a checkpoint that cannot be read, no permission, no network, in one line.
    """
    if not (match := _REPO.fullmatch(repo)) or match["revision"]:
        raise WeightsError(f"{shown(repo)} is not a repository name; give org/name")
    found = _find(source, None, None, True, with_card=True)
    content = _repository(found, found.read(), repo)
    sizes = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
    if dry_run:
        return Published(repo, None, sizes)
    message = f"Checkpoint {sizes[WEIGHTS_FILE][1][:12]}"
    return Published(repo, upload(repo, content, private=private, message=message), sizes)


def verify(name: str | os.PathLike[str]) -> str:
    """The sha256 of a checkpoint on this machine, after it was compared and the file was read.

    `name` as in `load_checkpoint`; a file of the manifest is compared with its entry, one in the cache with the Hub's
    hash of it, and one of your own with nothing.

    Raises:
        WeightsError: unknown name, missing file, wrong hash, or a file that cannot be read.
    """
    return load_checkpoint(name, local_files_only=True).sha256


def _find(
    name: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    with_card: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
) -> _Found:
    """Where a checkpoint is; brings it into the cache if it is on the Hub only."""
    text = os.fspath(name)
    path = os.path.expanduser(text)
    if os.path.exists(path):
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
    like_a_file = not isinstance(name, str) or text.lower().endswith((".safetensors", *PICKLE_SUFFIXES))
    if like_a_file or (match is None and ("/" in text or os.sep in text)):
        raise WeightsError(f"there is no file or folder {shown(text)}; check the path, or give a name or org/repo")
    if match is not None:
        pinned = match["revision"]
        if pinned and revision and pinned != revision:
            raise WeightsError(f"{text} names one revision and revision={revision!r} another; give one of them")
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


def _repository(found: _Found, checkpoint: Checkpoint, repo: str | None) -> dict[str, bytes]:
    """The three files of a checkpoint, by name, as a Hub repository or a folder holds them."""
    data = found.file.read_bytes()
    entry = found.entry or next((e for e in list_weights() if e["sha256"] == checkpoint.sha256), None)
    own = found.file.parent / CARD_FILE
    if found.path.is_dir() and own.is_file():
        text = own.read_bytes()
    else:
        stem = found.file.resolve().parent.name if found.file.name == WEIGHTS_FILE else found.file.stem
        facts = entry or {
            **checkpoint.provenance,
            "name": (repo or found.hub or stem).partition("@")[0].rpartition("/")[2],
            "repo": found.hub,
            "class": checkpoint.class_name,
            "scale": checkpoint.config.get("scale"),
            "size": len(data),
            "sha256": checkpoint.sha256,
        }
        text = card({**facts, "repo": repo, "revision": None} if repo else facts).encode()
    return {WEIGHTS_FILE: data, CONFIG_FILE: config_json(checkpoint.class_name, checkpoint.config), CARD_FILE: text}
