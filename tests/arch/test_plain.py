"""The package refuses models that it cannot read from their weights alone, with a message that says what to do.

These are models with adapters, with changed modules, or with quantization that transformers cannot undo.
"""

import re
import sys
from copy import deepcopy
from functools import wraps
from types import MethodType

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from helpers import logits, same_weights, unread, with_long
from models import build, config, documents, real_text_model, tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from quantized import Packed, Quantizer, quantized
from torch import nn
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_structprune import DomainConfig, InPlaceError, StructPruneError, StructPruner, export_gguf, prune_model
from optimum_structprune.arch.meta import check_no_adapter, check_plain


@pytest.mark.parametrize("inplace", [False, True])
def test_a_quantized_model_that_transformers_can_unpack_is_pruned_and_saved(tmp_path, inplace):
    plain, reader = real_text_model()
    export_gguf(plain.half(), tmp_path / "tiny.gguf", reader)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert model.hf_quantizer is not None
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "refused")

    original_logits = logits(model)
    pruner = StructPruner(config(widths={"mlp": 40, "attention": 1}))
    small = pruner.prune_model(model, reader, inplace=inplace)
    pruner.save(small, tmp_path / "out")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.intermediate_size == 40
    assert not hasattr(reloaded.config, "quantization_config")
    torch.testing.assert_close(logits(reloaded), logits(small))

    if inplace:
        assert small is model
    else:
        assert model.hf_quantizer is not None
        assert torch.equal(logits(model), original_logits)


@pytest.mark.parametrize("case", ["apertus", "llama-tied"])
def test_a_model_is_pruned_after_it_was_saved(case, tmp_path):
    """transformers leaves the dtype as text in the config of a saved model, and some activations refuse a text."""
    model = build(case)
    pruner = StructPruner(config())
    expected = pruner.prune_model(model, tokenizer())

    pruner.save(expected, tmp_path / "small")
    model.save_pretrained(tmp_path / "dense")
    assert model.config.dtype == "float32"

    pruned = prune_model(model, config(), tokenizer())
    assert torch.equal(logits(pruned), logits(expected))
    smaller = prune_model(expected, config(widths={"mlp": 16}), tokenizer())
    assert smaller.config.intermediate_size == 16


def test_a_quantized_model_that_transformers_cannot_unpack_is_refused():
    model = quantized(Quantizer())
    with pytest.raises(StructPruneError, match="with gptq, which transformers cannot undo.*no implementation"):
        prune_model(model, config(), tokenizer(), inplace=True)
    assert model.is_quantized
    assert type(model.model.layers[0].mlp.up_proj) is Packed

    model.hf_quantizer = None
    with pytest.raises(StructPruneError, match="has no quantizer to undo it. Load it without quantization"):
        prune_model(model, config(), tokenizer())


def code_in(error):
    """Return the code that a message proposes."""
    return re.search("`(.*?)`", str(error.value))[1]


def test_the_message_for_a_peft_model_has_the_code_that_merges_it():
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(build("llama-tied"), lora)
    expected = logits(model)

    unread_text = config(domains=[DomainConfig("a", unread())])
    with pytest.raises(StructPruneError, match="PeftModel has a PEFT adapter. Pass `(.*)` instead") as error:
        prune_model(model, unread_text, tokenizer())

    merged = eval(code_in(error), {"model": model})
    torch.testing.assert_close(logits(merged), expected)
    assert prune_model(merged, config(), tokenizer()).config.intermediate_size == 24


def test_the_message_for_an_injected_adapter_has_the_code_that_merges_it():
    model = build("llama-tied")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    expected = logits(model)

    with pytest.raises(StructPruneError, match="has a PEFT adapter injected into it. Merge it first") as error:
        prune_model(model, config(), tokenizer())

    exec(code_in(error), {"model": model})
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    torch.testing.assert_close(logits(model), expected)


def test_a_model_with_prompt_tuning_is_refused_and_its_base_model_is_pruned():
    plain = build("llama-tied")
    model = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(StructPruneError, match=r"Pass `model.get_base_model\(\)` instead"):
        prune_model(model, config(), tokenizer())

    assert model.get_base_model() is plain
    assert prune_model(plain, config(), tokenizer())


def test_a_model_on_the_meta_device_is_refused():
    with pytest.raises(StructPruneError, match=r"21 parameters of this LlamaForCausalLM have no weights.*and 18 more"):
        check_plain(build("llama-untied").to("meta"))


def test_the_check_does_not_import_peft(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft")
    check_plain(build("llama-tied"))
    check_no_adapter(build("llama-tied"))
    assert "peft" not in sys.modules


@pytest.mark.parametrize(("module", "replacement", "message"), [
    ("1.mlp.down_proj", nn.Identity(), r"model.layers.1.mlp.down_proj is a Identity in place of a Linear"),
    ("1.mlp.down_proj", nn.Linear(39, 32, bias=False), r"down_proj.weight: dimension 1 is 39, but 40 units of 1 make"),
    ("0.self_attn.k_proj", nn.Linear(32, 20, bias=False), r"k_proj.weight: dimension 0 is 20, but 4 units of 4 make"),
])  # fmt: skip
def test_a_model_that_half_matches_its_family_is_refused(module, replacement, message):
    model = build("llama-tied")
    model.set_submodule(f"model.layers.{module}", replacement)
    with pytest.raises(StructPruneError, match=message) as error:
        StructPruner(config()).prune_model(model, tokenizer(), inplace=True)
    assert not isinstance(error.value, InPlaceError)


def set_own_forward(model, name):
    module = model.get_submodule(name)
    module.forward = MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), module)


def set_own_class(model, name):
    module = model.get_submodule(name)
    module.__class__ = type("Mine", (type(module),), {})


def compile_module(model, name):
    model.set_submodule(name, torch.compile(model.get_submodule(name)))


def parametrize_module(model, name):
    module = model.get_submodule(name)
    parameter, _ = next(module.named_parameters(recurse=False))
    parametrize.register_parametrization(module, parameter, nn.Identity())


def modules_of_one_layer():
    """Return a layer of three models and all modules inside it, as pairs of a case and the name of a module."""
    layers = {"llama-tied": "model.layers.1", "gpt2-tied": "transformer.h.0", "mixtral": "model.layers.0"}
    modules = []
    for case, layer in layers.items():
        for name, _ in build(case).get_submodule(layer).named_modules(prefix=layer):
            modules.append((case, name))
    return modules


@pytest.mark.parametrize("change", [set_own_forward, set_own_class, compile_module, parametrize_module])
@pytest.mark.parametrize(("case", "name"), with_long(modules_of_one_layer(), ["mixtral"]))
def test_a_changed_module_in_a_layer_is_refused(case, name, change):
    model = build(case)
    if change is parametrize_module and not list(model.get_submodule(name).parameters(recurse=False)):
        return

    change(model, name)
    weights_before = deepcopy(model.state_dict())
    text = iter(documents())
    settings = config(domains=[DomainConfig("a", text)])
    with pytest.raises(StructPruneError, match=f"^{re.escape(name)} (is a|has a `forward`)") as error:
        prune_model(model, settings, tokenizer(), inplace=True)

    assert not isinstance(error.value, InPlaceError)
    assert next(text) == documents()[0], "text was read"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights_before[key])


def test_a_model_with_its_own_forward_is_refused():
    model = build("llama-tied")
    set_own_forward(model, "")
    with pytest.raises(StructPruneError, match="^The model has a `forward` of its own"):
        prune_model(model, config(domains=[DomainConfig("a", unread())]), tokenizer())


def test_the_message_for_mixed_precision_has_the_code_that_unwraps_the_model(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    accelerator = Trainer(build("llama-tied"), arguments).accelerator
    model = accelerator.prepare(build("llama-tied"))
    settings = config(domains=[DomainConfig("a", unread())])
    message = "^`model` computes in mixed precision.*Pass `(.*)`. With a Tr"
    with pytest.raises(StructPruneError, match=message) as error:
        prune_model(model, settings, tokenizer())

    code = re.search("Pass `(.*?)`", str(error.value))[1]
    unwrapped = eval(code, {"accelerator": accelerator, "model": model})
    pruned = prune_model(unwrapped, config(), tokenizer())
    expected = prune_model(build("llama-tied"), config(), tokenizer())
    assert same_weights(pruned, expected)


def wrap_forward(model, name, change):
    """Wrap the `forward` of a module as TRL does, and change the output."""
    module = model.get_submodule(name)

    @wraps(type(module).forward)
    def forward(self, *args, **kwargs):
        return change(type(self).forward(self, *args, **kwargs))

    module.forward = MethodType(forward, module)


def halve_logits(output):
    output.logits = output.logits / 2
    return output


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "mixtral"])
def test_a_wrapper_around_forward_is_accepted_if_the_logits_are_the_same(case):
    model = build(case)
    wrap_forward(model, "", lambda output: output)
    model.train()
    check_plain(model)
    assert all(module.training for module in model.modules())

    settings = config(widths={"mlp": 24})
    pruned = prune_model(model, settings, tokenizer())
    expected = prune_model(build(case), settings, tokenizer())
    assert same_weights(pruned, expected)


@pytest.mark.parametrize("case", ["llama-tied", "gpt2-tied", "t5", "bert"])
def test_a_wrapper_around_forward_is_refused_if_it_computes_something_else(case):
    changes = {"llama-tied": halve_logits, "gpt2-tied": lambda output: output.logits}
    model = build(case)
    wrap_forward(model, "", changes.get(case, lambda output: output))
    with pytest.raises(StructPruneError, match="^The model has a `forward` of its own"):
        check_plain(model)


def test_a_wrapper_inside_a_layer_is_refused():
    model = build("llama-tied")
    wrap_forward(model, "model.layers.1.mlp", lambda output: output)
    with pytest.raises(StructPruneError, match="^model.layers.1.mlp has a `forward` of its own"):
        check_plain(model)


@pytest.mark.parametrize(("target", "source"), [
    ("lm_head", "model.embed_tokens"), ("model.layers.1", "model.layers.0"),
    ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"),
])  # fmt: skip
def test_weights_that_are_shared_against_the_config_are_refused(target, source):
    model = build("llama-untied")
    if target == "model.layers.1":
        model.set_submodule(target, model.get_submodule(source))
    else:
        model.get_submodule(target).weight = model.get_submodule(source).weight

    with pytest.raises(StructPruneError, match=rf"^{target}.* is the same tensor as another one.*copy.deepcopy, or"):
        prune_model(model, config(domains=[DomainConfig("a", unread())]), tokenizer())

    if target == "lm_head":
        model.config.tie_word_embeddings = True
        prune_model(model, config(), tokenizer())


def test_weights_of_a_packing_class_are_refused():
    model = build("llama-tied")
    projection = model.model.layers[0].mlp.up_proj
    # torchao packs weights into tensors of such a class.
    projection.weight = nn.Parameter(TwoTensor(projection.weight.data, projection.weight.data))
    with pytest.raises(StructPruneError, match="class TwoTensor, which quantization uses. Prune the model first"):
        check_plain(model)


def test_hooks_of_accelerate_are_accepted():
    model = build("llama-tied")
    for module in model.model.layers[0].modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    check_plain(model)

    remove_hook_from_submodules(model)
    assert "forward" in vars(model.model.layers[0]), "accelerate leaves its `forward` in the module"
    check_plain(model)


def test_kernels_of_the_hub_are_accepted(monkeypatch):
    model = build("llama-tied")
    norm = model.model.norm
    monkeypatch.setattr(type(norm), "kernel_layer_name", "RMSNorm", raising=False)
    norm.forward = MethodType(lambda self, hidden: type(self).forward(self, hidden), norm)
    with pytest.raises(StructPruneError, match=r"model.norm has a `forward` of its own"):
        check_plain(model)

    model._use_kernels = True
    check_plain(model)
