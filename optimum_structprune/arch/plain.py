"""Models whose weights are not plain parameters: adapters and quantization."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import StructPruneError, one_line
from ..system.offloading import check_reachable
from .meta import skeleton


MERGE_INJECTED = (
    "for name, m in [*model.named_modules()]: "
    "hasattr(m, 'get_base_layer') and (m.merge(), model.set_submodule(name, m.get_base_layer()))"
)


def check_plain(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are not its own parameters. A quantized model passes, see `dequantized`.

    It is to be called before the model is described, because an adapter changes the names of the parameters.
    """
    check_no_adapter(model)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise StructPruneError(
            f"The weights of this {type(model).__name__} are spread over processes, as by FSDP or tensor parallelism; "
            "load it whole in every process, or with a device_map."
        )
    check_reachable(model)


def check_no_adapter(model: PreTrainedModel) -> None:
    """Refuse a PEFT model and a model that an adapter was injected into."""
    # An adapter can only exist where PEFT has been imported, and most runs do without.
    peft = sys.modules.get("peft")
    if peft is None:
        return
    name = type(model).__name__
    if isinstance(model, peft.PeftModel):
        prompts = model.active_peft_config.is_prompt_learning
        line = "model.get_base_model()" if prompts else "model.merge_and_unload()"
        raise StructPruneError(f"{name} carries a PEFT adapter; prune `{line}` instead.")
    if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()):
        raise StructPruneError(f"{name} has a PEFT adapter injected into it; merge it first: `{MERGE_INJECTED}`")


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether transformers regards the model as quantized."""
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def dequantized(model: PreTrainedModel, inplace: bool) -> PreTrainedModel:
    """A quantized model with its weights unpacked; any other model as it is."""
    if not is_quantized(model):
        return model
    check_no_adapter(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "an unknown method")
    problem = f"{type(model).__name__} is quantized with {getattr(method, 'value', method)}"
    if quantizer is None:
        raise StructPruneError(f"{problem} and has no quantizer to undo it; load it without quantization.")
    plain = model if inplace else deepcopy(model)
    if _unpacked(plain):
        # A GGUF file is unpacked while it is loaded; all that remains is the flag of a quantized model.
        quantizer.remove_quantization_config(plain)
        return plain
    try:
        return plain.dequantize()
    except NotImplementedError as error:
        raise StructPruneError(
            f"{problem}, which transformers cannot undo ({one_line(error)}); load it without quantization."
        ) from error


def _unpacked(model: PreTrainedModel) -> bool:
    """Whether the model is made of the same modules and shapes as one that was never quantized."""
    dense = skeleton(model, model.config)
    parameters = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in model.named_parameters()}
    return (
        {name: type(module) for name, module in model.named_modules()}
        == {name: type(module) for name, module in dense.named_modules()}
        and parameters == {name: (tensor.shape, True) for name, tensor in dense.named_parameters()}
        and all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    )
