"""Weights by name: the manifest, what rides in the package, the cache, and the Hub.

A name is looked for in this order: a path on this machine, the package, the cache of huggingface_hub, the Hub.
`load_checkpoint` turns whatever names a checkpoint into one; `fetch` and `publish` carry one from and to the Hub;
`deformmamba.checkpoint` reads and writes the files. Everywhere a checkpoint is one folder of three files, which
huggingface_hub alone can list and fetch too: `model.safetensors`, `config.json` and `README.md`, the model card.

A checkpoint of another size or for other data is another name (`ixi-4x-large`), so that a name says everything.

This module never imports a model, and imports huggingface_hub only to ask the Hub.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from deformmamba.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    CONVERT,
    PICKLE_SUFFIXES,
    WEIGHTS_FILE,
    Checkpoint,
    WeightsError,
    check_config,
    config_json,
    one_line,
    read_checkpoint,
    shown,
    write_checkpoint,
    write_files,
)

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
    local_files_only: bool = False,
) -> Checkpoint:
    """Finds and reads a checkpoint.

    `name` is, in this order: a path that exists (file or folder); a name of the manifest (the file that rides in the
    package, else the Hub repository and commit that the entry pins, from the cache if it is there), its sha256 checked
    before it is parsed; or a Hub repository `org/repo` or `org/repo@commit` (a tag or branch works where a commit
    does). What comes from a repository that the manifest does not know is checked against the Hub's own hash of the
    file, and the commit stands in `source` and, as `hub`, in `provenance`.

    `revision`: the same as `@commit`, for a Hub repository only. `cache_dir`, `local_files_only`: as in
    huggingface_hub; its HF_HUB_OFFLINE=1, HF_HOME, HF_ENDPOINT and HF_TOKEN work here too.

    Raises:
        WeightsError: whatever goes wrong, in one line.
    """
    return _find(name, revision, cache_dir, local_files_only).read()


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
    from huggingface_hub import CommitOperationAdd, HfApi, get_hf_file_metadata, hf_hub_url

    api = HfApi(library_name="deformmamba")
    with _hub_errors(repo, None, "publish"):
        api.create_repo(repo, private=private, exist_ok=True)
        additions = [CommitOperationAdd(name, data) for name, data in content.items()]
        made = api.create_commit(repo, additions, commit_message=f"Checkpoint {sizes[WEIGHTS_FILE][1][:12]}")
        url = hf_hub_url(repo, WEIGHTS_FILE, revision=made.oid, endpoint=api.endpoint)
        there = get_hf_file_metadata(url, token=api.token).etag
    if there != sizes[WEIGHTS_FILE][1]:
        raise WeightsError(
            f"{repo}@{made.oid} holds a {WEIGHTS_FILE} with the hash {there}, but {sizes[WEIGHTS_FILE][1]} was sent; "
            f"look at the repository before anybody uses it"
        )
    return Published(repo, made.oid, sizes)


def verify(name: str | os.PathLike[str]) -> str:
    """The sha256 of a checkpoint on this machine, after it was compared and the file was read.

    `name` as in `load_checkpoint`; a file of the manifest is compared with its entry, one in the cache with the Hub's
    hash of it, and one of your own with nothing.

    Raises:
        WeightsError: unknown name, missing file, wrong hash, or a file that cannot be read.
    """
    return load_checkpoint(name, local_files_only=True).sha256


# keys of an entry that have a place of their own in a card; any other is a line under "Facts"
_TABLES = {
    "trained_on": ("Training data", "What the weights were fitted to, with its licences."),
    "scores": (
        "Scores",
        "PSNR in dB and SSIM by the protocol that each row names, averaged over subjects, on scans that were not "
        "trained on. `sd over slices` and `sd over subjects` are standard deviations, over what they say.",
    ),
    "by_spacing": ("Scores by pixel size", "The same scans with their k-space cropped to other pixel sizes first."),
    "out_of_domain": ("Out of domain", "Scores where the input is not what the weights were trained on."),
    "lesions": (
        "Lesions",
        "Synthetic lesions, put into test slices before they were degraded: how much of their contrast comes back, and "
        "how much structure appears where there is none.",
    ),
}
_USE = (
    "Research on the super-resolution of MR images that were degraded as above. Not a medical device: not for "
    "diagnosis, and not for anything that a patient's care depends on."
)
_PLACED = ("name", "summary", "license", "repo", "revision", "intended_use", "limits", *_TABLES)


def card(entry: Mapping[str, Any]) -> str:
    """The model card of a manifest entry: Markdown with the front matter that the Hub reads.

    Lists of rows (`trained_on`, `scores`, `by_spacing`, `out_of_domain`, `lesions`) become tables whose columns are the
    rows' keys; whatever else the entry holds is a line under "Facts", so nothing that the manifest says is lost.
    """
    front = {
        "license": entry.get("license", "other"),
        "library_name": "deformmamba",
        "pipeline_tag": "image-to-image",
        "tags": ["mri", "super-resolution", "safetensors"],
    }
    name, repo = entry["name"], entry.get("repo")
    load = repo if repo and not entry.get("revision") else name
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {name}",
        "",
        *([str(entry["summary"]), ""] if entry.get("summary") else []),
        "```python",
        "import deformmamba",
        "",
        f'model = deformmamba.from_pretrained("{load}")',
        "```",
        "",
        "## Intended use and limits",
        "",
        str(entry.get("intended_use") or _USE),
        *(["", f"Limits: {entry['limits']}"] if entry.get("limits") else []),
        "",
        "## Facts",
        "",
    ]
    for key, value in entry.items():
        if key not in _PLACED and value is not None:
            said = f"{value / 1e6:.2f} MB ({value} bytes)" if key == "size" else _prose(value)
            lines.append(f"- **{key.replace('_', ' ')}**: {said}")
    if "file" in entry and not repo:
        lines.append("- **source**: the file rides in the package; there is no repository on the Hub")
    for key, (title, text) in _TABLES.items():
        rows = entry.get(key)
        if rows:
            lines += ["", f"## {title}", "", text, "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Any]) -> list[str]:
    """Lines of a Markdown table; the columns are the keys of all rows, in the order of their first use."""
    rows = [row if isinstance(row, Mapping) else {"": row} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [column.replace("_", " ") for column in columns],
        ["---"] * len(columns),
        *([_prose(row.get(column, "")) for column in columns] for row in rows),
    ]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def _prose(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_prose(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_prose, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split()) if value is not None else ""


def _find(
    name: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    with_card: bool = False,
) -> _Found:
    """Where a checkpoint is; brings it into the cache if it is on the Hub only."""
    text = os.fspath(name)
    path = os.path.expanduser(text)
    if os.path.exists(path):
        if revision is not None:
            raise WeightsError(f"revision {revision!r} was given, but {text} is a local path; leave the revision out")
        return _Found(Path(path), None, path)
    match = _REPO.fullmatch(text)
    like_a_file = not isinstance(name, str) or text.lower().endswith((".safetensors", *PICKLE_SUFFIXES))
    if like_a_file or (match is None and ("/" in text or os.sep in text)):
        raise WeightsError(f"there is no file or folder {shown(text)}; check the path, or give a name or org/repo")
    if match is not None:
        pinned = match["revision"]
        if pinned and revision and pinned != revision:
            raise WeightsError(f"{text} names one revision and revision={revision!r} another; give one of them")
        file, commit = _download(match["repo"], pinned or revision, cache_dir, local_files_only, with_card)
        source = f"{match['repo']}@{commit}"
        digest = _hub_hash(file, match["repo"], commit, local_files_only)
        return _Found(file.parent, digest, source, hub=source)
    entry = weights_entry(text)
    if revision is not None:
        raise WeightsError(f"revision {revision!r} was given, but the manifest pins the file of {text!r}; leave it out")
    packaged = Path(str(files("deformmamba").joinpath("checkpoints", entry["file"])))
    if packaged.is_file():
        return _Found(packaged, entry["sha256"], text, entry)
    if entry.get("repo") and entry.get("revision"):
        file, _ = _download(entry["repo"], entry["revision"], cache_dir, local_files_only, with_card)
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


def _download(
    repo: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    with_card: bool,
) -> tuple[Path, str]:
    """The weights file of a repository in the cache, with its companions beside it, and the commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    cache = None if cache_dir is None else os.fspath(cache_dir)

    def get(file: str, revision: str | None) -> Path:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache, local_files_only=local_files_only))

    with _hub_errors(repo, revision, "fetch", cache):
        path = get(WEIGHTS_FILE, revision)
        commit = path.parent.name
        # the header alone says what the file is: a companion that is not there has nothing to disagree with
        for companion in (CONFIG_FILE, CARD_FILE) if with_card else (CONFIG_FILE,):
            with contextlib.suppress(EntryNotFoundError):
                get(companion, commit)
    return path, commit


def _hub_hash(path: Path, repo: str, commit: str, local_files_only: bool) -> str | None:
    """The Hub's own hash of a cached file: SHA-256 of a large one, git's SHA-1 of a small one; None if it is not known.

    The cache links a file to a blob of that name. (That blob may be a link as well, into a store that is shared by
    repositories and names its files by another hash.) Where the cache cannot link, on Windows, the Hub is asked.
    """
    if path.is_symlink():
        name = Path(os.readlink(path)).name
    elif local_files_only:
        return None
    else:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            with _hub_errors(repo, commit, "fetch"):
                name = get_hf_file_metadata(hf_hub_url(repo, WEIGHTS_FILE, revision=commit)).etag or ""
        except WeightsError as error:
            if isinstance(error.__cause__, OfflineModeIsEnabled):
                return None
            raise
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None


@contextlib.contextmanager
def _hub_errors(repo: str, revision: str | None, verb: str, cache: str | None = None) -> Iterator[None]:
    """Turns whatever the Hub client raises into one line with a cure."""
    from huggingface_hub import constants, errors

    where = repo if revision is None else f"{repo}@{revision}"
    elsewhere = f"fetch it on a machine that can (deformmamba weights fetch {where} --to FOLDER) and give that folder"
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
        cause = error.__cause__
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
            raise WeightsError(
                f"{where} is not in the local cache and the Hub may not be asked; unset HF_HUB_OFFLINE, or {elsewhere}"
            ) from error
        if _status(cause) == 429:
            raise WeightsError(_too_many(where, verb)) from error
        raise WeightsError(
            f"{where} is not in the local cache and the Hub did not answer ({type(cause).__name__}: "
            f"{one_line(cause)}); try again later (HF_HUB_ETAG_TIMEOUT=60 waits longer), or {elsewhere}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{where} has no {WEIGHTS_FILE}; {CONVERT}") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{where} is not a repository name: {one_line(error)}") from error
    except Exception as error:  # the client passes on what its HTTP library, its Xet library and the disk raise
        status = _status(error)
        if status in (401, 403):
            raise WeightsError(
                f"the Hub does not let you {verb} {where} ({status}); `hf auth login` or set HF_TOKEN to a token that "
                f"is valid and may"
            ) from error
        if status == 429:
            raise WeightsError(_too_many(where, verb)) from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise WeightsError(f"cannot {verb} {where}: the Hub may not be asked; unset HF_HUB_OFFLINE") from error
        if isinstance(error, OSError) and error.errno is not None and status is None:
            folder = cache or constants.HF_HUB_CACHE
            full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
            cure = "free some, or set HF_HOME to a folder with more" if full else "set HF_HOME to one that can be"
            raise WeightsError(
                f"cannot {verb} {where}: the cache {folder} {'has no room' if full else 'cannot be written'} "
                f"({error.strerror}); {cure}"
            ) from error
        why = f"{type(error).__name__}: {one_line(error)}"
        if error.__cause__ is not None and one_line(error.__cause__) not in why:
            why += f" {type(error.__cause__).__name__}: {one_line(error.__cause__)}"
        cure = f"try again, or {elsewhere}" if verb == "fetch" else "try again"
        raise WeightsError(f"cannot {verb} {where} ({why}); {cure}") from error


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of the Hub client, or in the errors that it came from."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        seen = seen.__cause__
    return None


def _too_many(where: str, verb: str) -> str:
    return (
        f"cannot {verb} {where}: the Hub has had too many requests from here (429); wait some minutes, or "
        f"`hf auth login`, which allows more"
    )
