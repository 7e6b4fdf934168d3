"""`--offload` on the command line: what it refuses, each in one line before anything is pruned, and what it gives."""

import shutil
from pathlib import Path

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
    folder = tmp_path_factory.mktemp("offload")
    write_texts(folder / "a.jsonl", documents(80))
    build("llama-untied").save_pretrained(folder / "model", max_shard_size="12KB")
    tokenizer().save_pretrained(folder / "model")
    return folder


def command(desk, model, out, *flags, widths=("mlp=24",), offload="disk"):
    # A model that is streamed writes no text, so none is read beside the domain in memory either.
    short = ["--domain", f"a={desk / 'a.jsonl'}", "--general-share", "0", "--num-samples", "6", "--seq-length", "24"]
    short += ["--device", "cpu"]
    wide = [part for width in widths for part in ("--width", width)]
    place = [] if offload is None else ["--offload", offload]
    return ["prune", str(model), str(out), *short, *wide, *place, *map(str, flags)]


def refused(capsys, monkeypatch, tmp_path, arguments, *words):
    """The one line that a command ends with, while nothing is pruned or left behind."""
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(StructPruner, "apply_step_", None)
    assert main(arguments) == 2
    line = error_line(capsys)
    assert all(word in line for word in words), line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["disk", None])
@pytest.mark.parametrize("damage", ["cut", "noise", "gone", "index of a file that is not there", "index cut"])
def test_a_damaged_shard_is_named(desk, tmp_path, capsys, monkeypatch, damage, place):
    copy = shutil.copytree(desk / "model", tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[3]
    index = copy / "model.safetensors.index.json"
    if damage == "gone":
        shard.unlink()
    elif damage == "index cut":
        index.write_text(index.read_text()[:-50])
    elif damage.startswith("index"):
        index.write_text(index.read_text().replace("00004", "00444"))
        shard = Path("model-00444")
    else:
        shard.write_bytes({"cut": shard.read_bytes()[:-40], "noise": b"\xff" * 4000}[damage])
    word = index.name if damage == "index cut" else shard.name
    refused(capsys, monkeypatch, tmp_path, command(desk, copy, tmp_path / "out", offload=place), word)


def test_models_whose_layers_cannot_be_brought_in_one_by_one_are_refused(desk, tmp_path, capsys, monkeypatch):
    for case in ("t5", "gemma4_text"):
        save_with_tokenizer(build(case), tmp_path / case)
        arguments = command(desk, tmp_path / case, tmp_path / "out")
        refused(capsys, monkeypatch, tmp_path, arguments, "cannot be loaded one by one", "in memory")
    pickled = shutil.copytree(desk / "model", tmp_path / "pickled")
    for path in [*pickled.glob("*.safetensors"), *pickled.glob("*.index.json")]:
        path.unlink()
    torch.save(build("llama-untied").state_dict(), pickled / "pytorch_model.bin")
    words = ("pytorch_model.bin is not a safetensors file", "save_pretrained(")
    refused(capsys, monkeypatch, tmp_path, command(desk, pickled, tmp_path / "out"), *words)


def test_a_second_run_into_the_same_output_is_refused_at_once(desk, tmp_path, capsys, monkeypatch):
    with FileLock(tmp_path / ".out.lock"):
        words = ("Another run writes to", "choose another folder")
        refused(capsys, monkeypatch, tmp_path, command(desk, desk / "model", tmp_path / "out"), *words)


@pytest.mark.parametrize(("size", "resume"), with_long([(300, ()), (4000, ("--resume",)), (9000, ())], [300]))
def test_a_full_disk_is_one_line_and_keeps_what_was_there(desk, tmp_path, capsys, size, resume):
    out = tmp_path / "out"
    assert main(command(desk, desk / "model", out, widths=("mlp=32",))) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with full_disk(size):
        assert main(command(desk, desk / "model", out, "--overwrite", *resume)) == 2
    assert error_line(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.progress"}
    assert main(command(desk, desk / "model", out, "--overwrite", *resume)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_of_several_widths_are_pruned_again_as_in_memory(desk, tmp_path):
    """Other models and settings: `sources/test_offloaded.py`."""
    flags = ("--dtype", "bfloat16", "--skip-layer", "0")
    assert main(command(desk, desk / "model", tmp_path / "uneven", *flags, offload=None)) == 0
    for out, offload in (("memory", None), ("disk", "disk")):
        again = [tmp_path / "uneven", tmp_path / out, *flags]
        assert main(command(desk, *again, widths=("mlp=16",), offload=offload)) == 0
    expected, found = (load_file(tmp_path / out / "model.safetensors") for out in ("memory", "disk"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory", "uneven"]
