"""Models whose layers differ in width equal masked models, load in every way, and are pruned again."""

import json
import sys

import pytest
import torch
import transformers
from helpers import KEEP, free_spaces, logits, masked, own_family, ran, with_long, without_refit
from models import GROUPED, PRUNABLE, STRUCTURES, build, config, token_ids, tokenizer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from optimum_structprune import Plan, StructPruner, disable_heterogeneous, enable_heterogeneous, prune_model
from optimum_structprune.arch import per_layer
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.arch.shrink import legal_sizes, shrunk_config
from optimum_structprune.method.resize import pad_, resize_
from optimum_structprune.system.errors import StructPruneError
from optimum_structprune.system.fingerprint import fingerprint


def plan_with_differing_widths(model):
    """Return a plan that keeps one legal width more in every layer than in the layer before it."""
    arch = describe(model)
    generator = torch.Generator().manual_seed(3)
    keep = {}

    for name in free_spaces(arch):
        legal = legal_sizes(model.config, arch, name)
        first_layer = arch.of(name)[0].layer
        for space in arch.of(name):
            position = legal.index(KEEP[name]) + space.layer - first_layer
            width = legal[position] * space.scale
            units = torch.randperm(space.size, generator=generator)[:width].sort().values
            keep[space.layer, space.name] = tuple(units.tolist())
    return Plan(arch.model_type, keep)


def widths_of(model):
    arch = describe(model)
    widths = {}
    for name in free_spaces(arch):
        widths[name] = {space.layer: space.width for space in arch.of(name)}
    return widths


def assert_modules_share_one_config(model):
    config_ids = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert config_ids == {id(model.config)}


FREE_CASES = [case for case in PRUNABLE if free_spaces(describe(build(case)))]


@pytest.mark.parametrize("case", with_long(FREE_CASES, STRUCTURES))
def test_a_pruned_model_equals_a_masked_one_and_reloads_and_pads(case, tmp_path):
    model = build(case)
    arch = describe(model)
    plan = plan_with_differing_widths(model)
    layer_types = {type(layer) for layer in layer_list(model, arch)}
    assert layer_types == {per_layer.layer_class(type(model), model.config)}

    small = without_refit(model, plan)
    assert small.config.is_heterogeneous
    assert widths_of(small) == plan.widths()
    torch.testing.assert_close(logits(small), logits(masked(model, arch, plan)), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(small), logits(model), atol=1e-3), "pruning changed nothing"

    small.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    # A training continues only with a model of the same fingerprint.
    assert fingerprint(reloaded) == fingerprint(small)
    torch.testing.assert_close(logits(reloaded), logits(small), atol=1e-6, rtol=0)
    generated = reloaded.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)
    assert_modules_share_one_config(reloaded)

    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules")
    torch.testing.assert_close(logits(remote), logits(small), atol=1e-6, rtol=0)
    assert_modules_share_one_config(remote)

    pad_(reloaded, describe(reloaded))
    assert not reloaded.config.is_heterogeneous
    assert not hasattr(reloaded.config, "auto_map")
    torch.testing.assert_close(logits(reloaded), logits(small), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a pruned model with its expected logits, for tests that load it in another process."""
    folder = tmp_path_factory.mktemp("saved")
    pruner = StructPruner(config(widths={"mlp": [20, 32], "attention": [4, 2]}))
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    pruner.save(model, folder / "out", tokenizer=tokenizer())
    save_file({"logits": logits(model), "ids": token_ids()}, folder / "expected.safetensors")
    return folder, model, pruner


IN_ANOTHER_PROCESS = """
import sys

# The package cannot be imported from here on.
sys.modules["optimum_structprune"] = None
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

@torch.no_grad()
def check(model, name="expected"):
    expected = load_file(f"{name}.safetensors")
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=1e-6, rtol=0)

def check_that_loading_fails(name, message):
    try:
        AutoModelForCausalLM.from_pretrained(name)
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError("transformers builds such models by itself: say so in the docs")

check_that_loading_fails("out", "ignore_mismatched_sizes")
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
check(model)
model.save_pretrained("reloaded")
cache = Path(sys.modules[type(model).__module__].__file__).parent
for folder in (Path("out"), Path("reloaded"), cache):
    name = "modeling_structprune.py"
    assert (folder / name).read_bytes() == (Path("out") / name).read_bytes(), folder
check(AutoModelForCausalLM.from_pretrained("reloaded", trust_remote_code=True))
base = AutoModel.from_pretrained("out", trust_remote_code=True)
assert base(load_file("expected.safetensors")["ids"]).last_hidden_state.shape == (2, 12, 32)
assert not [name for name, module in sys.modules.items() if module and "optimum_structprune" in name]

del sys.modules["optimum_structprune"]
import optimum_structprune

model = AutoModelForCausalLM.from_pretrained("out")
assert type(model).__module__ == "transformers.models.llama.modeling_llama"
check(model)
check_that_loading_fails("own", "per-layer attribute")
check(AutoModelForCausalLM.from_pretrained("own", trust_remote_code=True), "own")
optimum_structprune.enable_heterogeneous("own.yaml")
check(AutoModelForCausalLM.from_pretrained("own"), "own")
"""


@pytest.mark.slow
def test_a_saved_model_loads_in_another_process_with_and_without_the_package(saved):
    folder = saved[0]
    own_yaml = folder / "own.yaml"
    own = own_family("diffllama", layer_class={"diffllama": "DiffLlamaDecoderLayer"})
    own_yaml.write_text(json.dumps([own]))

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("diffllama", **GROUPED))
    pruner = StructPruner(config(widths={"mlp": 24}, skip_layers=(0,), arch_file=str(own_yaml)))
    small = pruner.prune_model(model, tokenizer())
    pruner.save(small, folder / "own")
    save_file({"logits": logits(small), "ids": token_ids()}, folder / "own.safetensors")

    ran([sys.executable, "-c", IN_ANOTHER_PROCESS], cwd=folder)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_import_is_cheap_and_an_environment_variable_controls_the_patch(value):
    code = (
        "import sys, optimum_structprune\n"
        "assert not {'torch', 'transformers', 'yaml'} & set(sys.modules), sorted(sys.modules)\n"
        "finders = [type(finder).__module__ for finder in sys.meta_path]\n"
        f"assert ('optimum_structprune.arch.per_layer' in finders) == {value}\n"
    )
    env = {"OPTIMUM_STRUCTPRUNE_PATCH": value, "PYTHONPATH": ":".join(sys.path)}
    ran([sys.executable, "-c", code], env=env)


@pytest.fixture
def unpatched():
    """Remove the patch of transformers during a test."""
    disable_heterogeneous()
    yield
    enable_heterogeneous()


def differing_config():
    """Return the config of a Llama whose layers differ in width."""
    model = build("llama-tied")
    return shrunk_config(model.config, describe(model), {"mlp": {0: 24, 1: 20}})


def is_patched():
    return hasattr(transformers.PreTrainedModel.__init__, "__wrapped__")


def test_transformers_alone_does_not_build_differing_layers():
    model_config = differing_config()
    transformers.LlamaForCausalLM(model_config)

    disable_heterogeneous()
    try:
        with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
            transformers.LlamaForCausalLM(model_config)
    finally:
        enable_heterogeneous()

    transformers.LlamaForCausalLM(model_config)


def test_pruning_and_saving_work_without_the_patch(unpatched, tmp_path):
    pruner = StructPruner(config(widths={"mlp": 24}, skip_layers=(0,)))
    small = pruner.prune_model(build("qwen2"), tokenizer())
    pruner.save(small, tmp_path / "out")

    assert (tmp_path / "out" / "modeling_structprune.py").is_file()
    assert not is_patched()


def test_the_patch_is_not_applied_where_transformers_builds_differing_layers(unpatched, monkeypatch):
    monkeypatch.setattr(transformers.integrations.heterogeneity, "apply_heterogeneous_modeling", 1, raising=False)
    enable_heterogeneous()
    assert not is_patched()

    # Undo the change before the fixture applies the patch again.
    monkeypatch.undo()


def test_the_files_of_a_saved_model_do_not_need_the_package(saved):
    folder = saved[0] / "out"
    fields = json.loads((folder / "config.json").read_text())
    assert fields["per_layer_config"]
    assert fields["auto_map"]["AutoModel"] == "modeling_structprune.LlamaModel"
    assert "optimum_structprune" not in (folder / "modeling_structprune.py").read_text()


def test_a_model_with_differing_layers_is_pruned_again(saved):
    _, model, pruner = saved
    original_widths = widths_of(model)
    assert pruner.result.report.widths == original_widths
    assert 0.29 < pruner.result.report.sparsity < 0.31

    settings = config(sparsity=0.3, targets=("mlp", "attention"), allocation="sensitivity", round_to=1)
    pruner = StructPruner(settings)
    widths = widths_of(pruner.prune_model(model, tokenizer()))
    for name, by_layer in original_widths.items():
        for layer, width in by_layer.items():
            assert widths[name][layer] <= width
    assert pruner.result.report.sparsity == pytest.approx(0.3, abs=0.02)


def test_a_model_with_differing_layers_becomes_uniform(saved):
    model = saved[1]
    smallest = min(widths_of(model)["mlp"].values())
    uniform = prune_model(model, config(widths={"mlp": smallest, "attention": 1}), tokenizer())
    assert not uniform.config.is_heterogeneous
    assert uniform.config.intermediate_size == smallest


def test_differing_layers_lose_the_same_share_of_their_units(saved):
    model = saved[1]
    original_widths = widths_of(model)["mlp"]
    pruned = prune_model(model, config(sparsity=0.3, round_to=1, targets=("mlp",)), tokenizer())
    shares = [width / original_widths[layer] for layer, width in widths_of(pruned)["mlp"].items()]
    assert max(shares) - min(shares) < 0.05


def is_heterogeneous(model):
    return getattr(model.config, "is_heterogeneous", False)


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "phi3", "gpt2-inner"])
def test_a_model_is_resized_to_the_widths_of_a_state_dict(case):
    widths = {"mlp": 24}
    if case != "gpt2-inner":
        widths["attention"] = 2
    skipped = (0,) if case == "llama-tied" else ()
    small = prune_model(build(case), config(widths=widths, skip_layers=skipped), tokenizer())

    for source, target in ((small, build(case, seed=5)), (build(case), small)):
        resize_(target, describe(target), source.state_dict())
        target.load_state_dict(source.state_dict())
        assert torch.equal(logits(target), logits(source))
        assert is_heterogeneous(target) == is_heterogeneous(source)


def test_differing_widths_in_a_state_dict_are_refused_where_layers_cannot_differ():
    model = build("phi3")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    state = model.state_dict()
    state[name] = state[name][: len(state[name]) // 2]
    with pytest.raises(StructPruneError, match="2 units of 'attention' in one layer and 4 in another.*forward"):
        resize_(model, describe(model), state)
