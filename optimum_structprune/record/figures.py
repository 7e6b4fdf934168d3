"""The figures that reports and evaluations share: sizes, domains, languages, and answers.

All figures name the models in the same way. `dense` is the original model, `pruned` the model that is reported on, and
`recovered` the pruned model after training. A figure that was not measured is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import exp, hypot, inf, isfinite
from statistics import fmean, geometric_mean
from typing import Any

from torch import Tensor

from ..margins import MIN_RELATIVE_MARGIN, margin_of_error


# The constants of `technical_ratio`: the additional loss in nats per token if every word is split, and the share of
# split words in technical text relative to unseen text. docs/how_much.md has the measurements.
SPLIT_LOSS = 6.0
TECHNICAL_SPLITS = 2.0
# The names of the models in a figure, from the first model to the last.
DENSE, PRUNED, RECOVERED = "dense", "pruned", "recovered"
MODELS = (DENSE, PRUNED, RECOVERED)
# A language whose vectors have a lower mean cosine to the vectors of the original model got worse.
MIN_LANGUAGE_COSINE = 0.98


@dataclass(frozen=True)
class Figure:
    """One measured quantity of up to three models.

    Attributes:
        dense: The value of the original model.
        pruned: The value of the pruned model.
        recovered: The value of the pruned model after training.
        margin: Half the width of the 90% confidence interval over documents. It belongs to `ratio` if the original
            model was measured, and to the last value otherwise.
    """

    dense: float | None = None
    pruned: float | None = None
    recovered: float | None = None
    margin: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, float], margin: float | None = None) -> Figure:
        """Return the figure with these values by the names of the models.

        Args:
            values: The values by `dense`, `pruned` and `recovered`.
            margin: Half the width of the confidence interval. An infinite margin counts as unknown.
        """
        if margin is not None and not isfinite(margin):
            margin = None
        return cls(**values, margin=margin)

    def by_model(self) -> dict[str, float]:
        """Return the measured values by the names of the models."""
        values = {DENSE: self.dense, PRUNED: self.pruned, RECOVERED: self.recovered}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def last(self) -> float | None:
        """Return the value of the latest model."""
        return next(reversed(self.by_model().values()), None)

    @property
    def ratio(self) -> float | None:
        """Return the last value divided by the first, or None if fewer than two models were measured.

        A value that is not finite counts as an infinite ratio.
        """
        values = list(self.by_model().values())
        if len(values) < 2:
            return None
        return _ratio(values[-1], values[0])

    @property
    def pruned_ratio(self) -> float | None:
        """Return the value of the pruned model divided by the value of the original model."""
        if self.dense is None or self.pruned is None:
            return None
        return _ratio(self.pruned, self.dense)

    @property
    def ratio_margin(self) -> float | None:
        """Return the margin if it belongs to `ratio`."""
        return None if self.ratio is None else self.margin


def _ratio(value: float, baseline: float) -> float:
    """Return a ratio of two positive numbers, which is infinite if one of them is not finite."""
    if not isfinite(value) or not 0 < baseline < inf:
        return inf
    return value / baseline


@dataclass
class VectorResult:
    """The similarity of an encoder's vectors to the vectors of the original model.

    Attributes:
        texts: The number of texts.
        cosine: The mean cosine to the vector of the original model; None if the number of channels differs.
        cosine_p5: The 5th percentile of the cosines.
        cosine_worst: The lowest cosine.
        neighbours: The share of the 10 nearest neighbours that both models have in common; None for too few texts.
        retrieval: The share of translations that are found; None where texts do not come in pairs.
    """

    texts: int = 0
    cosine: Figure | None = None
    cosine_p5: float | None = None
    cosine_worst: float | None = None
    neighbours: Figure | None = None
    retrieval: Figure | None = None

    @classmethod
    def of(cls, figures: Mapping[str, float]) -> VectorResult:
        """Return the result of one comparison.

        Args:
            figures: The output of `measure.vectors.embedding_figures`.
        """
        result = cls(int(figures["texts"]))

        if "cosine" in figures:
            result.cosine = Figure.of({PRUNED: figures["cosine"]}, figures["cosine_margin"])
            result.cosine_p5 = figures["cosine_p5"]
            result.cosine_worst = figures["cosine_worst"]

        if "neighbours" in figures:
            result.neighbours = Figure.of({PRUNED: figures["neighbours"]}, figures["neighbours_margin"])

        if "retrieval" in figures:
            shares = {DENSE: figures["retrieval_dense"], PRUNED: figures["retrieval"]}
            result.retrieval = Figure.of(shares, figures["retrieval_margin"])
        return result


@dataclass
class DomainResult:
    """The measurements on one domain.

    Attributes:
        perplexity: The perplexity on held-out text, per token of the original tokenizer. For masked language models
            and encoder-decoders it is the perplexity of the missing text.
        bits_per_byte: The loss in bits per byte of the text.
        divergence: The mean KL divergence from the original model in nats per token.
        agreement: The share of positions where both models predict the same token.
        vectors: For encoders, the similarity of the vectors of sentences to the vectors of the original model.
        tokens: The number of tokens that perplexity was measured on.
        documents: The number of documents of these tokens.
    """

    perplexity: Figure | None = None
    bits_per_byte: Figure | None = None
    divergence: Figure | None = None
    agreement: Figure | None = None
    vectors: VectorResult | None = None
    tokens: int = 0
    documents: int = 0


@dataclass
class UnseenResult(DomainResult):
    """The measurements on unseen text, which the run does not use for any decision.

    Attributes:
        source: The origin of the text: `from the Hub`, `model-written`, or `built-in`.
        split_words: The share of its words that are split into more tokens after vocabulary trimming.
    """

    source: str = ""
    split_words: float | None = None


@dataclass
class LanguageResult:
    """The cost of the same text in one language.

    Attributes:
        cost: The cost in bits per byte, or in tokens if the model does not predict the next token.
        wanted: Whether the config names the language.
        known: Whether the original model reads the language in at most twice the bits of its best language; None
            where tokens are counted.
        vectors: For encoders, the similarity of the vectors to the vectors of the original model.
    """

    cost: Figure
    wanted: bool = False
    known: bool | None = None
    vectors: VectorResult | None = None

    @classmethod
    def of(cls, costs: Mapping[str, Any]) -> LanguageResult:
        """Return the result of one language.

        Args:
            costs: One value of `vocabulary.languages.costs_before` or `with_costs_after`.
        """
        values = {DENSE: float(costs["before"])}
        if costs.get("after") is not None:
            values[PRUNED] = float(costs["after"])

        return cls(Figure.of(values), costs["wanted"], costs.get("known"))

    @property
    def is_measured(self) -> bool:
        """Return whether the pruned model was measured."""
        return self.cost.ratio is not None

    @property
    def cosine(self) -> float | None:
        """Return the mean cosine to the vectors of the original model, for encoders."""
        if self.vectors is None or self.vectors.cosine is None:
            return None
        return self.vectors.cosine.pruned

    @property
    def severity(self) -> float:
        """Return how much worse the language got: one minus the cosine for encoders, else the ratio of the costs."""
        if self.cosine is not None:
            return 1.0 - self.cosine
        return self.cost.ratio or 0.0

    def is_worse(self, limit: float) -> bool:
        """Return whether the language got worse.

        The number of tokens alone does not show a loss: one unknown token replaces many tokens. The vectors of an
        encoder show it.

        Args:
            limit: The ratio of the costs above which a language is worse.
        """
        if self.cosine is not None and self.cosine < MIN_LANGUAGE_COSINE:
            return True
        return (self.cost.ratio or 0.0) > limit

    @property
    def is_known(self) -> bool:
        """Return whether the original model knows the language. Without a measurement in bits it counts as known."""
        return self.known is not False


@dataclass
class Answer:
    """The answer of one model to one question.

    Attributes:
        text: The answer.
        right: Whether it is correct.
        loops: Whether it repeats itself.
        stopped: Whether it ended before the limit of tokens.
        tokens: The number of tokens.
    """

    text: str
    right: bool
    loops: bool
    stopped: bool
    tokens: int = 0


@dataclass
class AnsweredQuestion:
    """A question and the answers of the models by name, from the first model to the last.

    Attributes:
        kind: The kind of question.
        prompt: The question.
        answers: The answers, by `dense`, `pruned` and `recovered` or by the names of models.
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
        divergence: The mean KL divergence from the original model along its own answers, in nats per token.
    """

    questions: list[AnsweredQuestion] = field(default_factory=list)
    divergence: float | None = None

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

    def tokens(self, model: str) -> list[int]:
        """Return the lengths of the answers of one model."""
        return [question.answers[model].tokens for question in self.questions]


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
) -> DomainResult:
    """Return the perplexities of models on one text, with the confidence interval of their ratio.

    Args:
        losses: The mean loss per token of each sample in nats, shape `(samples,)`, by `dense`, `pruned` and
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

    return DomainResult(Figure.of(perplexities, margin), tokens=tokens, documents=num_documents)


def ratios_of(domains: Mapping[str, DomainResult]) -> dict[str, Figure]:
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
    values_by_domain = [figure.by_model() for figure in figures]
    means = {}

    for name in MODELS:
        values = [by_model[name] for by_model in values_by_domain if name in by_model]
        if values and len(values) == len(values_by_domain):
            means[name] = fmean(values)

    return Figure.of(means)


def language_costs(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, LanguageResult]:
    """Return the results by language code from the costs that `vocabulary.languages` measures."""
    return {code: LanguageResult.of(costs) for code, costs in languages.items()}


def known_languages(languages: Mapping[str, LanguageResult]) -> dict[str, LanguageResult]:
    """Return the measured languages that the original model knows, the worst result first."""
    known = {}
    for code, result in languages.items():
        if result.is_known and result.is_measured:
            known[code] = result
    return dict(sorted(known.items(), key=lambda item: item[1].severity, reverse=True))


def technical_ratio(split_words: float) -> float:
    """Return the perplexity ratio that technical text may reach after vocabulary trimming.

    Generated text is simpler than most text, so its loss is too low. The loss grows with the share of words that are
    split into more tokens: by 0.06 nats per token for each per cent in web pages and encyclopedias, and by less in
    code. Web pages, encyclopedias and code have up to twice as many split words as generated text.

    Args:
        split_words: The share of the words of unseen text that are split into more tokens.
    """
    return exp(SPLIT_LOSS * TECHNICAL_SPLITS * split_words)


def with_technical_margin(figure: Figure, split_words: float | None) -> Figure:
    """Return a figure of unseen text, with an interval that includes the loss on technical text.

    Args:
        figure: The perplexity on unseen text.
        split_words: The share of its words that are split into more tokens; None if the vocabulary is unchanged.
    """
    if split_words is None or figure.ratio is None:
        return figure
    distance = technical_ratio(split_words) - figure.ratio
    return replace(figure, margin=max(figure.margin or 0.0, distance))


def unseen_of(domain: DomainResult, source: str) -> UnseenResult:
    """Return the result on unseen text from the measurements on it.

    Args:
        domain: The measurements.
        source: The origin of the text.
    """
    return UnseenResult(
        perplexity=domain.perplexity,
        divergence=domain.divergence,
        tokens=domain.tokens,
        documents=domain.documents,
        source=source,
    )
