"""Test that unusable files and devices are reported in one sentence."""

import json
import os
import shutil
from unittest.mock import Mock

import pytest
import torch
from helpers import save_with_tokenizer
from models import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneError
from optimum_structprune.commands.loading import Loading, usable_device, weights_bytes
from optimum_structprune.system.errors import reason_of


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "model"
    save_with_tokenizer(build("llama-tied"), folder)
    return folder


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_refused(folder, message):
    with pytest.raises(StructPruneError, match=message) as caught:
        Loading().model_and_tokenizer(str(folder))

    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_complete_model_loads(original):
    model, reader = Loading(device="cpu").model_and_tokenizer(str(original))

    assert model.dtype == torch.float32
    assert not model.training
    assert len(reader) == 96
    # The file lacks the weight of the head, because it is tied.
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert weights_bytes(str(original)) == (original / "model.safetensors").stat().st_size
    assert weights_bytes("no/where") == 0


def test_a_model_that_does_not_fit_in_memory_is_refused(original, monkeypatch):
    out_of_memory = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", out_of_memory)

    assert_refused(original, "cannot be put on --device cpu: CUDA out of memory")


def test_weights_that_contradict_the_config_are_named(copy):
    edit_config(copy, num_hidden_layers=4)
    assert_refused(copy, r"lacks weights .* random: model.layers.2.input_layernorm.weight, .* and \d+ more")

    edit_config(copy, num_hidden_layers=2, intermediate_size=24)
    message = r"other shapes .*: model.layers.0.mlp.down_proj.weight is \(32, 40\) .* and \(32, 24\) by the config"
    assert_refused(copy, message)

    edit_config(copy, intermediate_size=40)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert_refused(copy, r"lacks weights .*: model.layers.1.mlp.up_proj.weight\. ")


def test_unused_weights_are_named(copy, caplog):
    edit_config(copy, num_hidden_layers=1)

    Loading().model_and_tokenizer(str(copy))

    assert "does not use" in caplog.text
    assert "model.layers.1.input_layernorm.weight" in caplog.text


def test_a_damaged_tokenizer_is_refused(copy):
    edit_config(copy, num_hidden_layers=1)
    (copy / "tokenizer.json").write_text("{")

    assert_refused(copy, "tokenizer")


def test_a_damaged_file_of_weights_is_refused(copy):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"\xff" * 5000, content[:3000], content[:5], b""):
        path.write_bytes(damaged)
        assert_refused(copy, "cannot be loaded")

    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": 5}}))
    path.unlink()
    assert_refused(copy, "cannot be loaded")
    index.unlink()

    (copy / "model.gguf").write_bytes(b"GGUF\x03")
    assert_refused(copy / "model.gguf", "model.gguf is a GGUF file")


class Executed:
    """A pickled object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


def test_a_pickle_with_code_is_refused_without_advice_to_run_it(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    folder = tmp_path / "executed"
    torch.save({"model.norm.weight": torch.ones(2), "other": Executed(folder)}, copy / "pytorch_model.bin")

    message = assert_refused(copy, "a file holds Python objects besides tensors, which could run code. Pass a")

    assert "weights_only" not in message
    assert not folder.exists()


def test_a_tokenizer_with_code_names_the_flag(copy):
    path = copy / "tokenizer_config.json"
    fields = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (copy / "own.py").write_text("from transformers import PreTrainedTokenizerFast as Own\n")

    assert_refused(copy, "runs code of its own. Read it, and pass --trust-remote-code.$")


def test_a_long_error_of_a_library_ends_with_a_sentence():
    sentence = "The file has an unknown header. "

    assert reason_of(ValueError(sentence * 20)) == (sentence * 9).rstrip(". ")
    assert reason_of(ValueError("word " * 100)).endswith("word …")
    assert reason_of(KeyError()) == "KeyError"


def test_an_odd_value_in_a_config_is_refused_with_the_message_of_transformers(copy):
    path = copy / "config.json"
    original = path.read_text()
    for fields, message in (
        ({"hidden_size": "x"}, "'hidden_size' expected"),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_act": "nope"}, "nope"),
        ({"dtype": "nope"}, "nope"),
        ({"per_layer_config": 3}, ""),
        ({"auto_map": 3}, ""),
        ({"model_type": 5}, "model type `5`"),
        ({"model_type": "nope"}, "model type `nope`"),
    ):
        edit_config(copy, **fields)
        assert_refused(copy, f"cannot be loaded: .*{message}")
        path.write_text(original)


def test_a_malformed_config_is_refused(copy):
    for text in ("", "[]", "5", "null", "{", '"text"', "[" * 5000, "\0"):
        (copy / "config.json").write_text(text)

        assert_refused(copy, "config.json|cannot be loaded")
        with pytest.raises(StructPruneError):
            Loading().config(str(copy))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_an_absent_device_is_reported_in_one_sentence(original):
    for device in ("cuda", "cuda:3", "nope", "meta", "cpu:x"):
        with pytest.raises(StructPruneError, match=f"--device {device} cannot be used: .*This machine has cpu"):
            usable_device(device)

    assert usable_device(None) == "cpu"
    assert usable_device("cpu") == "cpu"
    assert usable_device("auto") == "auto"
