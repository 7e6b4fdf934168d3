"""What people do with a pruned model: generate, train, adapt, save, push, compile and export."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import logits
from huggingface_hub import HfApi
from models import build, config, token_ids, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from optimum_structprune import StructPruner


def pruned(case, **fields):
    """How to prune a model to these widths, in every layer but those that `skip_layers` names."""

    def prune():
        pruner = StructPruner(config(widths={"mlp": 24, "attention": 2}, **fields))
        return pruner, pruner.prune_model(build(case), tokenizer())

    return prune


# name -> how the model is made; every test below has to pass for all of them
PRUNED = {case: pruned(case) for case in ("llama-tied", "gemma3_text", "mixtral")}
PRUNED |= {"llama-differing": pruned("llama-tied", skip_layers=(1,))}
# Graphs take long to make, and experts are routed by values, which a graph does not see.
graphs = pytest.mark.parametrize("deployed", ["llama-tied"], indirect=True)


@pytest.fixture(scope="module", params=PRUNED)
def deployed(request, tmp_path_factory):
    """A pruned model and the folder that it was saved to, with its tokenizer."""
    pruner, model = PRUNED[request.param]()
    folder = tmp_path_factory.mktemp("deployment") / "pruned"
    pruner.save(model, folder, tokenizer=tokenizer())
    return SimpleNamespace(name=request.param, model=model.eval(), folder=folder)


def load(deployed, **options):
    return AutoModelForCausalLM.from_pretrained(deployed.folder, **options).eval()


def test_generation_is_the_same_with_every_cache_and_attention(deployed):
    tokens = {}
    for attention in ("eager", "sdpa"):
        model = load(deployed, attn_implementation=attention)
        for cache in (None, "dynamic", "static"):
            options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
            tokens[attention, cache] = model.generate(
                token_ids(2, 5), do_sample=False, min_new_tokens=8, max_new_tokens=8, **options
            )
    first = tokens.pop(("eager", None))
    assert first.shape == (2, 13) and all(torch.equal(first, other) for other in tokens.values())


def test_gradient_checkpointing_gives_the_same_gradients(deployed):
    plain, checkpointed = load(deployed).train(), load(deployed).train()
    # Transformers 5.24 calls it by the first name, earlier releases by the second.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(checkpointed, next(name for name in names if hasattr(checkpointed, name)))()
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.layers)
    for model in (plain, checkpointed):
        model(token_ids(), labels=token_ids()).loss.backward()
    ours, theirs = dict(plain.named_parameters()), dict(checkpointed.named_parameters())
    for name, parameter in ours.items():
        torch.testing.assert_close(theirs[name].grad, parameter.grad)


def test_lora_attaches_saves_and_merges(deployed, tmp_path):
    adapted = get_peft_model(load(deployed), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(deployed.model), atol=1e-3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(deployed), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again), expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


def test_a_trainer_trains_and_saves(deployed, tmp_path):
    model = load(deployed)
    before = deepcopy(model.state_dict())
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, learning_rate=1e-3)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in token_ids(4)]
    )
    trainer.train()
    after = model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trainer.save_model(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    torch.testing.assert_close(logits(again), logits(model.eval()))


def test_a_text_generation_pipeline(deployed):
    generator = pipeline("text-generation", model=str(deployed.folder), device="cpu")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = generator("w5 w6 w7", return_tensors=True, **options)[0]["generated_token_ids"]
    ids = generator.tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    assert found == deployed.model.generate(ids, **options)[0].tolist() and found[:3] == [5, 6, 7]
    assert generator("w5 w6 w7", **options)[0]["generated_text"].startswith("w5 w6 w7")


def test_saving_again_gives_the_same_files(deployed, tmp_path):
    load(deployed).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((deployed.folder / name).read_text())
    assert (tmp_path / "model.safetensors").read_bytes() == (deployed.folder / "model.safetensors").read_bytes()


def test_the_files_that_are_pushed_load(deployed, tmp_path, monkeypatch):
    def keep(api, repo_id, operations, **options):
        for operation in operations:
            (tmp_path / operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", keep)
    model = load(deployed)
    model.push_to_hub("me/pruned")
    tokenizer().push_to_hub("me/pruned")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert ("modeling_structprune.py" in names) == model.config.is_heterogeneous
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_sharded_checkpoint(deployed, tmp_path):
    deployed.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(deployed.model))


def test_a_device_map_with_layers_on_disk(deployed, tmp_path):
    layers = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(2)}
    places = {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(deployed, device_map=places, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    torch.testing.assert_close(logits(model), logits(deployed.model))


@graphs
def test_torch_compile(deployed):
    compiled = torch.compile(load(deployed), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(deployed.model))


@pytest.mark.nightly
@graphs
def test_torch_compile_with_inductor(deployed):
    compiled = torch.compile(load(deployed))
    torch.testing.assert_close(logits(compiled), logits(deployed.model), atol=1e-5, rtol=1e-4)


@graphs
@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")
def test_torch_export_and_onnx_with_any_batch_and_length(deployed, tmp_path):
    any_size = torch.export.Dim.DYNAMIC
    shapes = {"input_ids": {0: any_size, 1: any_size}, "use_cache": None}
    inputs, ids = {"input_ids": token_ids(), "use_cache": False}, token_ids(3, 7)
    program = torch.export.export(load(deployed), (), inputs, dynamic_shapes=shapes)
    expected = deployed.model(ids).logits.detach()
    torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, expected)

    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
