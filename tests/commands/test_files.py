"""Files and devices that a user can get wrong: each is one sentence and exit code 2, and nothing is lost."""

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


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "model"
    save_with_tokenizer(build("llama-tied"), folder)
    return folder


@pytest.fixture
def copy(dense, tmp_path):
    return shutil.copytree(dense, tmp_path / "copy")


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(folder, message):
    with pytest.raises(StructPruneError, match=message) as caught:
        Loading().model_and_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


def test_a_whole_model_is_loaded_where_there_is_room(dense, monkeypatch):
    model, reader = Loading(device="cpu").model_and_tokenizer(str(dense))
    assert model.dtype == torch.float32 and not model.training and len(reader) == 96
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # tied, and not missing
    assert weights_bytes(str(dense)) == (dense / "model.safetensors").stat().st_size
    assert weights_bytes("no/where") == 0
    no_room = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_room)
    refused(dense, "cannot be put on --device cpu: CUDA out of memory")


def test_weights_that_the_config_does_not_describe_are_refused_by_name(copy):
    edit(copy, num_hidden_layers=4)
    refused(copy, r"lacks weights .* random: model.layers.2.input_layernorm.weight, .* and \d+ more")
    edit(copy, num_hidden_layers=2, intermediate_size=24)
    message = r"other shapes .*: model.layers.0.mlp.down_proj.weight is \(32, 40\) .* and \(32, 24\) by the config"
    refused(copy, message)
    edit(copy, intermediate_size=40)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(copy, r"lacks weights .*: model.layers.1.mlp.up_proj.weight\. ")


def test_weights_that_are_not_used_are_named(copy, caplog):
    edit(copy, num_hidden_layers=1)
    Loading().model_and_tokenizer(str(copy))
    assert "does not use" in caplog.text and "model.layers.1.input_layernorm.weight" in caplog.text
    (copy / "tokenizer.json").write_text("{")
    refused(copy, "tokenizer")


def test_what_is_no_file_of_weights_is_refused_by_name(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"\xff" * 5000, whole[:3000], whole[:5], b""):
        path.write_bytes(content)
        refused(copy, "copy/model.safetensors is damaged or cut")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": 5}}))
    path.unlink()
    refused(copy, "model.safetensors.index.json is damaged or cut")
    (copy / "model.safetensors.index.json").unlink()
    os.mkfifo(path)
    refused(copy, "model.safetensors is not a regular file")
    (copy / "model.gguf").write_bytes(b"GGUF\x03")
    refused(copy / "model.gguf", "model.gguf is a GGUF file")


def test_an_odd_value_in_a_config_is_refused_with_what_transformers_says(copy):
    whole = (copy / "config.json").read_text()
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
        edit(copy, **fields)
        refused(copy, f"cannot be loaded: .*{message}")
        (copy / "config.json").write_text(whole)
    for text in ("", "[]", "5", "null", "{", '"text"', "[" * 5000, "\0"):
        (copy / "config.json").write_text(text)
        refused(copy, "config.json|cannot be loaded")
        with pytest.raises(StructPruneError):
            Loading().config(str(copy))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_one_sentence(dense):
    for device in ("cuda", "cuda:3", "nope", "meta", "cpu:x"):
        with pytest.raises(StructPruneError, match=f"--device {device} cannot be used: .*this machine has cpu"):
            usable_device(device)
    assert usable_device(None) == usable_device("cpu") == "cpu" and usable_device("auto") == "auto"
