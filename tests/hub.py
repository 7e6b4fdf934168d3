"""A Hub on this machine: the few routes that pushing a folder takes."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from unittest.mock import patch

import huggingface_hub.constants as constants


TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Keeps repositories of `ann`, who owns `TOKEN`: `{repo_id: {"private": …, "files": …, "commits": number}}`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        """Nothing is written to the terminal."""

    def answer(self, status: int, body=b"", **headers: str) -> None:
        """Send a response; a body that is no bytes is sent as JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        """Who am I, what is this repository, and give me a file."""
        if self.path == "/api/whoami-v2":
            right = self.headers["Authorization"] == f"Bearer {TOKEN}"
            self.answer(*((200, {"name": "ann", "type": "user"}) if right else (401, {"error": "Invalid token"})))
        elif found := re.fullmatch(r"/api/models/(\w+/[\w-]+)", self.path):
            if (repo := self.server.repos.get(found[1])) is None:
                return self.answer(404, X_Error_Code="RepoNotFound")
            self.answer(200, {"id": found[1], "private": repo["private"], "sha": "0" * 40})
        else:
            found = re.fullmatch(r"/(ann/[\w-]+)/resolve/main/(.+)", self.path)
            content = self.server.repos[found[1]]["files"].get(found[2])
            if content is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            self.answer(200, content, ETag=f'"{hash(content)}"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        """A large file comes here."""
        self.server.blobs[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)

    def do_POST(self) -> None:
        """Make a repository, say how files come, and take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ("lfs" if name.endswith(".safetensors") else "regular" for name in names)
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
            self.answer(200, {"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.server.url}/blob/{one['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})
        else:
            found = re.fullmatch(r"/api/models/(ann/[\w-]+)/commit/main", self.path)
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])

    def create(self, asked: dict) -> None:
        """A repository, unless it is somebody else's or there already."""
        if asked.get("organization") not in (None, "ann"):
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        repo_id, status = f"ann/{asked['name']}", 200
        if repo_id in self.server.repos:
            status = 409
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.repos.setdefault(repo_id, {"private": private, "files": {}, "commits": 0})
        self.answer(status, {"url": f"{self.server.url}/{repo_id}"})

    def commit(self, repo_id: str, lines: list[dict]) -> None:
        """All files of a commit at once."""
        repo = self.server.repos[repo_id]
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repo["files"][value["path"]] = self.server.blobs[f"/blob/{value['oid']}"]
        repo["commits"] += 1
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/1", "commitOid": "1" * 40})


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A Hub that `huggingface_hub` talks to inside `with`, in this process."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False}
        with patch.multiple(constants, HF_HUB_DISABLE_XET=True, **settings):
            yield hub
        hub.shutdown()
        thread.join()
