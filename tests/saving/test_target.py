"""Which folders may be replaced, and where a result can be written."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import recovery_config
from models import build, config, tokenizer

from optimum_structprune import DomainConfig, RecoveryConfig, StructPruneError, StructPruner, prune_model
from optimum_structprune.saving.hub import save_checked
from optimum_structprune.saving.staging import staged
from optimum_structprune.saving.target import (
    MARKERS,
    check_apart,
    check_target,
    is_result,
    probe_folder,
    probe_target,
    remove_checkpoints,
    used_paths,
)
from optimum_structprune.system.memory import model_bytes


def result(folder, marker="pruning_plan.json"):
    folder.mkdir(parents=True)
    (folder / marker).write_text(json.dumps(dict.fromkeys(MARKERS[marker], 1)))
    (folder / "model.safetensors").write_bytes(b"12345")
    return folder


@pytest.mark.parametrize("marker", MARKERS)
def test_a_result_may_be_replaced(tmp_path, marker):
    check_target(result(tmp_path / "out", marker), True)


def test_a_new_or_an_empty_folder_may_be_written_to(tmp_path):
    check_target(tmp_path / "new", False)
    check_target(tmp_path, True, [tmp_path])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "llama"}', "5", "[" * 5000])
def test_a_folder_that_only_looks_like_a_result_stays(tmp_path, text):
    (tmp_path / "pruning_plan.json").write_text(text)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "thesis.txt").write_text("x" * 2000)
    assert not is_result(tmp_path)
    with pytest.raises(StructPruneError, match=r"no result of structprune.*2 files \([27].0 kB\) would be lost"):
        check_target(tmp_path, True)


def test_a_dense_model_is_no_result(tmp_path):
    build("llama-tied").save_pretrained(tmp_path)
    with pytest.raises(StructPruneError, match="no result"):
        check_target(tmp_path, True)


@pytest.mark.parametrize("name", ["thesis.txt", "notes/", "README.md", "data.csv", ".git/"])
def test_what_was_put_into_a_result_stays(tmp_path, name):
    out = result(tmp_path / "out")
    (out / "tokenizer.model").write_text("")
    (out / "modeling_llama.py").write_text("")
    check_target(out, True)
    (out / name).mkdir() if name.endswith("/") else (out / name).write_text("mine")
    with pytest.raises(StructPruneError, match=f"did not write .{name.rstrip('/')}"):
        check_target(out, True)


def test_the_card_that_peft_writes_may_be_replaced(tmp_path):
    out = result(tmp_path / "out", "recovery_config.json")
    (out / "README.md").write_text("")
    (out / "adapter_config.json").write_text("{}")
    check_target(out, True)


def test_what_a_run_reads_is_never_replaced(tmp_path, monkeypatch):
    out = result(tmp_path / "home" / "out")
    inside = result(out / "in")
    text = out / "text.jsonl"
    text.write_text("")
    link = tmp_path / "link"
    link.symlink_to(out)
    monkeypatch.chdir(tmp_path)
    cases = {
        "is": [out, link, "home/out", "home/../home/out", os.path.join(out, "")],
        "holds": [inside, text, link / "in"],
        "lies in": [tmp_path / "home", "home", link.parent],
    }
    for relation, used in cases.items():
        for name in used:
            for target in (out, link, "home/../home/out"):
                with pytest.raises(StructPruneError, match=f"out {relation} .*which this run reads.*would be lost"):
                    check_target(target, True, [None, "", "owner/name", name])


def test_a_link_in_the_folder_counts_where_it_lies(tmp_path):
    out = result(tmp_path / "out")
    (tmp_path / "model").mkdir()
    (out / "in").symlink_to(tmp_path / "model")
    with pytest.raises(StructPruneError, match="holds"):
        check_target(out, True, [out / "in"])


def test_what_lies_elsewhere_does_not_matter(tmp_path):
    check_target(result(tmp_path / "out"), True, ["", None, tmp_path / "gone", "x\0y", "out", tmp_path / "out2"])


def test_the_paths_that_configs_name(tmp_path):
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("")
    domains = [DomainConfig(name="a", source=f"{tmp_path}/*.txt"), DomainConfig(name="b", source=["in memory"])]
    recovery = RecoveryConfig(
        domains=[DomainConfig(name="c", source="c.jsonl")],
        teacher_logits="logits",
        top_k=4,
        training={"output_dir": "steps"},
    )
    names = used_paths(config(domains=domains, checkpoint_dir="rounds", recovery=recovery), None)
    assert {*names} == {f"{tmp_path}/1.txt", f"{tmp_path}/2.txt", "rounds", "c.jsonl", "logits", "steps"}


def test_saving_never_replaces_the_dense_model(tmp_path):
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), tmp_path / "in" / "one")
    once = build("llama-tied").from_pretrained(tmp_path / "in" / "one")
    again = StructPruner(config(widths={"mlp": 16}))
    small = again.prune_model(once, tokenizer())
    with pytest.raises(StructPruneError, match="one is .*one, which this run reads"):
        again.save(small, tmp_path / "in" / "one", overwrite=True)
    shutil.copyfile(tmp_path / "in" / "one" / "pruning_plan.json", tmp_path / "in" / "pruning_plan.json")
    with pytest.raises(StructPruneError, match="in holds .*one, which this run reads"):
        again.save(small, tmp_path / "in", overwrite=True)
    again.save(small, tmp_path / "two")


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    probe_target(tmp_path / "a" / "b" / "out", 1)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target, message in [
        (tmp_path / "file" / "out", "file is a file"),
        ("/proc/none", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
        ("/proc", "mounted"),
        (tmp_path / "loop" / "out", "cannot be written: .*loop"),
        ("a\0b", r"'a\\x00b' cannot be written: embedded null byte"),
    ]:
        with pytest.raises(StructPruneError, match=message):
            probe_target(target)
        if "x" * 300 not in str(target) and message != "mounted":
            with pytest.raises(StructPruneError), staged(target, overwrite=False):
                pytest.fail("there is no such folder")
    usage = SimpleNamespace(free=3_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(StructPruneError, match="takes about 5.0 GB, and .* has 3.0 MB left"):
        probe_target(tmp_path / "out", 5_000_000_000)


@pytest.mark.parametrize("name", ["checkpoint_dir", "output_dir", "teacher_logits"])
def test_folders_of_checkpoints_are_probed_before_text_is_read(tmp_path, name):
    def unread():
        pytest.fail("text was read")
        yield

    domain = [DomainConfig("a", unread())]
    (tmp_path / "file").write_text("")
    for folder, message in [(tmp_path / "file" / "run", "file is a file"), (Path("/proc/none/run"), "cannot be")]:
        fields = {"teacher_logits": str(folder), "top_k": 7} if name == "teacher_logits" else {}
        training = {"output_dir": str(folder)} if name == "output_dir" else {}
        recovery = recovery_config(domains=domain, training=training, **fields)
        checked = {"checkpoint_dir": str(folder)} if name == "checkpoint_dir" else {"recovery": recovery}
        with pytest.raises(StructPruneError, match=message):
            prune_model(build("llama-tied"), config(domains=domain, rounds=2, **checked), tokenizer())
    probe_folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    model = build("llama-tied")
    assert model_bytes(model) == 4 * model.num_parameters()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StructPruneError, match="has 1.0 kB left"):
        save_checked(model, tmp_path / "out", None, False, lambda folder: 1 / 0, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_nothing_else_may_be_written_into_the_output(tmp_path):
    out = tmp_path / "out"
    for training in ({"output_dir": str(out)}, {"output_dir": f"{out}/steps"}):
        with pytest.raises(StructPruneError, match="output_dir .*lies in the output folder"):
            check_apart(out, config(recovery=RecoveryConfig(training=training)))
    with pytest.raises(StructPruneError, match="checkpoint_dir .*lies in the output folder"):
        check_apart(out, None, config(checkpoint_dir=f"{out}/rounds"))
    check_apart(out, config(checkpoint_dir=f"{out}.rounds"), RecoveryConfig(training={"output_dir": str(tmp_path)}))


def test_only_checkpoints_are_removed(tmp_path):
    for place in ("a/checkpoint-2", "a/round-1/checkpoint-4", "b/checkpoint-2", "b/notes"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / ("trainer_state.json" if "checkpoint" in place else "thesis.txt")).write_text("")
    for name in "abc":
        remove_checkpoints(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["notes"]
