"""Check a recovery before any text is read."""

from __future__ import annotations

import tempfile

import torch
from transformers import PreTrainedModel

from ..arch.meta import check_positions, is_offloaded, predicts_next
from ..config.domains import DomainConfig
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.load import texts_of
from ..domains.sources import documents
from ..domains.templates import read_pairs
from ..system.disk import check_folder
from ..system.errors import StructPruneError
from ..system.processes import check_launch
from .adapter import check_fits, lora_config
from .arguments import TrainingSize, training_arguments
from .encoders import check_encoder
from .prompts import read_prompts
from .text import VALIDATION, sample_length, text_config


MANY_GPUS = "To train a pruned model with it, use `attach_teacher`, see docs/recovery_many_gpus.md"


def check_recovery(config: RecoveryConfig, pruning: StructPruneConfig, model: PreTrainedModel) -> None:
    """Raise `StructPruneError` if a recovery cannot work.

    Args:
        config: How the model is trained.
        pruning: How it was pruned.
        model: The model. It may be on the meta device.
    """
    check_launch()
    for name in ("fsdp", "deepspeed"):  # before transformers initializes them
        if config.training.get(name):
            raise StructPruneError(
                f"`training` has {name}, but every process of a recovery holds the whole model. Remove it. "
                f"{MANY_GPUS}."
            )

    if config.training.get("neftune_noise_alpha"):
        raise StructPruneError(
            "`training` has neftune_noise_alpha, whose hook would stay on the model after an interruption. Remove it."
        )

    seq_length = sample_length(config, model)
    _check_model(model, config, pruning, seq_length)
    text = text_config(config, pruning, seq_length)
    if config.prompts is not None:
        read_prompts(config.prompts)
    if config.pairs is not None:
        read_pairs([config.pairs])

    domains = list(texts_of(text))
    if config.validation is not None:
        domains.append(DomainConfig(name=VALIDATION, source=config.validation))
    for domain in domains:
        # Opening a source raises if its name is wrong. Text is read with the first document.
        documents(domain, text.seed, None, lambda seed: iter(()))

    if predicts_next(model) and config.train != "full":
        check_fits(model, lora_config(config, model))
    size = TrainingSize(text.num_samples, seq_length)
    training_arguments(config, size, text.seed, trains_on_cpu(model), tempfile.gettempdir())
    if "output_dir" in config.training:
        check_folder(config.training["output_dir"])


def trains_on_cpu(model: PreTrainedModel) -> bool:
    """Return whether a model will be trained on the CPU.

    A model without weights will be loaded onto a GPU if there is one.
    """
    return model.device.type == "cpu" or not torch.cuda.is_available()


def _check_model(model: PreTrainedModel, config: RecoveryConfig, pruning: StructPruneConfig, seq_length: int) -> None:
    name = type(model).__name__
    if not predicts_next(model):
        check_encoder(model, config)
    elif config.pairs is not None:
        raise StructPruneError(f"{name} predicts the next token, and `pairs` is for encoders. Remove `pairs`.")

    if is_offloaded(model):
        raise StructPruneError(
            f"Recovery trains weights in memory, and {name} is offloaded. Prune without recovery, save, and recover "
            "the smaller model."
        )

    check_positions(model, seq_length, f"The recovery's seq_length={seq_length}")

    if config.train == "full" and model.dtype == torch.float16:
        raise StructPruneError(
            f"`train`='full' would change the weights of {name} in float16, which is too coarse for an optimizer. "
            "Load the model in float32, or set `train` to 'lora'."
        )
    if pruning.removes_tokens and model.dtype == torch.float16 and trains_on_cpu(model):
        raise StructPruneError(
            f"Recovery trains the embeddings of a trimmed model, and PyTorch cannot train {name} in float16 on a CPU. "
            "Load the model in bfloat16 or float32."
        )
