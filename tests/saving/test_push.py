"""A push uploads all files of a finished result in one commit, and uploads nothing if the result is not finished."""

import base64
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants as constants
import pytest
from helpers import contents, put_into, save_desk, write_texts
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import (
    DomainConfig,
    StructPruneConfig,
    StructPruneError,
    StructPruner,
    push_to_hub,
    write_report,
)
from optimum_structprune.commands.cli import main
from optimum_structprune.system.written import LIST_NAME, without_folders


TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """The repositories of `ann`, who owns `TOKEN`: `{repo_id: {"private": …, "files": …, "commits": number}}`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        # The mode "lfs" is for weights of a real size. This Hub refuses their upload.
        self.mode = "regular"
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The few routes of the Hub that the push of a folder needs."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        """Write nothing to the terminal."""

    def answer(self, status: int, body=b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()

        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.answer_whoami()
            return

        model_route = re.fullmatch(r"/api/models/(\w+/[\w-]+)", self.path)
        if model_route is not None:
            self.answer_repo(model_route[1])
            return

        file_route = re.fullmatch(r"/(ann/[\w-]+)/resolve/main/(.+)", self.path)
        self.answer_file(repo_id=file_route[1], path=file_route[2])

    do_HEAD = do_GET

    def answer_whoami(self) -> None:
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            self.answer(200, {"name": "ann", "type": "user"})
        else:
            self.answer(401, {"error": "no"})

    def answer_repo(self, repo_id: str) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        else:
            self.answer(200, {"id": repo_id, "private": repo["private"]})

    def answer_file(self, repo_id: str, path: str) -> None:
        content = self.server.repos[repo_id]["files"].get(path)
        if content is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, content, ETag=f'"{hash(content)}"', X_Repo_Commit="0" * 40)

    def do_PUT(self) -> None:
        self.read_body()
        self.answer(413, {"error": "too large"})

    def do_POST(self) -> None:
        body = self.read_body()
        if self.path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = self.server.mode
            self.answer(200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path in paths]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            actions = {"upload": {"href": f"{self.server.url}/storage"}}
            objects = json.loads(body)["objects"]
            self.answer(200, {"objects": [lfs_object | {"actions": actions} for lfs_object in objects]})
        else:
            route = re.fullmatch(r"/api/models/(ann/[\w-]+)/commit/main", self.path)
            self.commit(route[1], body)

    def create_repo(self, request: dict) -> None:
        if request.get("organization") not in (None, "ann"):
            self.answer(403, {"error": "no rights"})
            return

        repo_id = f"ann/{request['name']}"
        status = 200
        if repo_id in self.server.repos:
            status = 409
        is_private = request.get("visibility") == "private" or request.get("private", False)
        self.server.repos.setdefault(repo_id, {"private": is_private, "files": {}, "commits": 0})
        self.answer(status, {"url": f"{self.server.url}/{repo_id}"})

    def commit(self, repo_id: str, body: bytes) -> None:
        repo = self.server.repos[repo_id]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = entry["value"]
                repo["files"][file["path"]] = base64.b64decode(file["content"])
        repo["commits"] += 1
        self.answer(200, {"commitUrl": f"{self.server.url}/ann/slim/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch):
    """Start a Hub on this machine and point `huggingface_hub` to it."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()

        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub

        hub.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a pruned model and return its folder."""
    folder = tmp_path_factory.mktemp("push") / "slim"
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder, tokenizer())
    return folder


def test_all_files_of_a_result_arrive_in_one_commit(folder, hub):
    assert push_to_hub(folder, "ann/slim", private=True) == f"{hub.url}/ann/slim"
    repo = hub.repos["ann/slim"]
    assert repo["private"]
    assert repo["commits"] == 1

    files = repo["files"]
    assert set(files) == {path.name for path in folder.iterdir()}
    assert set(files) >= {"README.md", "model.safetensors"}
    assert json.loads(files[LIST_NAME])["files"] == sorted(name for name in files if name != LIST_NAME)
    for name, content in files.items():
        assert content == (folder / name).read_bytes(), name
    assert 'name = "ann/slim"' in files["README.md"].decode()

    push_to_hub(folder, "ann/again")
    assert 'name = "ann/again"' in hub.repos["ann/again"]["files"]["README.md"].decode()


def test_a_push_uploads_only_the_files_of_the_result_with_the_edits_of_the_user(folder, hub, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    put_into(copy, {"notes.txt": "mine", "drafts/thesis.txt": "mine", ".cache/x": "", "report.json": "{}"})
    (copy / "README.md").write_text("my own words")
    push_to_hub(copy, "ann/copy")

    files = hub.repos["ann/copy"]["files"]
    assert files.keys() == contents(folder).keys()
    assert files["README.md"] == b"my own words"
    assert files["report.json"] == b"{}"


@pytest.mark.parametrize(("repo_id", "fields", "message"), [
    ("ann/open", {"private": True}, "ann/open is public"),
    ("bob/slim", {}, "may not write to bob/slim.*complete in .*slim"),
    ("slim", {}, "has no owner"),
    ("ann/a b", {}, "is not a repository"),
    ("ann/slim", {"token": "hf_wrong"}, "does not know the token"),
])  # fmt: skip
def test_a_refusal_of_the_hub_is_an_error_and_nothing_is_pushed(folder, hub, repo_id, fields, message):
    push_to_hub(folder, "ann/open")
    with pytest.raises(StructPruneError, match=message):
        push_to_hub(folder, repo_id, **fields)
    assert hub.repos["ann/open"]["commits"] == 1
    assert list(hub.repos) == ["ann/open"]


def test_a_failed_upload_of_weights_is_an_error_without_a_commit(folder, hub):
    hub.mode = "lfs"
    with pytest.raises(StructPruneError, match="ann/slim could not be pushed: .*413.* pushes it later"):
        push_to_hub(folder, "ann/slim")
    assert not hub.repos["ann/slim"]["commits"]


def test_nothing_is_pushed_without_a_result_a_token_or_a_hub(folder, hub, tmp_path, monkeypatch):
    with pytest.raises(StructPruneError, match="holds no model that structprune has saved"):
        push_to_hub(tmp_path, "ann/slim")

    for target, value, message in (
        ("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9", "ann/slim could not be pushed.*push_to_hub"),
        ("huggingface_hub.constants.HF_HUB_OFFLINE", True, "unset the `HF_HUB_OFFLINE`"),
        ("optimum_structprune.saving.push.get_token", lambda: None, "needs a token of the Hub"),
    ):
        with monkeypatch.context() as patch, pytest.raises(StructPruneError, match=message):
            patch.setattr(target, value)
            push_to_hub(folder, "ann/slim")


def test_the_command_checks_the_hub_before_it_prunes_and_pushes_at_the_end(hub, tmp_path, capsys, monkeypatch):
    save_desk(tmp_path)
    out = tmp_path / "out"
    command = f"prune {tmp_path / 'model'} {out} --width mlp=24 --num-samples 4 --seq-length 24".split()
    text = ["--domain", f"a={tmp_path / 'a.jsonl'}"]

    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        assert main(command + text + ["--push-to-hub", "ann/out"]) == 2
        assert "does not know the token" in capsys.readouterr().err
        assert not out.exists()

    assert main(command + ["--domain", "a=nowhere.txt", "--push-to-hub", "ann/out"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert hub.repos == {}

    hub.repos["ann/open"] = {"private": False}
    assert main(command + text + ["--push-to-hub", "ann/open", "--private"]) == 2
    assert "ann/open is public" in capsys.readouterr().err
    assert not out.exists()

    assert main(command + text + ["--push-to-hub", "ann/out", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pushed"] == f"{hub.url}/ann/out"
    assert hub.repos["ann/out"]["private"]
    assert set(hub.repos["ann/out"]["files"]) == {path.name for path in out.iterdir()}


def test_pushed_files_do_not_name_folders_of_this_machine(hub, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "texts").mkdir(parents=True)
    write_texts(home / "near.jsonl", documents(60))
    write_texts(home / "texts" / "far.jsonl", documents(60))
    (home / "keep.txt").write_text("w5\n")
    build("llama-tied").save_pretrained(home / "original")
    monkeypatch.chdir(home)

    domains = [DomainConfig("a", "near.jsonl"), DomainConfig("b", str(home / "texts" / "far.jsonl"))]
    pruner = StructPruner(config(domains=domains, keep_tokens=str(home / "keep.txt")))
    original = AutoModelForCausalLM.from_pretrained(home / "original")
    pruner.save(pruner.prune_model(original, tokenizer()), home / "out", tokenizer())

    manifest = json.loads((home / "out" / "calibration_manifest.json").read_text())
    sources = [entry["origin"]["source"] for entry in manifest["domains"] if entry["origin"]]
    assert sources == ["near.jsonl", "far.jsonl"]
    saved_config = StructPruneConfig.from_pretrained(home / "out")
    assert [domain.source for domain in saved_config.domains] == sources
    assert saved_config.keep_tokens == "keep.txt"

    write_report(home / "out")
    push_to_hub(home / "out", "ann/out")
    files = hub.repos["ann/out"]["files"]
    assert {"report.html", "README.md", "structprune_config.json"} <= set(files)
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert b"far.jsonl" in files["README.md"]
    assert b"near.jsonl" in files["README.md"]


@pytest.mark.parametrize(("value", "expected"), [
    ("/tmp/a/b.jsonl", "b.jsonl"), ("/tmp/a/*.jsonl", "*.jsonl"), ("preset:/tmp/a.yaml#mine", "preset:a.yaml#mine"),
    ("a/b.jsonl", "a/b.jsonl"), ("owner/name", "owner/name"), ("/[a-z]+/x", "/[a-z]+/x"), ("self:code", "self:code"),
    ({"a": ["/tmp/x/y", 1, None]}, {"a": ["y", 1, None]}),
])  # fmt: skip
def test_absolute_paths_become_names(value, expected):
    assert without_folders(value) == expected
