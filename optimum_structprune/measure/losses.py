"""Measure the losses of a model on text, alone or against another model.

This is the only loop over text that measures. It cuts rows into batches, divides them among processes, runs offloaded
models layer by layer, and computes the logits of a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..arch.hooks import replaying
from ..arch.inference import evaluating
from ..arch.meta import is_offloaded, predicts_next
from ..arch.modules import layer_list
from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from ..method.layers import Batch, InMemory
from ..sources.offloaded import Offloaded
from ..system.processes import gather_objects, shard
from ..system.stages import progress
from ..vocabulary.token_alignment import TokenAlignment
from .kl import divergence
from .predictions import Predictions, Predictor, tokens_per_pass
from .text import NOT_PREDICTED, Text


if TYPE_CHECKING:
    from peft import PeftModel  # its import takes as long as the import of torch


@dataclass
class Losses:
    """The values of the counted tokens of each row, each of shape `(tokens,)`, fp64, on the CPU.

    If the models have different tokens, the values belong to the tokens of the other model.

    Attributes:
        loss: The loss in nats.
        other: The loss of the other model in nats; empty without one.
        kl: The KL divergence from the other model in nats; empty without one.
        agrees: 1 where both models predict the same token; empty if they have different tokens.
    """

    loss: list[Tensor] = field(default_factory=list)
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
    predictors = [Predictor.of(model)]
    if against is not None:
        predictors.append(Predictor.of(against))
    tokens = tokens or min(tokens_per_pass(predictor.model) for predictor in predictors)

    batches: list[TextBatch] = []
    for name, text in texts.items():
        batches += _batches(name, text, shard(range(len(text.rows))), alignment, tokens)
    with evaluating(*[predictor.model for predictor in predictors]):
        values = _measured(predictors, batches, alignment, arch)

    losses_by_text = {name: Losses() for name in texts}
    by_row: dict[tuple[str, int], dict[str, Tensor]] = {}
    for values_of_process in gather_objects(values):
        by_row.update(values_of_process)
    for (name, _), row_values in sorted(by_row.items(), key=itemgetter(0)):
        for attribute, value in row_values.items():
            getattr(losses_by_text[name], attribute).append(value)
    return losses_by_text


@dataclass
class Inputs:
    """The inputs of one model, and the positions whose predictions count.

    Attributes:
        ids: Token ids, shape `(batch, longest)`.
        options: Further inputs: `position_ids` if rows have several documents, `labels` for an encoder-decoder.
        places: The indices of the positions that predict counted tokens, in the flattened batch.
        targets: The counted tokens, shape `(places,)`.
    """

    ids: Tensor
    options: dict[str, Tensor]
    places: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor], is_counted: Sequence[Tensor], positions: Sequence[Tensor] | None) -> Inputs:
        """Pad rows at the end, which does not change the predictions of a causal model."""
        ids = pad_sequence(list(rows), batch_first=True)
        counts = pad_sequence(list(is_counted), batch_first=True)
        next_counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], 1)
        places = next_counts.flatten().nonzero()[:, 0]

        options = {}
        if positions is not None:
            options["position_ids"] = pad_sequence(list(positions), batch_first=True)
        return cls(ids, options, places, ids.flatten()[places + 1])

    @classmethod
    def with_labels(cls, rows: Sequence[Tensor], labels: Sequence[Tensor]) -> Inputs:
        """Return rows of one length, and labels of one length, which are the tokens of a decoder in some models."""
        stacked = torch.stack(list(labels))
        places = (stacked != NOT_PREDICTED).flatten().nonzero()[:, 0]
        return cls(torch.stack(list(rows)), {"labels": stacked}, places, stacked.flatten()[places])

    def predictions(self, predictor: Predictor) -> Predictions:
        """Return the predictions of a model for the counted tokens."""
        inputs = {"input_ids": self.ids} | self.options
        if not predictor.model.config.is_encoder_decoder:
            inputs.pop("labels", None)
        return predictor.predict(inputs, self.places)


@dataclass
class TextBatch:
    """Rows that run together.

    Attributes:
        text: The name of their text.
        numbers: The numbers of the rows in the text.
        inputs: The inputs of the model.
        counts: The number of counted tokens of each row.
        other: The inputs of the other model, if it has other tokens.
        rows: For each counted position of the model, the number of the other model's token, shape `(positions,)`.
        nodes: For each counted position, the node of its next token; see `TokenAlignment.align`.
    """

    text: str
    numbers: list[int]
    inputs: Inputs
    counts: list[int]
    other: Inputs | None = None
    rows: Tensor | None = None
    nodes: Tensor | None = None


def _batches(
    name: str, text: Text, numbers: Sequence[int], alignment: TokenAlignment | None, tokens: int
) -> list[TextBatch]:
    """Return some rows of a text in batches of at most `tokens` tokens, or of one row."""
    sizes: list[tuple[int, ...]] = [(len(row),) for row in text.rows]
    if text.labels is not None:
        sizes = [(len(row), len(labels)) for row, labels in zip(text.rows, text.labels, strict=True)]

    parts: list[list[int]] = []
    for number in sorted(numbers, key=sizes.__getitem__):
        # A model that sees the next tokens also sees padding.
        is_new_size = text.labels is not None and parts and sizes[parts[-1][0]] != sizes[number]
        if not parts or is_new_size or max(sizes[number]) * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(number)
    return [_batch(name, text, part, alignment) for part in parts]


def _batch(name: str, text: Text, numbers: list[int], alignment: TokenAlignment | None) -> TextBatch:
    """Return some rows of a text as a batch."""
    rows = [text.rows[number] for number in numbers]
    if text.labels is not None:
        inputs = Inputs.with_labels(rows, [text.labels[number] for number in numbers])
        return TextBatch(name, numbers, inputs, (inputs.options["labels"] != NOT_PREDICTED).sum(1).tolist())

    positions = None
    if text.positions is not None:
        positions = [text.positions[number] for number in numbers]

    is_counted = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    if text.is_counted is not None:
        is_counted = [text.is_counted[number] for number in numbers]

    inputs = Inputs.of(rows, is_counted, positions)
    batch = TextBatch(name, numbers, inputs, [int(counted[1:].sum()) for counted in is_counted])
    if alignment is not None:
        _spell_(batch, rows, is_counted, positions, alignment)
    return batch


def _spell_(
    batch: TextBatch,
    rows: Sequence[Tensor],
    is_counted: Sequence[Tensor],
    positions: Sequence[Tensor] | None,
    alignment: TokenAlignment,
) -> None:
    """Spell the rows of a batch, which are in the tokens of the other model, in the tokens of the model."""
    spelled = []
    spelled_positions = []
    first_row = 0
    for number, (row, counted) in enumerate(zip(rows, is_counted, strict=True)):
        starts = [0]
        if positions is not None:
            starts = (positions[number] == 0).nonzero()[:, 0].tolist()
        documents = []
        for start, end in pairwise(starts + [len(row)]):
            # The first token of a document has no prediction.
            has_prediction = [False] + counted[start + 1 : end].tolist()
            document = torch.tensor(alignment.align(row[start:end].tolist(), has_prediction, first_row))
            first_row += sum(has_prediction)
            documents.append(document)
        spelled.append(torch.cat(documents))
        spelled_positions.append(torch.cat([torch.arange(len(document)) for document in documents]))

    batch.other = batch.inputs
    is_counted = [row[:, 1] >= 0 for row in spelled]
    batch.inputs = Inputs.of(
        [row[:, 0] for row in spelled], is_counted, None if positions is None else spelled_positions
    )
    _, batch.rows, batch.nodes = torch.cat(spelled)[torch.cat(is_counted)].unbind(1)


def _measured(
    predictors: Sequence[Predictor],
    batches: Sequence[TextBatch],
    alignment: TokenAlignment | None,
    arch: ArchSpec | None,
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Return the values of each row by name, by the name of the text and the number of the row."""
    model = predictors[0].model
    size = min(predictor.tokens_at_once for predictor in predictors)

    stored = None
    if arch is not None and batches and is_offloaded(model):
        stored = _layer_by_layer(model, arch, batches)

    by_name: dict[str, list[Tensor]] = {}
    for index, batch in enumerate(progress(batches, desc="Measuring", unit="batch", leave=False, delay=1)):
        context: AbstractContextManager[None] = nullcontext()
        if stored is not None and arch is not None:
            context = skipping_layers(stored, arch.num_layers, index)
        with context:
            predictions = batch.inputs.predictions(predictors[0])
        other = None
        if len(predictors) > 1:
            other = (batch.other or batch.inputs).predictions(predictors[1])

        if other is None or alignment is None:
            values = same_tokens(predictions, batch.inputs.targets, other, size)
        else:
            values = _other_tokens(predictions, other, batch, alignment, size)
        for name, value in values.items():
            by_name.setdefault(name, []).append(value)

    keys = [(batch.text, number) for batch in batches for number in batch.numbers]
    counts = [count for batch in batches for count in batch.counts]
    by_row: dict[tuple[str, int], dict[str, Tensor]] = {key: {} for key in keys}
    for name, parts in by_name.items():
        # All values are copied to the CPU at once, so that the device does not wait in between.
        for key, value in zip(keys, torch.cat(parts).double().cpu().split(counts), strict=True):
            by_row[key][name] = value
    return by_row


def same_tokens(
    predictions: Predictions, targets: Tensor | None, other: Predictions | None, size: int
) -> dict[str, Tensor]:
    """Return the values of the counted tokens of a batch, each of shape `(tokens,)`, by the names in `Losses`.

    Args:
        predictions: The predictions of the model.
        targets: The counted tokens; None measures no losses.
        other: The predictions of the other model.
        size: The number of tokens whose logits are in memory at a time.
    """
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(predictions.values), size):
        end = start + size
        by_model = {"loss": predictions.logits(start, end)}
        device = by_model["loss"].device
        values: dict[str, Tensor] = {}
        if other is not None:
            by_model["other"] = other.logits(start, end, device)
            values["kl"] = divergence(by_model["loss"], by_model["other"])
            values["agrees"] = by_model["loss"].argmax(-1) == by_model["other"].argmax(-1)
        if targets is not None:
            for name, logits in by_model.items():
                values[name] = _losses(logits, targets[start:end].to(device))

        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def _other_tokens(
    predictions: Predictions, other: Predictions, batch: TextBatch, alignment: TokenAlignment, size: int
) -> dict[str, Tensor]:
    """Return the values of the counted tokens of the other model, whose tokens the model spells in parts."""
    assert batch.other is not None and batch.rows is not None and batch.nodes is not None
    device = predictions.values.device
    count = len(batch.other.targets)
    if not count:
        return {}

    rows, chunks = alignment.chunks(batch.rows, batch.nodes, size, device)
    targets = batch.inputs.targets.to(device)
    losses = []
    divergences = []
    for number, chunk in enumerate(chunks):
        start = number * size
        end = start + size
        logits = predictions.logits(start, end, device)
        losses.append(_losses(logits, targets[start:end]))
        other_logits = other.logits(chunk.dense.start, chunk.dense.stop, device)
        divergences.append(divergence(logits, other_logits, align=partial(alignment.next_part, chunk=chunk)))

    def by_token(parts: list[Tensor]) -> Tensor:
        values = torch.cat(parts).double()
        return values.new_zeros(count).index_add(0, rows, values)

    own = same_tokens(other, batch.other.targets, None, size)
    return {"loss": by_token(losses), "other": own["loss"], "kl": by_token(divergences)}


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token, shape `(tokens,)`, fp64, on the device of the logits."""
    return cross_entropy(logits.float(), targets, reduction="none").double()


def _layer_by_layer(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[TextBatch]) -> InMemory:
    """Run each layer of an offloaded model on all batches, and return the source with the last hidden states."""
    source = Offloaded(model, arch, [Batch(0, batch.inputs.ids) for batch in batches])
    for layer in range(arch.num_layers):
        with source.at(layer):
            source.pass_through(layer)
    return source


@contextmanager
def skipping_layers(source: InMemory, count: int, index: int) -> Iterator[None]:
    """Replace the first `count` layers of a model by the stored hidden states of one batch inside `with`."""
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
        for batch in _batches("", Text(list(samples)), range(len(samples)), None, tokens_per_pass(model)):
            predictions = batch.inputs.predictions(predictor)
            for start in range(0, len(batch.inputs.targets), predictor.tokens_at_once):
                logits = predictions.logits(start, start + predictor.tokens_at_once)
                # The sum remains on the device, so that the host waits only once.
                total = total + logits.float().softmax(-1).sqrt().sum(0).double()

    shares = torch.as_tensor(total).cpu()
    return shares / shares.sum()
