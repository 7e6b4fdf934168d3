"""Models that are not plain: quantized ones are unpacked or refused, adapters are refused with the line that helps."""

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
    dense = logits(model)
    pruner = StructPruner(config(widths={"mlp": 40, "attention": 1}))
    small = pruner.prune_model(model, reader, inplace=inplace)
    pruner.save(small, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.intermediate_size == 40 and not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(logits(again), logits(small))
    if inplace:
        assert small is model
    else:
        assert model.hf_quantizer is not None and torch.equal(logits(model), dense)


@pytest.mark.parametrize("case", ["apertus", "llama-tied"])
def test_a_model_that_has_been_saved_is_pruned_as_before(case, tmp_path):
    """transformers leaves the dtype as text in its config, which activations of some types do not take."""
    model, pruner = build(case), StructPruner(config())
    expected = pruner.prune_model(model, tokenizer())
    pruner.save(expected, tmp_path / "small")
    model.save_pretrained(tmp_path / "dense")
    assert model.config.dtype == "float32"
    assert torch.equal(logits(prune_model(model, config(), tokenizer())), logits(expected))
    assert prune_model(expected, config(widths={"mlp": 16}), tokenizer()).config.intermediate_size == 16


def test_what_transformers_cannot_undo_is_refused_with_the_reason():
    model = quantized(Quantizer())
    with pytest.raises(StructPruneError, match="with gptq, which transformers cannot undo.*no implementation"):
        prune_model(model, config(), tokenizer(), inplace=True)
    assert model.is_quantized and type(model.model.layers[0].mlp.up_proj) is Packed
    model.hf_quantizer = None
    with pytest.raises(StructPruneError, match="has no quantizer to undo it; load it without quantization"):
        prune_model(model, config(), tokenizer())


def test_a_peft_model_is_refused_with_the_line_that_helps():
    plain = build("llama-tied")
    model = get_peft_model(deepcopy(plain), LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    blind = config(domains=[DomainConfig("a", unread())])
    with pytest.raises(StructPruneError, match="PeftModel carries a PEFT adapter; pass `(.*)` instead") as refused:
        prune_model(model, blind, tokenizer())
    line = re.search("`(.*)`", str(refused.value))[1]
    expected = logits(model)
    merged = eval(line, {"model": model})
    torch.testing.assert_close(logits(merged), expected)
    assert prune_model(merged, config(), tokenizer()).config.intermediate_size == 24
    injected = build("llama-tied")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), injected)
    expected = logits(injected)
    with pytest.raises(StructPruneError, match="has a PEFT adapter injected into it; merge it first") as refused:
        prune_model(injected, config(), tokenizer())
    exec(re.search("`(.*)`", str(refused.value))[1], {"model": injected})
    assert not any(isinstance(module, BaseTunerLayer) for module in injected.modules())
    torch.testing.assert_close(logits(injected), expected)
    prompts = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(StructPruneError, match=r"pass `model.get_base_model\(\)` instead"):
        prune_model(prompts, config(), tokenizer())
    assert prompts.get_base_model() is plain and prune_model(plain, config(), tokenizer())


def test_those_on_the_meta_device_are_no_weights_and_the_check_does_not_import_peft(monkeypatch):
    with pytest.raises(StructPruneError, match=r"21 parameters of this LlamaForCausalLM have no weights.*and 18 more"):
        check_plain(build("llama-untied").to("meta"))
    monkeypatch.delitem(sys.modules, "peft")
    check_plain(build("llama-tied"))
    check_no_adapter(build("llama-tied"))
    assert "peft" not in sys.modules


@pytest.mark.parametrize(("module", "spoilt", "message"), [
    ("1.mlp.down_proj", nn.Identity(), r"model.layers.1.mlp.down_proj is a Identity in place of a Linear"),
    ("1.mlp.down_proj", nn.Linear(39, 32, bias=False), r"down_proj.weight: dimension 1 is 39, but 40 units of 1 make"),
    ("0.self_attn.k_proj", nn.Linear(32, 20, bias=False), r"k_proj.weight: dimension 0 is 20, but 4 units of 4 make"),
])  # fmt: skip
def test_a_model_that_half_matches_its_family_is_refused(module, spoilt, message):
    model = build("llama-tied")
    model.set_submodule(f"model.layers.{module}", spoilt)
    with pytest.raises(StructPruneError, match=message) as refused:
        StructPruner(config()).prune_model(model, tokenizer(), inplace=True)
    assert not isinstance(refused.value, InPlaceError)


def with_forward_of_mine(model, name):
    module = model.get_submodule(name)
    module.forward = MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), module)


def with_class_of_mine(model, name):
    module = model.get_submodule(name)
    module.__class__ = type("Mine", (type(module),), {})


def compiled(model, name):
    model.set_submodule(name, torch.compile(model.get_submodule(name)))


def parametrized(model, name):
    module = model.get_submodule(name)
    parametrize.register_parametrization(module, next(iter(module.named_parameters(recurse=False)))[0], nn.Identity())


LAYERS = {"llama-tied": "model.layers.1.", "gpt2-tied": "transformer.h.0.", "mixtral": "model.layers.0."}
MODULES = [(case, name) for case in LAYERS for name, _ in build(case).named_modules()]
PARTS = [(case, name) for case, name in MODULES if f"{name}.".startswith(LAYERS[case])]


@pytest.mark.parametrize("change", [with_forward_of_mine, with_class_of_mine, compiled, parametrized])
@pytest.mark.parametrize(("case", "name"), with_long(PARTS, ["mixtral"]))
def test_a_module_of_a_layer_that_is_not_the_stock_one_is_refused(case, name, change):
    model, text = build(case), iter(documents())
    if change is parametrized and not list(model.get_submodule(name).parameters(recurse=False)):
        return
    change(model, name)
    before, settings = deepcopy(model.state_dict()), config(domains=[DomainConfig("a", text)])
    with pytest.raises(StructPruneError, match=f"^{re.escape(name)} (is a|has a `forward`)") as refused:
        prune_model(model, settings, tokenizer(), inplace=True)
    assert not isinstance(refused.value, InPlaceError) and next(text) == documents()[0]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_model_with_a_forward_of_its_own_or_of_mixed_precision_is_refused(tmp_path):
    model, settings = build("llama-tied"), config(domains=[DomainConfig("a", unread())])
    with_forward_of_mine(model, "")
    with pytest.raises(StructPruneError, match="^The model has a `forward` of its own"):
        prune_model(model, settings, tokenizer())
    accelerator = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, bf16=True)).accelerator
    model = accelerator.prepare(build("llama-tied"))
    with pytest.raises(
        StructPruneError, match="^`model` computes in mixed precision.*Pass `(.*)`. With a Tr"
    ) as refused:
        prune_model(model, settings, tokenizer())
    plain = eval(re.search("Pass `(.*?)`", str(refused.value))[1], {"accelerator": accelerator, "model": model})
    assert same_weights(*(prune_model(of, config(), tokenizer()) for of in (plain, build("llama-tied"))))


def with_wrapper(model, name, change):
    """Wrap the `forward` of a module as TRL does, and change what it returns."""
    module = model.get_submodule(name)

    @wraps(type(module).forward)
    def forward(self, *args, **kwargs):
        return change(type(self).forward(self, *args, **kwargs))

    module.forward = MethodType(forward, module)
    return model


def with_half_logits(output):
    output.logits = output.logits / 2
    return output


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "mixtral"])
def test_a_wrapper_around_forward_is_accepted_where_the_logits_are_the_same(case):
    model = with_wrapper(build(case), "", lambda output: output).train()
    check_plain(model)
    assert all(module.training for module in model.modules())

    settings = config(widths={"mlp": 24})
    pruned = prune_model(model, settings, tokenizer())
    assert same_weights(pruned, prune_model(build(case), settings, tokenizer()))


@pytest.mark.parametrize("case", ["llama-tied", "gpt2-tied", "t5", "bert"])
def test_a_wrapper_around_forward_is_refused_where_it_computes_otherwise(case):
    changes = {"llama-tied": with_half_logits, "gpt2-tied": lambda output: output.logits}
    model = with_wrapper(build(case), "", changes.get(case, lambda output: output))
    with pytest.raises(StructPruneError, match="^The model has a `forward` of its own"):
        check_plain(model)


def test_a_wrapper_inside_a_layer_is_refused():
    model = with_wrapper(build("llama-tied"), "model.layers.1.mlp", lambda output: output)
    with pytest.raises(StructPruneError, match="^model.layers.1.mlp has a `forward` of its own"):
        check_plain(model)


@pytest.mark.parametrize(("one", "other"), [
    ("lm_head", "model.embed_tokens"), ("model.layers.1", "model.layers.0"),
    ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"),
])  # fmt: skip
def test_weights_that_only_this_model_shares_are_refused(one, other):
    model = build("llama-untied")
    if one == "model.layers.1":
        model.set_submodule(one, model.get_submodule(other))
    else:
        model.get_submodule(one).weight = model.get_submodule(other).weight
    with pytest.raises(StructPruneError, match=rf"^{one}.* is the same tensor as another one.*copy.deepcopy, or"):
        prune_model(model, config(domains=[DomainConfig("a", unread())]), tokenizer())
    if one == "lm_head":
        model.config.tie_word_embeddings = True
        prune_model(model, config(), tokenizer())


def test_weights_of_a_class_that_packs_them_are_refused():
    model = build("llama-tied")
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(TwoTensor(projection.weight.data, projection.weight.data))  # as torchao's are
    with pytest.raises(StructPruneError, match="class TwoTensor, which quantization uses; prune the model first"):
        check_plain(model)


def test_hooks_of_accelerate_present_or_gone_and_kernels_of_the_hub_are_no_forward_of_ones_own(monkeypatch):
    model = build("llama-tied")
    for module in model.model.layers[0].modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    check_plain(model)
    remove_hook_from_submodules(model)
    assert "forward" in vars(model.model.layers[0])
    check_plain(model)
    norm = model.model.norm
    monkeypatch.setattr(type(norm), "kernel_layer_name", "RMSNorm", raising=False)
    norm.forward = MethodType(lambda self, hidden: type(self).forward(self, hidden), norm)
    with pytest.raises(StructPruneError, match=r"model.norm has a `forward` of its own"):
        check_plain(model)
    model._use_kernels = True
    check_plain(model)
