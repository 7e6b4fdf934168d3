"""Measures the original and the pruned model of a run on held-out and on unseen text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.hooks import replaying
from ..arch.meta import is_offloaded, reads_text
from ..arch.modules import layer_list
from ..arch.spec import ArchSpec
from ..domains.packing import Domain, Passages, document_numbers
from ..errors import StructPruneError
from ..forward import metrics
from ..method.layers import Batch, InMemory
from ..record.figures import DENSE, PRUNED, Figure, language_costs, perplexity_result, unseen_of
from ..record.report import Report
from ..steps.base import RunState
from ..system.processes import every_process_runs, gather_objects, shard


if TYPE_CHECKING:
    from .embeddings import Embeddings

# A trial runs about this many held-out tokens, over all domains, and compares every fourth prediction.
PROBE_TOKENS = 2048
STRIDE = 4
# The tokens in a row of held-out text. With a shorter context, tokens are hard to predict.
ROW = 64
# On a CPU, rows run together up to this number of tokens.
AT_ONCE = 512
# The name of unseen text beside the domains, whose names are not empty.
UNSEEN = ""


class Comparison:
    """Measures the original model of a run when it is made, and the pruned model when it is finished.

    Args:
        run: The state of the run, whose report gets the figures.
        vocabulary_changes: Whether another tokenizer will read the text. Both models then read the same text.
        any_language: Whether languages are measured that the config does not name, if the vocabulary changes.
    """

    def __init__(self, run: RunState, vocabulary_changes: bool = False, any_language: bool = True):
        self.run = run
        self.measure: Measure | Embeddings | None = None
        self.unseen_source = ""
        self.language_costs: Mapping[str, Mapping[str, Any]] = {}

        wanted = run.config.languages or ()
        measures_languages = bool(wanted) or (vocabulary_changes and any_language)
        with run.report.timed("perplexity"):
            if run.arch.causal:
                self.measure = self._causal(vocabulary_changes)
            elif run.dense_tokenizer is None or reads_text(run.model):
                self.measure = self._encoder(measures_languages)
        if run.dense_tokenizer is not None and measures_languages:
            self._start_languages(wanted)

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

    def _start_languages(self, wanted: Sequence[str]) -> None:
        """Measure the original model in 30 languages."""
        from ..vocabulary.languages import costs_before

        run = self.run
        assert run.dense_tokenizer is not None
        with run.report.timed("languages"):
            model = run.model if run.arch.causal else None
            self.language_costs = costs_before(model, run.dense_tokenizer, wanted)
        run.report.languages = language_costs(self.language_costs)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Measure in the tokens of another tokenizer from now on. Raise if its samples are too long for the model."""
        if self.measure is not None:
            self.measure.read_by(tokenizer, model)

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
        """Enter the costs of languages for the pruned model, after a training too."""
        from ..vocabulary.languages import with_costs_after

        run = self.run
        assert run.tokenizer is not None
        model = run.model if run.arch.causal else None
        with run.report.timed("languages"):
            costs = language_costs(with_costs_after(self.language_costs, model, run.tokenizer))
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
        max_tokens: The number of held-out tokens of all domains together, about.
        tokenizer: The tokenizer of the model.
        vocabulary_changes: Whether another tokenizer will read the text, see `read_by`.
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
        eos = None if tokenizer is None else tokenizer.eos_token_id
        self.heldout: dict[str, list[Tensor]] = {}
        self.documents: dict[str, Tensor] = {}
        for domain in domains:
            rows, numbers = short_rows(domain.heldout, eos, max_tokens // len(domains))
            self.heldout[domain.name] = rows
            self.documents[domain.name] = numbers
        if unseen:
            self.heldout[UNSEEN] = list(unseen)
            self.documents[UNSEEN] = torch.arange(len(unseen))

        self.tokens_predicted = {name: rows[0][1:].numel() for name, rows in self.heldout.items()}
        self.texts: dict[str, Passages] = {}
        if tokenizer is not None:
            self.texts = {name: Passages(rows, tokenizer) for name, rows in self.heldout.items()}
            if vocabulary_changes:
                self.read_by(tokenizer, model)
        self.dense_losses = self._losses(model, arch)

    def read_by(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Read the same text with another tokenizer from now on."""
        self.heldout = {name: passages.rows(tokenizer, model) for name, passages in self.texts.items()}

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Enter the figures of the pruned model beside those of the original model."""
        pruned_losses = self._losses(model, arch)
        for name, dense_loss in self.dense_losses.items():
            losses = {DENSE: dense_loss, PRUNED: pruned_losses[name]}
            tokens = self.tokens_predicted[name] * len(dense_loss)
            spread = metrics.KINDS_DIFFER if name == UNSEEN else metrics.PARTS_DIFFER
            result = perplexity_result(losses, tokens, self.documents[name], spread)
            if name == UNSEEN:
                report.unseen = unseen_of(result, "")
                continue
            report.domains[name] = result
            if name in self.texts:
                result.bits_per_byte = self._bits_per_byte(name, losses)

    def _bits_per_byte(self, name: str, losses: Mapping[str, Tensor]) -> Figure:
        """Return the losses of a domain in bits per byte of its text."""
        totals = {model: loss * self.tokens_predicted[name] for model, loss in losses.items()}
        return Figure.of({model: self.texts[name].bits_per_byte(total) for model, total in totals.items()})

    def _losses(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, Tensor]:
        """Return the loss per predicted token of each sample by domain, shape `(samples,)`, fp64.

        Each process runs a part of the samples, and all get all losses.
        """
        texts = [shard(rows) for rows in self.heldout.values()]
        if is_offloaded(model):
            own_losses = layerwise_losses(model, arch, texts)
        else:
            tokens = metrics.tokens_per_pass(model, AT_ONCE)
            own_losses = [metrics.row_losses(model, text, tokens) for text in texts]
        by_domain = zip(*gather_objects(own_losses), strict=True)

        losses = {}
        for (name, rows), parts in zip(self.heldout.items(), by_domain, strict=True):
            total = parts[0]
            if not every_process_runs(rows):
                # Process n has run every n-th row.
                total = torch.stack([parts[place % len(parts)][place // len(parts)] for place in range(len(rows))])
            if total.isnan().any():
                text = "unseen text" if name == UNSEEN else f"held-out text of the domain {name!r}"
                raise StructPruneError(
                    f"The perplexity on {text} is not a number. Load the model in float32 or bfloat16, or check its "
                    "weights."
                )
            losses[name] = total / self.tokens_predicted[name]
        return losses


def short_rows(samples: Tensor, eos: int | None, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Cut short rows from samples, from as many documents as possible.

    The confidence interval is over documents, so there are at least 12 rows. Each row begins with the prefix.

    Args:
        samples: Token ids, shape `(samples, seq_length)`; documents end with `eos`.
        eos: The token that ends a document.
        tokens: The number of tokens of all rows, about.

    Returns:
        The rows, and the number of the document that each begins in.
    """
    length = min(ROW, samples.shape[1])
    starts = range(1, samples.shape[1] - length + 2, length - 1)
    rows = []
    documents = []
    for sample, numbers in zip(samples, document_numbers(samples, eos), strict=True):
        for start in starts:
            rows.append(torch.cat([sample[:1], sample[start : start + length - 1]]))
            documents.append(int(numbers[start]))

    # The first row of each document comes before the second row of any.
    seen: Counter[int] = Counter()
    rank = []
    for document in documents:
        rank.append(seen[document])
        seen[document] += 1
    count = max(tokens // length, metrics.MANY_DOCUMENTS)
    chosen = sorted(sorted(range(len(rows)), key=rank.__getitem__)[:count])
    return [rows[place] for place in chosen], torch.tensor(documents)[chosen]


@torch.no_grad()
def layerwise_losses(model: PreTrainedModel, arch: ArchSpec, texts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the `row_losses` of the samples of several texts; every layer is loaded once for all of them."""
    from ..sources.offloaded import Offloaded

    batches = [Batch(number, row[None]) for number, text in enumerate(texts) for row in text]
    with metrics.evaluating(model):
        source = Offloaded(model, arch, batches)
        for layer in range(arch.num_layers):
            with source.at(layer):
                source.pass_through(layer)

        losses = []
        for index, batch in enumerate(batches):
            with skipping_layers(source, arch.num_layers, index):
                losses.append(metrics.total_loss(model, batch.ids))
    return list(torch.tensor(losses, dtype=torch.float64).split([len(text) for text in texts]))


@contextmanager
def skipping_layers(source: InMemory, count: int, index: int) -> Iterator[None]:
    """Replace the first layers of a model by the stored hidden states of one batch inside `with`."""
    hidden = source.hidden[index]
    outputs: list[Any] = []
    for layer in range(count):
        extra = source.extras[layer]
        outputs.append(hidden if extra is None else (hidden, *extra))
    with replaying(layer_list(source.model, source.arch)[:count], outputs):
        yield
