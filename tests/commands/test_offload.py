"""Test `--offload` on the command line: its refusals and its results."""

import shutil

import pytest
import torch
from filelock import FileLock
from helpers import error_line, save_with_tokenizer, with_long, write_texts
from models import build, documents, full_disk, tokenizer
from safetensors.torch import load_file

from optimum_structprune import StructPruner
from optimum_structprune.commands.cli import main


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Save a text and a model of many shards."""
    folder = tmp_path_factory.mktemp("offload")
    write_texts(folder / "a.jsonl", documents(80))
    build("llama-untied").save_pretrained(folder / "model", max_shard_size="12KB")
    tokenizer().save_pretrained(folder / "model")
    return folder


def prune_command(desk, model, out, width=24, offload="disk"):
    line = ["prune", str(model), str(out), "--width", f"mlp={width}", "--device", "cpu"]
    line += ["--domain", f"a={desk / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "24"]
    # An offloaded model writes no general text. A run in memory must not write one either.
    line += ["--general-share", "0"]
    if offload is not None:
        line += ["--offload", offload]
    return line


@pytest.fixture
def assert_refused(capsys, monkeypatch, tmp_path):
    """Return a function that checks that a command prunes nothing, writes nothing, and ends with these words."""

    def check(line, *words):
        files_before = sorted(tmp_path.iterdir())
        monkeypatch.setattr(StructPruner, "apply_step_", None)

        assert main(line) == 2

        error = error_line(capsys)
        for word in words:
            assert word in error, error
        assert sorted(tmp_path.iterdir()) == files_before

    return check


@pytest.mark.parametrize("place", ["disk", None])
@pytest.mark.parametrize("damage", ["cut", "noise", "gone", "index of a file that is not there", "index cut"])
def test_a_damaged_shard_is_refused(desk, tmp_path, assert_refused, damage, place):
    copy = shutil.copytree(desk / "model", tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[3]
    index = copy / "model.safetensors.index.json"

    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-40])
    elif damage == "noise":
        shard.write_bytes(b"\xff" * 4000)
    elif damage == "gone":
        shard.unlink()
    elif damage == "index cut":
        index.write_text(index.read_text()[:-50])
    else:
        index.write_text(index.read_text().replace("00004", "00444"))

    assert_refused(prune_command(desk, copy, tmp_path / "out", offload=place), "cannot be loaded")


def test_a_teacher_whose_layers_are_on_the_disk_writes_the_same_predictions(desk, tmp_path):
    """A mixture is saved with a file entry for each expert, and its layers are stored again for this run."""
    save_with_tokenizer(build("mixtral"), tmp_path / "model")
    for name, flags in (("memory", []), ("disk", ["--offload", "disk"])):
        line = ["teacher", str(tmp_path / "model"), str(desk / "a.jsonl"), str(tmp_path / name), "--seq-length", "24"]
        assert main(line + ["--device", "cpu"] + flags) == 0

    expected = load_file(tmp_path / "memory" / "shard-00000.safetensors")
    written = load_file(tmp_path / "disk" / "shard-00000.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory", "model"]


def test_models_whose_layers_cannot_be_loaded_one_by_one_are_refused(desk, tmp_path, assert_refused):
    for case in ("t5", "gemma4_text"):
        save_with_tokenizer(build(case), tmp_path / case)
        line = prune_command(desk, tmp_path / case, tmp_path / "out")
        assert_refused(line, "cannot be loaded one by one", "in memory")


def test_pickled_weights_are_refused(desk, tmp_path, assert_refused):
    pickled = shutil.copytree(desk / "model", tmp_path / "pickled")
    (pickled / "model.safetensors.index.json").unlink()
    for path in pickled.glob("*.safetensors"):
        path.unlink()
    torch.save(build("llama-untied").state_dict(), pickled / "pytorch_model.bin")

    line = prune_command(desk, pickled, tmp_path / "out")
    assert_refused(line, "pytorch_model.bin is not a safetensors file", "save_pretrained(")


def test_a_second_run_into_the_same_output_is_refused_at_once(desk, tmp_path, assert_refused):
    line = prune_command(desk, desk / "model", tmp_path / "out")

    with FileLock(tmp_path / ".out.lock"):
        assert_refused(line, "Another run writes to", "choose another folder")


@pytest.mark.parametrize(("size", "resume"), with_long([(300, ()), (4000, ("--resume",)), (9000, ())], [300]))
def test_a_full_disk_is_reported_in_one_line_and_keeps_the_former_result(desk, tmp_path, capsys, size, resume):
    out = tmp_path / "out"
    assert main(prune_command(desk, desk / "model", out, width=32)) == 0
    former_files = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()

    line = prune_command(desk, desk / "model", out) + ["--overwrite"] + list(resume)
    with full_disk(size):
        assert main(line) == 2
    assert error_line(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == former_files
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.progress"}

    assert main(line) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_of_several_widths_are_pruned_as_in_memory(desk, tmp_path):
    """Other models and settings: `method/test_offloaded.py`."""
    flags = ["--dtype", "bfloat16", "--skip-layer", "0"]
    uneven = tmp_path / "uneven"
    assert main(prune_command(desk, desk / "model", uneven, offload=None) + flags) == 0
    assert main(prune_command(desk, uneven, tmp_path / "memory", width=16, offload=None) + flags) == 0
    assert main(prune_command(desk, uneven, tmp_path / "disk", width=16, offload="disk") + flags) == 0

    in_memory = load_file(tmp_path / "memory" / "model.safetensors")
    offloaded = load_file(tmp_path / "disk" / "model.safetensors")
    assert offloaded.keys() == in_memory.keys()
    for name, tensor in in_memory.items():
        torch.testing.assert_close(offloaded[name], tensor, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory", "uneven"]
