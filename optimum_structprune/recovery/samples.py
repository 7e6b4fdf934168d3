"""What a recovery trains on and is measured on: samples with the places whose next tokens count, what a teacher
predicts there, and how far a model is from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from ..forward.metrics import HEAD_TOKENS, TOKENS_AT_ONCE, divergence, evaluating, few_inputs, input_device, plain_head
from ..system.stages import stage


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
    inputs, counted = _inputs(bare, batch), batch["targets"] != IGNORED
    if "logits_to_keep" not in signature(bare.forward).parameters:
        logits = model(**inputs).logits
        return logits[counted.to(logits.device)]
    columns = counted.any(0).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=columns.to(input_device(bare))).logits
    return logits[counted[:, columns.to(counted.device)].to(logits.device)]


def _inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model takes of a batch: without a mask, so that positions alone tell conversations apart."""
    known = signature(model.forward).parameters
    inputs = {name: batch[name].to(input_device(model)) for name in ("input_ids", "position_ids") if name in known}
    return {**inputs, "use_cache": False}


class Teacher:
    """What a teacher predicts for samples. Where its head makes the logits of its last hidden states alone, these are
    computed once and kept in a file, and the rest of the teacher is needed no more; else it runs each time.
    """

    def __init__(self, model: PreTrainedModel):
        self.model: PreTrainedModel | None = model
        few = few_inputs(model)[:, :HEAD_TOKENS].to(input_device(model))
        self.head: Any = model.get_output_embeddings() if plain_head(model, few) else None

    def release(self) -> None:
        """Let go of all but the head, where all that the teacher predicts is kept."""
        if self.head is not None:
            self.model = None

    @torch.no_grad()
    def note(self, samples: Sequence[Sample], file: Path | None = None) -> None:
        """Add the `states` to samples; a file keeps them in bfloat16, which takes half of the room."""
        if self.head is None or self.model is None:
            return
        base: Any = self.model.base_model
        places = [int((sample["targets"] != IGNORED).sum()) for sample in samples]
        stored: Tensor | None = None
        with evaluating(self.model), stage("teacher"):
            for number, sample in enumerate(samples):
                counted = sample["targets"][None] != IGNORED
                hidden = base(**_inputs(base, {name: value[None] for name, value in sample.items()}))[0]
                states = hidden[counted.to(hidden.device)].cpu()
                if file is not None:
                    if stored is None:
                        size = sum(places) * states.shape[1]
                        stored = torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16)
                        stored = stored.view(sum(places), -1)
                    states = stored[sum(places[:number]) :][: len(states)].copy_(states)
                sample["states"] = states

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits for the places of a batch that count, shape `(places, vocab)`."""
        if self.head is None:
            assert self.model is not None
            return logits_at(self.model, batch)
        weight = self.head.weight
        return self.head(batch["states"].flatten(0, 1).to(weight.device, weight.dtype))


@torch.no_grad()
def measured(model: Any, samples: Sequence[Sample], teacher: Teacher | None) -> dict[str, Tensor]:
    """The number of counted `tokens` of each sample, the mean `loss` over them, and with a teacher its loss as `dense`
    and the mean KL(teacher‖model) in nats as `divergence`, each of shape `(samples,)`, fp64, on the CPU.
    """
    found: dict[str, list[Tensor]] = {}
    at_once = max(1, TOKENS_AT_ONCE // max(len(sample["input_ids"]) for sample in samples))
    with evaluating(model):
        for start in range(0, len(samples), at_once):
            batch = collate(samples[start : start + at_once])
            logits = logits_at(model, batch).float()
            targets = batch["targets"][batch["targets"] != IGNORED].to(logits.device)
            values = {"loss": cross_entropy(logits, targets, reduction="none"), "tokens": torch.ones_like(targets)}
            if teacher is not None:
                dense = teacher.logits(batch).to(logits.device).float()
                values["dense"] = cross_entropy(dense, targets, reduction="none")
                values["divergence"] = divergence(logits, dense, mean=False)
            for name, value in values.items():
                by_sample = value.double().view(len(batch["targets"]), -1).cpu()
                found.setdefault(name, []).append(by_sample.sum(1) if name == "tokens" else by_sample.mean(1))
    return {name: torch.cat(of) for name, of in found.items()}
