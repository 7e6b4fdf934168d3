"""A pruned model can generate, take adapters, and be saved, compiled, exported and quantized."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import first_units, logits, ran, save_with_tokenizer
from models import build, config, documents, real_text_model, token_ids, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner


UNIFORM = ("llama-tied", ())
# Graphs take long to build, and cannot contain the routing of experts, which depends on values.
graphs = pytest.mark.parametrize("deployed", [UNIFORM], indirect=True)


@pytest.fixture(scope="module", params=[UNIFORM, ("mixtral", (1,))], ids=["uniform", "differing"])
def deployed(request, tmp_path_factory):
    """Return a pruned model and its folder. All layers have one width, or one layer is unpruned."""
    case, skipped = request.param
    pruner = StructPruner(config(widths={"mlp": 24, "attention": 2}, skip_layers=skipped))
    model = pruner.prune_model(build(case), tokenizer())

    folder = tmp_path_factory.mktemp("deployment") / "pruned"
    pruner.save(model, folder, tokenizer=tokenizer())
    return SimpleNamespace(model=model.eval(), folder=folder)


def load(deployed, **options):
    return AutoModelForCausalLM.from_pretrained(deployed.folder, **options).eval()


def test_generation_does_not_depend_on_cache_and_attention(deployed):
    cache_options = [{"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}]
    results = []
    for attention in ("eager", "sdpa"):
        model = load(deployed, attn_implementation=attention)
        for options in cache_options:
            tokens = model.generate(token_ids(2, 5), do_sample=False, min_new_tokens=8, max_new_tokens=8, **options)
            results.append(tokens)

    assert results[0].shape == (2, 13)
    for tokens in results[1:]:
        assert torch.equal(results[0], tokens)


def test_lora_attaches_saves_and_merges(deployed, tmp_path):
    adapted = get_peft_model(load(deployed), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(deployed.model), atol=1e-3)

    adapted.save_pretrained(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(load(deployed), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(reloaded), expected)

    reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


def test_a_reloaded_model_saves_the_same_files(deployed, tmp_path):
    load(deployed).save_pretrained(tmp_path)

    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        expected = json.loads((deployed.folder / name).read_text())
        # transformers 5 does not write these keys of transformers 4.
        expected.pop("rope_theta", None)
        expected.pop("rope_scaling", None)
        assert values == expected
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (deployed.folder / name).read_bytes()


def test_it_can_be_saved_in_shards(deployed, tmp_path):
    deployed.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded), logits(deployed.model))


def test_its_layers_can_be_on_the_disk(deployed, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    offloaded = load(deployed, device_map=device_map, offload_folder=tmp_path)
    assert "disk" in offloaded.hf_device_map.values()
    torch.testing.assert_close(logits(offloaded), logits(deployed.model))


@pytest.mark.nightly
@graphs
def test_torch_compile(deployed):
    compiled = torch.compile(load(deployed), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(deployed.model))

    compiled = torch.compile(load(deployed))
    torch.testing.assert_close(logits(compiled), logits(deployed.model), atol=1e-5, rtol=1e-4)


@pytest.mark.nightly
@graphs
@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")
def test_torch_export_and_onnx_with_any_batch_and_length(deployed, tmp_path):
    any_size = torch.export.Dim.DYNAMIC
    shapes = {"input_ids": {0: any_size, 1: any_size}, "use_cache": None}
    inputs = {"input_ids": token_ids(), "use_cache": False}
    program = torch.export.export(load(deployed), (), inputs, dynamic_shapes=shapes)

    ids = token_ids(3, 7)
    expected = deployed.model(ids).logits.detach()
    torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, expected)

    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    outputs = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()
TORCHAO = ROOT / "build" / "torchao"
GPTQ_PYTHON = ROOT / "build" / "llm-compressor" / "bin" / "python"
# This code runs after a recipe of the page. The recipe calls the quantized model {name}.
CHECK = """
inputs = tokenizer("One and one is two", return_tensors="pt")
unquantized = AutoModelForCausalLM.from_pretrained("smollm2-32")
reloaded = AutoModelForCausalLM.from_pretrained("smollm2-{bits}")
assert reloaded.config.is_heterogeneous

logits = {name}(**inputs).logits
assert torch.equal(logits, reloaded(**inputs).logits)
expected = unquantized(**inputs).logits
error = (logits - expected).norm() / expected.norm()
assert 0 < error < {max_error}, error
"""


@pytest.mark.nightly
def test_layers_of_different_widths_are_quantized_by_torchao(tmp_path):
    if not (TORCHAO / "torchao").exists():
        pytest.skip(f"there is no {TORCHAO / 'torchao'}")
    save_desk_for_quantization(tmp_path)

    paths = [str(TORCHAO), str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    script = recipe("py") + CHECK.format(bits=8, name="small", max_error=0.05)
    ran([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    assert size_of_weights(tmp_path / "smollm2-8") < 0.6 * size_of_weights(tmp_path / "smollm2-32")


@pytest.mark.nightly
def test_layers_of_different_widths_are_quantized_by_gptq(tmp_path):
    if not GPTQ_PYTHON.exists():
        pytest.skip(f"there is no {GPTQ_PYTHON}")
    save_desk_for_quantization(tmp_path)

    script = recipe("python3") + CHECK.format(bits=4, name="model", max_error=0.2)
    ran([GPTQ_PYTHON, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    assert size_of_weights(tmp_path / "smollm2-4") < 0.4 * size_of_weights(tmp_path / "smollm2-32")


def save_desk_for_quantization(folder):
    """Save the files that the recipes of the page read: the original and a pruned model, and a text."""
    model, reader = real_text_model()
    save_with_tokenizer(model, folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct", reader)
    save_with_tokenizer(first_units(model, (512, 1024)), folder / "smollm2-32", reader)
    (folder / "calibration.txt").write_text("\n".join(documents(40)))


def recipe(language):
    """Return the snippet of the page in a language."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    return "import torch\n" + code


def size_of_weights(folder):
    return (folder / "model.safetensors").stat().st_size
