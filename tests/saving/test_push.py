"""What is pushed to the Hub: all of a finished result, in one commit, and nothing before."""

import json

import pytest
from hub import TOKEN, local_hub
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig, StructPruneError, StructPruner, push_to_hub
from optimum_structprune.commands.cli import main
from optimum_structprune.saving import push as pushing


@pytest.fixture
def hub():
    with local_hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def _logged_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


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
    for name, content in repo["files"].items():
        if name not in ("README.md", "report.html"):  # they name folders of this machine
            assert content == (folder / name).read_bytes(), name
    card = repo["files"]["README.md"].decode()
    assert 'name = "ann/slim"' in card and 'name = "slim"' in (folder / "README.md").read_text()


def test_what_is_not_of_the_result_stays_at_home(run, hub, tmp_path):
    _, folder = run
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "diary.txt").write_text("mine")
    (copy / "checkpoint-1").mkdir()
    (copy / "README.md").write_text("my own words")
    push_to_hub(copy, "ann/copy")
    files = hub.repos["ann/copy"]["files"]
    assert "diary.txt" not in files and not any("checkpoint" in name for name in files)
    assert files["README.md"] == b"my own words"
    push_to_hub(folder, "ann/copy")  # the card there is not ours, so it stays
    assert files["README.md"] == b"my own words" and hub.repos["ann/copy"]["commits"] == 2


def test_what_the_hub_refuses_is_said_plainly(run, hub, tmp_path, monkeypatch):
    _, folder = run
    push_to_hub(folder, "ann/open")
    with pytest.raises(StructPruneError, match="ann/open is public, and the result was to be private"):
        push_to_hub(folder, "ann/open", private=True)
    for repo_id, message in [
        ("bob/slim", "may not write to bob/slim.*complete in .*slim"),
        ("slim", "names no owner"),
        ("ann/a b", "is no name of a repository"),
    ]:
        with pytest.raises(StructPruneError, match=message):
            push_to_hub(folder, repo_id)
    with pytest.raises(StructPruneError, match="does not know the token: log in"):
        push_to_hub(folder, "ann/slim", token="hf_wrong")
    with pytest.raises(StructPruneError, match="holds no model that structprune has saved"):
        push_to_hub(tmp_path, "ann/slim")
    with monkeypatch.context() as patch:
        patch.setattr(pushing, "get_token", lambda: None)
        with pytest.raises(StructPruneError, match="takes a token of the Hub"):
            push_to_hub(folder, "ann/slim")
    assert hub.repos["ann/open"]["commits"] == 1 and [*hub.repos] == ["ann/open"]
    for name, value, message in (  # a Hub that is not there loses nothing
        ("ENDPOINT", "http://127.0.0.1:9", "ann/slim could not be pushed.*hf upload ann/slim"),
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set"),
    ):
        with monkeypatch.context() as patch, pytest.raises(StructPruneError, match=message):
            patch.setattr(f"huggingface_hub.constants.{name}", value)
            push_to_hub(folder, "ann/slim")


def test_the_command_asks_first_and_pushes_last(hub, tmp_path, capsys, monkeypatch):
    build("llama-tied").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60)))
    flags = ["--width", "mlp=24", "--num-samples", "4", "--seq-length", "24"]
    command = ["prune", str(tmp_path / "dense"), str(tmp_path / "out"), *flags]
    text = ["--domain", f"a={tmp_path / 'text.jsonl'}"]
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        assert main([*command, *text, "--push-to-hub", "ann/out"]) == 2
        assert "does not know the token" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--domain", "a=nowhere.txt", "--push-to-hub", "ann/out"]) == 2
    assert main([*command, *text, "--private"]) == 2
    assert hub.repos == {} and "--push-to-hub names none" in capsys.readouterr().err
    assert main([*command, *text, "--push-to-hub", "ann/out", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pushed"] == f"{hub.url}/ann/out"
    assert set(hub.repos["ann/out"]["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert hub.repos["ann/out"]["private"]


def test_nothing_that_is_pushed_names_a_folder_of_this_machine(hub, tmp_path, monkeypatch):
    (tmp_path / "home" / "texts").mkdir(parents=True)
    text = "".join(json.dumps({"text": text}) + "\n" for text in documents(60))
    for name in ("near.jsonl", "texts/far.jsonl"):
        (tmp_path / "home" / name).write_text(text)
    build("llama-tied").save_pretrained(tmp_path / "home" / "dense")
    monkeypatch.chdir(tmp_path / "home")
    far = str(tmp_path / "home" / "texts" / "far.jsonl")
    pruner = StructPruner(config(domains=[DomainConfig("a", "near.jsonl"), DomainConfig("b", far)]))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "home" / "dense")
    pruner.save(pruner.prune_model(dense, tokenizer()), "out", tokenizer())
    manifest = json.loads((tmp_path / "home/out/calibration_manifest.json").read_text())
    assert [entry["origin"]["source"] for entry in manifest["domains"]] == ["near.jsonl", far], "as they were given"
    push_to_hub("out", "ann/out")
    files = hub.repos["ann/out"]["files"]
    assert {"report.html", "README.md", "structprune_config.json"} <= set(files)
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert b"far.jsonl" in files["README.md"] and b"near.jsonl" in files["README.md"]
