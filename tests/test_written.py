"""A result knows its own files, whatever lies beside them."""

import pytest
from helpers import contents, put_into

from optimum_structprune import StructPruneError
from optimum_structprune.system.disk import GGUFOutput, Output
from optimum_structprune.written import LIST_NAME, replace_text, to_json, written_files


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
    before = contents(out)
    with pytest.raises(StructPruneError, match=r"did not write \((notes.txt|\.git|data)\)"):
        save(out, overwrite=True)
    assert contents(out) == before


def test_a_result_whose_own_files_have_changed_is_overwritten(tmp_path):
    out = save(tmp_path / "out")
    (out / "README.md").write_text("my words")
    (out / "model.safetensors").unlink()
    save(out, overwrite=True)
    assert contents(out) == contents(save(tmp_path / "other"))


def test_what_is_written_into_a_result_afterwards_is_part_of_it(tmp_path):
    out = save(tmp_path / "out")
    replace_text(out / "report.html", "new")
    for overwrite in (False, True):
        with GGUFOutput(out / "model.gguf", overwrite).staged() as file:
            file.write_bytes(b"GGUF")
    assert {"report.html", "model.gguf", *OWN} == {*written_files(out)}
    save(out, overwrite=True)
    replace_text(tmp_path / "notes.txt", "in no result")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "notes.txt"}


@pytest.mark.parametrize("files", [["in/it"], {"in/it": "a hash, as an earlier version wrote"}])
def test_a_list_names_nothing_outside_its_folder(tmp_path, files):
    (tmp_path / LIST_NAME).write_text(to_json({"files": files}))
    assert written_files(tmp_path) == ["in/it"]
    outside = ["../up.json", "/etc/passwd", "a/../../b", 5]
    (tmp_path / LIST_NAME).write_text(to_json({"files": [*outside, "in/it"]}))
    assert written_files(tmp_path) == ["in/it"]
