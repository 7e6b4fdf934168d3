"""Weights that lie in files while a run goes on: what is read of them is what lay there when it began."""

import os
import shutil

import pytest
import torch
from helpers import unread
from models import build, config, documents, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig, StructPruneError, layer_device_map, prune_model
from optimum_structprune.system.offloading import check_reachable, weight_of


LAST = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    """A model whose layers are read from files when they run."""
    dense = build("llama-untied")
    dense.save_pretrained(tmp_path / "dense", max_shard_size="12KB")
    places = layer_device_map(dense.config, "cpu", "disk")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map=places).eval()


def change_last(folder, put=os.replace):
    """Put other weights of the same shapes where the last layer is read from."""
    for path in folder.glob("*.safetensors"):
        if LAST in (weights := load_file(path)):
            weights = {name: tensor.clone() + 1 for name, tensor in weights.items()}
            save_file(weights, folder / "new", metadata={"format": "pt"})
            put(folder / "new", path)


@pytest.mark.parametrize("put", [os.replace, shutil.copyfile, lambda new, path: path.unlink()])
@pytest.mark.parametrize("read", [
    lambda model: weight_of(model, LAST),
    lambda model: model(torch.tensor([[3, 4, 5]])),
    lambda model: model.save_pretrained("unused"),
])  # fmt: skip
def test_a_file_that_was_replaced_is_refused_whoever_reads_it(model, tmp_path, monkeypatch, read, put):
    monkeypatch.chdir(tmp_path)
    check_reachable(model)
    read(model)
    change_last(tmp_path / "dense", put)
    with pytest.raises(StructPruneError, match=r"which holds model\.layers\.1\..*was replaced or removed"):
        read(model)


def test_a_pruning_does_not_mix_the_layers_of_two_models(model, tmp_path):
    def texts():
        change_last(tmp_path / "dense")
        yield from documents(80)

    with pytest.raises(StructPruneError, match=r"which holds model\.layers\.1\..*was replaced or removed"):
        prune_model(model, config(domains=[DomainConfig("a", texts())]), tokenizer(), inplace=True)


def cut(new, path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("put", [lambda new, path: path.unlink(), cut, lambda new, path: save_file({}, path)])
def test_a_file_that_does_not_hold_the_weights_is_refused_before_text_is_read(model, tmp_path, put):
    change_last(tmp_path / "dense", put)
    with pytest.raises(StructPruneError, match=r"weights are not in the files of the model: model\.layers\.1\."):
        prune_model(model, config(domains=[DomainConfig("a", unread())]), tokenizer(), inplace=True)
