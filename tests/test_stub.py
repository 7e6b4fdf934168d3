"""`examples/tools/stub.py` drafts the description of a model, as `docs/extending.md` shows."""

import pytest
import stub
from models import MOE
from transformers import AutoConfig

from optimum_structprune.arch.family import builtin_families, read_families
from optimum_structprune.arch.load import describe, resolve
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.commands.cli import main


# The spaces in stubs of mixtures of experts, and of models without a tensor-parallel plan.
UNKNOWN = {
    "afmoe": {"mlp_experts_mlp"},
    "hy_v3": {"attention", "mlp_experts_mlp"},
    "mamba2": set(),
    "diffllama": {"attention", "mlp"},
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_stub_of_an_unknown_model_type(model_type, tmp_path):
    assert model_type not in builtin_families(), "take another type that is not described"
    sizes = MOE | {"n_routed_experts": 4}
    if model_type == "mamba2":
        sizes |= {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "expand": 2}
    model = meta_model(AutoConfig.for_model(model_type, **sizes))
    text = stub.stub(model)
    (tmp_path / "stub.yaml").write_text(text)
    family = read_families(tmp_path / "stub.yaml")[0]

    assert family.model_types == (model_type,)
    assert family.layer_path[0].split(".")[-1] in ("layers", "layer")
    assert UNKNOWN[model_type] <= set(family.spaces)
    assert "nearest family" in text
    # Some releases of transformers have the experts in the plan of expert parallelism only.
    plans = [*(model.config.base_model_tp_plan or {}), *(getattr(model.config, "base_model_ep_plan", None) or {})]
    has_plan = any("layers" in pattern for pattern in plans)
    assert ("no tensor-parallel plan" in text) != has_plan
    if "mlp" in family.spaces:
        assert "No space has mlp.up_proj" not in text


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral"])
def test_a_stub_of_a_described_model_matches_its_description(model_type, tmp_path):
    model = meta_model(AutoConfig.for_model(model_type, **MOE, num_local_experts=4))
    (tmp_path / "stub.yaml").write_text(stub.stub(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    arch = resolve(read_families(tmp_path / "stub.yaml")[0], model.config, shapes, "model.")

    spaces = {space.axes for space in arch.spaces}
    assert spaces == {space.axes for space in describe(model).spaces if space.inside}


def test_inspect_reports_that_a_model_without_a_description_cannot_be_pruned(tmp_path, capsys):
    AutoConfig.for_model("diffllama", **MOE).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "cannot be pruned: The model type 'diffllama' is not described" in capsys.readouterr().out
