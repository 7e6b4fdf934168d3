"""An output belongs to one run at a time, and what a killed run leaves beside it goes with the next one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_structprune import StructPruneError
from optimum_structprune.saving.claims import claimed, clear_leftovers, folder_beside
from optimum_structprune.saving.staging import staged
from optimum_structprune.saving.target import LEFTOVERS


HOLD = """
import sys, time
from pathlib import Path
from optimum_structprune.saving.claims import claimed, folder_beside

with claimed(sys.argv[1]), folder_beside(Path(sys.argv[1]), "offload") as folder:
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
    with pytest.raises(StructPruneError, match=rf"Another run writes to .*out now: process {other.pid}, which holds"):
        with claimed(tmp_path / "out"):
            raise AssertionError
    clear_leftovers(tmp_path / "out")
    assert names(tmp_path) == before
    with claimed(tmp_path / "other"):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert names(tmp_path) == before
    with claimed(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock"]
    assert not names(tmp_path)


def test_a_link_and_its_folder_are_one_output(tmp_path, other):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(StructPruneError, match="Another run writes to"), claimed(tmp_path / "link"):
        raise AssertionError


def test_an_error_leaves_no_lock_and_no_folder(tmp_path):
    target = tmp_path / "new" / "deep" / "out"
    with pytest.raises(RuntimeError, match="mine"):
        with claimed(target), folder_beside(target, "offload"):
            assert len(names(target.parent)) == 2
            raise RuntimeError("mine")
    assert not names(tmp_path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StructPruneError, match="cannot be made: .*file is a file"):
        with claimed(tmp_path / "file" / "out"):
            raise AssertionError


def test_what_killed_runs_left_goes_and_nothing_else(tmp_path):
    killed = [f".out.{purpose}.abcd_123" for purpose in LEFTOVERS] + ["..out.saving.abcd_123.offload.abcd_123"]
    mine = ["out", ".out.progress", ".out.settings", ".out.saving", ".out.saving.notes", ".out.old.abcd_1234"]
    mine += ["x.out.saving.abcd_123", ".other.saving.abcd_123", ".out.checkpoints", ".out2.saving.abcd_123"]
    for name in killed + mine:
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / ".out.saving.12345678").write_text("a file")
    (tmp_path / ".out.saving.87654321").symlink_to(tmp_path / "out")
    with folder_beside(tmp_path / "out", "saving") as held:
        clear_leftovers(tmp_path / "out")
        kept = [*mine, ".out.saving.12345678", ".out.saving.87654321", held.name]
        assert names(tmp_path) == sorted(kept)


def test_a_result_that_a_kill_caught_while_it_was_replaced_is_put_back(tmp_path):
    former = tmp_path / ".out.old.abcd_123"
    former.mkdir()
    (former / "model").write_text("former")
    with claimed(tmp_path / "out"):
        assert (tmp_path / "out" / "model").read_text() == "former"
    former.mkdir()
    (former / "model").write_text("replaced, and not yet removed")
    with claimed(tmp_path / "out"):
        assert (tmp_path / "out" / "model").read_text() == "former"
    assert names(tmp_path) == ["out"]


def test_what_is_there_is_not_overwritten_unasked_when_it_comes_back(tmp_path):
    former = tmp_path / ".out.old.abcd_123"
    former.mkdir()
    (former / "model").write_text("former")
    with pytest.raises(StructPruneError, match="exists and is not empty"), staged(tmp_path / "out", False):
        raise AssertionError
    assert (tmp_path / "out" / "model").read_text() == "former"


def test_an_interruption_between_two_moves_leaves_the_former_result(tmp_path, monkeypatch):
    for name in ("pruning_plan.json", "model.safetensors"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text('{"model_type": "llama", "keep": {}}')
    rename, calls = Path.rename, []

    def once(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", True) as folder:
        (folder / "new").write_text("")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["model.safetensors", "pruning_plan.json"]


def test_a_file_system_without_locks_still_takes_a_run(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path / "out"), folder_beside(tmp_path / "out", "saving"):
        assert "cannot be locked" in caplog.text
        assert len(names(tmp_path)) == 2
    assert not names(tmp_path)
