"""Samples of a recovery: token ids with the places whose next tokens count, and what a model predicts there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..arch.meta import positions_of
from ..forward.generation import copied_cache
from ..forward.metrics import evaluating
from ..method.layers import input_device
from ..method.shrink import check_same
from ..vocabulary.parts import Parts


# The target of a place whose next token does not count, as everywhere in torch.
IGNORED = -100
# Token ids and their positions, each of shape `(tokens,)`, and the targets: the next token of a place, or `IGNORED`.
# `states` are the teacher's last hidden states at the places that count, shape `(places, channels)`. In a sample for a
# model with fewer tokens, `dense` is the same text in the teacher's, and `rows` and `nodes` say what it expects of the
# targets, see `Parts.spelled`.
Sample = dict[str, Any]


def text_sample(ids: Tensor) -> Sample:
    """The sample of a text of token ids, shape `(seq_length,)`, in which every next token counts."""
    return {"input_ids": ids[:-1], "position_ids": torch.arange(len(ids) - 1), "targets": ids[1:]}


def answer_samples(
    conversations: Iterable[tuple[Sequence[int], Sequence[int]]], places: int, shared: int = 0
) -> Iterator[Sample]:
    """Samples of prompts and answers as token ids, of which the answers alone count: so many tokens in each sample,
    whose last answer is cut off. Positions begin anew with each prompt, by which models tell conversations apart; the
    first `shared` tokens, which all prompts have, are read once in a sample, and positions go on from them.
    """
    parts: list[list[Tensor]] = []
    room = places
    for prompt, answer in conversations:
        kept, start = [*answer[:room]], shared if parts else 0
        ids = torch.tensor([*prompt, *kept])
        targets = ids[1:].clone()
        targets[: len(prompt) - 1] = IGNORED
        parts.append([ids[start:-1], torch.arange(start, len(ids) - 1), targets[start:]])
        room -= len(kept)
        if not room:
            names = ("input_ids", "position_ids", "targets")
            yield {name: torch.cat(of) for name, of in zip(names, zip(*parts, strict=True), strict=True)}
            parts, room = [], places


def in_parts(sample: Sample, parts: Parts) -> Sample:
    """The sample as a model reads it that has fewer tokens than the teacher."""
    positions, ids, targets = (sample[name].tolist() for name in ("position_ids", "input_ids", "targets"))
    begins = [at for at, position in enumerate(positions) if not at or position != positions[at - 1] + 1]
    columns: list[list[list[int]]] = []
    seen, at_position = 0, [0]
    for start, end in pairwise([*begins, len(ids)]):
        counted = [target != IGNORED for target in targets[start:end]]
        last = targets[end - 1 : end] if counted[-1] else []
        text = [*ids[start:end], *last]
        spelled = parts.spelled(text, [False, *counted][: len(text)], seen)
        if not columns:  # what conversations share lies in the first one
            at_position = [0, *accumulate(len(parts.spellings[token]) for token in text)]
        first, seen = at_position[positions[start]], seen + sum(counted)
        columns.append([
            [now[0], place, following[0] if following[1] >= 0 else IGNORED, *following[1:]]
            for place, (now, following) in enumerate(pairwise(spelled), start=first)
        ])  # fmt: skip
    names = ("input_ids", "position_ids", "targets", "rows", "nodes")
    values = torch.tensor([row for rows in columns for row in rows]).unbind(1)
    return {**dict(zip(names, values, strict=True)), "dense": sample}


def collate(samples: Sequence[Sample]) -> Sample:
    """A batch of samples of equally many tokens that count, with padding behind the shorter ones."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch: Sample = {
        name: torch.stack([pad(sample[name], (0, longest - len(sample[name])), value=value) for sample in samples])
        for name, value in {"input_ids": 0, "position_ids": 0, "targets": IGNORED, "rows": 0, "nodes": 0}.items()
        if name in samples[0]
    }
    if "states" in samples[0]:
        batch["states"] = torch.stack([sample["states"] for sample in samples])
    if "dense" in samples[0]:
        batch["dense"] = collate([sample["dense"] for sample in samples])
        batch["rows"] += torch.arange(len(samples))[:, None] * tokens_in(samples[0])
    return batch


def tokens_in(sample: Sample) -> int:
    """The number of tokens of a sample that count, of the teacher's where it has others."""
    return int((sample.get("dense", sample)["targets"] != IGNORED).sum())


def counted(batch: Sample, logits: Tensor) -> Tensor:
    """The targets of a batch that count, shape `(places,)`, where its logits are."""
    return batch["targets"][batch["targets"] != IGNORED].to(logits.device)


def by_token(values: Tensor, batch: Sample) -> Tensor:
    """Values of the places of a batch that count, summed over the parts of each token of the teacher."""
    if "dense" not in batch:
        return values
    rows = batch["rows"][batch["targets"] != IGNORED].to(values.device)
    return values.new_zeros(tokens_in(batch)).index_add(0, rows, values)


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
    """What a model takes of a batch: a mask where conversations go on from a shared prefix, else none, so that
    positions alone tell them apart.
    """
    device, known = input_device(model), signature(model.forward).parameters
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids") if name in known}
    if (mask := _mask(batch["position_ids"])) is not None:
        inputs["attention_mask"] = mask
    return {**{name: value.to(device) for name, value in inputs.items()}, "use_cache": False}


def _mask(positions: Tensor) -> Tensor | None:
    """Which places each place sees, shape `(batch, 1, tokens, tokens)`, if one conversation begins at a position above
    0: its own conversation up to itself, and as many places from the first on as lie before that position.
    """
    places = torch.arange(positions.shape[1], device=positions.device)
    begins = positions.diff(dim=1, prepend=positions[:, :1]) != 1
    start = torch.where(begins, places, 0).cummax(1).values
    first = positions.gather(1, start)
    if not first.any():
        return None
    own = (start[:, :, None] == start[:, None]) & (places <= places[:, None])
    return (own | (places < first[:, :, None]))[:, None]


@torch.no_grad()
def reads_shared_prefix(model: PreTrainedModel, length: int) -> bool:
    """Whether a model predicts the same for text of so many tokens at most where a prefix of conversations is read
    once: not if it keeps a state of the text or a short window, nor if its attention takes no mask that we make.
    """
    text = model.config.get_text_config()
    length = int(min(length, positions_of(model)))
    ids = torch.randint(text.vocab_size, (2 * length,), generator=torch.Generator()).tolist()
    shared = length // 4
    first, second = (ids[: length // 2], ids[:1]), ([*ids[:shared], *ids[length:-shared]], ids[:1])
    try:
        with evaluating(model):
            if text._attn_implementation != "sdpa" or copied_cache(model, ids[:1], 1) is None:
                return False
            samples = [*answer_samples([second], 1), *answer_samples([first, second], 2, shared)]
            alone, joined = (logits_at(model, collate([sample])) for sample in samples)
        check_same("", alone, joined[1:])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    return True
