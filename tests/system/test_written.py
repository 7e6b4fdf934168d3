"""A result lists its own files, so that an overwrite keeps the files of the user."""

import pytest
from helpers import contents, put_into

from optimum_structprune import StructPruneError
from optimum_structprune.system.disk import GGUFOutput, Output
from optimum_structprune.system.written import LIST_NAME, replace_text, to_json, written_files


OWN = {"config.json": b"{}", "model.safetensors": b"12345", "README.md": b"# A card", "1_Pooling/config.json": b"{}"}


def save(folder, overwrite=False):
    with Output(folder, overwrite).staged() as staging:
        put_into(staging, OWN)
    return folder


@pytest.mark.parametrize("put", [
    lambda out, elsewhere: (out / "notes.txt").write_text("mine"),
    lambda out, elsewhere: (out / ".git").mkdir(),
    lambda out, elsewhere: (out / "data").symlink_to(elsewhere),
])  # fmt: skip
def test_a_result_with_files_of_a_user_is_not_overwritten(tmp_path, put):
    out = save(tmp_path / "out")
    assert contents(out).keys() == {*OWN, LIST_NAME}
    put(out, tmp_path)
    files = contents(out)

    with pytest.raises(StructPruneError, match=r"did not write \((notes.txt|\.git|data)\)"):
        save(out, overwrite=True)
    assert contents(out) == files


def test_a_result_whose_own_files_have_changed_is_overwritten(tmp_path):
    out = save(tmp_path / "out")
    (out / "README.md").write_text("my words")
    (out / "model.safetensors").unlink()

    save(out, overwrite=True)
    assert contents(out) == contents(save(tmp_path / "other"))


def test_files_that_the_package_adds_later_belong_to_the_result(tmp_path):
    out = save(tmp_path / "out")
    replace_text(out / "report.html", "new")
    for overwrite in (False, True):
        with GGUFOutput(out / "model.gguf", overwrite).staged() as file:
            file.write_bytes(b"GGUF")
    assert set(written_files(out)) == {"report.html", "model.gguf", *OWN}
    save(out, overwrite=True)


def test_a_file_outside_a_result_gets_no_list(tmp_path):
    replace_text(tmp_path / "notes.txt", "in no result")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("files", [["in/it"], {"in/it": "a hash, as an earlier version wrote"}])
def test_a_list_of_files_is_read(tmp_path, files):
    (tmp_path / LIST_NAME).write_text(to_json({"files": files}))
    assert written_files(tmp_path) == ["in/it"]


def test_paths_outside_the_folder_of_a_list_are_ignored(tmp_path):
    files = ["../up.json", "/etc/passwd", "a/../../b", 5, "in/it"]
    (tmp_path / LIST_NAME).write_text(to_json({"files": files}))
    assert written_files(tmp_path) == ["in/it"]
