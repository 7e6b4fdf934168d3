"""What is wrong with a recovery, found before any text is read or any weight is touched."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.broad import texts_of
from ..domains.sources import documents
from ..errors import StructPruneError
from ..system.disk import check_folder
from ..system.offloading import is_offloaded
from .adapter import adapter_config, check_fits, lora_config
from .sharding import check_deepspeed, check_sharding
from .text import text_config
from .trainer import training_arguments


def check_recovery(
    config: RecoveryConfig,
    pruning: StructPruneConfig,
    model: PreTrainedModel | None = None,
    parts: int | None = None,
) -> None:
    """Refuse a recovery that would fail later."""
    check_deepspeed(config)
    if parts is None:
        parts = pruning.rounds if config.every_round else 1
    text = text_config(config, pruning, parts)
    for domain in texts_of(text):
        # Names that lead nowhere are found when the source is opened; nothing is read before the first document.
        documents(domain, text.seed, None, lambda name, seed: iter(()))
    lora_config(config)
    if model is not None and (adapter := adapter_config(config, model, pruning.arch_file)) is not None:
        check_fits(model, adapter, config.merge)
    device = model.device.type if model is not None else "cuda" if torch.cuda.is_available() else "cpu"
    arguments = training_arguments(config, text.seed, device == "cpu", tempfile.gettempdir(), parts=parts)
    check_sharding(arguments, device)
    if "output_dir" in config.training:
        check_folder(str(arguments.output_dir))
    if config.teacher_logits is not None:
        check_folder(Path(config.teacher_logits).parent)
    if model is not None:
        _check_model(model, text.seq_length)
        if config.train == "full" and model.dtype == torch.float16:
            raise StructPruneError(
                f"train='full' moves the weights of {type(model).__name__} in their own float16, which is too coarse "
                "for an optimizer; load the model in float32, or train='lora'."
            )


def _check_model(model: PreTrainedModel, seq_length: int) -> None:
    if model.config.is_encoder_decoder or not model.can_generate():
        raise StructPruneError(
            f"Recovery trains causal language models, and {type(model).__name__} is none; leave recovery out."
        )
    if is_offloaded(model):
        raise StructPruneError(
            f"Recovery trains weights in memory, and {type(model).__name__} is offloaded; leave recovery out, save, "
            "and recover the smaller model."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and seq_length > longest:
        raise StructPruneError(
            f"The recovery's seq_length={seq_length} is longer than the model's {longest} positions."
        )
