"""`examples/tools/stub.py`: the draft of a description, for model types that are not described."""

import pytest
import stub
from helpers import save_with_tokenizer, write_texts
from models import GROUPED, MOE, documents
from transformers import AutoConfig, AutoModelForCausalLM, DiffLlamaConfig

from optimum_structprune.arch.families import builtin_families, read_families
from optimum_structprune.arch.load import describe, resolve
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.commands.cli import main


# What a stub finds in mixtures of experts, and in models without a tensor-parallel plan.
UNKNOWN = {
    "afmoe": {"mlp_experts_mlp"},
    "hy_v3": {"attention", "mlp_experts_mlp"},
    "mamba2": set(),
    "diffllama": {"attention", "mlp"},
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_stub_says_what_it_finds(model_type, tmp_path):
    assert model_type not in builtin_families(), "take another type that is not described"
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "expand": 2} if model_type == "mamba2" else {}
    model = meta_model(AutoConfig.for_model(model_type, **{**MOE, "n_routed_experts": 4, **sizes}))
    text = stub.stub(model)
    (tmp_path / "stub.yaml").write_text(text)
    family = read_families(tmp_path / "stub.yaml")[0]
    assert family.model_types == (model_type,) and family.layer_path[0].rpartition(".")[2] in ("layers", "layer")
    assert UNKNOWN[model_type] <= set(family.spaces) and "nearest family" in text
    planned = any("layers" in pattern for pattern in model.config.base_model_tp_plan or {})
    assert planned != ("no tensor-parallel plan" in text)
    assert ("mlp" in family.spaces) <= ("No space has mlp.up_proj" not in text)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral"])
def test_a_stub_of_a_described_model_says_what_its_description_says(model_type, tmp_path):
    model = meta_model(AutoConfig.for_model(model_type, **{**MOE, "num_local_experts": 4}))
    (tmp_path / "stub.yaml").write_text(stub.stub(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    arch = resolve(read_families(tmp_path / "stub.yaml")[0], model.config, shapes, "model.")
    spaces = {space.axes for space in arch.spaces}
    assert spaces == {space.axes for space in describe(model).spaces if space.inside}


def test_an_unknown_architecture_from_stub_to_pruned(tmp_path, capsys):
    config = DiffLlamaConfig(**GROUPED)
    model = AutoModelForCausalLM.from_config(config)
    save_with_tokenizer(model, tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "cannot be pruned: The model type 'diffllama' is not described" in capsys.readouterr().out
    stub.main([str(tmp_path / "model")])
    text = capsys.readouterr().out
    assert "check every line" in text and "nearest family by names and shapes is llama" in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    assert main(["inspect", str(tmp_path / "model"), "--arch", str(mine)]) == 0
    assert "diffllama, 2 layers" in capsys.readouterr().out
    domain = ["--domain", f"a={write_texts(tmp_path / 'a.jsonl', documents(40))}"]
    short = ["--num-samples", "6", "--seq-length", "24", "--device", "cpu", "--arch", str(mine), "--width", "mlp=24"]
    assert main(["prune", str(tmp_path / "model"), str(tmp_path / "out"), *domain, *short]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24
