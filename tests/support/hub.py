"""A fake of the Hugging Face Hub's HTTP API on a loopback port: repositories, commits, LFS objects, and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
LARGE = (".safetensors", ".png")  # ends of the names of files that are stored as LFS objects


class FakeHub:
    """The server, a context manager.

    Attributes:
        repositories: content of each file by name, for each repository by USER/NAME.
        private: repositories that were created as private ones.
        requests: method and path of all requests so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> FakeHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """Return the environment variables of a process that uses this Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def commit(self, repository: str) -> str:
        """Return the hash of the newest commit, which depends on the files."""
        files = self.repositories[repository]
        return hashlib.sha1(repr(sorted((name, hash(data)) for name, data in files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._download(with_body=False)

    def do_GET(self) -> None:
        path = self._path()
        if path.startswith("/api/models/"):
            repository = "/".join(path.split("/")[3:5])
            if repository in self.hub.repositories:
                return self._json(
                    {"id": repository, "modelId": repository, "sha": self.hub.commit(repository), "tags": []}
                )
            return self._fail(404, "RepoNotFound")
        self._download(with_body=True)

    def do_PUT(self) -> None:
        digest, body = self._path().rpartition("/")[2], self._body()
        if hashlib.sha256(body).hexdigest() != digest:
            return self._fail(400, "BadDigest")
        self.hub.objects[digest] = body
        self._json({})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, None)
        parts = path.split("/")
        if path == "/api/repos/create":
            content = json.loads(body)
            repository = f"{content.get('organization') or 'me'}/{content['name']}"
            if content.get("private") or content.get("visibility") == "private":
                self.hub.private.add(repository)
            self.hub.repositories.setdefault(repository, {})
            return self._json({"url": f"{self.hub.url}/{repository}", "name": repository, "id": repository})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json(
                {"transfer": "basic", "objects": [self._action(each) for each in json.loads(body)["objects"]]}
            )
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repository, action = "/".join(parts[3:5]), parts[5]
        if repository not in self.hub.repositories:
            return self._fail(404, "RepoNotFound")
        if unquote(parts[6]) != "main":
            return self._fail(404, "RevisionNotFound")
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        assert action == "commit", path
        files = self.hub.repositories[repository]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.commit(repository)
        self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{oid}", "commitOid": oid, "success": True})

    def _action(self, each: dict[str, Any]) -> dict[str, Any]:
        target = {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}", "header": {}}}
        return each | ({} if each["oid"] in self.hub.objects else {"actions": target})

    def _download(self, *, with_body: bool) -> None:
        parts = self._path().split("/")
        repository = "/".join(parts[1:3])
        if repository not in self.hub.repositories:
            return self._fail(401 if self.headers.get("Authorization") is None else 404, "RepoNotFound")
        commit, revision = self.hub.commit(repository), unquote(parts[4])
        if revision not in ("main", commit):
            return self._fail(404, "RevisionNotFound")
        data = self.hub.repositories[repository].get(unquote("/".join(parts[5:])))
        if data is None:
            return self._fail(404, "EntryNotFound", commit)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        self._answer(200, data, headers, with_body=with_body)

    def _path(self) -> str:
        self.hub.requests.append((self.command, self.path))
        return urlsplit(self.path).path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code} if code else {}
        headers |= {"X-Repo-Commit": commit} if commit else {}
        self._answer(status, b"{}", headers | {"X-Error-Message": code or "Invalid credentials"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; see `FakeHub.requests`."""
