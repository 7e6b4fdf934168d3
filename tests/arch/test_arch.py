"""The architecture data: strict, checked, and in agreement with transformers."""

import fnmatch

import pytest
import yaml
from helpers import own_family
from models import CASES, OTHERS, build
from transformers import PretrainedConfig

from optimum_structprune import StructPruneError
from optimum_structprune.arch.family import FAMILIES_FOLDER, builtin_families, family_of, read_families
from optimum_structprune.arch.load import describe, resolve
from optimum_structprune.arch.spec import HIDDEN, LAYER


LLAMA = own_family("mine")


def write(tmp_path, *entries):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def shapes_of(*widths):
    """The weights of feed-forward layers of these widths."""
    shapes = {}
    for layer, width in enumerate(widths):
        shapes |= {f"layers.{layer}.mlp.{name}_proj.weight": (width, 4) for name in ("gate", "up")}
        shapes[f"layers.{layer}.mlp.down_proj.weight"] = (4, width)
    return shapes


def test_a_config_needs_only_the_numbers_that_the_description_names(tmp_path):
    (family,) = read_families(write(tmp_path, LLAMA))
    bare = PretrainedConfig(intermediate_size=8)
    (space, _) = resolve(family, bare, shapes_of(8, 8)).spaces
    assert space.size == 8
    heads = {**LLAMA["spaces"]["mlp"], "producers": {"mlp.up_proj": "q"}, "consumers": {"mlp.down_proj": "q"}}
    other = {**heads, "producers": {"mlp.up_proj": "my_dim+my_dim"}, "consumers": {"mlp.down_proj": "unit"}}
    for template, fields, message in [
        (heads, {}, "'num_attention_heads', a number of 1 or more .* and finds None"),
        (heads, {"num_attention_heads": 0}, "'num_attention_heads', .* and finds 0"),
        (heads, {"num_attention_heads": 2}, "'hidden_size', .* and finds None"),
        (heads, {"num_attention_heads": 2, "num_key_value_heads": 4}, "num_key_value_heads=4 is more than .*=2"),
        (other, {}, "'my_dim', .* and finds None"),
        (other, {"my_dim": "x"}, "'my_dim', .* and finds 'x'"),
        ({**LLAMA["spaces"]["mlp"], "times": "factor"}, {}, "'factor', .* and finds None"),
    ]:
        (family,) = read_families(write(tmp_path, {**LLAMA, "spaces": {"mlp": template}}))
        with pytest.raises(StructPruneError, match=message):
            resolve(family, PretrainedConfig(**fields), shapes_of(8, 8))
    (family,) = read_families(write(tmp_path, {**LLAMA, "layer_path": "layers.0"}))
    with pytest.raises(StructPruneError, match="layers at 'layers.0'; nothing is there"):
        resolve(family, bare, shapes_of(8, 8))
    (family,) = read_families(write(tmp_path, LLAMA))
    with pytest.raises(StructPruneError, match=r"Layer 1 has no mlp: layers.1.mlp.gate_proj.weight is \(0, 4\)"):
        resolve(family, bare, shapes_of(8, 0))


def test_every_family_has_a_case_and_says_which_spaces_it_lacks_and_whether_layers_may_differ():
    plain = {model_type for model_type, _ in CASES.values()} | {model_type for _, model_type, _ in OTHERS.values()}
    inside = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}  # only ever inside their multimodal models
    around = {"qwen3_5_moe"}  # like qwen3_5 around a text model that has a case
    assert plain | inside | around == set(builtin_families())
    for model_type, family in builtin_families().items():
        assert family.text or (family.layer is None) == (LAYER in family.missing), model_type
        assert family.text or (family.hidden is None) == (HIDDEN in family.missing), model_type
        assert not (family.layer_class and family.uniform), model_type
        if family.text is None and family.spaces:
            assert set(family.layer_class) == set(family.model_types) or family.uniform, model_type


def test_each_file_describes_one_family_and_is_named_after_its_first_model_type():
    described = []
    for path in FAMILIES_FOLDER.glob("*.yaml"):
        (family,) = read_families(path)
        assert path.stem == family.model_types[0]
        described += family.model_types
    assert len(described) == len(set(described)), "a model type stands in two files"
    assert set(described) == set(builtin_families())


@pytest.mark.parametrize("case", CASES)
def test_axes_do_not_overlap_and_lie_inside(case):
    model = build(case)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for space in describe(model).spaces:
        seen: dict[tuple[str, int], set[int]] = {}
        for axis in space.axes:
            mine = set(axis.indices(range(space.size)))
            taken = seen.setdefault((axis.param, axis.dim), set())
            assert not mine & taken and max(mine) < shapes[axis.param][axis.dim]
            taken |= mine
        assert all(len(indices) == shapes[param][dim] for (param, dim), indices in seen.items())
        if space.inside:
            assert_the_tensor_parallel_plan_agrees(model, space)


def assert_the_tensor_parallel_plan_agrees(model, space):
    for axes, expected in ((space.producers, "colwise"), (space.consumers, "rowwise")):
        for axis in axes:
            name = (axis.module if axis.part is None else axis.param).removeprefix(f"{model.base_model_prefix}.")
            plan = model.config.base_model_tp_plan or {}
            styles = [style for pattern, style in plan.items() if fnmatch.fnmatch(name, pattern)]
            assert not styles or expected in styles[0] or "gather" in styles[0], (name, styles)


def test_a_wrong_file_is_refused(tmp_path):
    mlp = LLAMA["spaces"]["mlp"]
    for change, message in (
        ({"layer_pth": "layers"}, r"unknown key 'layer_pth'.* Did you mean 'layer_path'\?"),
        ({"spaces": {"mlp": {**mlp, "consumer": {}}}}, r"unknown key 'consumer'.* Did you mean 'consumers'\?"),
        ({"spaces": {"mlp": {"size": "x", "producers": {}}}}, "'consumers' is missing"),
        ({"spaces": {"mlp": {**mlp, "producers": {"a": "unitt"}}}}, r"unit 'unitt'.* mean 'unit'\?"),
    ):
        with pytest.raises(StructPruneError, match=message):
            read_families(write(tmp_path, {**LLAMA, **change}))
    with pytest.raises(StructPruneError, match=r"'qwen22' is not described.* Did you mean 'qwen2'\?"):
        family_of("qwen22")
