"""Samples of a recovery: token ids, the places that count, and what a model predicts there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..method.layers import input_device
from ..vocabulary.token_alignment import TokenAlignment


# The target of a place whose next token does not count, as everywhere in torch.
IGNORED = -100
# Token ids and their positions, each of shape `(tokens,)`, and the targets: the next token of a place, or `IGNORED`.
# `states` are the teacher's last hidden states at the places that count, shape `(places, channels)`. In a sample for a
# model with fewer tokens, `taught` is the same text in the teacher's, and `rows` and `nodes` say what that expects of
# the targets, see `TokenAlignment.align`.
Sample = dict[str, Any]


def text_sample(ids: Tensor) -> Sample:
    """Makes the sample of a text of token ids, shape `(seq_length,)`, in which every next token counts."""
    return {"input_ids": ids[:-1], "position_ids": torch.arange(len(ids) - 1), "targets": ids[1:]}


def answer_samples(conversations: Iterable[tuple[Sequence[int], Sequence[int]]], places: int) -> Iterator[Sample]:
    """Packs prompts and answers as token ids into samples with `places` tokens of answers, which count.

    The last answer is cut off. Positions begin anew with each prompt, by which models tell conversations apart.
    """
    packed: list[list[Tensor]] = []
    room = places
    for prompt, answer in conversations:
        kept = [*answer[:room]]
        ids = torch.tensor([*prompt, *kept])
        targets = ids[1:].clone()
        targets[: len(prompt) - 1] = IGNORED
        packed.append([ids[:-1], torch.arange(len(ids) - 1), targets])
        room -= len(kept)
        if not room:
            columns = [torch.cat(column) for column in zip(*packed, strict=True)]
            yield dict(zip(("input_ids", "position_ids", "targets"), columns, strict=True))
            packed, room = [], places


def in_parts(sample: Sample, parts: TokenAlignment) -> Sample:
    """Spells a sample of the teacher's tokens as a model reads it that has fewer."""
    positions, ids, targets = (sample[name].tolist() for name in ("position_ids", "input_ids", "targets"))
    begins = [at for at, position in enumerate(positions) if not position]
    columns: list[list[list[int]]] = []
    seen = 0
    for start, end in pairwise([*begins, len(ids)]):
        counted = [target != IGNORED for target in targets[start:end]]
        text = [*ids[start:end], *(targets[end - 1 : end] if counted[-1] else [])]
        spelled = parts.align(text, [False, *counted][: len(text)], seen)
        seen += sum(counted)
        columns.append([
            [now[0], place, following[0] if following[1] >= 0 else IGNORED, *following[1:]]
            for place, (now, following) in enumerate(pairwise(spelled))
        ])  # fmt: skip
    names = ("input_ids", "position_ids", "targets", "rows", "nodes")
    values = torch.tensor([row for rows in columns for row in rows]).unbind(1)
    return {**dict(zip(names, values, strict=True)), "taught": sample}


def collate(samples: Sequence[Sample]) -> Sample:
    """Makes a batch of samples of equally many tokens that count, with padding behind the shorter ones."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch: Sample = {
        name: torch.stack([pad(sample[name], (0, longest - len(sample[name])), value=value) for sample in samples])
        for name, value in {"input_ids": 0, "position_ids": 0, "targets": IGNORED, "rows": 0, "nodes": 0}.items()
        if name in samples[0]
    }
    if "states" in samples[0]:
        batch["states"] = torch.stack([sample["states"] for sample in samples])
    if "taught" in samples[0]:
        batch["taught"] = collate([sample["taught"] for sample in samples])
        batch["rows"] += torch.arange(len(samples))[:, None] * tokens_in(samples[0])
    return batch


def tokens_in(sample: Sample) -> int:
    """Counts the tokens of a sample in the loss, in those of the teacher."""
    return int((sample.get("taught", sample)["targets"] != IGNORED).sum())


def counted_targets(batch: Sample, logits: Tensor) -> Tensor:
    """Gives the targets of a batch that count, shape `(places,)`, on the device of the logits."""
    return batch["targets"][batch["targets"] != IGNORED].to(logits.device)


def by_token(values: Tensor, batch: Sample) -> Tensor:
    """Sums values of the places of a batch that count over the parts of each token of the teacher."""
    if "taught" not in batch:
        return values
    rows = batch["rows"][batch["targets"] != IGNORED].to(values.device)
    return values.new_zeros(tokens_in(batch)).index_add(0, rows, values)


def logits_at(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Gives the logits of a model for the places of a batch that count, shape `(places, vocab)`."""
    bare: Any = getattr(model, "module", model)  # without what several processes put around it
    bare = bare.get_base_model() if isinstance(bare, PeftModel) else bare
    inputs, counts = model_inputs(bare, batch), batch["targets"] != IGNORED
    if "logits_to_keep" not in signature(bare.forward).parameters:
        logits = model(**inputs).logits
        return logits[counts.to(logits.device)]
    columns = counts.any(0).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=columns.to(input_device(bare))).logits
    return logits[counts[:, columns.to(counts.device)].to(logits.device)]


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Gives the inputs of a causal language model for a batch; positions tell conversations apart."""
    device, known = input_device(model), signature(model.forward).parameters
    names = [name for name in ("input_ids", "position_ids") if name in known]
    return {**{name: batch[name].to(device) for name in names}, "use_cache": False}
