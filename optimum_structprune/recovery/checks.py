"""The checks of a recovery, which run before any text is read or any weight changes."""

from __future__ import annotations

import tempfile

import torch
from transformers import PreTrainedModel

from ..arch.meta import positions_of, predicts_next
from ..config.domains import DomainConfig
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.resolve import texts_of
from ..domains.sources import documents
from ..errors import StructPruneError
from ..system.disk import check_folder
from ..system.offloading import is_offloaded
from ..system.processes import check_launch
from .adapter import check_fits, lora_config
from .answers import read_prompts
from .sharding import check_sharding
from .text import LEFT_OUT, text_config
from .trainer import training_arguments


def check_recovery(config: RecoveryConfig, pruning: StructPruneConfig, model: PreTrainedModel) -> None:
    """Refuse a recovery that would fail later."""
    check_launch()
    if config.training.get("deepspeed"):  # before transformers sets up anything for it
        raise StructPruneError(
            "training's deepspeed is not supported, because DeepSpeed keeps the trained weights in a form of its own; "
            "leave it out, and every process holds the whole model, or on GPUs set fsdp=True, which shards weights, "
            "gradients and the optimizer over them."
        )
    text = text_config(config, pruning)
    _check_model(model, config, text.seq_length)
    if config.prompts is not None:
        read_prompts(config.prompts)
    left_out = [] if config.left_out is None else [DomainConfig(name=LEFT_OUT, source=config.left_out)]
    for domain in [*texts_of(text), *left_out]:
        # Opening a source refuses a name that leads nowhere; nothing is read before the first document.
        documents(domain, text.seed, None, lambda name, seed: iter(()))
    adapter = lora_config(config, model)
    if config.train == "lora":
        check_fits(model, adapter, config.merge)
    device = model.device.type
    if device == "meta":  # it has no weights yet
        device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = training_arguments(config, text.seed, device == "cpu", tempfile.gettempdir())
    check_sharding(arguments, device)
    if "output_dir" in config.training:
        check_folder(str(arguments.output_dir))


def _check_model(model: PreTrainedModel, config: RecoveryConfig, seq_length: int) -> None:
    name = type(model).__name__
    if not predicts_next(model):
        raise StructPruneError(f"Recovery trains causal language models, and {name} is none; leave recovery out.")
    if is_offloaded(model):
        raise StructPruneError(
            f"Recovery trains weights in memory, and {name} is offloaded; leave recovery out, save, and recover the "
            "smaller model."
        )
    if seq_length > (longest := positions_of(model)):
        raise StructPruneError(
            f"The recovery's seq_length={seq_length} is longer than the model's {longest} positions."
        )
    if config.train == "full" and model.dtype == torch.float16:
        raise StructPruneError(
            f"train='full' moves the weights of {name} in their own float16, which is too coarse for an optimizer; "
            "load the model in float32, or train='lora'."
        )
