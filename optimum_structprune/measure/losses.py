"""Measure the losses of a model on text, alone or against another model.

This is the only loop over text that measures. It cuts rows into batches, divides them among processes, runs offloaded
models layer by layer, and computes the logits of a few tokens at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..arch.hooks import replaying
from ..arch.inference import evaluating
from ..arch.meta import is_offloaded, predicts_next
from ..arch.modules import layer_list
from ..arch.spec import ArchSpec
from ..method.layers import Batch, InMemory
from ..method.offloaded import Offloaded
from ..system.errors import StructPruneError
from ..system.processes import gather_objects, shard
from ..system.stages import progress
from ..vocabulary.token_alignment import TokenAlignment
from .batches import IGNORED, AlignedTargets, SampleCollator, next_tokens
from .kl import divergence
from .predictions import Predictions, Predictor, StoredPredictions, tokens_per_pass
from .text import Text


if TYPE_CHECKING:
    from peft import PeftModel  # its import takes as long as the import of torch


@dataclass
class Losses:
    """The values of the counted tokens of each row, each of shape `(tokens,)`, fp64, on the CPU.

    If the models have different tokens, the values belong to the tokens of the other model.

    Attributes:
        loss: The loss in nats.
        misses: 1 where another token is more likely, or the number of such parts of a token of the other model.
        other: The loss of the other model in nats; empty without one.
        kl: The KL divergence from the other model in nats; empty without one.
        agrees: 1 where both models predict the same token; empty if they have different tokens, or if the predictions
            of the other model are stored.
    """

    loss: list[Tensor] = field(default_factory=list)
    misses: list[Tensor] = field(default_factory=list)
    other: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)


def totals(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of the values of each row, shape `(rows,)`."""
    return torch.stack([row.sum() for row in values])


def means(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of the values of each row, shape `(rows,)`, which is 0 for a row without counted tokens."""
    return torch.stack([row.sum() / max(len(row), 1) for row in values])


@torch.no_grad()
def perplexity(model: PreTrainedModel | PeftModel, samples: Tensor, batch_size: int | None = None) -> float:
    """Return the perplexity over samples: e to the mean loss per predicted token.

    The first token of each sample is context only.

    Args:
        model: A causal language model. Its training mode is restored afterwards.
        samples: Token ids, shape `(samples, seq_length)`.
        batch_size: The number of samples per forward pass. The default is about 512 tokens on a CPU. A GPU takes up to
            16 times as many, as long as their logits fill at most 1/64 of its memory.

    Raises:
        StructPruneError: If the model does not predict the next token, or if the samples have fewer than two tokens.
    """
    # A bidirectional model sees the token that it would predict.
    if not predicts_next(model):
        raise StructPruneError(f"{type(model).__name__} does not predict the next token, and has no perplexity.")
    if samples.dim() != 2 or not samples[:, 1:].numel():
        raise StructPruneError(
            f"`samples` must contain at least one sample of two tokens, got the shape {tuple(samples.shape)}."
        )

    tokens = None if batch_size is None else batch_size * samples.shape[1]
    losses = measure(model, Text(list(samples)), tokens=tokens)
    return float(torch.cat(losses.loss).mean().exp())


def measure(
    model: Any,
    text: Text,
    against: Any = None,
    alignment: TokenAlignment | None = None,
    tokens: int | None = None,
) -> Losses:
    """Measure a model on one text; see `measure_all`."""
    return measure_all(model, {"": text}, against, alignment, tokens=tokens)[""]


@torch.no_grad()
def measure_all(
    model: Any,
    texts: Mapping[str, Text],
    against: Any = None,
    alignment: TokenAlignment | None = None,
    arch: ArchSpec | None = None,
    tokens: int | None = None,
) -> dict[str, Losses]:
    """Measure a model on texts.

    Each process runs a part of the rows and gets the values of all rows. Rows of similar length run together.

    Args:
        model: A causal language model, or a `Predictor` of one.
        texts: The texts by name, in the tokens of the model; with an `alignment`, in the tokens of the other model.
        against: Another model to compare with, or a `Predictor` of one.
        alignment: The spelling of the tokens of the other model in the tokens of the model, if they differ.
        arch: The description of the model. With it, each layer of an offloaded model is loaded once for all texts.
        tokens: The maximum number of tokens in a forward pass. The default depends on the device.

    Returns:
        The values of each text.
    """
    predictor = Predictor.of(model)
    other = None if against is None else Predictor.of(against)
    models = [used.model for used in (predictor, other) if used is not None and used.model is not None]
    tokens = tokens or min(map(tokens_per_pass, models))

    batches: list[TextBatch] = []
    for name, text in texts.items():
        batches += batches_of(text, shard(range(len(text.rows))), tokens, alignment, name)

    with evaluating(*models):
        by_row = _measured(predictor, other, batches, arch)

    losses_by_text = {name: Losses() for name in texts}
    for by_row_of_process in gather_objects(by_row):
        by_row.update(by_row_of_process)
    for (name, _), values in sorted(by_row.items(), key=itemgetter(0)):
        for attribute, value in values.items():
            getattr(losses_by_text[name], attribute).append(value)
    return losses_by_text


@dataclass
class TextBatch:
    """Rows that run together.

    Attributes:
        text: The name of their text.
        numbers: The numbers of the rows in the text.
        inputs: The inputs of the model.
        positions: The indices of the positions whose predictions count, in the flattened batch.
        targets: The predicted tokens, shape `(positions,)`.
        counts: The number of values of each row.
        aligned: The predictions of the other model, if it has other tokens.
    """

    text: str
    numbers: list[int]
    inputs: dict[str, Tensor]
    positions: Tensor
    targets: Tensor
    counts: list[int]
    aligned: AlignedTargets | None = None

    @classmethod
    def of(
        cls,
        text: str,
        numbers: list[int],
        batch: dict[str, Tensor],
        alignment: TokenAlignment | None,
        has_gaps: bool,
    ) -> TextBatch:
        """Select the predictions that count in a batch of samples."""
        targets = batch["labels"] if has_gaps else next_tokens(batch)
        counts = (targets != IGNORED).sum(1).tolist()
        targets = targets.flatten()
        positions = (targets != IGNORED).nonzero()[:, 0]

        aligned = None
        if alignment is not None:
            aligned = AlignedTargets.of(batch, positions, alignment)
            counts = (batch["teacher_labels"][:, 1:] != IGNORED).sum(1).tolist()
        names = ("input_ids", "labels") if has_gaps else ("input_ids", "position_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        return cls(text, numbers, inputs, positions, targets[positions], counts, aligned)


def batches_of(
    text: Text, numbers: Sequence[int], tokens: int, alignment: TokenAlignment | None = None, name: str = ""
) -> list[TextBatch]:
    """Return some rows of a text in batches of at most `tokens` tokens. Rows of similar length run together."""
    collator = SampleCollator(alignment)
    batches = []
    for part in text.parts(numbers, tokens):
        samples = [text.sample(number) for number in part]
        batches.append(TextBatch.of(name, part, collator(samples), alignment, text.has_gaps))
    return batches


def predicted(
    predictor: Predictor, batches: Sequence[TextBatch], arch: ArchSpec | None = None
) -> Iterator[tuple[TextBatch, Predictions]]:
    """Yield batches with the predictions of a model. See `measure_all` for `arch`."""
    stored = None
    if arch is not None and batches and is_offloaded(predictor.model):
        stored = _layer_by_layer(predictor.model, arch, batches)
    for index, batch in enumerate(progress(batches, unit="batch", leave=False, delay=1)):
        with skipping_layers(stored, index):
            predictions = predictor.predict(batch.inputs, batch.positions)
        yield batch, predictions


def _measured(
    predictor: Predictor, other: Predictor | None, batches: Sequence[TextBatch], arch: ArchSpec | None
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Return the values of each row by name, by the name of the text and the number of the row."""
    size = predictor.tokens_at_once
    if other is not None:
        size = min(size, other.tokens_at_once)

    by_name: defaultdict[str, list[Tensor]] = defaultdict(list)
    for batch, predictions in predicted(predictor, batches, arch):
        others = None
        if other is not None and batch.aligned is not None:
            others = other.predict(batch.aligned.teacher_inputs, batch.aligned.teacher_positions)
        elif other is not None:
            others = other.predict(batch.inputs, batch.positions)
        for name, value in values_of(predictions, batch.targets, others, size, batch.aligned).items():
            by_name[name].append(value)

    keys = [(batch.text, number) for batch in batches for number in batch.numbers]
    counts = [count for batch in batches for count in batch.counts]
    by_row: dict[tuple[str, int], dict[str, Tensor]] = {key: {} for key in keys}
    for name, parts in by_name.items():
        # All values are copied to the CPU at once, so that the device does not wait in between.
        for key, value in zip(keys, torch.cat(parts).double().cpu().split(counts), strict=True):
            by_row[key][name] = value
    return by_row


def values_of(
    predictions: Predictions,
    targets: Tensor | None,
    others: Predictions | StoredPredictions | None,
    size: int,
    aligned: AlignedTargets | None = None,
) -> dict[str, Tensor]:
    """Return the values of a batch, each of shape `(tokens,)`, by the names in `Losses`.

    Args:
        predictions: The predictions of the model.
        targets: The predicted tokens; None measures no losses.
        others: The predictions of the other model.
        size: The number of tokens whose logits are in memory at a time.
        aligned: The tokens of the other model, which the model spells in parts.
    """
    if aligned is not None:
        aligned.split(size, predictions.device)

    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(predictions.values), size):
        end = start + size
        logits = predictions.logits(start, end)
        if targets is not None:
            parts["loss"].append(_losses(logits, targets[start:end]))
            parts["misses"].append(logits.argmax(-1) != targets[start:end].to(logits.device))
        if others is not None and aligned is not None:
            parts["kl"].append(aligned.divergence(logits, others, start // size))
        elif isinstance(others, StoredPredictions):
            parts["kl"].append(others.divergence(logits, start, end))
        elif others is not None:
            other_logits = others.logits(start, end, logits.device)
            parts["kl"].append(divergence(logits, other_logits))
            parts["agrees"].append(logits.argmax(-1) == other_logits.argmax(-1))
            if targets is not None:
                parts["other"].append(_losses(other_logits, targets[start:end]))

    values = {name: torch.cat(chunks) for name, chunks in parts.items()}
    if others is not None and aligned is not None:
        # A token of the other model has the sum of the values of its parts.
        for name, value in values.items():
            total = value.new_zeros(len(aligned.teacher_positions), dtype=torch.float64)
            values[name] = total.index_add(0, aligned.rows.to(value.device), value.double())

    if isinstance(others, StoredPredictions):
        values["other"] = others.losses.double()
    elif others is not None and aligned is not None:
        own = values_of(others, aligned.teacher_targets, None, size)
        if own:
            values["other"] = own["loss"]
    return values


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token, shape `(tokens,)`, fp64, on the device of the logits."""
    return cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double()


def _layer_by_layer(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[TextBatch]) -> InMemory:
    """Run each layer of an offloaded model on all batches, and return the source with the last hidden states."""
    source = Offloaded(model, arch, [Batch(0, batch.inputs["input_ids"]) for batch in batches])
    for layer in range(arch.num_layers):
        with source.at(layer):
            source.pass_through(layer)
    return source


@contextmanager
def skipping_layers(source: InMemory | None, index: int, count: int | None = None) -> Iterator[None]:
    """Replace layers of a model by the stored hidden states of one batch inside `with`.

    Args:
        source: The hidden states of batches; None replaces no layers.
        index: The number of the batch.
        count: The number of layers, from the first layer on; by default all.
    """
    if source is None:
        yield
        return

    if count is None:
        count = source.arch.num_layers
    hidden = source.hidden[index]
    outputs: list[Any] = []
    for layer in range(count):
        extra = source.extras[layer]
        if extra is None:
            outputs.append(hidden)
        else:
            outputs.append((hidden, *extra))

    with replaying(layer_list(source.model, source.arch)[:count], outputs):
        yield


@torch.no_grad()
def expected_shares(model: PreTrainedModel, samples: Tensor) -> Tensor:
    """Return the share of each token in the predictions of a model, shape `(vocab,)`, fp64, on the CPU.

    The shares are sums of square roots of probabilities. Compared with sums of probabilities, they favour tokens that
    are rare in these samples and may be frequent in other text. `samples` has the shape `(samples, seq_length)`.
    """
    predictor = Predictor(model)
    total: Tensor | float = 0.0
    with evaluating(model):
        for batch in samples.split(max(tokens_per_pass(model) // samples.shape[1], 1)):
            positions = (next_tokens({"input_ids": batch}) != IGNORED).flatten().nonzero()[:, 0]
            predictions = predictor.predict({"input_ids": batch}, positions)
            for start in range(0, len(positions), predictor.tokens_at_once):
                logits = predictions.logits(start, start + predictor.tokens_at_once)
                # The sum remains on the device, so that the host waits only once.
                total = total + logits.float().softmax(-1).sqrt().sum(0).double()

    shares = torch.as_tensor(total).cpu()
    return shares / shares.sum()
