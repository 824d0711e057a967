"""A stand-in for the Hugging Face Hub: the part of its HTTP interface that huggingface_hub uses, on loopback.

Repositories are commits of files in memory. Large files go through LFS's batch API and come from another host (here
another port), by a redirect. `Fault`s make it fail in the ways that networks and services do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writerAbCdEf0123456789", "hf_readerAbCdEf0123456789"
LARGE = 4096  # bytes from which on a file goes to LFS


@dataclass
class Fault:
    """What happens instead to requests whose "METHOD path" holds `match`, the next `times` of them.

    A status without a body; or the connection closed after `cut` bytes of the body; or other `data` in its place.
    """

    match: str
    status: int = 0
    cut: int = -1
    data: bytes | None = None
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    head: str = ""

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        listing = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        self.head = hashlib.sha1(f"{self.head}{listing}{message}".encode()).hexdigest()
        self.commits[self.head] = dict(files)
        self.messages.append(message)
        return self.head

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]


class Server:
    """The Hub. `requests` is what it was asked, as "METHOD path"; `hooks` are called with that before it answers."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.tokens_elsewhere: list[str] = []  # that the other host was told
        self.faults: list[Fault] = []
        self.hooks: list[Callable[[str], None]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True) for s in self._servers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def publish(self, repo: str, files: dict[str, bytes], **kind: bool) -> str:
        """Put files into a repository, as another client would. Gives the commit."""
        return self.repositories.setdefault(repo, Repository(**kind)).commit(files, "by another client")

    def asked_for(self, text: str) -> list[str]:
        return [request for request in self.requests if text in request]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = f"{self.command} {path}"
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append(asked)
            self.hub.ranges.append(self.headers.get("Range", ""))
            if path.startswith("/cdn/") and self._token():
                self.hub.tokens_elsewhere.append(self._token())
            fault = next((fault for fault in self.hub.faults if fault.match in asked and fault.times > 0), None)
            if fault is not None:
                fault.times -= 1
            for hook in self.hub.hooks:
                hook(asked)
        if fault is not None and fault.status:
            self._send(fault.status, b"", fault.headers)
        elif path.startswith("/api/"):
            self._api(path, body)
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(path.split(".git/")[0].strip("/"), json.loads(body))
        elif path.startswith("/lfs/"):
            self._store(path.removeprefix("/lfs/"), body)
        elif path.startswith("/cdn/"):
            self._file(self.hub.large[path.removeprefix("/cdn/")], {}, fault)
        elif "/resolve/" in path:
            self._resolve(path, fault)
        else:
            self._send(404, b"")

    def _api(self, path: str, body: bytes) -> None:
        parts = path.split("/")[2:]
        if parts == ["validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts == ["repos", "create"]:
            self._create(json.loads(body))
        elif parts[0] == "models" and (repository := self._repository("/".join(parts[1:3]), parts[3:])) is not None:
            match parts[3:]:
                case [] | ["revision", _]:
                    self._info("/".join(parts[1:3]), repository, parts[4] if parts[3:] else "main")
                case ["preupload", _]:
                    self._preupload(repository, json.loads(body))
                case ["commit", _]:
                    self._commit("/".join(parts[1:3]), repository, body)
                case ["tree", revision]:
                    self._tree(repository, revision)
                case _:  # whoever asks would wait for ever
                    self._send(404, b"")
        elif parts[0] != "models":
            self._send(404, b"")

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repository(self, name: str, action: list[str]) -> Repository | None:
        """The repository, if the caller may do that with it; else the answer has been given."""
        repository, token = self.hub.repositories.get(name), self._token()
        known = token in (WRITER, READER)
        writes = action[:1] in (["preupload"], ["commit"], ["lfs"])
        if repository is None or (repository.private and not known):
            self._refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and not known:
            self._refuse(401, "GatedRepo", "Access to this model is restricted")
        elif writes and token != WRITER:
            self._refuse(403 if known else 401, "", f"not with the token {token}")
        else:
            return repository
        return None

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if self._token() != WRITER:
            self._refuse(403 if self._token() else 401, "", "You don't have the rights")
        elif name in self.hub.repositories:
            self._refuse(409, "", "You already created this model repo")
        else:
            self.hub.repositories[name] = repository = Repository(private=wanted.get("visibility") == "private")
            repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self._json({"url": f"{self.hub.url}/{name}"})

    def _revision(self, repository: Repository, revision: str) -> str | None:
        commit = repository.head if revision == "main" else revision
        if commit in repository.commits:
            return commit
        self._refuse(404, "RevisionNotFound", "Invalid rev id")
        return None

    def _info(self, name: str, repository: Repository, revision: str) -> None:
        if (commit := self._revision(repository, revision)) is None:
            return
        siblings = []
        for path, data in repository.commits[commit].items():
            large = len(data) >= LARGE
            digest = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            row = {"rfilename": path, "size": len(data), "blobId": git_blob(data)}
            siblings.append(row | ({"lfs": digest} if large else {}))
        told = {"id": name, "sha": commit, "private": repository.private, "gated": repository.gated}
        self._json(told | {"siblings": siblings})

    def _tree(self, repository: Repository, revision: str) -> None:
        if (commit := self._revision(repository, revision)) is None:
            return
        rows = []
        for path, data in repository.commits[commit].items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
            if len(data) >= LARGE:
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            rows.append(row)
        self._json(rows)

    def _preupload(self, repository: Repository, wanted: dict[str, Any]) -> None:
        rows = []
        for item in wanted["files"]:
            there = repository.files.get(item["path"])
            row = {"path": item["path"], "shouldIgnore": False, "uploadMode": _mode(item["size"])}
            if there is not None:
                row["oid"] = hashlib.sha256(there).hexdigest() if len(there) >= LARGE else git_blob(there)
            rows.append(row)
        self._json({"files": rows})

    def _batch(self, name: str, wanted: dict[str, Any]) -> None:
        if self._repository(name, ["lfs"]) is None:
            return
        rows = []
        for item in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            rows.append(item | ({} if item["oid"] in self.hub.large else {"actions": upload}))
        self._json({"transfer": "basic", "objects": rows})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, b"")
            return
        self.hub.large[oid] = body
        self._send(200, b"")

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        header, *rows = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", repository.head) != repository.head:
            self._refuse(412, "", "A commit has happened since")
            return
        files = dict(repository.files)
        for row in rows:
            value = row["value"]
            if row["key"] == "deletedFile":
                del files[value["path"]]
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = repository.commit(files, header["value"]["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None})

    def _resolve(self, path: str, fault: Fault | None) -> None:
        name, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self._repository(name, [])
        commit = self._revision(repository, revision) if repository else None
        if repository is None or commit is None:
            return
        data = repository.commits[commit].get(file)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit}
        if len(data) < LARGE:
            self._file(data, headers | {"ETag": f'"{git_blob(data)}"'}, fault)
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.large[oid] = data
        headers |= {
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn}/cdn/{oid}",
        }
        self._send(302, b"", headers)

    def _file(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        if fault is not None and fault.data is not None:
            data = fault.data
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if wanted:
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        cut = fault.cut if fault is not None and self.command == "GET" else -1
        self._send(206 if wanted else 200, data[start:], headers, cut)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), told | (headers or {}))

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: int = -1) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut < 0 else data[:cut])
        if cut >= 0:
            self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def _mode(size: int) -> str:
    return "lfs" if size >= LARGE else "regular"
