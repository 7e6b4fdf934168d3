"""What people do with a pruned model: generate, adapt, save, compile, export and quantise."""

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
from helpers import first_units, logits, ran
from models import build, config, documents, real_text_model, token_ids, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner


UNIFORM = ("llama-tied", ())
# Graphs take long to make, and experts are routed by values, which a graph does not see.
graphs = pytest.mark.parametrize("deployed", [UNIFORM], indirect=True)


@pytest.fixture(scope="module", params=[UNIFORM, ("mixtral", (1,))], ids=["uniform", "differing"])
def deployed(request, tmp_path_factory):
    """A pruned model, of one width or with a layer that is as it was, and its folder with its tokenizer."""
    case, skipped = request.param
    pruner = StructPruner(config(widths={"mlp": 24, "attention": 2}, skip_layers=skipped))
    model = pruner.prune_model(build(case), tokenizer())
    folder = tmp_path_factory.mktemp("deployment") / "pruned"
    pruner.save(model, folder, tokenizer=tokenizer())
    return SimpleNamespace(model=model.eval(), folder=folder)


def load(deployed, **options):
    return AutoModelForCausalLM.from_pretrained(deployed.folder, **options).eval()


def test_generation_is_the_same_with_every_cache_and_attention(deployed):
    tokens = {}
    for attention in ("eager", "sdpa"):
        model = load(deployed, attn_implementation=attention)
        for cache in (None, "dynamic", "static"):
            options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
            options |= {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
            tokens[attention, cache] = model.generate(token_ids(2, 5), **options)
    first = tokens.pop(("eager", None))
    assert first.shape == (2, 13) and all(torch.equal(first, other) for other in tokens.values())


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


def test_it_is_saved_again_in_shards_and_with_layers_on_disk(deployed, tmp_path):
    load(deployed).save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        again, before = (json.loads((folder / name).read_text()) for folder in (tmp_path / "again", deployed.folder))
        # transformers 5 does not write the words of transformers 4.
        assert again == {key: value for key, value in before.items() if key not in ("rope_theta", "rope_scaling")}
    weights = (folder / "model.safetensors" for folder in (tmp_path / "again", deployed.folder))
    assert len({path.read_bytes() for path in weights}) == 1, "the same files"
    deployed.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    layers = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(2)}
    places = {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = load(deployed, device_map=places, offload_folder=tmp_path / "disk")
    assert "disk" in spread.hf_device_map.values()
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "shards"), spread):
        torch.testing.assert_close(logits(model), logits(deployed.model))


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
    inputs, ids = {"input_ids": token_ids(), "use_cache": False}, token_ids(3, 7)
    program = torch.export.export(load(deployed), (), inputs, dynamic_shapes=shapes)
    expected = deployed.model(ids).logits.detach()
    torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, expected)

    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()
TORCHAO, GPTQ = ROOT / "build" / "torchao", ROOT / "build" / "llm-compressor" / "bin" / "python"
# It follows a recipe, whose quantised model has this name in it.
CHECK = """
inputs = tokenizer("One and one is two", return_tensors="pt")
whole, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("smollm2-32", "smollm2-{bits}"))
whole, first, second = (each(**inputs).logits for each in (whole, {name}, again))
assert torch.equal(first, second) and again.config.is_heterogeneous
error = (first - whole).norm() / whole.norm()
assert 0 < error < {most}, error
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("language", "needs", "python", "bits", "name", "most"), [
    ("py", TORCHAO / "torchao", sys.executable, 8, "small", 0.05), ("python3", GPTQ, GPTQ, 4, "model", 0.2),
], ids=["torchao", "GPTQ"])  # fmt: skip
def test_layers_that_differ(language, needs, python, bits, name, most, tmp_path):
    if not needs.exists():
        pytest.skip(f"there is no {needs}")
    model, tokenizer = real_text_model()
    small = first_units(model, (512, 1024))
    for saved, folder in ((model, "HuggingFaceTB/SmolLM2-135M-Instruct"), (small, "smollm2-32")):
        saved.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "calibration.txt").write_text("\n".join(documents(40)))
    (recipe,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    script = f"import torch\n{recipe}{CHECK.format(bits=bits, name=name, most=most)}"
    paths = [str(TORCHAO), str(ROOT), os.environ.get("PYTHONPATH")] if bits == 8 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ran([python, "-c", script], cwd=tmp_path, env=environment)
    sizes = [(tmp_path / f"smollm2-{size}" / "model.safetensors").stat().st_size for size in (32, bits)]
    assert sizes[1] < {8: 0.6, 4: 0.4}[bits] * sizes[0]
