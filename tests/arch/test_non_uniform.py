"""Models whose layers differ in width: pruned ≡ masked, every way to load them, and what people do with them."""

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
from optimum_structprune.errors import StructPruneError
from optimum_structprune.steps.resize import pad_, resize_
from optimum_structprune.system.fingerprint import fingerprint


def differing(model):
    """The description of a model, and a plan that keeps more units in every layer than in the one before."""
    arch = describe(model)
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for name in free_spaces(arch):
        legal = legal_sizes(model.config, arch, name)
        first = arch.of(name)[0].layer
        for space in arch.of(name):
            width = legal[legal.index(KEEP[name]) + space.layer - first] * space.scale
            units = torch.randperm(space.size, generator=generator)[:width].sort().values
            keep[space.layer, space.name] = tuple(units.tolist())
    return arch, Plan(arch.model_type, keep)


def widths_of(model):
    arch = describe(model)
    return {name: {space.layer: space.width for space in arch.of(name)} for name in free_spaces(arch)}


@pytest.mark.parametrize(
    "case", with_long((case for case in PRUNABLE if free_spaces(describe(build(case)))), STRUCTURES)
)
def test_pruned_equals_masked_reloads_and_pads(case, tmp_path):
    model = build(case)
    arch, plan = differing(model)
    assert {type(layer) for layer in layer_list(model, arch)} == {per_layer.layer_class(type(model), model.config)}
    small = without_refit(model, plan)
    assert small.config.is_heterogeneous and widths_of(small) == plan.widths()
    torch.testing.assert_close(logits(small), logits(masked(model, arch, plan)), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(small), logits(model), atol=1e-3), "pruning changed nothing"

    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and fingerprint(again) == fingerprint(small)  # by which a training goes on
    torch.testing.assert_close(logits(again), logits(small), atol=1e-6, rtol=0)
    assert again.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 7)
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules")
    torch.testing.assert_close(logits(remote), logits(small), atol=1e-6, rtol=0)
    for one in (again, remote):
        assert {id(module.config) for module in one.modules() if hasattr(module, "config")} == {id(one.config)}

    pad_(again, describe(again))
    assert not again.config.is_heterogeneous and not hasattr(again.config, "auto_map")
    torch.testing.assert_close(logits(again), logits(small), atol=1e-5, rtol=0)


# What the tests below load in other processes.
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pruner = StructPruner(config(widths={"mlp": [20, 32], "attention": [4, 2]}))
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    pruner.save(model, folder / "out", tokenizer=tokenizer())
    save_file({"logits": logits(model), "ids": token_ids()}, folder / "expected.safetensors")
    return folder, model, pruner


IN_ANOTHER_PROCESS = """
import sys
sys.modules["optimum_structprune"] = None  # makes it unimportable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

@torch.no_grad()
def check(model, name="expected"):
    expected = load_file(f"{name}.safetensors")
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=1e-6, rtol=0)

def check_that_it_does_not_load(name, words):
    try:
        AutoModelForCausalLM.from_pretrained(name)
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError("transformers builds such models by itself: say so in the docs")

check_that_it_does_not_load("out", "ignore_mismatched_sizes")
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
check(model)
model.save_pretrained("again")
cache = Path(sys.modules[type(model).__module__].__file__).parent
for folder in (Path("out"), Path("again"), cache):
    name = "modeling_structprune.py"
    assert (folder / name).read_bytes() == (Path("out") / name).read_bytes(), folder
check(AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True))
base = AutoModel.from_pretrained("out", trust_remote_code=True)
assert base(load_file("expected.safetensors")["ids"]).last_hidden_state.shape == (2, 12, 32)
assert not [name for name, module in sys.modules.items() if module and "optimum_structprune" in name]

del sys.modules["optimum_structprune"]
import optimum_structprune

model = AutoModelForCausalLM.from_pretrained("out")
assert type(model).__module__ == "transformers.models.llama.modeling_llama"
check(model)
check_that_it_does_not_load("own", "per-layer attribute")
check(AutoModelForCausalLM.from_pretrained("own", trust_remote_code=True), "own")
optimum_structprune.enable_heterogeneous("own.yaml")
check(AutoModelForCausalLM.from_pretrained("own"), "own")
"""


@pytest.mark.slow
def test_it_loads_in_another_process_without_the_plugin_and_then_with_it_and_with_a_family_of_ones_own(saved):
    folder = saved[0]
    own = own_family("diffllama", layer_class={"diffllama": "DiffLlamaDecoderLayer"})
    (folder / "own.yaml").write_text(json.dumps([own]))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("diffllama", **GROUPED))
    pruner = StructPruner(config(widths={"mlp": 24}, skip_layers=(0,), arch_file=str(folder / "own.yaml")))
    small = pruner.prune_model(model, tokenizer())
    pruner.save(small, folder / "own")
    save_file({"logits": logits(small), "ids": token_ids()}, folder / "own.safetensors")
    ran([sys.executable, "-c", IN_ANOTHER_PROCESS], cwd=folder)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_import_is_cheap_and_the_environment_has_a_say(value):
    code = (
        "import sys, optimum_structprune\n"
        "assert not {'torch', 'transformers', 'yaml'} & set(sys.modules), sorted(sys.modules)\n"
        "waiting = [type(finder).__module__ for finder in sys.meta_path]\n"
        f"assert ('optimum_structprune.arch.per_layer' in waiting) == {value}\n"
    )
    env = {"OPTIMUM_STRUCTPRUNE_PATCH": value, "PYTHONPATH": ":".join(sys.path)}
    ran([sys.executable, "-c", code], env=env)


def test_the_patch_comes_off(saved, monkeypatch):
    from transformers import LlamaForCausalLM

    model = build("llama-tied")
    fields = shrunk_config(model.config, describe(model), {"mlp": {0: 24, 1: 20}})
    LlamaForCausalLM(fields)
    disable_heterogeneous()
    try:
        with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
            LlamaForCausalLM(fields)
        # Pruning and saving do without it.
        pruner = StructPruner(config(widths={"mlp": 24}, skip_layers=(0,)))
        pruner.save(pruner.prune_model(build("qwen2"), tokenizer()), saved[0] / "off")
        assert (saved[0] / "off" / "modeling_structprune.py").is_file()
        assert not hasattr(transformers.PreTrainedModel.__init__, "__wrapped__")
        monkeypatch.setattr(transformers.integrations.heterogeneity, "apply_heterogeneous_modeling", 1, raising=False)
        enable_heterogeneous()
        assert not hasattr(transformers.PreTrainedModel.__init__, "__wrapped__"), "transformers does it by itself"
        monkeypatch.undo()
    finally:
        enable_heterogeneous()
    LlamaForCausalLM(fields)


def test_it_can_be_pruned_again(saved):
    folder, model, pruner = saved
    fields = json.loads((folder / "out" / "config.json").read_text())
    assert fields["per_layer_config"] and fields["auto_map"]["AutoModel"] == "modeling_structprune.LlamaModel"
    assert "optimum_structprune" not in (folder / "out" / "modeling_structprune.py").read_text()
    before = widths_of(model)
    assert pruner.report.widths == before and 0.29 < pruner.report.sparsity < 0.31
    pruner = StructPruner(config(sparsity=0.3, targets=("mlp", "attention"), allocation="sensitivity", round_to=1))
    after = widths_of(pruner.prune_model(model, tokenizer()))
    assert all(after[name][layer] <= width for name in before for layer, width in before[name].items())
    assert pruner.report.sparsity == pytest.approx(0.3, abs=0.02)
    least = min(before["mlp"].values())
    uniform = prune_model(model, config(widths={"mlp": least, "attention": 1}), tokenizer())
    assert not uniform.config.is_heterogeneous and uniform.config.intermediate_size == least
    even = prune_model(model, config(sparsity=0.3, round_to=1, targets=("mlp",)), tokenizer())
    shares = [width / before["mlp"][layer] for layer, width in widths_of(even)["mlp"].items()]
    assert max(shares) - min(shares) < 0.05


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "phi3", "gpt2-inner"])
def test_a_model_takes_the_widths_of_a_state_dict(case):
    widths = {"mlp": 24} if case == "gpt2-inner" else {"mlp": 24, "attention": 2}
    skipped = (0,) if case == "llama-tied" else ()
    small = prune_model(build(case), config(widths=widths, skip_layers=skipped), tokenizer())
    model = build(case, seed=5)
    for source, target in ((small, model), (build(case), small)):
        resize_(target, describe(target), source.state_dict())
        target.load_state_dict(source.state_dict())
        assert torch.equal(logits(target), logits(source))
        assert getattr(target.config, "is_heterogeneous", False) == getattr(source.config, "is_heterogeneous", False)
    if case == "phi3":  # whose layers cannot differ in this width
        few, name = build(case), "model.layers.0.self_attn.qkv_proj.weight"
        state = few.state_dict()
        with pytest.raises(StructPruneError, match="2 units of 'attention' in one layer and 4 in another.*forward"):
            resize_(few, describe(few), {**state, name: state[name][: len(state[name]) // 2]})
