"""The descriptions of architectures are complete, are checked, and agree with transformers."""

import fnmatch

import pytest
import yaml
from helpers import own_family
from models import CASES, OTHERS, build
from transformers import CONFIG_MAPPING, PretrainedConfig

from optimum_structprune import StructPruneError
from optimum_structprune.arch.family import FAMILIES_FOLDER, builtin_families, family_of, read_families
from optimum_structprune.arch.load import describe, resolve
from optimum_structprune.arch.spec import HIDDEN, LAYER


LLAMA = own_family("mine")
MLP = LLAMA["spaces"]["mlp"]


def write_family(tmp_path, entry):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump([entry]))
    return path


def read_family(tmp_path, entry):
    (family,) = read_families(write_family(tmp_path, entry))
    return family


def ffn_shapes(*widths):
    """Return the shapes of the weights of feed-forward layers with these widths."""
    shapes = {}
    for layer, width in enumerate(widths):
        shapes[f"layers.{layer}.mlp.gate_proj.weight"] = (width, 4)
        shapes[f"layers.{layer}.mlp.up_proj.weight"] = (width, 4)
        shapes[f"layers.{layer}.mlp.down_proj.weight"] = (4, width)
    return shapes


def test_a_config_needs_only_the_numbers_that_the_description_names(tmp_path):
    family = read_family(tmp_path, LLAMA)
    (space, _) = resolve(family, PretrainedConfig(intermediate_size=8), ffn_shapes(8, 8)).spaces
    assert space.size == 8


def test_a_missing_or_wrong_number_of_the_config_is_refused(tmp_path):
    heads = MLP | {"producers": {"mlp.up_proj": "q"}, "consumers": {"mlp.down_proj": "q"}}
    own_unit = MLP | {"producers": {"mlp.up_proj": "my_dim+my_dim"}, "consumers": {"mlp.down_proj": "unit"}}
    own_factor = MLP | {"times": "factor"}

    for template, fields, message in [
        (heads, {}, "'num_attention_heads', a number of 1 or more .* and finds None"),
        (heads, {"num_attention_heads": 0}, "'num_attention_heads', .* and finds 0"),
        (heads, {"num_attention_heads": 2}, "'hidden_size', .* and finds None"),
        (heads, {"num_attention_heads": 2, "num_key_value_heads": 4}, "num_key_value_heads=4 is more than .*=2"),
        (own_unit, {}, "'my_dim', .* and finds None"),
        (own_unit, {"my_dim": "x"}, "'my_dim', .* and finds 'x'"),
        (own_factor, {}, "'factor', .* and finds None"),
    ]:
        family = read_family(tmp_path, LLAMA | {"spaces": {"mlp": template}})
        with pytest.raises(StructPruneError, match=message):
            resolve(family, PretrainedConfig(**fields), ffn_shapes(8, 8))


def test_a_description_that_does_not_match_the_weights_is_refused(tmp_path):
    model_config = PretrainedConfig(intermediate_size=8)

    family = read_family(tmp_path, LLAMA | {"layer_path": "layers.0"})
    with pytest.raises(StructPruneError, match="layers at 'layers.0', and nothing is there"):
        resolve(family, model_config, ffn_shapes(8, 8))

    family = read_family(tmp_path, LLAMA)
    with pytest.raises(StructPruneError, match=r"Layer 1 has no mlp: layers.1.mlp.gate_proj.weight is \(0, 4\)"):
        resolve(family, model_config, ffn_shapes(8, 0))


def test_every_model_type_has_a_test_case():
    text_models = {model_type for model_type, _ in CASES.values()}
    other_models = {model_type for _, model_type, _ in OTHERS.values()}
    # These model types exist only inside their multimodal models.
    inner = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
    # This model type is built like qwen3_5, and its text model has a case.
    outer = {"qwen3_5_moe"}
    # An older transformers does not have the newest model types.
    known = {model_type for model_type in builtin_families() if model_type in CONFIG_MAPPING}
    assert text_models | other_models | inner | outer == known


def test_every_family_states_its_missing_spaces_and_whether_its_layers_may_differ():
    for model_type, family in builtin_families().items():
        assert not (family.layer_class and family.uniform), model_type
        if family.text:
            continue

        assert (family.layer is None) == (LAYER in family.missing), model_type
        assert (family.hidden is None) == (HIDDEN in family.missing), model_type
        if family.spaces:
            assert set(family.layer_class) == set(family.model_types) or family.uniform, model_type


def test_each_file_describes_one_family_and_is_named_after_its_first_model_type():
    model_types = []
    for path in FAMILIES_FOLDER.glob("*.yaml"):
        (family,) = read_families(path)
        assert path.stem == family.model_types[0]
        model_types += family.model_types

    assert len(model_types) == len(set(model_types)), "a model type stands in two files"
    assert set(model_types) == set(builtin_families())


@pytest.mark.parametrize("case", CASES)
def test_the_axes_of_a_space_cover_each_dimension_once(case):
    model = build(case)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    for space in describe(model).spaces:
        covered: dict[tuple[str, int], set[int]] = {}
        for axis in space.axes:
            indices = set(axis.indices(range(space.size)))
            covered_indices = covered.setdefault((axis.param, axis.dim), set())
            assert not indices & covered_indices
            assert max(indices) < shapes[axis.param][axis.dim]
            covered_indices.update(indices)

        for (param, dim), indices in covered.items():
            assert len(indices) == shapes[param][dim]
        if space.inside:
            assert_the_tensor_parallel_plan_agrees(model, space)


def assert_the_tensor_parallel_plan_agrees(model, space):
    plan = model.config.base_model_tp_plan or {}
    styles_and_axes = [("colwise", axis) for axis in space.producers]
    styles_and_axes += [("rowwise", axis) for axis in space.consumers]

    for expected, axis in styles_and_axes:
        name = axis.module if axis.part is None else axis.param
        name = name.removeprefix(f"{model.base_model_prefix}.")
        styles = [style for pattern, style in plan.items() if fnmatch.fnmatch(name, pattern)]
        assert not styles or expected in styles[0] or "gather" in styles[0], (name, styles)


def test_a_wrong_file_is_refused(tmp_path):
    for change, message in (
        ({"layer_pth": "layers"}, r"unknown key 'layer_pth'.* Did you mean 'layer_path'\?"),
        ({"spaces": {"mlp": MLP | {"consumer": {}}}}, r"unknown key 'consumer'.* Did you mean 'consumers'\?"),
        ({"spaces": {"mlp": {"size": "x", "producers": {}}}}, "'consumers' is missing"),
        ({"spaces": {"mlp": MLP | {"producers": {"a": "unitt"}}}}, r"unit 'unitt'.* mean 'unit'\?"),
    ):
        path = write_family(tmp_path, LLAMA | change)
        with pytest.raises(StructPruneError, match=message):
            read_families(path)


def test_an_unknown_model_type_is_refused_with_a_similar_one():
    with pytest.raises(StructPruneError, match=r"'qwen22' is not described.* Did you mean 'qwen2'\?"):
        family_of("qwen22")


def test_a_type_of_transformers_is_not_taken_for_a_misspelt_one():
    for model_type in ("clip_text_model", "speech_to_text", "perceiver"):
        with pytest.raises(StructPruneError, match=f"'{model_type}' is not described in arch/families. examples"):
            family_of(model_type)
