"""Forward passes of any type of model over token ids or images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..system.offloading import check_reachable
from .hooks import in_fast_dtype
from .meta import beside_text, positions_of, random_image, reads_images
from .modules import blocks


if TYPE_CHECKING:
    from peft import PeftModel  # its import takes as long as the import of torch


def input_device(model: Any) -> torch.device:
    """Return the device of a model's inputs: the CPU where accelerate has put weights on the meta device."""
    device = torch.device(model.device)
    if device.type == "meta":
        return torch.device("cpu")
    return device


def on_device(inputs: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return the inputs of a model with their tensors on a device."""
    moved = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
    return moved


def run_model(model: Any, ids: Tensor, **options: Any) -> Any:
    """Run a forward pass and return its outputs.

    An encoder-decoder model reads `ids` as the input of its encoder and of its decoder. A model with two towers runs
    the text tower. Other required inputs are random.

    Args:
        model: The model.
        ids: Token ids, shape `(batch, seq_length)`, or pixels, shape `(batch, channels, height, width)`.
        options: Further arguments of the model. With `labels`, an encoder-decoder model makes the input of its decoder
            from them.
    """
    config = model.config
    is_text = not ids.is_floating_point()
    ids = ids.to(input_device(model))
    if not is_text:
        ids = ids.to(model.dtype)

    if config.is_encoder_decoder:
        if "labels" not in options:
            options["decoder_input_ids"] = ids
        options["use_cache"] = False
    elif hasattr(config.get_text_config(), "use_cache"):
        options["use_cache"] = False

    with in_fast_dtype(blocks(model)):
        if hasattr(model, "get_text_features"):
            return model.get_text_features(ids)

        extra_inputs: dict[str, Any] = {}
        if is_text:
            extra_inputs = beside_text(model, ids)
        if not extra_inputs:
            return model(ids, **options)

        options.update(extra_inputs)
        if not config.is_encoder_decoder:
            options["input_ids"] = ids
        return model(**options)


def last_states(model: Any, ids: Tensor) -> Tensor:
    """Return the last hidden states of a batch.

    An encoder-decoder model reads `ids` as the input of its encoder and of its decoder.

    Args:
        model: The model.
        ids: Token ids, shape `(batch, tokens)`, or pixels, shape `(batch, channels, height, width)`.

    Returns:
        The hidden states of shape `(batch, tokens, channels)`.
    """
    if not model.config.is_encoder_decoder:
        return run_model(model.base_model, ids)[0]

    # The output of T5's classes is logits, and they have no base model inside them.
    encoder = model.get_encoder()
    decoder = model.get_decoder()
    while decoder.get_decoder() is not decoder:  # Florence-2 returns the whole language model
        decoder = decoder.get_decoder()

    ids = ids.to(input_device(model))
    with in_fast_dtype(blocks(model)):
        states = encoder(input_ids=ids)[0]
        return decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False)[0]


def random_inputs(model: PreTrainedModel, length: int = 16) -> Tensor:
    """Return a random image, or random tokens with a token at the end that ends a sequence.

    Args:
        model: The model that reads the inputs.
        length: The number of tokens; fewer if the model has fewer positions.

    Returns:
        Pixels of shape `(1, channels, height, width)`, or token ids of shape `(1, length)`; of shape `(1, 1, length)`
        for a head that chooses among sequences.
    """
    config = model.config
    if reads_images(model):
        return random_image(config).to(model.dtype)

    text = config.get_text_config()
    length = int(min(length, positions_of(model)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (1, length), generator=generator)

    # Some heads for classification look for the end of the sequence.
    eos_id = getattr(text, "eos_token_id", None)
    if isinstance(eos_id, int) and 0 <= eos_id < text.vocab_size:
        ids[0, -1] = eos_id

    if type(model).__name__.endswith("ForMultipleChoice"):
        return ids[None]
    return ids


@contextmanager
def evaluating(*models: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Put models in eval mode inside `with`, and restore the mode of every module afterwards.

    A module that was replaced inside `with` gets the mode of the module before it. A module with a new name gets the
    mode of the model.

    Raises:
        StructPruneError: If a model has no weights.
    """
    modes_by_model = []
    for model in models:
        modes_by_model.append({name: module.training for name, module in model.named_modules()})

    try:
        for model in models:
            if any(parameter.is_meta for parameter in model.parameters()):
                check_reachable(model)
            model.eval()

        yield
    finally:
        for model, modes in zip(models, modes_by_model, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, modes[""])


@contextmanager
def without_dropout(model: nn.Module, *inner_models: nn.Module) -> Iterator[None]:
    """Compute a training step as in eval mode inside `with`: without dropout, skipped layers and batch statistics.

    Adapters of PEFT keep their own dropout, and activation checkpointing goes on. A backward pass may compute layers
    again, so the modules inside stay in eval mode until the next `model.train()`.

    Args:
        model: A model in train mode, with its wrappers.
        inner_models: Modules inside that are in train mode again after `with`, because Trainers read their mode.
    """
    # A model that switches its mode itself may also replace its kernels by kernels without a backward pass.
    for module in model.modules():
        module.training = False

    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "adapter_layer_names"):
                for name, part in module.named_children():
                    part.train(name != "base_layer")
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                stack.enter_context(_checkpointed_in_eval_mode(module))
        try:
            yield
        finally:
            for module in (model, *inner_models):
                module.training = True


@contextmanager
def _checkpointed_in_eval_mode(layer: Any) -> Iterator[None]:
    """Checkpoint the activations of a layer, which needs train mode, and compute the layer in eval mode."""
    checkpoint = layer._gradient_checkpointing_func

    def checkpoint_in_eval_mode(function: Callable[..., Any], *args: Any) -> Any:
        def compute(*inputs: Any) -> Any:
            layer.training = False
            try:
                return function(*inputs)
            finally:
                layer.training = True

        return checkpoint(compute, *args)

    layer.training = True
    layer._gradient_checkpointing_func = checkpoint_in_eval_mode
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint


def outputs_of(output: Any) -> Tensor:
    """Return the main tensor of a model's output: the logits, or else the last hidden states."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return output[0]
    return logits


@torch.no_grad()
def outputs_for(model: PreTrainedModel, inputs: Tensor | None = None) -> Tensor:
    """Return the outputs of a model for inputs, by default `random_inputs`.

    The shape is `(1, tokens, vocab)` for logits, and `(1, tokens, channels)` for hidden states.
    """
    if inputs is None:
        inputs = random_inputs(model)
    with evaluating(model):
        return outputs_of(run_model(model, inputs))
