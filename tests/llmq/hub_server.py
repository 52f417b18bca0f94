"""A hub on loopback: enough of the hub's HTTP for huggingface_hub's downloads and for data sets streamed by `datasets`.

Repositories are dictionaries of files. It counts what it serves, refuses as the hub refuses (gated, missing), and can
break a connection in the middle of a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """files: path → bytes. gated: refused with 403. drops: path → how many times to break off in its middle."""

    files: dict[str, bytes]
    gated: bool = False
    drops: dict[str, int] = field(default_factory=dict)
    reset: bool = False
    """Break off with a reset rather than an orderly close."""
    private: bool = False
    branches: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    @cached_property
    def commit(self) -> str:
        """The one commit that the repository has."""
        digest = hashlib.sha1()
        for path, data in sorted(self.files.items()):
            digest.update(path.encode() + b"\0" + data)
        return digest.hexdigest()


class HubServer:
    """`with HubServer() as hub`: serves `hub.models` and `hub.datasets` (name → Repo) at `hub.url`."""

    def __init__(self) -> None:
        self.models: dict[str, Repo] = {}
        self.datasets: dict[str, Repo] = {}
        self.requests: Counter[str] = Counter()
        """'METHOD path' → how many."""
        self.ranges: list[str] = []
        """The Range headers of file requests."""
        self.served: Counter[str] = Counter()
        """File path in its repository → body bytes sent."""
        self.objects: dict[str, bytes] = {}
        """What was uploaded by its sha256, before and after the commit that names it."""
        self.writers: set[str] = set()
        """Tokens that may write."""
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def forget(self) -> None:
        """Set the counts to zero."""
        with self.lock:
            self.requests.clear()
            self.served.clear()
            self.ranges.clear()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the request below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on stderr."""

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if not upload(hub, self):
                    self.form = parse_qs(self.body.decode())
                    self.answer()

            def do_PUT(self) -> None:
                """The bytes of a large file, to where `upload` said."""
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.objects[self.path.rpartition("/")[2]] = self.body
                self.json({})

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path).strip("/")
                with hub.lock:
                    hub.requests[f"{self.command} {path}"] += 1
                parts = path.split("/")
                if parts[0] == "api" and parts[1] in ("models", "datasets"):
                    repos = hub.models if parts[1] == "models" else hub.datasets
                    found = self.find(repos, "/".join(parts[2:4]))
                    if found:
                        self.api(found, "/".join(parts[2:4]), parts[4:])
                    return
                repos, rest = (hub.datasets, parts[1:]) if parts[0] == "datasets" else (hub.models, parts)
                if len(rest) > 4 and rest[2] == "resolve":
                    found = self.find(repos, "/".join(rest[:2]))
                    if found and self.right(found, rest[3]):
                        self.file(found, "/".join(rest[4:]))
                    return
                self.refuse(404, "EntryNotFound")

            def find(self, repos: dict[str, Repo], name: str) -> Repo | None:
                if name not in repos:
                    self.refuse(401, "RepoNotFound")
                elif repos[name].gated:
                    self.refuse(403, "GatedRepo")
                else:
                    return repos[name]
                return None

            def right(self, repo: Repo, revision: str) -> bool:
                known = revision in ("main", repo.commit)
                if not known:
                    self.refuse(404, "RevisionNotFound")
                return known

            def api(self, repo: Repo, name: str, rest: list[str]) -> None:
                if len(rest) > 1 and not self.right(repo, rest[1]):
                    return
                if not rest or rest[0] == "revision":
                    siblings = [{"rfilename": path, "size": len(data)} for path, data in repo.files.items()]
                    self.json(
                        {"id": name, "sha": repo.commit, "private": repo.private, "tags": [], "siblings": siblings}
                    )
                elif rest[0] == "tree":
                    under = "/".join(rest[2:])
                    recursive = "recursive=True" in self.path or "recursive=true" in self.path
                    self.json(tree(repo, under, recursive))
                elif rest[0] == "paths-info":
                    wanted = self.form.get("paths", [])
                    entries = {entry["path"]: entry for entry in tree(repo, "", True)}
                    self.json([entries[path] for path in wanted if path in entries])
                else:
                    self.refuse(404, "EntryNotFound")

            def file(self, repo: Repo, path: str) -> None:
                if path not in repo.files:
                    self.refuse(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
                    return
                data = repo.files[path]
                begin, end, status = 0, len(data), 200
                asked = self.headers.get("Range")
                if asked and self.command == "GET":
                    with hub.lock:
                        hub.ranges.append(asked)
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    begin, end, status = int(first), min(int(last) + 1 if last else len(data), len(data)), 206
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", f'"{etag(data)}"')
                self.send_header("X-Repo-Commit", repo.commit)
                self.send_header("Content-Length", str(end - begin))
                self.end_headers()
                if self.command == "HEAD":
                    return
                body = memoryview(data)[begin:end]
                with hub.lock:
                    drop = repo.drops.get(path, 0) > 0
                    repo.drops[path] = max(0, repo.drops.get(path, 0) - 1)
                self.send(path, body[: len(body) // 2] if drop else body)
                if drop:
                    self.wfile.flush()
                    if repo.reset:
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close() if repo.reset else self.connection.shutdown(socket.SHUT_RDWR)

            def send(self, path: str, body: memoryview) -> None:
                for at in range(0, len(body), 1 << 16):
                    piece = body[at : at + (1 << 16)]
                    try:
                        self.wfile.write(piece)
                    except OSError:  # the client has seen enough
                        self.close_connection = True
                        return
                    with hub.lock:
                        hub.served[path] += len(piece)

            def json(self, value: Any, status: int = 200) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler


def upload(hub: HubServer, request: Any) -> bool:
    """Answer a step of an upload: create, branch, preupload, large files, commit. False where it is none of those."""
    parts = unquote(urlsplit(request.path).path).strip("/").split("/")
    name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
    if parts == ["api", "repos", "create"]:
        step = "create"
    else:
        step = parts[-1] if parts[-1] in ("batch", "validate-yaml") else "".join(parts[4:5])
    if step not in ("create", "branch", "preupload", "batch", "commit", "validate-yaml"):
        return False
    with hub.lock:
        hub.requests[f"{request.command} {step}"] += 1
    if request.headers.get("Authorization", "").removeprefix("Bearer ") not in hub.writers:
        request.refuse(403, "Forbidden")
        return True
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()] if step == "commit" else []
    given = lines or json.loads(request.body or b"{}")
    if step == "create":
        name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
        there = name in hub.models
        hub.models.setdefault(name, Repo({}, private=given.get("private") or given.get("visibility") == "private"))
        request.json({"url": f"{hub.url}/{name}", "id": name, "name": name}, 409 if there else 200)
    elif step == "validate-yaml":
        request.json({"errors": [], "warnings": []})
    elif step == "branch":
        hub.models[name].branches.add(parts[-1])
        request.json({})
    elif step == "preupload":
        large = [(file["path"], file["size"] > 10_000) for file in given["files"]]
        modes = [{"path": p, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} for p, lfs in large]
        request.json({"files": modes})
    elif step == "batch":
        objects = [
            {**one, "authenticated": True}
            | ({} if one["oid"] in hub.objects else {"actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}"}}})
            for one in given["objects"]
        ]
        request.json({"transfer": "basic", "objects": objects})
    else:
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "header":
                hub.models[name].messages.append(value["summary"])
        hub.models[name].files |= files
        request.json({"success": True, "commitOid": "c" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'c' * 40}"})
    return True


def etag(data: bytes) -> str:
    """The name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def tree(repo: Repo, under: str, recursive: bool) -> list[dict[str, Any]]:
    """The hub's listing of a folder."""
    entries: dict[str, dict[str, Any]] = {}
    prefix = under + "/" if under else ""
    for path, data in repo.files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                entries[folder] = {"type": "directory", "path": folder, "oid": etag(folder.encode()), "size": 0}
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "path": path, "oid": etag(data), "size": len(data)}
    return list(entries.values())
