"""A small Hub on loopback: the HTTP endpoints that huggingface_hub calls to list, download and upload a model.

It answers like the Hub. A request for a large file (here: any .safetensors) is redirected to storage on another host
name, with the file's SHA-256 in `X-Linked-Etag`. A small file comes from the repository itself, with git's blob SHA-1
as its ETag. A caller without read permission gets "not found" for a private repository. Uploads use git LFS, not Xet.
`fail` makes it fail in a chosen way.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_tokenoftheowner"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]  # lower-case names


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class Fault:
    """A failure instead of the answer, for the first `times` requests of `method` for a path that contains `part`."""

    method: str
    part: str
    times: int
    status: int = 0  # HTTP status of the answer; 0: do `how`
    how: str = "cut"  # close the connection within the body; "stall": stop sending there; "silent": send nothing
    headers: dict[str, str] = field(default_factory=dict)


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}  # by sha256
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.stalled = threading.Event()  # set when an answer has stalled
        self.closing = threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self._server.server_port}"

    def put(self, name: str, files: dict[str, bytes], *, branch: str = "main", message: str = "") -> str:
        """Commits `files` to the branch and returns the commit. Creates the repository if it is missing."""
        repository = self.repositories.setdefault(name, Repository())
        parent = repository.refs.get(branch, "")
        tree = {**repository.commits.get(parent, {}), **files}
        listing = "".join(f"{path} {git_blob(data)}\n" for path, data in sorted(tree.items()))
        commit = hashlib.sha1(f"{parent}\n{message}\n{listing}".encode()).hexdigest()
        repository.commits[commit] = tree
        repository.refs[branch] = commit
        repository.messages.append(message)
        self.stored |= {hashlib.sha256(data).hexdigest(): data for path, data in files.items() if is_large(path)}
        return commit

    def fail(self, method: str, part: str, *, times: int = 1000, **what: Any) -> None:
        self.faults.append(Fault(method, part, times, **what))

    def asked(self, method: str = "", part: str = "") -> list[Request]:
        return [r for r in self.requests if r.method.startswith(method) and part in r.path]

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        self._thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # huggingface_hub's own request, once a day and cached: no part of a test
            return self._answer(404, b"")
        self.hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        for fault in self.hub.faults:
            if fault.times and self._is(fault) and (fault.status or fault.how == "silent"):
                fault.times -= 1
                if fault.status:
                    return self._answer(fault.status, b"", **fault.headers)
                self.close_connection = True
                self.hub.closing.wait(60)
                return None
        for pattern, answer in self.ROUTES:
            if match := re.fullmatch(pattern, path):
                return answer(self, body, **match.groupdict())
        return self._answer(404, b"")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, data: bytes | Any, /, **headers: str) -> None:
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = next((f for f in self.hub.faults if f.times and not f.status and self._is(f)), None)
        if fault is None or len(data) < 2:
            self.wfile.write(data)
            return
        fault.times -= 1
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if fault.how == "stall":
            self.hub.stalled.set()
            self.hub.closing.wait(60)
        self.close_connection = True

    def _is(self, fault: Fault) -> bool:
        return self.command == fault.method and fault.part in self.path

    def _repository(self, name: str, write: bool = False) -> Repository | None:
        """The repository, or None if this caller may not access it; then the error has been sent."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = self.hub.repositories.get(name)
        if token not in ("", TOKEN):
            self._answer(401, b"", X_Error_Message="Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not token):
            self._answer(401 if not token else 404, b"", X_Error_Code="RepoNotFound")
        elif repository.gated and not token:
            self._answer(401, b"", X_Error_Code="GatedRepo")
        elif write and not token:
            self._answer(401, b"", X_Error_Message="You must be logged in to do this")
        else:
            return repository
        return None

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._answer(404, b"", X_Error_Code="RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        if name in self.hub.moved:
            there = f"/{self.hub.moved[name]}/resolve/{revision}/{file}"
            return self._answer(307, b"", Location=there)
        if (found := self._tree(name, revision)) is None:
            return None
        commit, tree = found
        if file not in tree:
            return self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = tree[file]
        if not is_large(file):
            size = {"Content_Length": str(len(data))}
            etag = f'"{git_blob(data)}"'
            return self._answer(200, b"" if self.command == "HEAD" else data, ETag=etag, X_Repo_Commit=commit, **size)
        digest = hashlib.sha256(data).hexdigest()
        return self._answer(
            302,
            b"",
            Location=f"{self.hub.storage}/storage/{digest}",
            ETag=f'"{git_blob(data)}"',
            X_Linked_Etag=f'"{digest}"',
            X_Linked_Size=str(len(data)),
            X_Repo_Commit=commit,
        )

    def _storage(self, _: bytes, digest: str) -> None:
        data = self.hub.stored[digest]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._answer(200, data, ETag=f'"{digest}"', Accept_Ranges="bytes")
        start = int(asked[1])
        whole = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._answer(206, data[start:], ETag=f'"{digest}"', Content_Range=whole)

    def _info(self, _: bytes, name: str, revision: str | None = None) -> None:
        if found := self._tree(name, revision or "main"):
            commit, tree = found
            siblings = [{"rfilename": path} for path in sorted(tree)]
            self._answer(200, {"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _listing(self, _: bytes, name: str, revision: str) -> None:
        if found := self._tree(name, revision):
            rows: list[dict[str, Any]] = []
            for path, data in sorted(found[1].items()):
                rows.append({"type": "file", "path": path, "size": len(data), "oid": git_blob(data)})
                if is_large(path):
                    large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                    rows[-1]["lfs"] = large
            self._answer(200, rows)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **url})
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self.hub.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        return self._answer(200, url)

    def _validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        ok = re.match(r"---\n(.*\n)+?---\n", text)
        self._answer(200 if ok else 400, {"warnings": [], "errors": [] if ok else [{"message": "no metadata"}]})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._repository(name, write=True):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})

    def _batch(self, body: bytes, name: str) -> None:
        if self._repository(name, write=True):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {
                        "upload": {"href": f"{self.hub.url}/storage/{o['oid']}", "header": {}},
                        "verify": {"href": f"{self.hub.url}/verify", "header": {}},
                    },
                }
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, digest: str) -> None:
        if self.command in ("GET", "HEAD"):
            return self._storage(body, digest)
        if hashlib.sha256(body).hexdigest() != digest:
            return self._answer(400, b"")
        self.hub.stored[digest] = body
        return self._answer(200, b"", ETag=f'"{digest}"')

    def _verify(self, body: bytes) -> None:
        asked = json.loads(body)
        there = len(self.hub.stored.get(asked["oid"], b"")) == asked["size"]
        self._answer(200 if there else 404, {})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        if self._repository(name, write=True):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.stored[value["oid"]]
            message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            commit = self.hub.put(name, files, branch=revision, message=message)
            self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    ROUTES = (
        (r"/api/repos/create", _create),
        (r"/api/validate-yaml", _validate),
        (r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>.+)", _preupload),
        (r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>.+)", _commit),
        (r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>.+)", _listing),
        (r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>.+)", _info),
        (r"/api/models/(?P<name>[^/]+/[^/]+)", _info),
        (r"/storage/(?P<digest>[0-9a-f]{64})", _upload),
        (r"/verify", _verify),
        (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
        (r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>.+?)/(?P<file>[^/]+)", _resolve),
    )
