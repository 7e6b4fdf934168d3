"""The teacher of a recovery: its predictions, and the KL of another model from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import predicts_next
from ..domains.manifest import tokenizer_of
from ..errors import StructPruneError
from ..forward.metrics import HEAD_TOKENS, TOKENS_AT_ONCE, divergence, evaluating, plain_head, random_inputs
from ..method.layers import input_device
from ..system.fingerprint import fingerprint
from ..system.stages import stage
from ..vocabulary.token_alignment import TokenAlignment
from .samples import IGNORED, Sample, by_token, collate, counted_targets, logits_at, model_inputs


def load_teacher(
    teacher: PreTrainedModel | str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """Makes a teacher for a model; from an id or folder, it is loaded as the model is."""
    same = teacher is model
    if isinstance(teacher, (str, Path)):
        try:
            teacher = AutoModelForCausalLM.from_pretrained(
                teacher, dtype=model.dtype, device_map=model.device, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise StructPruneError(f"The teacher {str(teacher)!r} cannot be loaded: {error}") from error
        same = fingerprint(teacher) == fingerprint(model)
    teacher = getattr(teacher, "_orig_mod", teacher)  # of a compiled one
    if not (isinstance(teacher, nn.Module) and hasattr(teacher, "config") and predicts_next(teacher)):
        kind = type(teacher).__name__
        raise StructPruneError(f"teacher takes a causal language model, or its id or folder, got {kind}.")
    if same:
        raise StructPruneError(
            "The teacher is the model that is trained, from which it learns nothing; take the model that was pruned, "
            "or leave the teacher out."
        )
    return Teacher(teacher, *tokens_of_teacher(teacher, model, tokenizer, teacher_tokenizer, trust_remote_code))


def tokens_of_teacher(
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedTokenizerBase | None, TokenAlignment | None]:
    """Gives the tokenizer of a teacher, and the parts of its tokens if the model lacks some.

    A teacher of other tokens is refused, and as many unknown ones are taken for the model's. No weights are needed.
    """
    taught, learnt = (each.config.get_text_config().vocab_size for each in (teacher, model))
    reader = teacher_tokenizer or tokenizer_of(teacher, trust_remote_code)
    if taught == learnt and None in (reader, tokenizer):
        return tokenizer, None
    if reader is None or tokenizer is None:
        raise StructPruneError(
            f"The teacher has a vocabulary of {taught} tokens and the model one of {learnt}, and nothing says which "
            "are the same; save its tokenizer into its folder, or pass it (teacher_tokenizer)."
        )
    parts = TokenAlignment.between(teacher, reader, model, tokenizer)
    return (tokenizer, None) if parts.is_identity() else (reader, parts)


class Teacher:
    """Predicts samples of text in its own tokens, and with `parts` in those of a model that lacks some.

    Where its head makes the logits of its last hidden states alone, these are computed once and kept, and the rest
    of the teacher is needed no more; else it runs each time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        parts: TokenAlignment | None = None,
    ):
        self.model: PreTrainedModel | None = model
        self.tokenizer, self.parts = tokenizer, parts
        few = random_inputs(model)[:, :HEAD_TOKENS].to(input_device(model))
        self.head: Any = model.get_output_embeddings() if plain_head(model, few) else None

    @torch.no_grad()
    def keep_states(self, samples: Sequence[Sample], dtype: torch.dtype | None = None, mixed: bool = False) -> None:
        """Add the `states` to samples in a dtype, by default the teacher's; `mixed` computes them in bfloat16."""
        if self.head is None or self.model is None:
            return
        base: Any = self.model.base_model
        autocast = torch.autocast(self.model.device.type, torch.bfloat16, enabled=mixed)
        with evaluating(self.model), stage("teacher"), autocast:
            for sample in samples:
                batch = {name: value[None] for name, value in sample.items()}
                # The base of some models is a wrapper that does not say what it takes.
                hidden = base(**model_inputs(self.model, batch))[0]
                counts = batch["targets"] != IGNORED
                sample["states"] = hidden[counts.to(hidden.device)].to("cpu", dtype or self.model.dtype)

    @torch.no_grad()
    def logits(self, batch: Sample) -> Tensor:
        """Gives the logits for the tokens of a batch that count, shape `(tokens, vocab)`."""
        batch = batch.get("taught", batch)
        if self.head is None:
            assert self.model is not None
            return logits_at(self.model, batch)
        weight = self.head.weight
        return self.head(batch["states"].flatten(0, 1).to(weight.device, weight.dtype))

    def kl(self, logits: Tensor, taught: Tensor, batch: Sample) -> Tensor:
        """Gives the KL(teacher‖model) in nats of each token of a batch that counts, from the logits of both."""
        if self.parts is None:
            return divergence(logits, taught, mean=False)
        counts = batch["targets"] != IGNORED
        return self.parts.divergence(logits, taught, batch["rows"][counts], batch["nodes"][counts])


@torch.no_grad()
def measure_samples(model: Any, samples: Sequence[Sample], teacher: Teacher | None) -> dict[str, Tensor]:
    """Measures a model on each sample: the number of counted `tokens` and the mean `loss` over them.

    With a teacher also its own loss, as `teacher`, and the mean KL(teacher‖model) in nats, as `kl`. Each has the shape
    `(samples,)`, fp64, on the CPU. Tokens are the teacher's where it has others.
    """
    found: dict[str, list[Tensor]] = {}
    at_once = max(1, TOKENS_AT_ONCE // max(len(sample["input_ids"]) for sample in samples))
    with evaluating(model):
        for start in range(0, len(samples), at_once):
            batch = collate(samples[start : start + at_once])
            logits = logits_at(model, batch).float()
            losses = by_token(cross_entropy(logits, counted_targets(batch, logits), reduction="none"), batch)
            values = {"loss": losses, "tokens": torch.ones_like(losses)}
            if teacher is not None:
                taught = teacher.logits(batch).to(logits.device).float()
                targets = counted_targets(batch.get("taught", batch), logits)
                values["teacher"] = cross_entropy(taught, targets, reduction="none")
                values["kl"] = teacher.kl(logits, taught, batch)
            for name, value in values.items():
                by_sample = value.double().view(len(batch["targets"]), -1).cpu()
                found.setdefault(name, []).append(by_sample.sum(1) if name == "tokens" else by_sample.mean(1))
    return {name: torch.cat(parts) for name, parts in found.items()}
