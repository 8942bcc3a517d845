"""A small stand-in for the Hugging Face Hub on 127.0.0.1: the part of its HTTP API that a push and a download need.

Written from what the huggingface_hub client sends. Repositories live in memory; a commit is applied whole or
not at all, and only when every large file it names has arrived.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".mp4")


@dataclass
class Repository:
    """One repository: every branch is a list of commits, a commit all files by path."""

    kind: str
    private: bool
    branches: dict[str, list[dict[str, bytes]]]
    messages: list[str] = field(default_factory=list)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.branches[branch][-1]

    def commits(self, branch: str = "main") -> int:
        """How many commits there are after the first one, which the Hub makes itself."""
        return len(self.branches[branch]) - 1

    def branch_of(self, revision: str) -> str:
        """The branch of that name, or whose newest commit has it."""
        return next((branch for branch in self.branches if self.sha(branch) == revision), revision)

    def sha(self, branch: str = "main") -> str:
        """The newest commit's name."""
        files = {path: hashlib.sha1(data).hexdigest() for path, data in self.files(branch).items()}
        return hashlib.sha1(f"{branch} {len(self.branches[branch])} {sorted(files.items())}".encode()).hexdigest()


@dataclass(frozen=True)
class Cut:
    """Requests on which the connection is closed."""

    request: str
    """A pattern of ``METHOD /path``."""
    when: Literal["before", "halfway", "after", "answering"]
    """Before anything is read, with half of the body read, once all is done but not answered, or in the answer."""


@dataclass
class Hub:
    """What the server knows, what it was asked, and how it should misbehave."""

    users: dict[str, str] = field(default_factory=dict)
    """Token to user name."""
    readers: set[str] = field(default_factory=set)
    """Tokens that may not write."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, kept when no commit names them, as the Hub does."""
    requests: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    """SHA-256 of each large file whose bytes arrived, in order."""
    break_uploads_after: int | None = None
    """Close the connection on every large file after this many."""
    cut: Cut | None = None
    dies: bool = False
    """When an upload breaks off, stop listening and answer nothing any more."""
    dead: bool = False
    card_warning: str = ""
    refuse_commit: tuple[int, str] | None = None
    """Status and message to answer a commit with."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: else each answer waits for the client to acknowledge
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class names it so)
        """Say nothing: pytest shows what matters."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        cut = self._cut_of(path)
        if cut in ("before", "halfway"):
            if cut == "halfway":
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        body = self._body()
        with self.hub.lock:
            if self.hub.dead:
                self.close_connection = True
                return
            self.hub.requests.append(f"{self.command} {path}")
            try:
                for method, pattern, handle in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        answer = handle(self, body, *match.groups())
                        break
                else:
                    raise _Refused(404, f"no such page: {self.command} {path}")
            except _Refused as refused:
                headers = {"X-Error-Message": refused.message}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)
                return
        if answer is None or cut == "after":
            self.close_connection = True
        elif cut == "answering":
            self._send_half(*answer)
        elif isinstance(answer, tuple):
            self._send_file(*answer)
        else:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _cut_of(self, path: str) -> str:
        cut = self.hub.cut
        return cut.when if cut is not None and re.fullmatch(cut.request, f"{self.command} {path}") else ""

    def _send_file(self, body: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, body, headers)
            return
        first = int(asked[1])
        self._send(206, body[first:], {**headers, "Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"})

    def _send_half(self, body: bytes, headers: dict[str, str]) -> None:
        self._send(200, body[: len(body) // 2], {**headers, "Content-Length": str(len(body))})
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _user(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.users:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _writer(self, repo_id: str) -> None:
        user = self._user()
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if user != repo_id.split("/")[0] or token in self.hub.readers:
            raise _Refused(403, "You don't have the rights to write here")

    def _repository(self, kind: str, repo_id: str) -> Repository:
        self._user()
        found = self.hub.repositories.get(repo_id)
        if found is None or found.kind != kind:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return found

    def _whoami(self, _body: bytes) -> Any:
        return {"type": "user", "name": self._user(), "orgs": []}

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self._writer(repo_id)
        if repo_id in self.hub.repositories:
            raise _Refused(409, "You already created this repo")
        private = asked.get("visibility") == "private"
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.hub.repositories[repo_id] = Repository(asked.get("type", "model"), private, {"main": [first]})
        return {"url": f"{self._endpoint}/{repo_id}"}

    @property
    def _endpoint(self) -> str:
        return f"http://{self.headers['Host']}"

    def _branch(self, _body: bytes, repo_id: str, branch: str) -> Any:
        self._writer(repo_id)
        repository = self._repository("model", repo_id)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.branches[branch] = [dict(repository.files())]
        return {}

    def _info(self, _body: bytes, kind: str, repo_id: str, branch: str | None) -> Any:
        repository = self._repository(kind, repo_id)
        branch = repository.branch_of(branch or "main")
        if branch not in repository.branches:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        return {
            "id": repo_id,
            "sha": repository.sha(branch),
            "private": repository.private,
            "siblings": [{"rfilename": path} for path in sorted(repository.files(branch))],
        }

    def _validate(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        if not isinstance(data.get("license"), str):
            raise _Refused(400, '"license" must be a string')
        warnings = [{"message": self.hub.card_warning}] if self.hub.card_warning else []
        return {"errors": [], "warnings": warnings}

    def _preupload(self, body: bytes, repo_id: str, branch: str) -> Any:
        self._writer(repo_id)
        there = self._repository("model", repo_id).files(branch)
        answer = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES)
            old = there.get(file["path"])
            oid = None
            if old is not None:
                git = hashlib.sha1(b"blob %d\0" % len(old) + old).hexdigest()
                oid = hashlib.sha256(old).hexdigest() if large else git
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def _batch(self, body: bytes, repo_id: str) -> Any:
        self._writer(repo_id)
        objects: list[dict[str, Any]] = []
        for item in json.loads(body)["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if item["oid"] not in self.hub.blobs:
                upload = {"href": f"{self._endpoint}/blobs/{item['oid']}"}
                objects[-1]["actions"] = {"upload": upload}
        return {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> Any:
        limit = self.hub.break_uploads_after
        if limit is not None and len(self.hub.uploads) >= limit:
            if self.hub.dies:
                self.hub.dead = True
                self.server.shutdown()
                self.server.server_close()
            return None
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(422, "these bytes are not those that were announced")
        self.hub.blobs[oid] = body
        self.hub.uploads.append(oid)
        return {}

    def _commit(self, body: bytes, repo_id: str, branch: str) -> Any:
        self._writer(repo_id)
        repository = self._repository("model", repo_id)
        if self.hub.refuse_commit:
            raise _Refused(*self.hub.refuse_commit)
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", repository.sha(branch)) != repository.sha(branch):
                    raise _Refused(412, "A commit has happened since")
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Refused(400, f"{value['path']} was never uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, f"what is a {line['key']}?")
        repository.branches[branch].append(files)
        repository.messages.append(message)
        sha = repository.sha(branch)
        return {"commitUrl": f"{self._endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}

    def _squash(self, _body: bytes, repo_id: str, branch: str) -> Any:
        self._writer(repo_id)
        repository = self._repository("model", repo_id)
        repository.branches[branch] = [repository.files(branch)]
        return {}

    def _tree(self, _body: bytes, kind: str, repo_id: str, revision: str) -> Any:
        repository = self._repository(kind, repo_id)
        files = repository.files(repository.branch_of(revision))
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(files.items())
        ]

    def _resolve(self, _body: bytes, repo_id: str, revision: str, path: str) -> Any:
        repository = self._repository("model", repo_id)
        branch = repository.branch_of(revision)
        files = repository.files(branch)
        if path not in files:
            raise _Refused(404, f"no {path}", "EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest()
        return files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": repository.sha(branch)}


_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", _Handler._whoami),
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", _Handler._validate),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", _Handler._branch),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler._preupload),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", _Handler._commit),
    ("POST", r"/api/models/([^/]+/[^/]+)/super-squash/(.+)", _Handler._squash),
    ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/(.+)", _Handler._tree),
    ("GET", r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/revision/(.+))?", _Handler._info),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/blobs/([0-9a-f]{64})", _Handler._put),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler._resolve),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Run the server while the block lasts; its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
