"""What is pushed to the Hub: all of a finished result, in one commit, and nothing before."""

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
from optimum_structprune.written import LIST_NAME, without_folders


TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Keeps repositories of `ann`, who owns `TOKEN`: `{repo_id: {"private": …, "files": …, "commits": number}}`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.mode = "regular"  # "lfs" for weights of a real size, which this Hub then does not take
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        """Nothing is written to the terminal."""

    def answer(self, status: int, body=b"", **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            right = self.headers["Authorization"] == f"Bearer {TOKEN}"
            return self.answer(200 if right else 401, {"name": "ann", "type": "user"} if right else {"error": "no"})
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)", self.path):
            if (repo := self.server.repos.get(found[1])) is None:
                return self.answer(404, X_Error_Code="RepoNotFound")
            return self.answer(200, {"id": found[1], "private": repo["private"]})
        found = re.fullmatch(r"/(ann/[\w-]+)/resolve/main/(.+)", self.path)
        content = self.server.repos[found[1]]["files"].get(found[2])
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        self.answer(200, content, ETag=f'"{hash(content)}"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(413, {"error": "too large"})

    def do_POST(self) -> None:
        body, repos = self.rfile.read(int(self.headers["Content-Length"])), self.server.repos
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if asked.get("organization") not in (None, "ann"):
                return self.answer(403, {"error": "no rights"})
            new = {"private": asked.get("visibility") == "private" or asked.get("private", False)}
            there = f"ann/{asked['name']}" in repos
            repos.setdefault(f"ann/{asked['name']}", {**new, "files": {}, "commits": 0})
            self.answer(409 if there else 200, {"url": f"{self.server.url}/ann/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            how = {"uploadMode": self.server.mode, "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            actions = {"upload": {"href": f"{self.server.url}/storage"}}
            objects = [{**each, "actions": actions} for each in json.loads(body)["objects"]]
            self.answer(200, {"objects": objects})
        else:
            repo = repos[re.fullmatch(r"/api/models/(ann/[\w-]+)/commit/main", self.path)[1]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repo["commits"] += 1
            self.answer(200, {"commitUrl": f"{self.server.url}/ann/slim/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine that `huggingface_hub` talks to: the few routes that pushing a folder takes."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False}
        for name, value in {**settings, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "slim"
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder, tokenizer())
    return pruner, folder


def test_a_result_arrives_whole_in_one_commit(run, hub):
    _, folder = run
    assert push_to_hub(folder, "ann/slim", private=True) == f"{hub.url}/ann/slim"
    repo = hub.repos["ann/slim"]
    assert repo["private"] and repo["commits"] == 1
    assert set(repo["files"]) == {path.name for path in folder.iterdir()} >= {"README.md", "model.safetensors"}
    assert json.loads(repo["files"][LIST_NAME])["files"] == sorted(name for name in repo["files"] if name != LIST_NAME)
    for name, content in repo["files"].items():
        assert content == (folder / name).read_bytes(), name
    assert 'name = "ann/slim"' in repo["files"]["README.md"].decode()
    push_to_hub(folder, "ann/again")
    assert 'name = "ann/again"' in hub.repos["ann/again"]["files"]["README.md"].decode()


def test_a_push_uploads_what_was_written_with_the_result_and_nothing_else(run, hub, tmp_path):
    copy = shutil.copytree(run[1], tmp_path / "copy")
    put_into(copy, {"notes.txt": "mine", "drafts/thesis.txt": "mine", ".cache/x": "", "report.json": "{}"})
    (copy / "README.md").write_text("my own words")
    push_to_hub(copy, "ann/copy")
    files = hub.repos["ann/copy"]["files"]
    assert files.keys() == contents(run[1]).keys()
    assert files["README.md"] == b"my own words" and files["report.json"] == b"{}", "as they are now"


@pytest.mark.parametrize(("repo_id", "fields", "message"), [
    ("ann/open", {"private": True}, "ann/open is public"),
    ("bob/slim", {}, "may not write to bob/slim.*complete in .*slim"),
    ("slim", {}, "has no owner"),
    ("ann/a b", {}, "is not a repository"),
    ("ann/slim", {"token": "hf_wrong"}, "does not know the token"),
])  # fmt: skip
def test_what_the_hub_refuses_is_said_and_nothing_is_pushed(run, hub, repo_id, fields, message):
    push_to_hub(run[1], "ann/open")
    with pytest.raises(StructPruneError, match=message):
        push_to_hub(run[1], repo_id, **fields)
    assert hub.repos["ann/open"]["commits"] == 1 and [*hub.repos] == ["ann/open"]


def test_an_upload_of_weights_that_breaks_off_leaves_no_commit_and_is_said(run, hub):
    hub.mode = "lfs"
    with pytest.raises(StructPruneError, match="ann/slim could not be pushed: .*413.* pushes it later"):
        push_to_hub(run[1], "ann/slim")
    assert not hub.repos["ann/slim"]["commits"]


def test_without_a_result_a_token_or_a_hub_nothing_is_pushed(run, hub, tmp_path, monkeypatch):
    with pytest.raises(StructPruneError, match="holds no model that structprune has saved"):
        push_to_hub(tmp_path, "ann/slim")
    for place, value, message in (
        ("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9", "ann/slim could not be pushed.*push_to_hub"),
        ("huggingface_hub.constants.HF_HUB_OFFLINE", True, "unset the `HF_HUB_OFFLINE`"),
        ("optimum_structprune.saving.push.get_token", lambda: None, "needs a token of the Hub"),
    ):
        with monkeypatch.context() as patch, pytest.raises(StructPruneError, match=message):
            patch.setattr(place, value)
            push_to_hub(run[1], "ann/slim")


def test_the_command_asks_first_and_pushes_last(hub, tmp_path, capsys, monkeypatch):
    save_desk(tmp_path)
    command = f"prune {tmp_path / 'model'} {tmp_path / 'out'} --width mlp=24 --num-samples 4 --seq-length 24".split()
    text = ["--domain", f"a={tmp_path / 'a.jsonl'}"]
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        assert main([*command, *text, "--push-to-hub", "ann/out"]) == 2
        assert "does not know the token" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--domain", "a=nowhere.txt", "--push-to-hub", "ann/out"]) == 2
    assert hub.repos == {} and "nowhere.txt" in capsys.readouterr().err
    hub.repos["ann/open"] = {"private": False}
    assert main([*command, *text, "--push-to-hub", "ann/open", "--private"]) == 2 and not (tmp_path / "out").exists()
    assert "ann/open is public" in capsys.readouterr().err
    assert main([*command, *text, "--push-to-hub", "ann/out", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pushed"] == f"{hub.url}/ann/out" and hub.repos["ann/out"]["private"]
    assert set(hub.repos["ann/out"]["files"]) == {path.name for path in (tmp_path / "out").iterdir()}


def test_no_record_names_a_folder_of_this_machine(hub, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "texts").mkdir(parents=True)
    for name in ("near.jsonl", "texts/far.jsonl"):
        write_texts(home / name, documents(60))
    (home / "keep.txt").write_text("w5\n")
    build("llama-tied").save_pretrained(home / "dense")
    monkeypatch.chdir(home)
    far = str(home / "texts" / "far.jsonl")
    domains = [DomainConfig("a", "near.jsonl"), DomainConfig("b", far)]
    pruner = StructPruner(config(domains=domains, keep_tokens=str(home / "keep.txt")))
    dense = AutoModelForCausalLM.from_pretrained(home / "dense")
    pruner.save(pruner.prune_model(dense, tokenizer()), home / "out", tokenizer())
    manifest = json.loads((home / "out" / "calibration_manifest.json").read_text())
    sources = [entry["origin"]["source"] for entry in manifest["domains"] if entry["origin"]]
    assert sources == ["near.jsonl", "far.jsonl"]
    saved = StructPruneConfig.from_pretrained(home / "out")
    assert [domain.source for domain in saved.domains] == sources and saved.keep_tokens == "keep.txt"
    write_report(home / "out")
    push_to_hub(home / "out", "ann/out")
    files = hub.repos["ann/out"]["files"]
    assert {"report.html", "README.md", "structprune_config.json"} <= set(files)
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert b"far.jsonl" in files["README.md"] and b"near.jsonl" in files["README.md"]


@pytest.mark.parametrize(("value", "expected"), [
    ("/tmp/a/b.jsonl", "b.jsonl"), ("/tmp/a/*.jsonl", "*.jsonl"), ("preset:/tmp/a.yaml#mine", "preset:a.yaml#mine"),
    ("a/b.jsonl", "a/b.jsonl"), ("owner/name", "owner/name"), ("/[a-z]+/x", "/[a-z]+/x"), ("self:code", "self:code"),
    ({"a": ["/tmp/x/y", 1, None]}, {"a": ["y", 1, None]}),
])  # fmt: skip
def test_absolute_paths_become_names(value, expected):
    assert without_folders(value) == expected
