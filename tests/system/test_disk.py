"""An output belongs to one run at a time, replaces nothing of the user's, and what a kill leaves beside it goes."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import contents, put_into, recovery_config
from models import build, config, full_disk, tokenizer

from optimum_structprune import RecoveryConfig, RunOptions, StructPruner, export_uniform, prune_model
from optimum_structprune.config.domains import DomainConfig
from optimum_structprune.errors import StructPruneError
from optimum_structprune.saving.save import save_checked
from optimum_structprune.system import disk
from optimum_structprune.system.disk import OFFLOAD, SAVING, Output, check_apart, check_folder
from optimum_structprune.written import LIST_NAME


def result(folder):
    with Output(folder).staged() as staging:
        (staging / "model.safetensors").write_bytes(b"12345")
    return folder


def test_what_may_be_written_to_and_is_left_as_it_was(tmp_path):
    Output(tmp_path / "a" / "b" / "out").check(1)
    assert not list(tmp_path.iterdir())
    Output(tmp_path / "new").check()
    Output(tmp_path, True, [tmp_path]).check()
    elsewhere = ["", None, tmp_path / "gone", "x\0y", "out", tmp_path / "out2"]
    Output(result(tmp_path / "out"), True, elsewhere).check()


@pytest.mark.parametrize("refuse", [Output, check_folder])
def test_a_name_that_is_not_utf_8_is_refused_for_all_that_is_written(tmp_path, refuse):
    refuse(f"{tmp_path}/café")
    with pytest.raises(StructPruneError, match=r"caf\\udce9' cannot be written: its path is not text in UTF-8"):
        refuse(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))


def test_a_folder_that_only_looks_like_a_result_stays(tmp_path):
    put_into(tmp_path, {"deep/thesis.txt": "x" * 2000})
    for text in ("", "[]", "{}", '{"files": 5}', '{"files": []}', "5"):
        (tmp_path / LIST_NAME).write_text(text)
        with pytest.raises(StructPruneError, match="is not a result of structprune"):
            Output(tmp_path, True).check()
    build("llama-tied").save_pretrained(tmp_path / "dense")
    with pytest.raises(StructPruneError, match="not a result"):
        Output(tmp_path / "dense", True).check()


@pytest.mark.parametrize("spelling", [".", "", "..", "../out", "deep/..", "../link", "../../{}", "{}/./"])
def test_a_folder_that_the_process_works_in_is_not_replaced_under_any_name(tmp_path, monkeypatch, spelling):
    out = result(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    shutil.copyfile(out / LIST_NAME, tmp_path / LIST_NAME)
    (out / "deep").mkdir()
    monkeypatch.chdir(out)
    target = spelling.format(tmp_path.name if spelling.startswith("..") else out)
    model = build("llama-tied")
    output = Output(target, True)
    export = lambda: export_uniform(model, target, overwrite=True)  # noqa: E731
    for refused in (output.check, output.staged().__enter__, export):
        with pytest.raises(StructPruneError, match=f"is or holds the working directory, {re.escape(str(out))}[.] "):
            refused()
    monkeypatch.chdir("deep")
    Output(f"{tmp_path}/other", True).check()
    assert names(tmp_path) == ["link", "out", LIST_NAME] and names(out) == ["deep", "model.safetensors", LIST_NAME]


def test_what_a_run_reads_is_never_replaced(tmp_path, monkeypatch):
    out = result(tmp_path / "home" / "out")
    text = out / "model.safetensors"
    link = tmp_path / "link"
    link.symlink_to(out)
    (tmp_path / "file link").symlink_to(text)
    monkeypatch.chdir(tmp_path)
    itself = [out, link, "home/out", "home/../home/out", os.path.join(out, "")]
    for name in (*itself, text, link / "model.safetensors", tmp_path / "file link", tmp_path / "home", "home"):
        for target in (out, link, "home/../home/out"):
            with pytest.raises(StructPruneError, match=f"out overlaps with {re.escape(str(name))}, which this run"):
                Output(target, True, [None, "", "owner/name", name]).check()
    Output(result(tmp_path / "other"), True, [out, text]).check()


def test_a_folder_that_a_run_reads_is_not_walked(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rglob", Mock(side_effect=AssertionError("a home folder may be large")))
    monkeypatch.setattr(os, "walk", Mock(side_effect=AssertionError("a home folder may be large")))
    (tmp_path / "home").mkdir()
    out = tmp_path / "out"
    put_into(out, {LIST_NAME: '{"files": ["model"]}', "model": ""})
    Output(out, True, [tmp_path / "home"]).check()


def test_a_pipe_among_the_files_of_a_model_is_refused(tmp_path):
    disk.check_regular_files(result(tmp_path / "out"))
    disk.check_regular_files("owner/name")
    for name in ("pytorch_model.bin", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / name
        folder.mkdir()
        os.mkfifo(folder / "pipe")
        (folder / name).symlink_to(folder / "pipe")
        with pytest.raises(StructPruneError, match=f"({name}|pipe) is not a regular file"):
            disk.check_regular_files(folder)


def test_the_paths_that_configs_name_are_known_and_none_lies_in_the_output(tmp_path):
    put_into(tmp_path, {"1.txt": "", "2.txt": ""})
    domains = [DomainConfig(name="a", source=f"{tmp_path}/*.txt"), DomainConfig(name="b", source=["in memory"])]
    recovery = RecoveryConfig(domains=[DomainConfig(name="c", source="c.jsonl")], training={"output_dir": "steps"})
    names = disk.used_paths(config(domains=domains, recovery=recovery), None, RunOptions(checkpoint_dir="rounds"))
    assert {*names} == {f"{tmp_path}/1.txt", f"{tmp_path}/2.txt", "rounds", "c.jsonl", "steps"}
    out = tmp_path / "out"
    for folder in (out, f"{out}/steps"):
        with pytest.raises(StructPruneError, match="output_dir .*is inside the output folder"):
            check_apart(out, config(recovery=RecoveryConfig(training={"output_dir": str(folder)})))
    with pytest.raises(StructPruneError, match="checkpoint_dir .*is inside the output folder"):
        check_apart(out, None, RunOptions(checkpoint_dir=f"{out}/rounds"))
    beside = RunOptions(checkpoint_dir=f"{out}.rounds")
    check_apart(out, beside, RecoveryConfig(training={"output_dir": str(tmp_path)}))


def test_saving_never_replaces_the_dense_model(tmp_path):
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), tmp_path / "in" / "one")
    once = build("llama-tied").from_pretrained(tmp_path / "in" / "one")
    again = StructPruner(config(widths={"mlp": 16}))
    small = again.prune_model(once, tokenizer())
    with pytest.raises(StructPruneError, match="one overlaps with .*one, which this run reads"):
        again.save(small, tmp_path / "in" / "one", overwrite=True)
    again.save(small, tmp_path / "two")


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target, message in [
        (tmp_path / "file" / "out", "file is a file"),
        ("/proc/none", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
        ("/proc", "is a mount point"),
        (tmp_path / "loop" / "out", "cannot be written: .*loop"),
        ("a\0b", r"'a\\x00b' cannot be written: embedded null byte"),
    ]:
        with pytest.raises(StructPruneError, match=message):
            Output(target).check()
        if "x" * 300 not in str(target) and message != "mounted":
            with pytest.raises(StructPruneError), Output(target).staged():
                pytest.fail("there is no such folder")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3_000))
    with pytest.raises(StructPruneError, match="takes about 5.0 GB, and .* has 3.0 kB left"):
        Output(tmp_path / "out").check(5_000_000_000)
    with pytest.raises(StructPruneError, match="has 3.0 kB left"):
        save_checked(build("llama-tied"), tmp_path / "out", None, False, lambda folder: 1 / 0)
    assert not (tmp_path / "out").exists()


def test_folders_of_checkpoints_are_probed_before_text_is_read(tmp_path):
    domain = [DomainConfig("a", (pytest.fail("text was read") for _ in "a"))]
    (tmp_path / "file").write_text("")
    for folder, message in [(tmp_path / "file" / "run", "file is a file"), (Path("/proc/none/run"), "cannot be")]:
        recovery = recovery_config(domains=domain, training={"output_dir": str(folder)})
        for fields, options in ({}, RunOptions(checkpoint_dir=str(folder))), ({"recovery": recovery}, None):
            with pytest.raises(StructPruneError, match=message):
                prune_model(build("llama-tied"), config(domains=domain, **fields), tokenizer(), options=options)
    check_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == ["file"]


def test_only_checkpoints_are_removed(tmp_path):
    state = "checkpoint-2/trainer_state.json"
    put_into(tmp_path, dict.fromkeys([f"a/{state}", f"b/{state}", "b/notes/thesis.txt"], ""))
    for name in "abc":
        disk.remove_checkpoints(tmp_path / name)
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == ["notes"]


HOLD = """
import sys, time
from optimum_structprune.system.disk import OFFLOAD, Output

output = Output(sys.argv[1])
with output.locked(), output.sibling(OFFLOAD) as folder:
    (folder / "weights").write_text("")
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that writes to `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path, other):
    before = names(tmp_path)
    assert len(before) == 2 and ".out.lock" in before
    (tmp_path / "link").symlink_to(tmp_path / "out")  # a link and its folder are one output
    out, link = Output(tmp_path / "out"), Output(tmp_path / "link")
    for refused in (out.locked(), link.locked(), out.staged()):
        with pytest.raises(StructPruneError, match="Another run writes to"), refused:
            raise AssertionError
    (tmp_path / "link").unlink()
    assert names(tmp_path) == before
    with Output(tmp_path / "other").locked():
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert names(tmp_path) == before
    with Output(tmp_path / "out").locked():
        assert names(tmp_path) == [".out.lock"]
    assert not names(tmp_path)


def test_one_run_saves_inside_its_own_lock_and_leaves_its_working_folders(tmp_path):
    output = Output(tmp_path / "out")
    with output.locked(), output.sibling(OFFLOAD) as scratch:
        with Output(tmp_path / "out").staged() as folder:
            (folder / "model").write_text("mine")
        assert names(tmp_path) == sorted([".out.lock", scratch.name, "out"])
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["model", LIST_NAME]
    output = Output(tmp_path / "new" / "deep" / "out")
    with pytest.raises(RuntimeError, match="mine"), output.locked(), output.sibling(OFFLOAD):
        assert len(names(output.path.parent)) == 2
        raise RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"), output.staged():
        raise RuntimeError("mine")
    assert names(tmp_path) == ["new", "out"] and names(tmp_path / "new" / "deep") == []


def test_what_killed_runs_left_goes_and_nothing_else(tmp_path):
    killed = [f".out.{purpose}.abcd_123" for purpose in (SAVING, OFFLOAD)]
    mine = ["out", ".out.progress", ".out.settings", ".out.saving", ".out.saving.notes", ".out.saving.abcd_1234"]
    mine += ["x.out.saving.abcd_123", ".other.saving.abcd_123", ".out.checkpoints", ".out2.saving.abcd_123"]
    for name in killed + mine:
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / ".out.saving.12345678").write_text("a file")
    (tmp_path / ".out.saving.87654321").symlink_to(tmp_path / "out")
    with Output(tmp_path / "out").locked():
        pass
    assert names(tmp_path) == sorted([*mine, ".out.saving.12345678", ".out.saving.87654321"])


def test_a_result_that_a_kill_caught_while_it_was_replaced_is_put_back(tmp_path):
    former = tmp_path / ".out.saving.abcd_123" / "former"
    put_into(former, {"model": "former"})
    # What is back is not overwritten unasked.
    with pytest.raises(StructPruneError, match="exists and is not empty"), Output(tmp_path / "out").staged():
        raise AssertionError
    assert (tmp_path / "out" / "model").read_text() == "former"
    put_into(former, {"model": "replaced, and not yet removed"})
    with Output(tmp_path / "out").locked():
        assert (tmp_path / "out" / "model").read_text() == "former"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("device or resource busy")], ids=["key", "busy"])
def test_what_stops_the_second_of_two_moves_leaves_the_former_result(tmp_path, monkeypatch, error):
    out, rename, calls = result(tmp_path / "out"), Path.rename, iter([None, error])

    def once(self, target):
        if stops := next(calls, None):
            raise stops
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StructPruneError
    with pytest.raises(expected, match="out could not be written.*busy|^$"), Output(out, True).staged() as folder:
        (folder / "new").write_text("")
    assert names(tmp_path) == ["out"] and names(out) == ["model.safetensors", LIST_NAME]
    other = tmp_path / "other"
    with pytest.raises(StructPruneError, match="other could not be written"), Output(other, True).staged():
        other.write_text("a file that appears in the way stays")
    assert names(tmp_path) == ["other", "out"] and other.is_file()


def test_a_disk_that_is_full_for_torch_or_a_tokenizer_is_an_error_of_ours(tmp_path):
    out = result(tmp_path / "out")
    before = contents(out)
    for reason, write in (
        ("inline_container|PytorchStream", lambda folder: torch.save(torch.zeros(9999), folder / "optimizer.pt")),
        ("too large", lambda folder: (folder / "notes.txt").write_text("x" * 9999)),
        ("os error", tokenizer().save_pretrained),
    ):
        refused = pytest.raises(StructPruneError, match=f"out could not be written and is unchanged.*({reason})")
        with full_disk(1_000), refused, Output(out, True).staged() as folder:
            write(folder)
        assert names(tmp_path) == ["out"] and contents(out) == before
    # torch writes the state of an optimizer by a stream of C++.
    assert disk.is_write_error(RuntimeError("basic_ios::clear: iostream error"))
    assert not disk.is_write_error(RuntimeError("shape mismatch"))


def test_a_file_system_without_locks_still_takes_a_run(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(95, "Operation not supported")))
    left = tmp_path / ".out.saving.abcd_123"  # another run may be at work in it
    left.mkdir()
    output = Output(tmp_path / "out")
    with output.locked(), output.sibling(SAVING) as folder:
        assert "cannot be locked" in caplog.text
        assert {left.name, folder.name} <= {*names(tmp_path)}
    assert names(tmp_path) == [left.name]
