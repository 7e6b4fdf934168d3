"""Stubs of architectures that are not described: with a tensor-parallel plan, and without."""

import pytest
import yaml
from models import GROUPED, MOE
from transformers import AutoConfig

from optimum_structprune.arch.families import builtin_families, read_families
from optimum_structprune.arch.load import resolve
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.arch.stub import stub


# Hybrids, mixtures of experts, and dense models; the spaces that a stub finds in them.
UNKNOWN = {
    "afmoe": {"attention", "mlp", "shared_experts", "mlp_experts_mlp", "expert"},
    "hy_v3": {"attention", "mlp", "shared_experts", "mlp_experts_mlp", "expert"},
    "solar_open": {"attention", "shared_experts", "mlp_experts_mlp", "expert"},
    "mellum": {"attention", "mlp_experts_mlp", "expert"},
    "recurrent_gemma": {"mlp_block"},
    "mamba2": set(),
    "flint": {"attention", "mlp"},
    "biogpt": {"attention", "mlp"},
    "ernie": {"attention", "mlp"},
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_stub_says_what_it_finds(model_type, tmp_path):
    assert model_type not in builtin_families(), "take another type that is not described"
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "expand": 2} if model_type == "mamba2" else {}
    model = meta_model(AutoConfig.for_model(model_type, **{**MOE, "n_routed_experts": 4, **sizes}))
    text = stub(model)
    (tmp_path / "stub.yaml").write_text(text)
    family = read_families(tmp_path / "stub.yaml")[0]
    assert family.model_types == (model_type,) and family.layer_paths[0].rpartition(".")[2] in ("layers", "layer")
    assert UNKNOWN[model_type] <= set(family.spaces) and "nearest family" in text
    planned = bool(model.config.base_model_tp_plan)
    assert planned or "no tensor-parallel plan" in text
    if not family.spaces:
        assert text.count("# No space has") > 2


def test_a_stub_without_a_plan_fits_the_model(tmp_path):
    model = meta_model(AutoConfig.for_model("biogpt", **{**GROUPED, "num_key_value_heads": 8}))
    (tmp_path / "stub.yaml").write_text(stub(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    arch = resolve(read_families(tmp_path / "stub.yaml")[0], model.config, shapes, "biogpt.")
    assert arch.widths("mlp") == {0: 40, 1: 40} and arch.widths("attention") == {0: 8, 1: 8}


def test_a_stub_is_yaml_behind_its_comments():
    model = meta_model(AutoConfig.for_model("flint", **GROUPED))
    lines = [line for line in stub(model).splitlines() if not line.startswith("#")]
    assert yaml.safe_load("\n".join(lines))[0]["layer_path"] == "layers"
