"""What lies beside a dense model comes along, or is named."""

import json
import logging
from types import SimpleNamespace

import pytest
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from optimum_structprune import DomainConfig, StructPruner
from optimum_structprune.commands.cli import main
from optimum_structprune.saving.carry import carry
from optimum_structprune.saving.push import _result_files


SIDE = {
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "chat_template.json": "{}",
    "sentence_bert_config.json": "{}",
    "config_sentence_transformers.json": "{}",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "1_Pooling/config.json": "{}",
    "2_Dense/model.safetensors": "weights of another module",
    "LICENSE": "Apache",
    "LICENSE.txt": "Apache",
    "NOTICE": "of them",
    "USE_POLICY.md": "be good",
    "labels.txt": "a",
    "picture.png": "x",
    "vocabulary.tiktoken": "x",
}
NAMED = ("onnx/model.onnx", "original/consolidated.pth", "modeling_odd.py")
STAYS = ("pytorch_model.bin", "flax_model.msgpack", "model.safetensors.index.json", "README.md", ".gitattributes")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carry")
    build("llama-tied").save_pretrained(folder / "dense")
    for name in (*SIDE, *NAMED, *STAYS):
        (folder / "dense" / name).parent.mkdir(exist_ok=True)
        (folder / "dense" / name).write_text(SIDE.get(name, "theirs"))
    pruner = StructPruner(config(domains=[DomainConfig("a", documents(60))]))
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", use_safetensors=True)
    pruned = pruner.prune_model(dense, tokenizer())
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("optimum_structprune.saving.carry").addHandler(handler)
    pruner.save(pruned, folder / "out", tokenizer())
    return pruner, pruned, folder / "out", records


def test_every_kind_of_file_is_carried_or_named(result):
    _, _, out, records = result
    for name, text in SIDE.items():
        assert (out / name).read_text() == text, name
    (warned,) = records
    for name in ("modeling_odd.py", "onnx/", "original/"):
        assert name in warned and not (out / name).exists()
    assert not (out / "pytorch_model.bin").exists() and "theirs" not in (out / "README.md").read_text()


def test_what_was_carried_is_part_of_the_result(result):
    pruner, pruned, out, _ = result
    assert set(SIDE) <= set(_result_files(out))
    pruner.save(pruned, out, tokenizer(), overwrite=True)
    assert (out / "LICENSE").is_file()
    again = AutoModelForCausalLM.from_pretrained(out)
    other = StructPruner(config(widths={"mlp": 16}, domains=[DomainConfig("a", documents(60))]))
    other.save(other.prune_model(again, tokenizer()), out.parent / "twice", tokenizer())
    assert (out.parent / "twice" / "1_Pooling" / "config.json").is_file(), "a result passes on what it was given"


def test_other_forms_of_the_vocabulary_stay_with_a_dense_one(tmp_path):
    forms = {"tokenizer.model", "vocab.json", "merges.txt", "vocabulary.tiktoken"}
    for kind, size in (("dense", 96), ("same", 96), ("smaller", 64)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"text_config": {"vocab_size": size}}))
    for name in (*forms, "LICENSE"):
        (tmp_path / "dense" / name).write_text(name)
    dense = SimpleNamespace(name_or_path=tmp_path / "dense")
    for kind, there in (("same", forms), ("smaller", set())):
        carry(dense, tmp_path / kind, None)
        names = {path.name for path in (tmp_path / kind).iterdir()}
        assert names & forms == there and "LICENSE" in names


def test_a_model_of_pictures_on_the_command_line(tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    assert main(["prune", str(tmp_path / "vit"), str(tmp_path / "out"), "--sparsity", "0.2", "--device", "cpu"]) == 2
    assert "reads no text" in (shown := capsys.readouterr().err) and "inputs={'images': pixel_values}" in shown
