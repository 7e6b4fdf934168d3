"""Measure the original and the pruned model of a run on held-out and on unseen text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of, reads_text
from ..arch.spec import ArchSpec
from ..domains.load import MEASURED_TOKENS
from ..measure.losses import measure_all, totals
from ..measure.text import Text
from ..record.figures import (
    ORIGINAL,
    PRUNED,
    UNSEEN_TEXT,
    Figure,
    Measurements,
    language_costs,
    perplexity_result,
    unseen_of,
)
from ..record.report import Report
from ..steps.base import RunState
from ..system.errors import StructPruneError
from ..system.margins import KINDS_DIFFER, PARTS_DIFFER


if TYPE_CHECKING:
    from ..measure.vectors import Embeddings


class Comparison:
    """Comparison of the original and the pruned model of a run.

    The constructor measures the original model, and `finish` measures the pruned model.

    Args:
        run: The state of the run. The figures are entered into its report.
        vocabulary_changes: Whether another tokenizer will read the text. Both models then read the same text.
    """

    def __init__(self, run: RunState, vocabulary_changes: bool = False):
        self.run = run
        self.measure: DomainLosses | Embeddings | None = None
        self.unseen_source = ""
        self.language_costs: Mapping[str, Mapping[str, Any]] = {}

        languages = run.config.languages or ()
        measures_languages = bool(languages) or vocabulary_changes

        with run.report.timed("perplexity"):
            if run.arch.causal:
                self.measure = self._causal(vocabulary_changes)
            elif run.original_tokenizer is None or reads_text(run.model):
                self.measure = self._encoder(measures_languages)
        if run.original_tokenizer is not None and measures_languages:
            self._start_languages(languages)

    def _causal(self, vocabulary_changes: bool) -> DomainLosses:
        """Measure a causal language model on the domains and on unseen text."""
        run = self.run
        domains = run.data.domains
        heldout_tokens = run.config.holdout * sum(domain.samples.numel() for domain in domains)
        max_tokens = min(MEASURED_TOKENS, round(heldout_tokens))
        if run.config.removes_only_tokens:
            # Measuring would take most of the run.
            max_tokens //= 2
        tokens_per_domain = max_tokens // len(domains)
        texts = {
            domain.name: Text.short(domain.heldout, run.original_tokenizer, tokens_per_domain) for domain in domains
        }

        # Inputs that a program gave have no origin.
        if run.original_tokenizer is not None and domains[0].origin is not None:
            self.unseen_source = run.unseen.source
            if run.unseen.rows:
                texts[UNSEEN_TEXT] = Text(run.unseen.rows, tokenizer=run.original_tokenizer)

        tokenizer = run.original_tokenizer if vocabulary_changes else None
        if tokenizer is not None:
            texts = {name: text.cut(positions_of(run.model)) for name, text in texts.items()}
        return DomainLosses(run.model, texts, run.arch, tokenizer)

    def _encoder(self, measures_languages: bool) -> Embeddings:
        """Measure the vectors of an encoder."""
        from ..measure.vectors import Embeddings, judged_texts

        run = self.run
        texts, entries = judged_texts(run.data.domains, run.original_tokenizer, run.config.seed, run.earlier)
        run.entries += entries
        return Embeddings(run.model, texts, run.original_tokenizer, measures_languages)

    def _start_languages(self, languages: Sequence[str]) -> None:
        """Measure the original model in 30 languages. `languages` are the codes that the config names."""
        from ..measure.languages import costs_before

        run = self.run
        assert run.original_tokenizer is not None
        with run.report.timed("languages"):
            self.language_costs = costs_before(self._language_model(), run.original_tokenizer, languages)
        run.report.languages = language_costs(self.language_costs)

    def _language_model(self) -> PreTrainedModel | None:
        """Return the model if it predicts tokens, or None for an encoder, whose languages are counted in tokens."""
        if self.run.arch.causal:
            return self.run.model
        return None

    def finish(self) -> None:
        """Enter the figures of the pruned model, and the share of words that are split."""
        run = self.run
        measure = self.measure
        if measure is None:
            return
        if run.tokenizer is not None and run.tokenizer is not run.original_tokenizer:
            measure.set_tokenizer(run.tokenizer, run.model)

        with run.report.timed("perplexity"):
            if isinstance(measure, DomainLosses):
                measure.after(run.model, run.arch, run.report)
            else:
                enter_vectors(run.report, measure, run.model)

        unseen = run.report.unseen
        if unseen is None:
            return

        unseen.source = self.unseen_source
        if isinstance(measure, DomainLosses) and run.report.trimmed is not None:
            from ..domains.unseen import respelled

            assert run.original_tokenizer is not None
            assert run.tokenizer is not None
            unseen.split_words = respelled(measure.texts[UNSEEN_TEXT].strings, run.original_tokenizer, run.tokenizer)

    def finish_languages(self) -> None:
        """Enter the costs of languages for the pruned model, if languages were measured."""
        from ..measure.languages import with_costs_after

        run = self.run
        if not run.report.languages:
            return
        assert run.tokenizer is not None
        with run.report.timed("languages"):
            by_language = with_costs_after(self.language_costs, self._language_model(), run.tokenizer)

        costs = language_costs(by_language)
        for code, result in costs.items():
            vectors = run.report.languages[code]
            result.texts = vectors.texts
            result.cosine = vectors.cosine
        run.report.languages = costs


class DomainLosses:
    """Perplexity by domain of causal language models. See `Embeddings` for encoders.

    Perplexity is per token of the original model's tokenizer, also where the pruned model reads with another one.

    Args:
        model: The original model, which is measured at once.
        texts: The texts by domain, and unseen text as `UNSEEN_TEXT`.
        arch: The description of the model.
        tokenizer: The tokenizer of the model, if another tokenizer will read the text. The original model then reads
            the same text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Mapping[str, Text],
        arch: ArchSpec,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.texts = dict(texts)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, model)
        self.original_losses = self._losses(model, arch)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Read the same text with another tokenizer from now on."""
        self.texts = {name: text.for_tokenizer(tokenizer, model) for name, text in self.texts.items()}

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Enter the figures of both models into the report."""
        pruned_losses = self._losses(model, arch)
        for name, text in self.texts.items():
            totals_by_model = {ORIGINAL: self.original_losses[name], PRUNED: pruned_losses[name]}
            losses = {model_name: total / text.tokens for model_name, total in totals_by_model.items()}
            tokens = int(text.tokens.sum())

            if name == UNSEEN_TEXT:
                result = perplexity_result(losses, tokens, text.documents, KINDS_DIFFER)
                report.unseen = unseen_of(result, "")
                continue

            result = perplexity_result(losses, tokens, text.documents, PARTS_DIFFER)
            if text.tokenizer is not None:
                bits = {model_name: text.bits_per_byte(total) for model_name, total in totals_by_model.items()}
                result.bits_per_byte = Figure.of(bits)
            report.domains[name] = result

    def _losses(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, Tensor]:
        """Return the total loss of each row by domain, shape `(rows,)`, fp64."""
        losses = {}
        for name, measured in measure_all(model, self.texts, arch=arch).items():
            losses[name] = totals(measured.loss)
            if losses[name].isnan().any():
                _raise_not_a_number(name)
        return losses


def _raise_not_a_number(name: str) -> NoReturn:
    text = f"held-out text of the domain {name!r}"
    if name == UNSEEN_TEXT:
        text = "unseen text"
    raise StructPruneError(
        f"The perplexity on {text} is not a number. Load the model in float32 or bfloat16, or check its weights."
    )


def enter_vectors(table: Measurements, embeddings: Embeddings, model: PreTrainedModel) -> None:
    """Enter the figures of a pruned encoder into a table, with perplexity if a head predicts tokens."""
    by_domain, by_language = embeddings.figures(model)
    table.domains.update(by_domain)

    for name, pruned_losses in embeddings.losses(model).items():
        losses = {ORIGINAL: embeddings.original_losses[name], PRUNED: pruned_losses}
        tokens = int(embeddings.gaps[name].tokens.sum())
        documents = torch.tensor(embeddings.texts[name].documents)[: len(pruned_losses)]
        loss = perplexity_result(losses, tokens, documents)
        result = by_domain[name]
        result.perplexity = loss.perplexity
        result.tokens = loss.tokens
        result.documents = loss.documents

    for code, vectors in by_language.items():
        table.languages[code].texts = vectors.texts
        table.languages[code].cosine = vectors.cosine
