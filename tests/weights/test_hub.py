"""The Hub: huggingface_hub's client with a small Hub on loopback (tests/weights/hub_server.py), over real HTTP."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, HubServer, git_blob
from huggingface_hub import constants
from refusals import refused as refused_by_any

from deformmamba import weights
from deformmamba.cli import main
from deformmamba.models import DeformMambaSR, from_pretrained
from deformmamba.weights import WeightsError, fetch, load_checkpoint, publish, read_checkpoint, verify

refused = partial(refused_by_any, kind=WeightsError)

pytestmark = [
    # huggingface_hub 2.4 uploads with an option that its HTTP library has deprecated
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),
    pytest.mark.skipif(
        int(huggingface_hub.__version__.split(".")[0]) < 2, reason="older clients read their settings elsewhere"
    ),
]

TINY: dict[str, Any] = {"scale": 2, "dims": [8, 12], "depths": [1, 1], "patch": 2, "stem_channels": 4, "d_state": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, of about 50 kB."""
    path = tmp_path_factory.mktemp("saved") / "tiny"
    torch.manual_seed(0)
    DeformMambaSR(**TINY).save_pretrained(path, provenance={"trained_on": ["noise"]})
    return path


@pytest.fixture
def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running Hub, an empty cache, no login, and a client that does not wait between its attempts."""
    with HubServer().running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HF_HUB_DISABLE_XET", True, raising=False
        )  # the server does not implement Xet's protocol
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server
        huggingface_hub.close_session()


def python(script: str, hub: HubServer | None, home: Path, **environment: str) -> "subprocess.Popen[str]":
    """A separate process, in which the client reads its settings from the environment, as for a user."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    url = hub.url if hub else "http://127.0.0.1:9"
    plain |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], env=plain, **pipes)


def finished(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# ---------------------------------------------------------------------------------------------------------- downloads


def test_a_repository_is_loaded_and_its_commit_recorded(hub: HubServer, files: dict[str, bytes]) -> None:
    first = hub.put("org/name", files)
    second = hub.put("org/name", {"README.md": b"# better"})
    hub.repositories["org/name"].refs |= {"v1": first, "feature/x": second}
    for name, revision, commit in [
        ("org/name", None, second),
        ("org/name@main", None, second),
        ("org/name", "v1", first),
        ("org/name@feature/x", "feature/x", second),
        (f"org/name@{first}", None, first),
    ]:
        model = from_pretrained(name, revision=revision)
        assert model.source == f"org/name@{commit}"
        assert model.provenance == {"trained_on": ["noise"], "hub": f"org/name@{commit}"}
    refused(lambda: load_checkpoint("org/name@v1", revision="v2"), "contains a revision, but revision='v2' is another")


def test_what_the_client_asks_for(hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.put("org/name", files)
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_checkpoint("org/name")
    assert [(r.method, r.path) for r in hub.requests] == [
        ("HEAD", "/org/name/resolve/main/model.safetensors"),
        ("GET", f"/storage/{digest}"),
        ("HEAD", f"/org/name/resolve/{commit}/config.json"),
        ("GET", f"/org/name/resolve/{commit}/config.json"),
    ]
    sent = ["authorization" in r.headers for r in hub.requests]
    assert sent == [True, False, True, True], "the token goes to the Hub, and not to its storage"
    hub.requests.clear()
    load_checkpoint("org/name")
    assert [r.method for r in hub.requests] == ["HEAD"], "a branch is looked up again, its files are not fetched again"
    hub.requests.clear()
    load_checkpoint(f"org/name@{commit}")
    assert hub.requests == [], "a commit that is in the cache needs no network"


def test_a_renamed_repository_is_followed(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.put("org/new", files)
    hub.moved["org/old"] = "org/new"
    assert from_pretrained("org/old").config == TINY | from_pretrained("org/new").config


@pytest.mark.parametrize("times", [1, 3])
def test_a_download_that_is_cut_off_is_resumed(
    times: int, hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # default: 10 MB; a smaller rest is requested again
    hub.put("org/name", files)
    hub.fail("GET", "/storage/", times=times, how="cut")
    assert load_checkpoint("org/name").class_name == "DeformMambaSR"
    data = files["model.safetensors"]
    half = len(data) // 2 // 1000 * 1000
    ranges = [r.headers.get("range") for r in hub.asked("GET", "/storage/")]
    assert len(ranges) == times + 1
    assert ranges[:2] == [None, f"bytes={half}-"]
    assert verify("org/name@" + hub.repositories["org/name"].refs["main"]) == hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_a_download_that_is_killed_leaves_nothing_that_loads(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put("org/name", files)
    hub.fail("GET", "/storage/", times=1, how="stall")
    script = "from deformmamba.weights import fetch; print(fetch('org/name'))"
    process = python(script, hub, tmp_path / "home")
    assert hub.stalled.wait(120)
    process.send_signal(signal.SIGKILL)
    assert finished(process)[0] == -signal.SIGKILL
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert any(path.suffix == ".incomplete" for path in left)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    cache = tmp_path / "home" / "hub"
    refused(lambda: load_checkpoint("org/name", cache_dir=cache, local_files_only=True), "not in the local cache")
    for path in left:
        refused(lambda path=path: read_checkpoint(path), "not a usable checkpoint")
    assert load_checkpoint("org/name", cache_dir=cache).class_name == "DeformMambaSR"


def test_what_the_hub_sends_is_compared_with_the_hubs_own_hash(hub: HubServer, files: dict[str, bytes]) -> None:
    data = files["model.safetensors"]
    digest = hashlib.sha256(data).hexdigest()
    hub.put("org/name", files)
    hub.stored[digest] = other = data[:-1] + bytes([data[-1] ^ 1])
    message = refused(lambda: load_checkpoint("org/name"), "damaged or is another one; delete .* fetch it again")
    assert digest in message
    assert hashlib.sha256(other).hexdigest() in message
    hub.stored[digest] = data
    blob = re.search(r"delete (\S+) and", message)
    assert blob
    Path(blob[1]).unlink()
    assert load_checkpoint("org/name").sha256 == digest


def test_a_blob_that_is_a_link_itself_is_still_compared(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The client may keep blobs in a store shared by several repositories, where file names are another hash."""
    hub.put("org/name", files)
    load_checkpoint("org/name")
    (blob,) = (tmp_path / "cache" / "models--org--name" / "blobs").glob("?" * 64)
    store = tmp_path / "cache" / "blobs" / ("0" * 64)
    store.parent.mkdir()
    blob.rename(store)
    blob.symlink_to(store)
    assert load_checkpoint("org/name").sha256 == blob.name
    store.write_bytes(files["model.safetensors"] + b"\0")
    refused(lambda: load_checkpoint("org/name"), f"{blob.name} was expected")


def test_a_cache_without_links_asks_the_hub_for_the_hash(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    commit = hub.put("org/name", files)
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    path = fetch(f"org/name@{commit}")
    assert not path.is_symlink()
    assert verify(f"org/name@{commit}") == digest
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    refused(lambda: load_checkpoint(f"org/name@{commit}"), f"{digest} was expected")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint(f"org/name@{commit}").sha256 != digest, "nobody knows the hash, and the file is well-formed"


def test_a_small_file_is_compared_by_gits_hash(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.put("org/name", files)
    load_checkpoint("org/name")
    blobs = tmp_path / "cache" / "models--org--name" / "blobs"
    assert {path.name for path in blobs.iterdir()} == {
        hashlib.sha256(files["model.safetensors"]).hexdigest(),
        git_blob(files["config.json"]),
    }


def test_a_repository_whose_config_disagrees_is_refused(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.put("org/name", {**files, "config.json": files["config.json"].replace(b'"scale": 2', b'"scale": 4')})
    refused(lambda: load_checkpoint("org/name"), "disagree on config")
    hub.put("org/bare", {"model.safetensors": files["model.safetensors"]})
    assert load_checkpoint("org/bare").config["scale"] == 2, "the header alone is enough"


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_repositories_that_are_not_there_or_not_yours(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("org/name", files)
    hub.put("org/private", files)
    hub.repositories["org/private"].private = True
    hub.put("org/gated", files)
    hub.repositories["org/gated"].gated = True
    hub.put("org/pickle", {"pytorch_model.bin": b"PK\x03\x04"})
    refused(lambda: load_checkpoint("org/nothing"), "no repository org/nothing that you can access.*HF_TOKEN")
    refused(lambda: load_checkpoint("org/private"), "no repository org/private that you can access.*HF_TOKEN")
    refused(lambda: load_checkpoint("org/gated"), "org/gated is gated; ask for access.*HF_TOKEN")
    refused(lambda: load_checkpoint("org/name@v9"), "org/name has no revision 'v9'; give a commit")
    refused(lambda: load_checkpoint("org/pickle"), "org/pickle has no model.safetensors; only safetensors is read")
    refused(lambda: load_checkpoint("org/bad..name"), "not a repository name")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused(lambda: load_checkpoint("org/name"), r"does not let you fetch org/name \(401\).*a token that is valid")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_checkpoint("org/private").class_name == load_checkpoint("org/gated").class_name
    refused(lambda: load_checkpoint("org/nothing"), "no repository org/nothing that you can access")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, r"does not let you fetch org/name \(403\)|not in the local cache.*403"),
        (429, r"too many requests from here \(429\); wait some minutes"),
        (500, "500.*again"),
        (503, "503.*again"),
    ],
)
def test_a_hub_that_refuses(
    method: str, status: int, message: str, hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put("org/name", files)
    hub.fail(method, "/", status=status)
    refused(lambda: load_checkpoint("org/name"), message)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.faults.clear()
    assert load_checkpoint("org/name").class_name == "DeformMambaSR"
    hub.fail("HEAD", "/", status=status)
    assert load_checkpoint("org/name").class_name == "DeformMambaSR", "a warm cache helps"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_recovers(status: int, hub: HubServer, files: dict[str, bytes]) -> None:
    hub.put("org/name", files)
    hub.fail("HEAD", "/", status=status, times=2)
    assert load_checkpoint("org/name").class_name == "DeformMambaSR"
    assert len(hub.asked("HEAD", "model.safetensors")) == 3


def test_a_hub_that_does_not_answer_in_time(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("org/name", files)
    for name, seconds in (("HF_HUB_ETAG_TIMEOUT", 0.05), ("HF_HUB_DOWNLOAD_TIMEOUT", 0.05)):
        monkeypatch.setattr(constants, name, seconds)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.05)
    hub.fail("GET", "/storage/", how="silent")
    refused(lambda: load_checkpoint("org/name"), r"cannot fetch org/name \(ReadTimeout: .*try again")
    hub.fail("HEAD", "/", how="silent")
    refused(lambda: load_checkpoint("org/name"), "did not answer .ReadTimeout.*HF_HUB_ETAG_TIMEOUT=60")


def test_a_file_that_is_no_checkpoint(hub: HubServer) -> None:
    hub.put("org/name", {"model.safetensors": b"\x80\x04K\x01."})
    refused(lambda: load_checkpoint("org/name"), "pickle or zip archive, not safetensors|header|ends inside")
    assert main(["weights", "fetch", "org/name"]) == 2


@pytest.mark.slow
def test_a_cache_without_room_or_permission(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    """The process first cannot write files of more than 10 kB, and then cannot write into the cache."""
    hub.put("org/name", files)
    script = (
        "import os, resource\n"
        "from deformmamba.weights import WeightsError, load_checkpoint\n"
        "def attempt():\n"
        "    try: load_checkpoint('org/name')\n"
        "    except WeightsError as error: print(error)\n"
        "limit = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))\n"
        "attempt()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limit)\n"
        "from huggingface_hub import constants\n"
        "constants.HF_HUB_CACHE += '-locked'\n"
        "os.mkdir(constants.HF_HUB_CACHE, 0o500)\n"
        "os.getuid() or os.setuid(65534)\n"
        "attempt()\n"
    )
    tmp_path.chmod(0o755)
    code, out, err = finished(python(script, hub, tmp_path / "home"))
    assert code == 0, err
    room, permission = out.splitlines()
    cache = tmp_path / "home" / "hub"
    assert re.fullmatch(rf"cannot fetch org/name: the cache {cache} has no room .*set HF_HOME to .*", room)
    assert re.fullmatch(rf"cannot fetch org/name: the cache {cache}-locked cannot be written .*HF_HOME.*", permission)
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Data processing error: \ud800 CAS service error"),
            r"cannot fetch org/name \(RuntimeError: Data",
        ),
        (OSError("Consistency check failed:\nfile should be of size 5"), "OSError: Consistency check.*try again"),
        (OSError(28, "No space left on device"), "has no room .No space left on device.; free some, or set HF_HOME"),
        (PermissionError(13, "Permission denied"), "cannot be written .Permission denied.; set HF_HOME"),
        (OSError(30, "Read-only file system"), "cannot be written .Read-only file system.; set HF_HOME"),
    ],
)
def test_whatever_else_the_client_raises_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refused(lambda: load_checkpoint("org/name"), message).encode()


# ---------------------------------------------------------------------------------------------------- offline


@pytest.mark.slow
def test_offline_with_a_cold_and_a_warm_cache(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    commit = hub.put("org/name", files)
    assert fetch("org/name", cache_dir=tmp_path / "home" / "hub").read_bytes() == files["model.safetensors"]
    script = (
        "from deformmamba.cli import main\n"
        "for name in ['org/name', 'org/name@main', 'org/name@COMMIT', 'org/other', 'org/name@v1', 'org/bad..name']:\n"
        "    print(main(['weights', 'verify', name]))\n"
    ).replace("COMMIT", commit)
    code, out, err = finished(python(script, None, tmp_path / "home", HF_HUB_OFFLINE="1"))
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    warm = [f"{name}: ok, sha256 {digest}" for name in ("org/name", "org/name@main", f"org/name@{commit}")]
    assert out.splitlines() == [warm[0], "0", warm[1], "0", warm[2], "0", "2", "2", "2"], err
    assert code == 0
    *cold, invalid = err.splitlines()
    assert len(cold) == 2
    for line in cold:
        assert re.search(
            "is not in the local cache and offline mode is on; unset HF_HUB_OFFLINE, or fetch it on a machine "
            "that can .deformmamba weights fetch org/.* --to FOLDER. and give that folder",
            line,
        )
    assert "not a repository name" in invalid


def test_no_network_and_nobody_said_so(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put("org/name", files)
    load_checkpoint("org/name")
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    assert load_checkpoint("org/name").source == f"org/name@{commit}"
    refused(lambda: load_checkpoint("org/other"), "the Hub did not answer .ConnectError.*on a machine that can")


def test_a_folder_for_a_machine_without_a_network(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.put("org/name", {**files, "README.md": b"# the card"})
    hub.put("org/bare", {"model.safetensors": files["model.safetensors"]})
    assert main(["weights", "fetch", "org/name", "--to", str(tmp_path / "stick")]) == 0
    assert "verified" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (tmp_path / "stick").iterdir()} == {**files, "README.md": b"# the card"}
    model = from_pretrained(tmp_path / "stick")
    assert model.source == str(tmp_path / "stick")
    assert fetch("org/bare", tmp_path / "bare").read_bytes() == files["model.safetensors"]
    assert (tmp_path / "bare" / "config.json").read_bytes() == files["config.json"]
    assert 'from_pretrained("org/bare@' in (tmp_path / "bare" / "README.md").read_text()
    assert fetch(f"org/name@{commit}").read_bytes() == files["model.safetensors"]
    (tmp_path / "file").touch()
    refused(lambda: fetch("org/name", tmp_path / "file"), "cannot make the folder")
    assert main(["weights", "fetch", "org/name", "--to", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- the manifest


def test_manifest_entries_on_the_hub_are_pinned(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = files["model.safetensors"]
    commit = hub.put("org/ixi-2x", files)
    entry = {"file": "ixi-2x.safetensors", "sha256": hashlib.sha256(data).hexdigest(), "repo": "org/ixi-2x"}
    known = {"format": 1, "weights": {"ixi-2x": {**entry, "revision": commit}}, "planned": {}}
    monkeypatch.setattr(weights, "manifest", lambda: known)
    monkeypatch.setattr(weights, "files", lambda package: tmp_path / "package")
    hub.put("org/ixi-2x", {"model.safetensors": data + b"x"})
    refused(lambda: verify("ixi-2x"), "not in the local cache")
    model = from_pretrained("ixi-2x")  # from the Hub
    assert model.source == "ixi-2x"
    assert "hub" not in model.provenance
    assert hub.asked("HEAD")[0].path == f"/org/ixi-2x/resolve/{commit}/model.safetensors"
    hub.requests.clear()
    assert from_pretrained("ixi-2x").source == "ixi-2x"  # from the cache
    assert verify("ixi-2x") == entry["sha256"]
    (tmp_path / "package" / "checkpoints").mkdir(parents=True)
    (tmp_path / "package" / "checkpoints" / "ixi-2x.safetensors").write_bytes(b"damaged")
    refused(lambda: from_pretrained("ixi-2x"), "damaged or is another one")  # the package comes before the cache
    assert hub.requests == []

    (tmp_path / "package" / "checkpoints" / "ixi-2x.safetensors").unlink()
    known["weights"]["ixi-2x"] = {**entry, "sha256": "0" * 64, "revision": commit}  # type: ignore[index]
    message = refused(lambda: from_pretrained("ixi-2x"), "damaged or is another one")  # although the Hub's hash fits
    assert "0" * 64 in message
    assert entry["sha256"] in message


# --------------------------------------------------------------------------------------------------------------- upload


def test_publish_and_load_again(
    hub: HubServer,
    folder: Path,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert main(["weights", "publish", str(folder), "org/mine", "--dry-run", "--license", "cc-by-4.0"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"would upload model.safetensors +{len(files['model.safetensors'])} bytes +sha256 {digest}", said)
    assert "would upload config.json" in said
    assert "would upload README.md" in said
    assert hub.requests == [], "a dry run asks nobody"

    assert main(["weights", "publish", str(folder), "org/mine", "--private", "--license", "cc-by-4.0"]) == 0
    said = capsys.readouterr().out
    commit = hub.repositories["org/mine"].refs["main"]
    assert f"published org/mine@{commit}" in said
    assert hub.repositories["org/mine"].private
    assert hub.repositories["org/mine"].messages == ["initial commit", f"Checkpoint {digest[:12]}"]
    (put,) = hub.asked("PUT")
    assert put.path == f"/storage/{digest}"
    model = from_pretrained("org/mine")
    assert model.source == f"org/mine@{commit}"

    # huggingface_hub can list and fetch the model, and read its card, without this package
    names = {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert set(huggingface_hub.list_repo_files("org/mine")) == names
    snapshot = Path(huggingface_hub.snapshot_download("org/mine", cache_dir=tmp_path / "other"))
    assert {path.name for path in snapshot.iterdir()} == names
    sent = {name: content for name, content in files.items() if name != "README.md"}  # the card now names the licence
    assert {name: (snapshot / name).read_bytes() for name in sent} == sent
    data = huggingface_hub.ModelCard.load(snapshot / "README.md").data
    assert data.library_name == "deformmamba"
    assert data.pipeline_tag == "image-to-image"
    assert 'from_pretrained("org/mine")' in (snapshot / "README.md").read_text()
    assert from_pretrained(snapshot).config == model.config

    made = publish(snapshot, "org/copy")
    assert made.revision == hub.repositories["org/copy"].refs["main"]
    text = (snapshot / "README.md").read_text()  # a generated card is generated again, with its licence
    assert (
        made.files["README.md"][1]
        == hashlib.sha256(text.replace("org/mine", "org/copy").replace("# mine", "# copy").encode()).hexdigest()
    )


@pytest.mark.slow
def test_what_may_not_be_published(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        lambda: publish(folder, "org/mine", license="cc-by-4.0"),
        r"does not let you publish org/mine \(401\); `hf auth login`",
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(lambda: publish(folder, "mine"), "'mine' is not a repository name; wanted org/name")
    refused(lambda: publish(folder, "org/mine@v1"), "wanted org/name")
    refused(lambda: publish(folder, "org/mi..ne", license="cc-by-4.0"), "not a repository name")
    refused(lambda: publish(tmp_path / "nothing", "org/mine"), "no file or folder")
    refused(lambda: publish("unknown", "org/mine"), "unknown weights")
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: publish(tmp_path, "org/mine"), "holds no model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refused(lambda: publish(tmp_path, "org/mine"), "disagree on")
    assert main(["weights", "publish", str(tmp_path), "org/mine"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert "org/mine" not in hub.repositories
    for part in ("/api/repos/create", "/preupload/", "/commit/"):
        hub.faults.clear()
        hub.fail("POST", part, status=403)
        refused(lambda: publish(folder, "org/mine", license="cc-by-4.0"), r"does not let you publish org/mine \(403\)")
    hub.faults.clear()
    hub.fail("PUT", "/storage/", status=500)
    refused(lambda: publish(folder, "org/mine", license="cc-by-4.0"), "cannot publish org/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: publish(folder, "org/mine", license="cc-by-4.0"), "cannot publish org/mine: offline mode is on")


def test_a_hub_that_stored_something_else_is_noticed(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    put = hub.put
    monkeypatch.setattr(
        hub, "put", lambda name, files, **what: put(name, {k: v + b"\0" for k, v in files.items()}, **what)
    )
    refused(lambda: publish(folder, "org/mine", license="cc-by-4.0"), "check the repository before it is used")


def test_the_card_of_a_file_that_the_manifest_lists_is_the_manifests(hub: HubServer) -> None:
    made = publish("ixi-4x", "org/ixi-4x", dry_run=True)
    refused(
        lambda: publish("ixi-4x", "org/ixi-4x", dry_run=True, license="mit"),
        "'ixi-4x': the licence of ixi-4x is cc-by-sa-4.0, not mit; leave license=",
    )
    entry = weights.weights_entry("ixi-4x")
    card = weights.card({**entry, "repo": "org/ixi-4x", "revision": None})
    assert made.files["README.md"] == (len(card.encode()), hashlib.sha256(card.encode()).hexdigest())
    assert made.files["model.safetensors"] == (entry["size"], entry["sha256"])
    assert json.loads(json.dumps(made.files))
    assert hub.requests == []
