"""Test the rules of output folders: one run at a time, no replaced user files, no leftovers of killed runs."""

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
from optimum_structprune.saving.save import save_checked
from optimum_structprune.system import disk
from optimum_structprune.system.disk import OFFLOAD, SAVING, Output, check_apart, check_folder
from optimum_structprune.system.errors import StructPruneError
from optimum_structprune.system.written import LIST_NAME


def write_result(folder):
    with Output(folder).staged() as staging:
        (staging / "model.safetensors").write_bytes(b"12345")
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_check_creates_no_folder(tmp_path):
    Output(tmp_path / "a" / "b" / "out").check(1)

    assert not list(tmp_path.iterdir())


def test_new_and_empty_folders_and_results_are_accepted(tmp_path):
    Output(tmp_path / "new").check()
    Output(tmp_path, True, [tmp_path]).check()

    out = write_result(tmp_path / "out")
    sources = ["", None, tmp_path / "gone", "x\0y", "out", tmp_path / "out2"]
    Output(out, True, sources).check()


def test_a_folder_that_only_looks_like_a_result_is_not_replaced(tmp_path):
    put_into(tmp_path, {"deep/thesis.txt": "x" * 2000})
    for text in ("", "[]", "{}", '{"files": 5}', '{"files": []}', "5"):
        (tmp_path / LIST_NAME).write_text(text)
        with pytest.raises(StructPruneError, match="is not a result of structprune"):
            Output(tmp_path, True).check()

    build("llama-tied").save_pretrained(tmp_path / "original")
    with pytest.raises(StructPruneError, match="not a result"):
        Output(tmp_path / "original", True).check()


@pytest.mark.parametrize("spelling", [".", "", "..", "../out", "deep/..", "../link", "../../{}", "{}/./"])
def test_the_working_directory_is_not_replaced_under_any_name(tmp_path, monkeypatch, spelling):
    out = write_result(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    shutil.copyfile(out / LIST_NAME, tmp_path / LIST_NAME)
    (out / "deep").mkdir()
    monkeypatch.chdir(out)
    if spelling.startswith(".."):
        target = spelling.format(tmp_path.name)
    else:
        target = spelling.format(out)

    message = f"is or holds the working directory, {re.escape(str(out))}[.] "
    output = Output(target, True)
    with pytest.raises(StructPruneError, match=message):
        output.check()
    with pytest.raises(StructPruneError, match=message):
        output.staged().__enter__()
    with pytest.raises(StructPruneError, match=message):
        export_uniform(build("llama-tied"), target, overwrite=True)

    monkeypatch.chdir("deep")
    Output(f"{tmp_path}/other", True).check()
    assert names_in(tmp_path) == ["link", "out", LIST_NAME]
    assert names_in(out) == ["deep", "model.safetensors", LIST_NAME]


def test_the_sources_of_a_run_are_never_replaced(tmp_path, monkeypatch):
    out = write_result(tmp_path / "home" / "out")
    weights = out / "model.safetensors"
    link = tmp_path / "link"
    link.symlink_to(out)
    file_link = tmp_path / "file link"
    file_link.symlink_to(weights)
    monkeypatch.chdir(tmp_path)

    spellings = [out, link, "home/out", "home/../home/out", os.path.join(out, "")]
    files = [weights, link / "model.safetensors", file_link]
    parents = [tmp_path / "home", "home"]
    for source in spellings + files + parents:
        message = f"out overlaps with {re.escape(str(source))}, which this run"
        for target in (out, link, "home/../home/out"):
            with pytest.raises(StructPruneError, match=message):
                Output(target, True, [None, "", "owner/name", source]).check()

    separate = write_result(tmp_path / "other")
    Output(separate, True, [out, weights]).check()


def test_the_source_folder_of_a_run_is_not_walked(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rglob", Mock(side_effect=AssertionError("a home folder may be large")))
    monkeypatch.setattr(os, "walk", Mock(side_effect=AssertionError("a home folder may be large")))
    (tmp_path / "home").mkdir()
    out = tmp_path / "out"
    put_into(out, {LIST_NAME: '{"files": ["model"]}', "model": ""})

    Output(out, True, [tmp_path / "home"]).check()


def recovery_into(folder):
    return RecoveryConfig(training={"output_dir": str(folder)})


def test_all_paths_that_configs_name_are_found(tmp_path):
    put_into(tmp_path, {"1.txt": "", "2.txt": ""})
    domains = [DomainConfig(name="a", source=f"{tmp_path}/*.txt"), DomainConfig(name="b", source=["in memory"])]
    recovery = RecoveryConfig(domains=[DomainConfig(name="c", source="c.jsonl")], training={"output_dir": "steps"})
    pruning = config(domains=domains, recovery=recovery)

    paths = disk.used_paths(pruning, None, RunOptions(checkpoint_dir="rounds"))

    assert set(paths) == {f"{tmp_path}/1.txt", f"{tmp_path}/2.txt", "rounds", "c.jsonl", "steps"}


def test_checkpoints_inside_the_output_are_refused(tmp_path):
    out = tmp_path / "out"
    for folder in (out, out / "steps"):
        with pytest.raises(StructPruneError, match="output_dir .*is inside the output folder"):
            check_apart(out, config(recovery=recovery_into(folder)))
    with pytest.raises(StructPruneError, match="checkpoint_dir .*is inside the output folder"):
        check_apart(out, None, RunOptions(checkpoint_dir=f"{out}/rounds"))

    check_apart(out, RunOptions(checkpoint_dir=f"{out}.rounds"), recovery_into(tmp_path))


def test_saving_never_replaces_the_source_model(tmp_path):
    first_folder = tmp_path / "in" / "one"
    first_pruner = StructPruner(config())
    first_pruner.save(first_pruner.prune_model(build("llama-tied"), tokenizer()), first_folder)

    first_model = build("llama-tied").from_pretrained(first_folder)
    second_pruner = StructPruner(config(widths={"mlp": 16}))
    second_model = second_pruner.prune_model(first_model, tokenizer())
    with pytest.raises(StructPruneError, match="one overlaps with .*one, which this run reads"):
        second_pruner.save(second_model, first_folder, overwrite=True)
    second_pruner.save(second_model, tmp_path / "two")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    for target, message in [
        (tmp_path / "file" / "out", "file is a file"),
        ("/proc/none", "cannot be written"),
        (tmp_path / "loop" / "out", "cannot be written: .*loop"),
        ("a\0b", r"'a\\x00b' cannot be written: embedded null byte"),
    ]:
        with pytest.raises(StructPruneError, match=message):
            Output(target).check()
        with pytest.raises(StructPruneError), Output(target).staged():
            pytest.fail("there is no such folder")

    long_name = "x" * 300
    with pytest.raises(StructPruneError, match="cannot be written"):
        Output(tmp_path / long_name).check()


def test_an_output_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3_000))

    with pytest.raises(StructPruneError, match="takes about 5.0 GB, and .* has 3.0 kB left"):
        Output(out).check(5_000_000_000)
    with pytest.raises(StructPruneError, match="has 3.0 kB left"):
        save_checked(build("llama-tied"), out, None, False, lambda folder: 1 / 0)

    assert not out.exists()


def test_checkpoint_folders_are_checked_before_text_is_read(tmp_path):
    domains = [DomainConfig("a", (pytest.fail("text was read") for _ in "a"))]
    (tmp_path / "file").write_text("")

    for folder, message in [(tmp_path / "file" / "run", "file is a file"), (Path("/proc/none/run"), "cannot be")]:
        settings = config(domains=domains)
        options = RunOptions(checkpoint_dir=str(folder))
        with pytest.raises(StructPruneError, match=message):
            prune_model(build("llama-tied"), settings, tokenizer(), options=options)

        recovery = recovery_config(domains=domains, training={"output_dir": str(folder)})
        settings = config(domains=domains, recovery=recovery)
        with pytest.raises(StructPruneError, match=message):
            prune_model(build("llama-tied"), settings, tokenizer(), options=None)

    check_folder(tmp_path / "a" / "b")
    assert names_in(tmp_path) == ["file"]


def test_only_checkpoints_are_removed(tmp_path):
    files = ["a/checkpoint-2/trainer_state.json", "b/checkpoint-2/trainer_state.json", "b/notes/thesis.txt"]
    put_into(tmp_path, dict.fromkeys(files, ""))

    for name in "abc":
        disk.remove_checkpoints(tmp_path / name)

    assert names_in(tmp_path) == ["b"]
    assert names_in(tmp_path / "b") == ["notes"]


HOLD_SCRIPT = """
import sys, time
from optimum_structprune.system.disk import OFFLOAD, Output

output = Output(sys.argv[1])
with output.locked(), output.sibling(OFFLOAD) as folder:
    (folder / "weights").write_text("")
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holding_process(tmp_path):
    """Start a process that writes to `out` until it is killed."""
    command = [sys.executable, "-c", HOLD_SCRIPT, tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"

    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path, holding_process):
    names_before = names_in(tmp_path)
    assert len(names_before) == 2
    assert ".out.lock" in names_before

    # A link to a folder and the folder are one output.
    (tmp_path / "link").symlink_to(tmp_path / "out")
    output = Output(tmp_path / "out")
    for attempt in (output.locked(), Output(tmp_path / "link").locked(), output.staged()):
        with pytest.raises(StructPruneError, match="Another run writes to"), attempt:
            raise AssertionError
    (tmp_path / "link").unlink()
    assert names_in(tmp_path) == names_before
    with Output(tmp_path / "other").locked():
        pass

    os.kill(holding_process.pid, signal.SIGKILL)
    holding_process.wait()
    assert names_in(tmp_path) == names_before
    with Output(tmp_path / "out").locked():
        assert names_in(tmp_path) == [".out.lock"]
    assert not names_in(tmp_path)


def test_a_run_saves_inside_its_own_lock_and_keeps_its_working_folder(tmp_path):
    output = Output(tmp_path / "out")
    with output.locked(), output.sibling(OFFLOAD) as scratch:
        with Output(tmp_path / "out").staged() as staging:
            (staging / "model").write_text("mine")
        assert names_in(tmp_path) == sorted([".out.lock", scratch.name, "out"])

    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["model", LIST_NAME]


def test_a_failed_run_removes_its_working_folders(tmp_path):
    parent = tmp_path / "new" / "deep"
    output = Output(parent / "out")
    with pytest.raises(RuntimeError, match="mine"), output.locked(), output.sibling(OFFLOAD):
        assert len(names_in(parent)) == 2
        raise RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"), output.staged():
        raise RuntimeError("mine")

    assert names_in(tmp_path) == ["new"]
    assert names_in(parent) == []


def test_only_working_folders_of_killed_runs_are_removed(tmp_path):
    killed = [f".out.{SAVING}.abcd_123", f".out.{OFFLOAD}.abcd_123"]
    folders = ["out", ".out.progress", ".out.settings", ".out.saving", ".out.saving.notes", ".out.saving.abcd_1234"]
    folders += ["x.out.saving.abcd_123", ".other.saving.abcd_123", ".out.checkpoints", ".out2.saving.abcd_123"]
    for name in killed + folders:
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / ".out.saving.12345678").write_text("a file")
    (tmp_path / ".out.saving.87654321").symlink_to(tmp_path / "out")

    with Output(tmp_path / "out").locked():
        pass

    assert names_in(tmp_path) == sorted(folders + [".out.saving.12345678", ".out.saving.87654321"])


def test_a_result_is_restored_after_a_kill_during_its_replacement(tmp_path):
    former = tmp_path / ".out.saving.abcd_123" / "former"
    model = tmp_path / "out" / "model"
    put_into(former, {"model": "former"})
    # A restored result is overwritten only on request.
    with pytest.raises(StructPruneError, match="exists and is not empty"), Output(tmp_path / "out").staged():
        raise AssertionError
    assert model.read_text() == "former"

    put_into(former, {"model": "replaced, and not yet removed"})
    with Output(tmp_path / "out").locked():
        assert model.read_text() == "former"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(("error", "expected"), [
    pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="key"),
    pytest.param(OSError("device or resource busy"), StructPruneError, id="busy"),
])  # fmt: skip
def test_an_error_in_the_second_of_two_moves_restores_the_former_result(tmp_path, monkeypatch, error, expected):
    out = write_result(tmp_path / "out")
    rename = Path.rename
    errors = iter([None, error])

    def fail_second(self, target):
        next_error = next(errors, None)
        if next_error is not None:
            raise next_error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(expected, match="out could not be written.*busy|^$"), Output(out, True).staged() as staging:
        (staging / "new").write_text("")

    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == ["model.safetensors", LIST_NAME]


def test_a_file_that_appears_at_the_output_is_not_replaced(tmp_path):
    file = tmp_path / "other"
    with pytest.raises(StructPruneError, match="other could not be written"), Output(file, True).staged():
        file.write_text("a file that appears in the way stays")

    assert names_in(tmp_path) == ["other"]
    assert file.is_file()


def write_with_torch(folder):
    torch.save(torch.zeros(9999), folder / "optimizer.pt")


def write_notes(folder):
    (folder / "notes.txt").write_text("x" * 9999)


def test_a_full_disk_leaves_the_former_result_unchanged(tmp_path):
    out = write_result(tmp_path / "out")
    former_files = contents(out)

    for reason, write in (
        ("inline_container|PytorchStream", write_with_torch),
        ("too large", write_notes),
        ("os error", tokenizer().save_pretrained),
    ):
        refused = pytest.raises(StructPruneError, match=f"out could not be written and is unchanged.*({reason})")
        with full_disk(1_000), refused, Output(out, True).staged() as staging:
            write(staging)

        assert names_in(tmp_path) == ["out"]
        assert contents(out) == former_files


def test_errors_of_cpp_streams_are_write_errors():
    """torch writes the state of an optimizer by a stream of C++."""
    assert disk.is_write_error(RuntimeError("basic_ios::clear: iostream error"))
    assert not disk.is_write_error(RuntimeError("shape mismatch"))
