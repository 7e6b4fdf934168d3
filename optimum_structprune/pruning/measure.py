"""Measure the original and the pruned model of a run on held-out and on unseen text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.hooks import replaying
from ..arch.meta import is_offloaded, positions_of, reads_text
from ..arch.modules import layer_list
from ..arch.spec import ArchSpec
from ..domains.packing import Domain, Passages, cut_to_positions, document_numbers
from ..errors import StructPruneError
from ..forward import metrics
from ..method.layers import Batch, InMemory
from ..record.figures import DENSE, PRUNED, Figure, language_costs, perplexity_result, unseen_of
from ..record.report import Report
from ..steps.base import RunState
from ..system.processes import every_process_runs, gather_objects, shard
from ..system.stages import progress


if TYPE_CHECKING:
    from .embeddings import Embeddings

# A trial runs about this many held-out tokens, over all domains, and compares every fourth prediction.
PROBE_TOKENS = 2048
STRIDE = 4
# The tokens in a row of held-out text. With a shorter context, tokens are hard to predict.
ROW = 64
# On a CPU, rows run together up to this number of tokens.
AT_ONCE = 512
# The name of unseen text among the domains. Names of domains are not empty.
UNSEEN = ""


class Comparison:
    """Comparison of the original and the pruned model of a run.

    The constructor measures the original model, and `finish` measures the pruned model.

    Args:
        run: The state of the run. The figures are entered into its report.
        vocabulary_changes: Whether another tokenizer will read the text. Both models then read the same text.
        any_language: If the vocabulary changes, whether to measure languages that the config does not name.
    """

    def __init__(self, run: RunState, vocabulary_changes: bool = False, any_language: bool = True):
        self.run = run
        self.measure: Measure | Embeddings | None = None
        self.unseen_source = ""
        self.language_costs: Mapping[str, Mapping[str, Any]] = {}

        languages = run.config.languages or ()
        measures_languages = bool(languages) or (vocabulary_changes and any_language)

        with run.report.timed("perplexity"):
            if run.arch.causal:
                self.measure = self._causal(vocabulary_changes)
            elif run.dense_tokenizer is None or reads_text(run.model):
                self.measure = self._encoder(measures_languages)
        if run.dense_tokenizer is not None and measures_languages:
            self._start_languages(languages)

    def _causal(self, vocabulary_changes: bool) -> Measure:
        """Measure a causal language model on the domains and on unseen text."""
        run = self.run
        domains = run.data.domains
        unseen: Sequence[Tensor] = ()
        # Inputs that a program gave have no origin.
        if run.dense_tokenizer is not None and domains[0].origin is not None:
            from ..sources.other import other_text

            with run.report.timed("other text"):
                text = other_text(run.config, run.model, run.dense_tokenizer, domains, run.earlier)
            self.unseen_source = text.source
            unseen = text.rows
            run.entries += text.entries

        heldout_tokens = run.config.holdout * sum(domain.samples.numel() for domain in domains)
        max_tokens = min(metrics.MEASURED_TOKENS, round(heldout_tokens))
        return Measure(run.model, domains, run.arch, max_tokens, run.dense_tokenizer, vocabulary_changes, unseen)

    def _encoder(self, measures_languages: bool) -> Embeddings:
        """Measure the vectors of an encoder."""
        from .embeddings import Embeddings, judged_texts

        run = self.run
        texts, entries = judged_texts(run.data.domains, run.dense_tokenizer, run.config.seed, run.earlier)
        run.entries += entries
        return Embeddings(run.model, texts, run.dense_tokenizer, measures_languages)

    def _start_languages(self, languages: Sequence[str]) -> None:
        """Measure the original model in 30 languages. `languages` are the codes that the config names."""
        from ..vocabulary.languages import costs_before

        run = self.run
        assert run.dense_tokenizer is not None
        with run.report.timed("languages"):
            self.language_costs = costs_before(self._language_model(), run.dense_tokenizer, languages)
        run.report.languages = language_costs(self.language_costs)

    def _language_model(self) -> PreTrainedModel | None:
        """Return the model if it predicts tokens, or None for an encoder, whose languages are counted in tokens."""
        if self.run.arch.causal:
            return self.run.model
        return None

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Measure with another tokenizer from now on."""
        if self.measure is not None:
            self.measure.set_tokenizer(tokenizer, model)

    def finish(self) -> None:
        """Enter the figures of the pruned model, and the share of words that are split."""
        run = self.run
        measure = self.measure
        if measure is None:
            return

        with run.report.timed("perplexity"):
            measure.after(run.model, run.arch, run.report)

        unseen = run.report.unseen
        if unseen is None:
            return

        unseen.source = self.unseen_source
        if isinstance(measure, Measure) and run.report.trimmed is not None:
            from ..sources.other import respelled

            assert run.dense_tokenizer is not None
            assert run.tokenizer is not None
            unseen.split_words = respelled(measure.texts[UNSEEN].texts, run.dense_tokenizer, run.tokenizer)

    def finish_languages(self) -> None:
        """Enter the costs of languages for the pruned model. Call it again after a training."""
        from ..vocabulary.languages import with_costs_after

        run = self.run
        assert run.tokenizer is not None
        with run.report.timed("languages"):
            by_language = with_costs_after(self.language_costs, self._language_model(), run.tokenizer)

        costs = language_costs(by_language)
        for code, result in costs.items():
            result.vectors = run.report.languages[code].vectors
        run.report.languages = costs


class Measure:
    """Perplexity by domain of causal language models. See `Embeddings` for encoders.

    Perplexity is per token of the original model's tokenizer, also where the pruned model reads with another one.

    Args:
        model: The original model, which is measured at once.
        domains: The domains, whose held-out text is measured.
        arch: The description of the model.
        max_tokens: The approximate number of held-out tokens of all domains together.
        tokenizer: The tokenizer of the model.
        vocabulary_changes: Whether another tokenizer will read the text, see `set_tokenizer`.
        unseen: Rows of unseen text of equal length, each of another document.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        domains: Sequence[Domain],
        arch: ArchSpec,
        max_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocabulary_changes: bool = False,
        unseen: Sequence[Tensor] = (),
    ):
        eos = None
        if tokenizer is not None:
            eos = tokenizer.eos_token_id

        self.heldout: dict[str, list[Tensor]] = {}
        self.documents: dict[str, Tensor] = {}
        for domain in domains:
            rows, numbers = short_rows(domain.heldout, eos, max_tokens // len(domains))
            self.heldout[domain.name] = rows
            self.documents[domain.name] = numbers
        if unseen:
            self.heldout[UNSEEN] = list(unseen)
            self.documents[UNSEEN] = torch.arange(len(unseen))
        if vocabulary_changes and tokenizer is not None:
            for name, rows in self.heldout.items():
                self.heldout[name] = list(cut_to_positions(torch.stack(rows), tokenizer, positions_of(model)))

        # All rows of a domain have the same length. A model predicts all tokens of a row but the first.
        self.tokens_predicted = {name: rows[0][1:].numel() for name, rows in self.heldout.items()}

        self.texts: dict[str, Passages] = {}
        if tokenizer is not None:
            self.texts = {name: Passages(rows, tokenizer) for name, rows in self.heldout.items()}
            if vocabulary_changes:
                self.set_tokenizer(tokenizer, model)
        self.dense_losses = self._losses(model, arch)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Read the same text with another tokenizer from now on."""
        self.heldout = {name: passages.rows(tokenizer, model) for name, passages in self.texts.items()}

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Enter the figures of both models into the report."""
        pruned_losses = self._losses(model, arch)
        for name, dense_loss in self.dense_losses.items():
            losses = {DENSE: dense_loss, PRUNED: pruned_losses[name]}
            tokens = self.tokens_predicted[name] * len(dense_loss)
            documents = self.documents[name]

            if name == UNSEEN:
                result = perplexity_result(losses, tokens, documents, metrics.KINDS_DIFFER)
                report.unseen = unseen_of(result, "")
                continue

            result = perplexity_result(losses, tokens, documents, metrics.PARTS_DIFFER)
            if name in self.texts:
                result.bits_per_byte = self._bits_per_byte(name, losses)
            report.domains[name] = result

    def _bits_per_byte(self, name: str, losses: Mapping[str, Tensor]) -> Figure:
        """Return the losses of a domain in bits per byte of its text."""
        totals = {model: loss * self.tokens_predicted[name] for model, loss in losses.items()}
        return Figure.of({model: self.texts[name].bits_per_byte(total) for model, total in totals.items()})

    def _losses(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, Tensor]:
        """Return the loss per predicted token of each sample by domain, shape `(samples,)`, fp64.

        Each process runs a part of the samples and gets the losses of all samples.
        """
        texts = [shard(rows) for rows in self.heldout.values()]
        if is_offloaded(model):
            own_losses = layerwise_losses(model, arch, texts)
        else:
            tokens = metrics.tokens_per_pass(model, AT_ONCE)
            bar = progress(texts, desc="Measuring perplexity", unit="text", leave=False, delay=1)
            own_losses = [metrics.row_losses(model, text, tokens) for text in bar]
        by_process = gather_objects(own_losses)

        losses = {}
        for index, (name, rows) in enumerate(self.heldout.items()):
            parts = [domain_losses[index] for domain_losses in by_process]
            total = parts[0]
            if not every_process_runs(rows):
                total = _interleaved(parts, len(rows))
            if total.isnan().any():
                _raise_not_a_number(name)
            losses[name] = total / self.tokens_predicted[name]
        return losses


def _interleaved(parts: Sequence[Tensor], count: int) -> Tensor:
    """Return the losses of all rows in order. Process n of N has run the rows n, n + N, n + 2N, and so on."""
    number = len(parts)
    return torch.stack([parts[row % number][row // number] for row in range(count)])


def _raise_not_a_number(name: str) -> NoReturn:
    text = f"held-out text of the domain {name!r}"
    if name == UNSEEN:
        text = "unseen text"
    raise StructPruneError(
        f"The perplexity on {text} is not a number. Load the model in float32 or bfloat16, or check its weights."
    )


def short_rows(samples: Tensor, eos: int | None, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Cut short rows from samples, from as many documents as possible.

    The confidence interval is over documents, so there are at least 12 rows. Each row begins with the prefix.

    Args:
        samples: Token ids, shape `(samples, seq_length)`; documents end with `eos`.
        eos: The token that ends a document.
        tokens: The approximate number of tokens of all rows.

    Returns:
        The rows, and the number of the document at the start of each row.
    """
    length = min(ROW, samples.shape[1])
    starts = range(1, samples.shape[1] - length + 2, length - 1)

    rows = []
    documents = []
    for sample, numbers in zip(samples, document_numbers(samples, eos), strict=True):
        for start in starts:
            rows.append(torch.cat([sample[:1], sample[start : start + length - 1]]))
            documents.append(int(numbers[start]))

    # Take the first row of every document, then the second row of every document, and so on.
    rows_of_document: Counter[int] = Counter()
    ranks = []
    for document in documents:
        ranks.append(rows_of_document[document])
        rows_of_document[document] += 1

    count = max(tokens // length, metrics.MANY_DOCUMENTS)
    by_rank = sorted(range(len(rows)), key=ranks.__getitem__)
    chosen = sorted(by_rank[:count])
    return [rows[place] for place in chosen], torch.tensor(documents)[chosen]


@torch.no_grad()
def layerwise_losses(model: PreTrainedModel, arch: ArchSpec, texts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the `row_losses` of the samples of several texts. Each layer is loaded once for all texts."""
    from ..sources.offloaded import Offloaded

    batches = []
    for number, text in enumerate(texts):
        batches += [Batch(number, row[None]) for row in text]

    with metrics.evaluating(model):
        source = Offloaded(model, arch, batches)
        for layer in range(arch.num_layers):
            with source.at(layer):
                source.pass_through(layer)

        losses = []
        for index, batch in enumerate(batches):
            with skipping_layers(source, arch.num_layers, index):
                losses.append(metrics.total_loss(model, batch.ids))

    sizes = [len(text) for text in texts]
    return list(torch.tensor(losses, dtype=torch.float64).split(sizes))


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
