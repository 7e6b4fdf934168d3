"""A result knows its own files, whatever lies beside them: these alone are replaced, and only as they were written."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from helpers import contents, put_into, user_files
from hypothesis import given

from optimum_structprune import StructPruneError
from optimum_structprune.system.disk import GGUFOutput, Output
from optimum_structprune.written import LIST_NAME, check_unchanged, foreign_files, replace_text, to_json, written_files


OWN = {"config.json": b"{}", "model.safetensors": b"12345", "README.md": b"# A card", "1_Pooling/config.json": b"{}"}


def save(folder, overwrite=False):
    with Output(folder, overwrite).staged() as staging:
        put_into(staging, OWN)
    return folder


@given(user_files())
def test_what_a_user_puts_into_a_result_or_changes_there_is_refused_by_name(files):
    with tempfile.TemporaryDirectory() as place:
        folder = save(Path(place, "out"))
        put_into(folder, files)
        before = contents(folder)
        named = [name for name, content in files.items() if OWN.get(name) != content]
        if named:
            with pytest.raises(StructPruneError, match="is not as structprune wrote it") as refused:
                save(folder, overwrite=True)
            for name in named:
                of_user = name if name.startswith("1_Pooling/") else name.partition("/")[0]
                assert of_user in str(refused.value)
            assert contents(folder) == before
        for name in named:
            (folder / name).unlink()
        for of_user in (".cache", "__pycache__", "additional_chat_templates", "my notes"):
            shutil.rmtree(folder / of_user, ignore_errors=True)
        save(folder, overwrite=True)
        assert contents(folder).keys() == {*OWN, LIST_NAME}


def test_folders_and_links_of_a_user_stay_too(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_bytes(OWN["config.json"])
    for number, put in enumerate(
        (
            lambda out: (out / ".git").mkdir(),
            lambda out: (out / "data").symlink_to(tmp_path / "elsewhere"),
            lambda out: os.symlink((out / "config.json").rename(tmp_path / "c"), out / "config.json"),
            lambda out: [shutil.rmtree(out / "1_Pooling"), (out / "1_Pooling").write_text("mine")],
            lambda out: [shutil.rmtree(out / "1_Pooling"), (out / "1_Pooling").symlink_to(tmp_path / "elsewhere")],
        )
    ):
        out = save(tmp_path / str(number))
        put(out)
        with pytest.raises(StructPruneError, match=r"wrote it \((\.git|data|config\.json|1_Pooling)\), so"):
            save(out, overwrite=True)
    (tmp_path / "0" / ".git").rmdir()
    (tmp_path / "0" / "README.md").unlink()  # what is gone cannot be lost
    save(tmp_path / "0", overwrite=True)


def test_what_is_written_into_a_result_afterwards_is_part_of_it(tmp_path):
    out = save(tmp_path / "out")
    for name in ("report.html", "README.md"):
        replace_text(out / name, "new")
        check_unchanged(out / name, out / "nowhere.json")
    for overwrite in (False, True):
        with GGUFOutput(out / "model.gguf", overwrite).staged() as file:
            file.write_bytes(b"GGUF")
    assert {"report.html", "model.gguf"} < written_files(out).keys() and not foreign_files(out)
    (out / "report.html").write_text("new, and changed")
    with pytest.raises(StructPruneError, match="report.html is not as structprune wrote it"):
        check_unchanged(out / "report.html")
    (out / "report.html").unlink()
    save(out, overwrite=True)
    replace_text(tmp_path / "notes.txt", "in no result")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "notes.txt"}


def test_a_list_names_nothing_outside_its_folder(tmp_path):
    names = ("../up.json", "/etc/passwd", "a/../../b", "in/it")
    (tmp_path / LIST_NAME).write_text(to_json({"files": dict.fromkeys(names, "1")}))
    assert written_files(tmp_path) == {"in/it": "1"}
