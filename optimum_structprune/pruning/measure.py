"""How good a model is before and after, on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
from ..record.report import Report, enter_figures
from ..system.processes import every_process_runs, gather_objects, shard


if TYPE_CHECKING:
    from .embeddings import Embeddings
    from .run import Run

# A trial runs about so many held-out tokens, over all domains, and compares the predictions of every fourth one.
PROBE_TOKENS = 2048
STRIDE = 4
ROW = 64  # tokens in a row of held-out text: fewer are hard to predict, with so little in front of them
AT_ONCE = 512  # on a CPU, short rows run together up to this number of tokens
# The name of other text beside the domains, whose names are not empty.
OTHER = ""
# The token ids of samples by domain; their lengths differ where a tokenizer reads text that another has cut.
Rows = Mapping[str, list[Tensor]]


class Comparison:
    """Measures the dense model of a run when it is made, and the smaller one beside it when it is finished.

    Where the vocabulary changes, the dense model is measured on the same text as the smaller one, see `read_by`.
    On trial no languages are measured but those to keep.
    """

    def __init__(self, run: Run, vocabulary_changes: bool = False, on_trial: bool = False):
        self.run = run
        self.measure: Measure | Embeddings | None = None
        data, report, tokenizer, causal = run.data, run.report, run.dense_tokenizer, run.arch.causal
        domains, wanted = data.domains, run.config.languages or ()
        languages = bool(wanted) or vocabulary_changes and not on_trial
        with report.timed("perplexity"):
            if causal:
                heldout = run.config.holdout * sum(domain.samples.numel() for domain in domains)
                most = min(metrics.MEASURED_TOKENS, round(heldout))
                other: Sequence[Tensor] = ()
                if tokenizer is not None and domains[0].origin is not None:  # no program gave inputs
                    from ..sources.other import other_text

                    with report.timed("other text"):
                        found = other_text(run.config, run.model, tokenizer, domains, run.earlier)
                    report.other, other = {"source": found.source}, found.rows
                    run.entries += found.entries
                self.measure = Measure(run.model, domains, run.arch, most, tokenizer, vocabulary_changes, other)
            elif tokenizer is None or reads_text(run.model):
                from .embeddings import Embeddings, judged_texts

                texts, entries = judged_texts(domains, tokenizer, run.config.seed, run.earlier)
                run.entries += entries
                self.measure = Embeddings(run.model, texts, tokenizer, languages)
        if tokenizer is not None and languages:
            from ..vocabulary.languages import costs_before

            with report.timed("languages"):
                report.languages = costs_before(run.model if causal else None, tokenizer, wanted)

    def finish(self) -> None:
        """Put the losses of the smaller model into the report, and the words that it spells otherwise."""
        run, measure = self.run, self.measure
        if measure is None:
            return
        with run.report.timed("perplexity"):
            measure.after(run.model, run.arch, run.report)
        if isinstance(measure, Measure) and run.report.trimmed and (other := measure.texts.get(OTHER)):
            from ..sources.other import respelled

            assert run.dense_tokenizer is not None and run.tokenizer is not None
            run.report.other["respelled"] = respelled(other.texts, run.dense_tokenizer, run.tokenizer)

    def finish_languages(self) -> None:
        """Put what languages cost into the report, after a training too."""
        from ..vocabulary.languages import with_costs_after

        run, known = self.run, self.run.report.languages
        assert run.tokenizer is not None
        with run.report.timed("languages"):
            run.report.languages = with_costs_after(known, run.model if run.arch.causal else None, run.tokenizer)


class Measure:
    """Perplexity by domain, of models that predict the next token; `Embeddings` is its like for all others.

    It is measured on about `most` held-out tokens of all domains together. Perplexity is per token of the dense
    model's `tokenizer`. Where another will read the text (`vocabulary_changes`, see `read_by`), the dense model is
    measured on the same text. `other` are rows of equal length by which nothing is chosen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        domains: Sequence[Domain],
        arch: ArchSpec,
        most: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocabulary_changes: bool = False,
        other: Sequence[Tensor] = (),
    ):
        share, eos = most // len(domains), None if tokenizer is None else tokenizer.eos_token_id
        short = {domain.name: short_rows(domain.heldout, eos, share) for domain in domains}
        short |= {OTHER: ([*other], torch.arange(len(other)))} if other else {}  # each row is of another document
        self.heldout: Rows = {name: rows for name, (rows, _) in short.items()}
        self.documents = {name: numbers for name, (_, numbers) in short.items()}
        self.tokens_predicted = {name: rows[0][1:].numel() for name, rows in self.heldout.items()}
        self.texts: dict[str, Passages] = {}
        if tokenizer is not None:
            self.texts = {name: Passages(rows, tokenizer) for name, rows in self.heldout.items()}
            if vocabulary_changes:
                self.read_by(tokenizer, model)
        self.dense_figures = self._losses(model, arch)

    def read_by(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Measure from now on in the tokens of another tokenizer, which `model` reads, on the same text."""
        self.heldout = {name: passages.rows(tokenizer, model) for name, passages in self.texts.items()}

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Put the figures of the smaller model into the report, beside those of the dense one."""
        smaller = self._losses(model, arch)
        for name, before in self.dense_figures.items():
            losses = {"before": before, "after": smaller[name]}
            tokens = self.tokens_predicted[name] * len(before)
            differs = metrics.KINDS_DIFFER if name == OTHER else metrics.PARTS_DIFFER
            figures = metrics.perplexity_figures(losses, tokens, self.documents[name], differs)
            enter_figures(report, name, figures, name == OTHER)
            if name != OTHER and (passages := self.texts.get(name)):
                report.bits_per_byte[name] = {
                    when: passages.bits_per_byte(loss * self.tokens_predicted[name]) for when, loss in losses.items()
                }

    def _losses(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, Tensor]:
        """The loss per predicted token of each sample by domain, of all processes, shape `(samples,)`, fp64."""
        texts = [shard(rows) for rows in self.heldout.values()]
        if is_offloaded(model):
            values = layerwise_losses(model, arch, texts)
        else:
            tokens = metrics.tokens_per_pass(model, AT_ONCE)
            values = [metrics.row_losses(model, text, tokens) for text in texts]
        losses = {}
        for (name, rows), parts in zip(self.heldout.items(), zip(*gather_objects(values), strict=True), strict=True):
            total = parts[0]
            if not every_process_runs(rows):  # each has run every N-th row, and `documents` has them in order
                total = torch.stack([parts[place % len(parts)][place // len(parts)] for place in range(len(rows))])
            losses[name] = total / self.tokens_predicted[name]
            if total.isnan().any():
                which = f"held-out text of the domain {name!r}" if name else "other text"
                raise StructPruneError(
                    f"The perplexity on {which} is not a number; load the model in float32 or bfloat16, or check its "
                    "weights."
                )
        return losses


def short_rows(samples: Tensor, eos: int | None, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Cut short rows from samples, of about `tokens` tokens in all, and number the document that each begins in.

    The samples have the shape `(samples, seq_length)`, and documents end with `eos`. Each row has the prefix in front.
    There are 12 rows or more, of as many documents as there are, because the margin of error is one over documents.
    """
    length, numbers = min(ROW, samples.shape[1]), document_numbers(samples, eos)
    starts = range(1, samples.shape[1] - length + 2, length - 1)
    rows = [torch.cat([sample[:1], sample[start : start + length - 1]]) for sample in samples for start in starts]
    documents = [int(number[start]) for number in numbers for start in starts]
    before = [documents[:place].count(number) for place, number in enumerate(documents)]  # rows of the same document
    taken = sorted(sorted(range(len(rows)), key=before.__getitem__)[: max(tokens // length, metrics.MANY_DOCUMENTS)])
    return [rows[place] for place in taken], torch.tensor(documents)[taken]


@torch.no_grad()
def layerwise_losses(model: PreTrainedModel, arch: ArchSpec, texts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The `row_losses` of the samples of several texts; every layer is brought in once for all of them."""
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
    """The first layers of a model do not run inside `with`: they give the stored hidden states of one batch."""
    hidden, extras = source.hidden[index], source.extras
    outputs = [hidden if (more := extras[layer]) is None else (hidden, *more) for layer in range(count)]
    with replaying(layer_list(source.model, source.arch)[:count], outputs):
        yield
