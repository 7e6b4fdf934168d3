"""The table of measurements: figures of several models on several texts, with confidence intervals.

A figure has one value for each model that was measured: `original`, `pruned` and `recovered`, in this order. A figure
that was not measured is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import exp, hypot, inf, isfinite
from statistics import fmean, geometric_mean
from typing import Any, TypeVar

from torch import Tensor

from ..system.margins import MIN_RELATIVE_MARGIN, margin_of_error


# The constants of `technical_ratio`: the additional loss in nats per token if every word is split, and the share of
# split words in technical text relative to unseen text. docs/how_much.md has the measurements.
SPLIT_LOSS = 6.0
TECHNICAL_SPLITS = 2.0
# The names of the models of a run, from the first model to the last.
ORIGINAL, PRUNED, RECOVERED = "original", "pruned", "recovered"
# The name of unseen text among the domains. Names of domains are not empty.
UNSEEN_TEXT = ""
# A language whose vectors have a lower mean cosine to the vectors of the original model got worse.
MIN_LANGUAGE_COSINE = 0.98
AnyText = TypeVar("AnyText", bound="TextResult")


@dataclass(frozen=True)
class Figure:
    """One measured quantity of up to three models on one text.

    Attributes:
        original: The value of the original model.
        pruned: The value of the pruned model.
        recovered: The value of the pruned model after training.
        margin: Half the width of the 90% confidence interval over documents. It belongs to `ratio` if there is one,
            and to the last value otherwise.
    """

    original: float | None = None
    pruned: float | None = None
    recovered: float | None = None
    margin: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, float], margin: float | None = None) -> Figure:
        """Return the figure with these values by the names of the models. An infinite margin counts as unknown."""
        if margin is not None and not isfinite(margin):
            margin = None
        return cls(**values, margin=margin)

    @property
    def values(self) -> dict[str, float]:
        """Return the measured values by the names of the models."""
        values = {ORIGINAL: self.original, PRUNED: self.pruned, RECOVERED: self.recovered}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def model(self) -> str:
        """Return the name of the last model; empty if none was measured."""
        return next(reversed(self.values), "")

    @property
    def last(self) -> float | None:
        """Return the value of the last model."""
        return self.values.get(self.model)

    @property
    def ratio(self) -> float | None:
        """Return the last value divided by the first, or None if fewer than two models were measured."""
        return self.ratio_of(self.model)

    def ratio_of(self, model: str) -> float | None:
        """Return the value of a model divided by the first value.

        The ratio is infinite if a value is not finite, and None for the first model and models without a value.
        """
        values = self.values
        first = next(iter(values), model)
        if model == first or model not in values:
            return None
        if not isfinite(values[model]) or not 0 < values[first] < inf:
            return inf
        return values[model] / values[first]

    def of_model(self, model: str) -> Figure:
        """Return the values of the original model and of one other; an empty figure if it was not measured."""
        values = self.values
        if model not in values:
            return Figure()
        margin = self.margin if model == self.model else None
        return Figure.of({name: value for name, value in values.items() if name in (ORIGINAL, model)}, margin)


@dataclass
class TextResult:
    """The measurements on one text.

    Attributes:
        perplexity: The perplexity on held-out text, per token of the original tokenizer. For masked language models
            and encoder-decoders it is the perplexity of the missing text.
        bits_per_byte: The loss in bits per byte of the text.
        divergence: The mean KL divergence from the original model in nats per token.
        agreement: The share of positions where the model and the original model predict the same token.
        cosine: For encoders, the mean cosine of vectors to the vectors of the original model; None if the number of
            channels differs.
        cosine_p5: The 5th percentile of the cosines.
        cosine_worst: The lowest cosine.
        neighbours: For encoders, the share of the 10 nearest neighbours that the model has in common with the original
            model; None for too few texts.
        retrieval: For encoders, the mean reciprocal rank of the passage that each query should find: of the rest of
            its document, or of its partner in a file of pairs. None for too few documents.
        texts: The number of vectors; None where vectors were not compared.
        tokens: The number of tokens that perplexity was measured on; None where it was not measured.
        documents: The number of documents of these tokens.
    """

    perplexity: Figure | None = None
    bits_per_byte: Figure | None = None
    divergence: Figure | None = None
    agreement: Figure | None = None
    cosine: Figure | None = None
    cosine_p5: Figure | None = None
    cosine_worst: Figure | None = None
    neighbours: Figure | None = None
    retrieval: Figure | None = None
    texts: int | None = None
    tokens: int | None = None
    documents: int | None = None

    def of_model(self: AnyText, model: str) -> AnyText:
        """Return the result of the original model and of one other."""
        figures: dict[str, Any] = {}
        for attribute in fields(self):
            figure = getattr(self, attribute.name)
            if isinstance(figure, Figure):
                figures[attribute.name] = figure.of_model(model)
        return replace(self, **figures)


@dataclass
class UnseenResult(TextResult):
    """The measurements on unseen text, which the run does not use for any decision.

    Attributes:
        source: The origin of the text: `from the Hub`, `model-written`, or `built-in`.
        split_words: The share of its words that are split into more tokens after vocabulary trimming.
    """

    source: str = ""
    split_words: float | None = None

    def with_technical_margin(self, split_words: float | None) -> UnseenResult:
        """Return the result with an interval of the perplexity that includes the loss on technical text.

        Args:
            split_words: The share of the words that are split into more tokens; None if the vocabulary is unchanged.
        """
        perplexity = self.perplexity
        if split_words is not None and perplexity is not None and perplexity.ratio is not None:
            distance = technical_ratio(split_words) - perplexity.ratio
            perplexity = Figure.of(perplexity.values, max(perplexity.margin or 0.0, distance))
        return replace(self, perplexity=perplexity, split_words=split_words)


@dataclass
class LanguageResult(TextResult):
    """The measurements on the same text in one language.

    Attributes:
        cost: The cost in bits per byte, or in tokens if the model does not predict the next token.
        wanted: Whether the config names the language.
        known: Whether the original model reads the language in at most twice the bits of its best language; None
            where tokens are counted.
    """

    cost: Figure = field(default_factory=Figure)
    wanted: bool = False
    known: bool | None = None

    @property
    def severity(self) -> float:
        """Return how much worse the language got: one minus the cosine for encoders, else the ratio of the costs."""
        if self.cosine is not None:
            return 1.0 - (self.cosine.last or 0.0)
        return self.cost.ratio or 0.0

    def is_worse(self, limit: float) -> bool:
        """Return whether the language got worse.

        The number of tokens alone does not show a loss: one unknown token replaces many tokens. The vectors of an
        encoder show it.

        Args:
            limit: The ratio of the costs above which a language is worse.
        """
        if self.cosine is not None and (self.cosine.last or 0.0) < MIN_LANGUAGE_COSINE:
            return True
        return (self.cost.ratio or 0.0) > limit


@dataclass
class Reading:
    """The predictions of one model along the original model's answer to one question.

    Attributes:
        tokens: The number of the model's tokens that spell the answer.
        agreed: The number of these tokens that are the most likely next token.
        first: The number of tokens before the first that is not.
        log_probability: The log-probability of the answer in nats.
    """

    tokens: int
    agreed: int
    first: int
    log_probability: float


@dataclass
class Answer:
    """The answer of one model to one question.

    Attributes:
        text: The answer.
        right: Whether it is correct.
        loops: Whether it repeats itself.
        stopped: Whether it ended before the limit of tokens.
        tokens: The number of tokens.
        reading: The predictions of the model along the original model's answer; None if they were not measured, or if
            that answer is empty.
    """

    text: str
    right: bool
    loops: bool
    stopped: bool
    tokens: int = 0
    reading: Reading | None = None


@dataclass
class AnsweredQuestion:
    """A question and the answers of the models by name, from the first model to the last.

    Attributes:
        kind: The kind of question.
        prompt: The question.
        answers: The answers by the name of the model.
    """

    kind: str
    prompt: str
    answers: dict[str, Answer]

    @property
    def first(self) -> Answer:
        """Return the answer of the first model."""
        return next(iter(self.answers.values()))

    @property
    def last(self) -> Answer:
        """Return the answer of the last model."""
        return next(reversed(self.answers.values()))


@dataclass
class AnswersResult:
    """The answers of several models to the same questions.

    Attributes:
        questions: The questions with all answers.
    """

    questions: list[AnsweredQuestion] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Return the names of the models that answered."""
        if not self.questions:
            return []
        return list(self.questions[0].answers)

    def counts(self, name: str) -> list[int]:
        """Return the number of answers of each model for which `right`, `loops` or `stopped` holds."""
        counts = []
        for model in self.models:
            values = [getattr(question.answers[model], name) for question in self.questions]
            counts.append(sum(values))
        return counts


@dataclass(kw_only=True)
class Measurements:
    """All figures of some models, by text. Pruning, recovery and evaluation add the columns of their models.

    Attributes:
        domains: The results by domain.
        unseen: The results on unseen text; None where it was not measured.
        languages: The results by language code, where tokens were removed or languages were named.
        answers: The answers of the models to test questions; None where no questions were asked.
    """

    domains: dict[str, TextResult] = field(default_factory=dict)
    unseen: UnseenResult | None = None
    languages: dict[str, LanguageResult] = field(default_factory=dict)
    answers: AnswersResult | None = None

    @property
    def unseen_perplexity(self) -> Figure | None:
        """Return the perplexity on unseen text."""
        return None if self.unseen is None else self.unseen.perplexity

    @property
    def has_original(self) -> bool:
        """Return whether perplexity was measured, and the original model on the same text."""
        figures = [domain.perplexity for domain in self.domains.values() if domain.perplexity is not None]
        return bool(figures) and all(figure.original is not None for figure in figures)

    @property
    def has_perplexity(self) -> bool:
        """Return whether perplexity was measured on any domain."""
        return any(domain.perplexity is not None for domain in self.domains.values())

    @property
    def has_vectors(self) -> bool:
        """Return whether the vectors of an encoder were compared on any domain."""
        return any(domain.texts is not None for domain in self.domains.values())


@dataclass
class FileResult:
    """The size of the file that is served, in bytes.

    Attributes:
        asked: The limit of the budget.
        predicted: The size that was computed from the shape.
        measured: The size of the written file; None before it is written.
        type: The data type of a GGUF file; empty for a folder.
    """

    asked: int
    predicted: int
    measured: int | None = None
    type: str = ""

    def __str__(self) -> str:
        """Return the sizes in one line."""
        text = f"File: asked for at most {self.asked:,} bytes, predicted {self.predicted:,}"
        if self.measured is not None:
            text += f", measured {self.measured:,}"
        return text


@dataclass
class SizeResult:
    """The size of one model.

    Attributes:
        parameters: The number of parameters.
        layer_parameters: The number of parameters in the transformer layers; 0 where the layers are not described.
        bytes: The bytes of the weights.
        layers: The number of layers; None where it is unknown.
        cache_per_token: The bytes of keys and values that generation keeps per token; None where it was not measured.
    """

    parameters: int = 0
    layer_parameters: int = 0
    bytes: int = 0
    layers: int | None = None
    cache_per_token: int | None = None


@dataclass
class TrimResult:
    """The result of vocabulary trimming.

    Attributes:
        tokens: The number of removed tokens.
        respelled: The share of removed tokens in held-out text. The kept tokens spell this text now.
        reasons: The number of kept tokens by reason: `always`, `text`, `language`, `needed` to form other tokens, and
            `usual` in general text.
        reason_of_each: The first letter of the reason of each kept token, by its new id.
        unreadable: The number of letters that can no longer be spelled, by script.
        scripts: The number of removed tokens by script, as Unicode names it.
    """

    tokens: int
    respelled: float
    reasons: dict[str, int] = field(default_factory=dict)
    reason_of_each: str = ""
    unreadable: dict[str, int] = field(default_factory=dict)
    scripts: dict[str, int] = field(default_factory=dict)


def perplexity_result(
    losses: Mapping[str, Tensor], tokens: int, documents: Tensor | None = None, spread: float = 0.0
) -> TextResult:
    """Return the perplexities of models on one text, with the confidence interval of their ratio.

    Args:
        losses: The mean loss per token of each sample in nats, shape `(samples,)`, by `original`, `pruned` and
            `recovered`. All models read the same samples.
        tokens: The number of predicted tokens.
        documents: The number of the document of each sample, shape `(samples,)`. By default each sample is a document
            of its own.
        spread: The relative difference of the loss on other text of this kind. It widens the interval.
    """
    losses_by_model = list(losses.values())
    first = losses_by_model[0]
    last = losses_by_model[-1]
    perplexities = {name: float(loss.mean().exp()) for name, loss in losses.items()}
    num_documents = len(first) if documents is None else len(documents.unique())

    if len(losses_by_model) == 1:
        margin = float(last.mean().exp()) * margin_of_error(last, documents)
    else:
        difference = last - first
        ratio = float(difference.mean().exp())
        # A margin m of the mean loss is, for small m, a relative margin m of exp(mean loss).
        relative_margin = max(margin_of_error(difference, documents), MIN_RELATIVE_MARGIN / num_documents)
        margin = hypot(ratio * relative_margin, spread * (ratio - 1))

    return TextResult(Figure.of(perplexities, margin), tokens=tokens, documents=num_documents)


def ratios_of(domains: Mapping[str, TextResult]) -> dict[str, Figure]:
    """Return the perplexity of each domain where at least two models were measured."""
    figures = {name: domain.perplexity for name, domain in domains.items()}
    return {name: figure for name, figure in figures.items() if figure is not None and figure.ratio is not None}


def mean_ratio(figures: Iterable[Figure]) -> tuple[float, float | None]:
    """Return the geometric mean of ratios, and its margin.

    The ratios were measured on different texts, so their errors are independent.
    """
    ratios = []
    margins = []
    for figure in figures:
        ratios.append(inf if figure.ratio is None else figure.ratio)
        margins.append(figure.margin)

    if not all(0 < ratio < inf for ratio in ratios):
        return inf, None
    return geometric_mean(ratios), margin_of_mean(ratios, margins)


def margin_of_mean(ratios: Iterable[float], margins: Iterable[float | None]) -> float | None:
    """Return the margin of the geometric mean of ratios with independent errors; None if a margin is unknown.

    The relative margin of the geometric mean of n ratios is the root of the sum of their squared relative margins,
    divided by n.
    """
    ratios = list(ratios)
    relative_margins = []
    for ratio, margin in zip(ratios, margins, strict=True):
        if margin is None or not isfinite(margin):
            return None
        relative_margins.append(margin / ratio)

    return geometric_mean(ratios) * hypot(*relative_margins) / len(ratios)


def mean_figure(figures: Iterable[Figure]) -> Figure:
    """Return the arithmetic mean of a figure over domains, for each model that was measured on all of them."""
    values_by_domain = [figure.values for figure in figures]
    means = {}

    for name in values_by_domain[0] if values_by_domain else ():
        values = [by_model[name] for by_model in values_by_domain if name in by_model]
        if len(values) == len(values_by_domain):
            means[name] = fmean(values)

    return Figure.of(means)


def language_costs(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, LanguageResult]:
    """Return the results by language code.

    Args:
        languages: The costs that `domains.languages.costs_before` or `with_costs_after` return.
    """
    results = {}
    for code, costs in languages.items():
        cost = {ORIGINAL: float(costs["before"])}
        if costs.get("after") is not None:
            cost[PRUNED] = float(costs["after"])
        results[code] = LanguageResult(cost=Figure.of(cost), wanted=costs["wanted"], known=costs.get("known"))
    return results


def known_languages(languages: Mapping[str, LanguageResult]) -> dict[str, LanguageResult]:
    """Return the measured languages that the original model knows, the worst result first.

    Without a measurement in bits, a language counts as known.
    """
    known = {}
    for code, result in languages.items():
        if result.known is not False and result.cost.ratio is not None:
            known[code] = result
    return dict(sorted(known.items(), key=lambda item: item[1].severity, reverse=True))


def worse_languages(languages: Mapping[str, LanguageResult], limit: float) -> dict[str, LanguageResult]:
    """Return the known languages that got worse, the worst result first; see `LanguageResult.is_worse`."""
    return {code: result for code, result in known_languages(languages).items() if result.is_worse(limit)}


def technical_ratio(split_words: float) -> float:
    """Return the perplexity ratio that technical text may reach after vocabulary trimming.

    Generated text is simpler than most text, so its loss is too low. The loss grows with the share of words that are
    split into more tokens: by 0.06 nats per token for each per cent in web pages and encyclopedias, and by less in
    code. Web pages, encyclopedias and code have up to twice as many split words as generated text.

    Args:
        split_words: The share of the words of unseen text that are split into more tokens.
    """
    return exp(SPLIT_LOSS * TECHNICAL_SPLITS * split_words)


def unseen_of(result: TextResult, source: str) -> UnseenResult:
    """Return the result on unseen text from the measurements on it.

    Args:
        result: The measurements.
        source: The origin of the text.
    """
    return UnseenResult(**vars(result), source=source)
