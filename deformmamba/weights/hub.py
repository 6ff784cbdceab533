"""Downloads from and uploads to the Hub with huggingface_hub's client, and turns its errors into one line.

The client's settings (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, time limits) work as usual. This module also
checks the Hub's hash of a file, and its error messages include the next step.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from deformmamba.errors import did_you_mean, one_line, shown
from deformmamba.weights.checkpoint import CARD_FILE, CONFIG_FILE, CONVERT, WEIGHTS_FILE, WeightsError

# licence identifiers of the Hub, without "other" and "unknown", which are no specific licence
LICENSES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0",
    "eupl-1.1", "eupl-1.2", "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1",
    "openmdw-1.0", "openrail", "openrail++", "osl-3.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
)  # fmt: skip


def download(
    repo: str,
    revision: str | None,
    *,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None = None,
    force_download: bool = False,
    with_card: bool = False,
) -> tuple[Path, str]:
    """Downloads a checkpoint into the cache; returns its weights file and the commit. The other files are beside it.

    Raises:
        WeightsError: any failure, as one line that includes the next step.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    cache = None if cache_dir is None else os.fspath(cache_dir)

    def get(file: str, revision: str | None) -> Path:
        found = hf_hub_download(
            repo,
            file,
            revision=revision,
            cache_dir=cache,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
        return Path(found)

    with _hub_errors(repo, revision, "fetch", cache):
        path = get(WEIGHTS_FILE, revision)
        commit = path.parent.name
        # the weights file is complete without the other files, which are only compared with it if present
        for companion in (CONFIG_FILE, CARD_FILE) if with_card else (CONFIG_FILE,):
            with contextlib.suppress(EntryNotFoundError):
                get(companion, commit)
    return path, commit


def hub_hash(
    path: Path, repo: str, commit: str, *, local_files_only: bool, token: str | bool | None = None
) -> str | None:
    """The Hub's own hash of a cached file: SHA-256 of a large file, git's SHA-1 of a small one; None if unknown.

    In the cache, a file is a link to a blob whose name is the hash. (The blob may itself be a link into a store shared
    by repositories, whose file names are other hashes.) If the cache has no links, as on Windows, the hash is requested
    from the Hub.
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
                url = hf_hub_url(repo, WEIGHTS_FILE, revision=commit)
                name = get_hf_file_metadata(url, token=token).etag or ""
        except WeightsError as error:
            if isinstance(error.__cause__, OfflineModeIsEnabled):
                return None
            raise
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def upload(repo: str, content: Mapping[str, bytes], *, private: bool, message: str) -> str:
    """Uploads files as one commit to a repository, which is created if it does not exist; returns the commit.

    Raises:
        WeightsError: any failure, also if the Hub's weights file afterwards differs from the one that was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_hf_file_metadata, hf_hub_url

    api = HfApi(library_name="deformmamba")
    with _hub_errors(repo, None, "publish"):
        api.create_repo(repo, private=private, exist_ok=True)
        additions = [CommitOperationAdd(name, data) for name, data in content.items()]
        commit = api.create_commit(repo, additions, commit_message=message).oid
        url = hf_hub_url(repo, WEIGHTS_FILE, revision=commit, endpoint=api.endpoint)
        there = get_hf_file_metadata(url, token=api.token).etag
    sent = hashlib.sha256(content[WEIGHTS_FILE]).hexdigest()
    if there != sent:
        raise WeightsError(
            f"{repo}@{commit} holds a {WEIGHTS_FILE} with the hash {there}, but {sent} was sent; check the repository "
            "before it is used"
        )
    return commit


def checked_license(name: str) -> str:
    """The Hub's spelling of a licence identifier; capital and small letters are the same.

    Raises:
        WeightsError: the Hub does not have it.
    """
    if (found := name.strip().lower()) not in LICENSES:
        raise WeightsError(
            f"{shown(name)} is no licence that the Hub lists{did_you_mean(name, LICENSES)}; give an identifier "
            "such as cc-by-4.0, cc-by-sa-4.0 or apache-2.0 (all: huggingface.co/docs/hub/repositories-licenses)"
        )
    return found


@contextlib.contextmanager
def _hub_errors(repo: str, revision: str | None, verb: str, cache: str | None = None) -> Iterator[None]:
    """Turns any error of the Hub client into one line that includes the next step."""
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
            f"the Hub has no repository {repo} that you can access; check the name, and for a private one "
            f"`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo} has no revision {revision!r}; give a commit, tag or branch that it has") from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
            raise WeightsError(
                f"{where} is not in the local cache and offline mode is on; unset HF_HUB_OFFLINE, or {elsewhere}"
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
    except Exception as error:  # the client does not catch the errors of its HTTP library, its Xet library and the disk
        status = _status(error)
        if status in (401, 403):
            raise WeightsError(
                f"the Hub does not let you {verb} {where} ({status}); `hf auth login` or set HF_TOKEN to a token that "
                f"is valid and may"
            ) from error
        if status == 429:
            raise WeightsError(_too_many(where, verb)) from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise WeightsError(f"cannot {verb} {where}: offline mode is on; unset HF_HUB_OFFLINE") from error
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
    """The HTTP status in an error of the Hub client, or in the errors that caused it."""
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
