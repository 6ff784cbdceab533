"""Weights by name: the manifest, what rides in the package, and the Hub.

`load_checkpoint` turns whatever names a checkpoint into one; `deformmamba.checkpoint` reads the file. This module never
imports a model, and imports huggingface_hub only to ask the Hub.
"""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from deformmamba.checkpoint import (
    CONFIG_FILE,
    CONVERT,
    PICKLE_SUFFIXES,
    WEIGHTS_FILE,
    Checkpoint,
    WeightsError,
    check_config,
    one_line,
    read_checkpoint,
    shown,
    write_checkpoint,
)

__all__ = [
    "Checkpoint",
    "WeightsError",
    "card",
    "check_config",
    "list_weights",
    "load_checkpoint",
    "manifest",
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
    path = os.path.expanduser(text)
    if os.path.exists(path):
        if revision is not None:
            raise WeightsError(f"revision {revision!r} was given, but {text} is a local path; leave the revision out")
        return read_checkpoint(path)
    match = _REPO.fullmatch(text)
    like_a_file = not isinstance(name, str) or text.lower().endswith((".safetensors", *PICKLE_SUFFIXES))
    if like_a_file or (match is None and ("/" in text or os.sep in text)):
        raise WeightsError(f"there is no file or folder {shown(text)}; check the path, or give a name or org/repo")
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
    front = {
        "license": entry.get("license", "other"),
        "library_name": "deformmamba",
        "pipeline_tag": "image-to-image",
        "tags": ["mri", "super-resolution"],
    }
    facts = {key: value for key, value in entry.items() if key not in ("name", "summary", "scores")}
    scores = entry.get("scores", [])
    columns = list(dict.fromkeys(key for score in scores for key in score))
    table = [columns, ["---"] * len(columns), *([_prose(score.get(key, "")) for key in columns] for score in scores)]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {entry['name']}",
        "",
        str(entry.get("summary", "")),
        "",
        "```python",
        "import deformmamba",
        "",
        f'model = deformmamba.from_pretrained("{entry["name"]}")',
        "```",
        "",
        *(f"- **{key.replace('_', ' ')}**: {_prose(value)}" for key, value in facts.items() if value is not None),
        *(["", "## Scores", "", *(f"| {' | '.join(row)} |" for row in table)] if scores else []),
    ]
    return "\n".join(lines) + "\n"


def _load_named(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> Checkpoint:
    entry = weights_entry(name)
    if revision is not None:
        raise WeightsError(f"revision {revision!r} was given, but the manifest pins the file of {name!r}; leave it out")
    packaged = Path(str(files("deformmamba").joinpath("checkpoints", entry["file"])))
    if packaged.is_file():
        checkpoint = read_checkpoint(packaged, digest=entry["sha256"])
    elif entry.get("repo") and entry.get("revision"):
        checkpoint = _load_from_hub(entry["repo"], entry["revision"], entry["sha256"], cache_dir, local_files_only)
    else:
        raise WeightsError(
            f"the file of {name!r}, {packaged}, is missing from this installation; reinstall deformmamba"
        )
    return replace(checkpoint, source=name)


def _load_from_hub(
    repo: str,
    revision: str | None,
    digest: str | None,
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
        # config.json is for people: where it is missing, nothing disagrees with the header
        with contextlib.suppress(EntryNotFoundError):
            fetch(CONFIG_FILE, commit)
    if digest is None:
        # the cache names a file by the Hub's own hash of it: SHA-256 for a large file, git's SHA-1 for a small one
        # (where the cache cannot link, on Windows, it keeps no such name, and the client's own size check remains)
        blob = path.resolve().name
        digest = blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else None
    return replace(read_checkpoint(path.parent, digest=digest), source=f"{repo}@{commit}")


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
        why = f" ({type(error.__cause__).__name__}: {one_line(error.__cause__)})" if error.__cause__ else ""
        raise WeightsError(
            f"{where} is not in the local cache and the Hub was not asked or did not answer{why}; connect, unset "
            f"HF_HUB_OFFLINE, or bring the folder here by other means and give its path"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{where} has no {WEIGHTS_FILE}; {CONVERT}") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{where} is not a repository name: {one_line(error)}") from error
    except Exception as error:  # the client passes on what its HTTP library, its Xet library and the disk raise
        raise WeightsError(
            f"fetching {where} failed ({type(error).__name__}: {one_line(error)}); try again, or fetch the files by "
            f"other means and give the folder's path"
        ) from error


def _prose(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_prose(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_prose, value))
    return str(value)
