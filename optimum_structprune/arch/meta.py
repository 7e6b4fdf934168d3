"""Models without weights, models with adapters or quantized weights, and the inputs that a model reads."""

from __future__ import annotations

import sys
from copy import deepcopy
from inspect import unwrap
from math import inf
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import set_zero3_state

from ..system.errors import StructPruneError, one_line
from ..system.offloading import check_reachable
from ..system.placement import check_devices
from .family import family_of
from .modules import TASK, embedding_of, module_files
from .per_layer import heterogeneous
from .shrink import shrunk_config
from .spec import ArchSpec, Space, Widths
from .token_space import first_position


# The height and width of an image for a model whose config has no size.
IMAGE_SIZE = 224


def model_class(config: PretrainedConfig, arch_file: str | Path | None = None) -> Any:
    """Return the class that loads a model: a causal language model where its type has one, or else the saved class."""
    saved = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        family = family_of(config.model_type, arch_file)
    except StructPruneError:
        return saved or AutoModelForCausalLM

    if not family.causal or family.text is not None:
        return saved or AutoModel
    if saved is not None and not saved.can_generate():
        return saved

    # The modules of sentence-transformers read hidden states, except the modules of a reranker that reads logits.
    files = module_files(config)
    reads_logits = '"text-generation"' in files.get(TASK, "")
    if files and not reads_logits:
        return AutoModel
    return AutoModelForCausalLM


def meta_model(
    config: PretrainedConfig,
    arch_file: str | Path | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model of a config on the meta device, which has names and shapes but no memory.

    Args:
        config: The config.
        arch_file: A file that describes further model types.
        dtype: The dtype of the model; by default the dtype in the config.
        trust_remote_code: Whether code that comes with the model is run.

    Raises:
        StructPruneError: If the config describes no model.
    """
    if not isinstance(config, PretrainedConfig):
        raise StructPruneError(
            f"A config is needed, got {type(config).__name__}. Pass `AutoConfig.from_pretrained(folder)`."
        )

    kind = model_class(config, arch_file)
    config = deepcopy(config)

    # Every model class raises its own errors. DeepSpeed's ZeRO-3 would shard weights, which have no memory here.
    try:
        with torch.device("meta"), heterogeneous(), set_zero3_state():
            if hasattr(kind, "from_config"):
                model = kind.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = kind(config)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StructPruneError(
            f"A model of type {config.model_type!r} cannot be built from its config: {reason}"
        ) from error

    model.eval()
    if dtype is not None:
        model.to(dtype)
    return model


def skeleton(model: PreTrainedModel, config: PretrainedConfig, buffers: bool = False) -> PreTrainedModel:
    """Build a model of the same class with another config on the meta device: shapes without memory.

    Args:
        model: The model whose class is used.
        config: The config of the new model.
        buffers: Whether the buffers get their values, on the CPU.
    """
    # transformers leaves the name of the dtype in the config of a model that it has saved.
    if isinstance(config.dtype, str):
        config.dtype = getattr(torch, config.dtype)

    without_memory: Any = torch.device("meta")
    if buffers:
        without_memory = init_empty_weights(include_buffers=False)
    with without_memory, heterogeneous():
        return type(model)(config)


def shrunk_skeleton(model: PreTrainedModel, arch: ArchSpec, widths: Widths) -> PreTrainedModel:
    """Build the skeleton of a model with other widths; see `shrunk_config`."""
    return skeleton(model, shrunk_config(model.config, arch, widths))


def check_plain(model: PreTrainedModel) -> None:
    """Raise if the weights of a model are not its own plain parameters. A quantized model passes.

    This check runs before the model is described, because an adapter changes the names of the parameters.
    """
    check_no_adapter(model)
    name = type(model).__name__
    parameters = list(model.parameters())

    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise StructPruneError(
            f"The weights of this {name} are spread over processes, as by FSDP or tensor parallelism. "
            "Load it whole in every process, or with a device_map."
        )

    if not is_quantized(model):
        for parameter in parameters:
            if is_traceable_wrapper_subclass(parameter):
                raise StructPruneError(
                    f"Weights of this {name} are of the class {type(parameter).__name__}, which quantization uses. "
                    "Prune the model first."
                )

    if any(parameter.is_meta for parameter in parameters):
        check_reachable(model)
    _check_stock(model)


def _check_stock(model: PreTrainedModel) -> None:
    """Raise if a model has modules or shared weights that its class does not build."""
    # Dequantization restores the stock modules.
    if is_quantized(model):
        return

    stock_model = skeleton(model, model.config)
    stock_modules = dict(stock_model.named_modules())
    for name, module in model.named_modules():
        stock_module = stock_modules.get(name)
        # The class of a parametrized module is made for this module alone, so the classes of two models differ.
        if stock_module is not None and is_parametrized(stock_module):
            raise StructPruneError(
                f"{name} of a {type(model).__name__} computes its weight from other tensors, as by weight "
                "normalization. Pruning removes only plain weights, so this type of model cannot be pruned."
            )

        expected_type = type(stock_module)
        if type(module) is not expected_type:
            problem = f"is a {type(module).__name__} in place of a {expected_type.__name__}"
        elif not _has_stock_forward(model, name):
            problem = "has a `forward` of its own"
        else:
            continue

        raise StructPruneError(
            f"{name or 'The model'} {problem}. Pruning rebuilds this {type(model).__name__} from the classes of its "
            "type, which would compute something else. Undo the change, and compile, parametrize or patch the pruned "
            "model."
        )

    _check_shared_weights(model, stock_model)


def _has_stock_forward(model: PreTrainedModel, name: str) -> bool:
    """Return whether a module of a model runs the `forward` of its class, or a wrapper that computes the same."""
    module = model.get_submodule(name)
    kind = type(module)

    # A kernel of the Hub computes the same.
    if getattr(model, "use_kernels", False) and hasattr(kind, "kernel_layer_name"):
        return True

    # Accelerate keeps a `forward` that it has replaced in one of these attributes.
    forward = vars(module).get("forward")
    for attribute in ("_old_forward", "_original_forward"):
        forward = vars(module).get(attribute, forward)

    function = getattr(forward, "__func__", forward)
    if function in (None, kind.forward, unwrap(kind.forward)):
        return True
    wraps_stock = getattr(function, "__wrapped__", None) is kind.forward
    return wraps_stock and module is model and _computes_the_same(model, forward)


@torch.no_grad()
def _computes_the_same(model: PreTrainedModel, forward: Any) -> bool:
    """Return whether a wrapper around the `forward` of a causal language model does not change its logits.

    TRL sets such a wrapper on the models that it trains. The wrapper computes the loss in another way.
    """
    if not predicts_next(model) or any(parameter.is_meta for parameter in model.parameters()):
        return False

    device = embedding_of(model).weight.device
    ids = torch.arange(2, device=device)[None]

    # Dropout would differ between the two passes.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        expected_logits = type(model).forward(model, input_ids=ids, use_cache=False).logits
        logits = getattr(forward(input_ids=ids, use_cache=False), "logits", None)
    finally:
        for module, training in modes.items():
            module.training = training

    if not isinstance(logits, torch.Tensor):
        return False
    return torch.equal(logits.nan_to_num(), expected_logits.nan_to_num())


def _check_shared_weights(model: PreTrainedModel, stock_model: PreTrainedModel) -> None:
    """Raise if two parameters are the same tensor, but not in a stock model of this config."""
    stock_names = {name for name, _ in stock_model.named_parameters()}
    names = {name for name, _ in model.named_parameters()}

    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in stock_names and name not in names:
            raise StructPruneError(
                f"{name} is the same tensor as another one. In a {type(model).__name__} of this config, also when it "
                "is saved and loaded, it is a tensor of its own. Copy the tensor with copy.deepcopy, or for the head "
                "of a language model set config.tie_word_embeddings=True."
            )


def check_changeable(model: Any) -> None:
    """Raise if the weights of a model cannot change: it is compiled, has an adapter, or has inference tensors."""
    check_no_adapter(model)
    check_devices(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise StructPruneError(
            "`model` was made inside torch.inference_mode. To change it, pass `copy.deepcopy(model)`."
        )


def check_no_adapter(model: PreTrainedModel) -> None:
    """Raise if a model is compiled, is a PEFT model, or has an adapter injected into it."""
    if hasattr(model, "_orig_mod"):
        raise StructPruneError("`model` is compiled. Pass `model._orig_mod`, and compile the result.")
    # Each layer would be compiled again for each new width.
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise StructPruneError("`model` is compiled. Pass `copy.deepcopy(model)`, and compile the result.")

    # An adapter needs PEFT, which most runs do not import.
    peft = sys.modules.get("peft")
    if peft is None:
        return

    name = type(model).__name__
    if isinstance(model, peft.PeftModel):
        # Prompts cannot be merged.
        line = "model.merge_and_unload()"
        if model.active_peft_config.is_prompt_learning:
            line = "model.get_base_model()"
        raise StructPruneError(f"{name} has a PEFT adapter. Pass `{line}` instead.")

    if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()):
        raise StructPruneError(
            f"{name} has a PEFT adapter injected into it. Merge it first: `for name, m in [*model.named_modules()]: "
            "hasattr(m, 'get_base_layer') and (m.merge(), model.set_submodule(name, m.get_base_layer()))`"
        )


def is_quantized(model: nn.Module) -> bool:
    """Return whether transformers regards a model as quantized."""
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def is_offloaded(model: nn.Module) -> bool:
    """Return whether accelerate offloads weights of a model between the calls of its modules."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return hooked and any(parameter.is_meta for parameter in model.parameters())


def stays_packed(model: PreTrainedModel, space: Space) -> bool:
    """Return whether units of a space can be removed from a quantized model without unpacking it.

    The units must be rows of plain weights. torchao's packed tensors cannot be saved.
    """
    tensors = model.state_dict(keep_vars=True)
    if any(hasattr(tensor, "__tensor_flatten__") for tensor in tensors.values()):
        return False

    for axis in space.axes:
        weight = tensors.get(axis.param)
        is_plain = type(weight) in (nn.Parameter, torch.Tensor)
        if weight is None or not is_plain or not weight.is_floating_point() or weight.itemsize == 1:
            return False
    return True


def dequantized(model: PreTrainedModel, inplace: bool) -> PreTrainedModel:
    """Unpack the weights of a quantized model; any other model is returned as it is.

    Args:
        model: The model.
        inplace: Whether the model itself is unpacked, and not a copy.

    Raises:
        StructPruneError: If transformers cannot undo the quantization.
    """
    if not is_quantized(model):
        return model

    check_no_adapter(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "an unknown method")
    problem = f"{type(model).__name__} is quantized with {getattr(method, 'value', method)}"
    if quantizer is None:
        raise StructPruneError(f"{problem} and has no quantizer to undo it. Load it without quantization.")

    if not inplace:
        model = deepcopy(model)

    # A GGUF file is unpacked while it is loaded, and only the flag of a quantized model remains.
    if _is_unpacked(model):
        quantizer.remove_quantization_config(model)
        return model

    try:
        return model.dequantize()
    except NotImplementedError as error:
        raise StructPruneError(
            f"{problem}, which transformers cannot undo ({one_line(error)}). Load it without quantization."
        ) from error


def _is_unpacked(model: PreTrainedModel) -> bool:
    """Return whether a model has the modules and shapes of a model that was never quantized."""
    plain_model = skeleton(model, model.config)
    if _module_types(model) != _module_types(plain_model):
        return False
    return _weight_types(model) == _weight_types(plain_model)


def _module_types(model: nn.Module) -> dict[str, type]:
    """Return the class of each module."""
    return {name: type(module) for name, module in model.named_modules()}


def _weight_types(model: nn.Module) -> dict[str, tuple[type, torch.Size, bool]]:
    """Return the class and the shape of each parameter, and whether it is floating-point."""
    types: dict[str, tuple[type, torch.Size, bool]] = {}
    for name, weight in model.named_parameters():
        types[name] = (type(weight), weight.shape, weight.is_floating_point())
    return types


def predicts_next(model: Any) -> bool:
    """Return whether a model predicts the next token of a text."""
    return model.can_generate() and not model.config.is_encoder_decoder and reads_text(model)


def reads_forward(model: PreTrainedModel) -> bool:
    """Return whether a model predicts each token from the earlier tokens alone, as causal language models do."""
    bidirectional = getattr(model.config.get_text_config(), "use_bidirectional_attention", None)
    return predicts_next(model) and bidirectional not in (True, "all")


def predicts_gaps(model: Any) -> bool:
    """Return whether a model that reads text predicts masked tokens, or a text after another text."""
    if not reads_text(model):
        return False

    if model.config.is_encoder_decoder:
        return model.can_generate() and getattr(model.config, "decoder_start_token_id", None) is not None
    return type(model).__name__.endswith("ForMaskedLM")


def reads_text(model: PreTrainedModel) -> bool:
    """Return whether a model, or one of its two towers, reads text alone."""
    return model.main_input_name == "input_ids" or hasattr(model, "get_text_features")


def reads_images(model: Any) -> bool:
    """Return whether a model reads images alone."""
    is_main_input = getattr(model, "main_input_name", "") == "pixel_values"
    return is_main_input and not isinstance(embedding_of(model), nn.Embedding)


def random_image(config: Any, images: int = 1) -> torch.Tensor:
    """Return random images of the size in a config, shape `(images, channels, size, size)`.

    A convolutional network has no size in its config. Its images have the size of ImageNet's.
    """
    size = getattr(config, "image_size", IMAGE_SIZE)
    if not isinstance(size, int):
        size = size[0]
    return _random(images, getattr(config, "num_channels", 3), size, size)


def beside_text(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Return random inputs for a model that needs more than token ids: images, or outputs of its encoder."""
    if reads_text(model):
        return {}

    if not model.config.is_encoder_decoder:
        images = random_image(model.config.vision_config, len(ids))
        return {"pixel_values": images.to(ids.device, model.dtype)}

    states = _random(len(ids), 16, model.get_encoder().config.hidden_size)
    return {"encoder_outputs": BaseModelOutput(states.to(ids.device, model.dtype))}


def _random(*shape: int) -> torch.Tensor:
    """Return a tensor of random numbers from a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def positions_of(model: PreTrainedModel) -> float:
    """Return the largest number of tokens in a row that a model reads, infinity by default."""
    config = model.config.get_text_config()

    # `max_seq_len` is the length of MPT's ALiBi biases.
    for name in ("max_position_embeddings", "max_seq_len"):
        if getattr(config, name, None):
            return getattr(config, name) - first_position(model)
    return inf


def check_positions(model: PreTrainedModel, tokens: int, what: str, num_taken: int = 0) -> None:
    """Raise if a model reads fewer tokens in a row.

    Args:
        model: The model.
        tokens: The number of tokens.
        what: The name of the text in the error.
        num_taken: The number of positions that another text takes.
    """
    num_positions = positions_of(model)
    if tokens + num_taken <= num_positions:
        return

    advice = ""
    if num_taken:
        num_free = max(num_positions - num_taken, 0)
        advice = f" ({num_taken} of them are taken). Pass at most {num_free} tokens"
    raise StructPruneError(f"{what} is longer than the model's {num_positions} positions{advice}.")
