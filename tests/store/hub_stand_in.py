"""A stand-in for the Hub's HTTP API, as far as uploads and downloads of whole repositories use it.

Every commit is a dictionary of files; a branch is the name of one. What is uploaded goes through the client's own
requests: ``preupload`` (everything is a regular file here), ``commit`` with one JSON object a line, ``revision``,
``tree`` and ``resolve``.
"""

from __future__ import annotations

import base64
import json
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Repositories by name: branches with their commits, and files of every commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        digest = sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.branches[name][branch] = digest
        return digest

    def files(self, name: str, revision: str = "main") -> dict[str, bytes] | None:
        digest = self.branches.get(name, {}).get(revision, revision)
        return self.commits.get(digest)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        sent = {"Content-Type": kind, "Content-Length": str(len(body)), **headers}
        for name, text in sent.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized", "Invalid credentials")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.server.branches:
                told = {
                    "error": "You already created this model repo",
                    "url": f"{self.server.address}/{name}",
                }
                return self.answer(told, 409)
            self.server.branches[name] = {}
            self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.commit(name, "main", {".gitattributes": b""})
            return self.answer({"url": f"{self.server.address}/{name}"})
        name, verb, *rest = f"{parts[2]}/{parts[3]}", parts[4], *parts[5:]
        if name not in self.server.branches:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if verb == "preupload":
            files = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer({"files": [{"path": file["path"], **regular} for file in files]})
        if verb == "branch":
            if rest[0] in self.server.branches[name]:
                return self.refuse(409, "RefExists", "Reference already exists")
            self.server.branches[name][rest[0]] = self.server.branches[name]["main"]
            return self.answer({})
        files = dict(self.server.files(name, rest[0]) or {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        digest = self.server.commit(name, rest[0], files)
        url = f"{self.server.address}/{name}/commit/{digest}"
        return self.answer({"success": True, "commitOid": digest, "commitUrl": url})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, verb = f"{parts[2]}/{parts[3]}", parts[4] if len(parts) > 4 else "revision"
            revision = parts[5] if len(parts) > 5 else "main"
        else:
            name, verb, revision = f"{parts[0]}/{parts[1]}", parts[2], parts[3]
        if name not in self.server.branches:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        files = self.server.files(name, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        digest = self.server.branches[name].get(revision, revision)
        if verb == "resolve":
            content = files.get("/".join(parts[4:]))
            if content is None:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.answer(content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=digest)
        if verb == "tree":
            return self.answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            )
        if verb == "refs":
            branches = self.server.branches[name].items()
            found = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in branches]
            return self.answer({"branches": found, "tags": [], "converts": []})
        siblings = [{"rfilename": path} for path in files]
        told = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": digest,
            "private": False,
            "siblings": siblings,
        }
        return self.answer(told)
