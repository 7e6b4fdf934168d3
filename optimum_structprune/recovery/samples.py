"""Samples of a recovery: token ids with the places whose next tokens count, and what a model predicts there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..method.layers import input_device


# The target of a place whose next token does not count, as everywhere in torch.
IGNORED = -100
# Token ids and their positions, each of shape `(tokens,)`, and the targets: the next token of a place, or `IGNORED`.
# `states` are the teacher's last hidden states at the places that count, shape `(places, channels)`.
Sample = dict[str, Tensor]


def text_sample(ids: Tensor) -> Sample:
    """The sample of a text of token ids, shape `(seq_length,)`, in which every next token counts."""
    return {"input_ids": ids[:-1], "position_ids": torch.arange(len(ids) - 1), "targets": ids[1:]}


def answer_samples(conversations: Iterable[tuple[Sequence[int], Sequence[int]]], places: int) -> Iterator[Sample]:
    """Samples of prompts and answers as token ids, of which the answers alone count: so many tokens in each sample,
    whose last answer is cut off. Positions begin anew with each prompt, by which models tell conversations apart.
    """
    parts: list[list[Tensor]] = []
    room = places
    for prompt, answer in conversations:
        kept = [*answer[:room]]
        ids = torch.tensor([*prompt, *kept])
        targets = ids[1:].clone()
        targets[: len(prompt) - 1] = IGNORED
        parts.append([ids[:-1], torch.arange(len(ids) - 1), targets])
        room -= len(kept)
        if not room:
            names = ("input_ids", "position_ids", "targets")
            yield {name: torch.cat(of) for name, of in zip(names, zip(*parts, strict=True), strict=True)}
            parts, room = [], places


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A batch of samples that have equally many places, with padding behind the shorter ones."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": 0, "position_ids": 0, "targets": IGNORED}
    batch = {
        name: torch.stack([pad(sample[name], (0, longest - len(sample[name])), value=value) for sample in samples])
        for name, value in fill.items()
    }
    return {**batch, **({"states": torch.stack([s["states"] for s in samples])} if "states" in samples[0] else {})}


def logits_at(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model for the places of a batch that count, shape `(places, vocab)`."""
    bare: Any = getattr(model, "module", model)  # without what several processes put around it
    bare = bare.get_base_model() if isinstance(bare, PeftModel) else bare
    inputs, counted = model_inputs(bare, batch), batch["targets"] != IGNORED
    if "logits_to_keep" not in signature(bare.forward).parameters:
        logits = model(**inputs).logits
        return logits[counted.to(logits.device)]
    columns = counted.any(0).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=columns.to(input_device(bare))).logits
    return logits[counted[:, columns.to(counted.device)].to(logits.device)]


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model takes of a batch: without a mask, so that positions alone tell conversations apart."""
    known = signature(model.forward).parameters
    inputs = {name: batch[name].to(input_device(model)) for name in ("input_ids", "position_ids") if name in known}
    return {**inputs, "use_cache": False}
