"""Build results of prunings and of trainings without a model."""

from collections.abc import Mapping, Sequence
from math import nan

from optimum_structprune.record.figures import (
    ORIGINAL,
    PRUNED,
    RECOVERED,
    Answer,
    AnsweredQuestion,
    AnswersResult,
    Figure,
    SizeResult,
    TextResult,
    UnseenResult,
)
from optimum_structprune.record.report import RecoveryReport, Report


ORIGINAL_PERPLEXITY = 10.0


def figure(*ratios: float, margin: float | None = None) -> Figure:
    """Return a perplexity that grew from 10 by these factors, for the pruned and the recovered model."""
    values = {ORIGINAL: ORIGINAL_PERPLEXITY}
    for name, ratio in zip((PRUNED, RECOVERED), ratios, strict=False):
        values[name] = ORIGINAL_PERPLEXITY * ratio
    if margin is None:
        margin = nan
    return Figure.of(values, margin)


def cost(ratio: float) -> Figure:
    """Return a cost that grew from 1 by this factor."""
    return Figure.of({ORIGINAL: 1.0, PRUNED: ratio})


def unseen(*ratios: float, source: str = "model-written", margin: float | None = None) -> UnseenResult:
    """Return a result on unseen text."""
    return UnseenResult(figure(*ratios, margin=margin), documents=90, tokens=900, source=source)


def question(outcomes: Mapping[str, bool], loops: Sequence[str] = (), prompt: str = "?") -> AnsweredQuestion:
    """Return a question that these models answered right or wrong."""
    answers = {name: Answer("a", is_right, name in loops, stopped=True) for name, is_right in outcomes.items()}
    return AnsweredQuestion("facts", prompt, answers)


def answers(kept: int = 32, correct: int = 32, loops: int = 0, asked: int = 32) -> AnswersResult:
    """Return answers: `kept` of the pruned model are right, and `correct` of the original model."""
    questions = []
    for number in range(asked):
        repetitive = [PRUNED] if asked - number <= loops else []
        questions.append(question({ORIGINAL: number < correct, PRUNED: number < kept}, repetitive))
    return AnswersResult(questions)


def report(
    ratios: Sequence[float] | Mapping[str, float],
    margin: float | None = None,
    unseen_ratio: float | None = None,
    asked: AnswersResult | None = None,
    documents: int = 90,
    source: str = "model-written",
) -> Report:
    """Return the report of a pruning that removed a tenth of the parameters."""
    if not isinstance(ratios, Mapping):
        ratios = {f"domain {number}": ratio for number, ratio in enumerate(ratios)}

    result = Report(
        model_type="llama", criterion="obs", original=SizeResult(100, 80, 200), pruned=SizeResult(90, 70, 180)
    )
    for name, ratio in ratios.items():
        result.domains[name] = TextResult(figure(ratio, margin=margin), tokens=9_000, documents=documents)
    if unseen_ratio is not None:
        result.unseen = unseen(unseen_ratio, source=source, margin=margin)
    result.answers = asked
    return result


def encoder(*shares: float | None, margin: float | None = None, retrieval: float | None = None) -> Report:
    """Return the report of an encoder that keeps these shares of neighbours, and a share of the retrieval."""
    result = Report(
        model_type="bert", criterion="obs", original=SizeResult(100, 80, 200), pruned=SizeResult(90, 70, 180)
    )
    for number, share in enumerate(shares):
        domain = TextResult(texts=90)
        if share is not None:
            domain.neighbours = Figure.of({PRUNED: share}, margin)
        if retrieval is not None:
            domain.retrieval = Figure.of({ORIGINAL: 0.5, PRUNED: 0.5 * retrieval}, margin)
        result.domains[f"domain {number}"] = domain
    return result


def recovery(*pairs: tuple[float, float], has_original: bool = True, **fields) -> RecoveryReport:
    """Return the report of a training, with the ratios of each domain before and after it."""
    result = RecoveryReport(tokens=400, steps=4, seconds=3.0, **fields)
    for number, pair in enumerate(pairs):
        perplexity = figure(*pair)
        if not has_original:
            perplexity = Figure.of({model: perplexity.values[model] for model in (PRUNED, RECOVERED)})
        result.domains[f"domain {number}"] = TextResult(perplexity, documents=90)
    return result
