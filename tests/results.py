"""Makes results of prunings and of trainings without a model."""

from collections.abc import Mapping, Sequence
from math import nan

from optimum_structprune.record.figures import (
    DENSE,
    PRUNED,
    RECOVERED,
    Answer,
    AnsweredQuestion,
    AnswersResult,
    DomainResult,
    Figure,
    SizeResult,
    UnseenResult,
    VectorResult,
)
from optimum_structprune.record.report import RecoveryReport, Report


DENSE_PERPLEXITY = 10.0


def figure(*ratios: float, margin: float | None = None) -> Figure:
    """Return a perplexity that grew from 10 by these factors, for the pruned and the recovered model."""
    names = (PRUNED, RECOVERED)
    values = {name: DENSE_PERPLEXITY * ratio for name, ratio in zip(names, ratios, strict=False)}
    return Figure.of({DENSE: DENSE_PERPLEXITY, **values}, nan if margin is None else margin)


def unseen(*ratios: float, source: str = "model-written", margin: float | None = None) -> UnseenResult:
    """Return a result on unseen text."""
    return UnseenResult(figure(*ratios, margin=margin), documents=90, tokens=900, source=source)


def question(outcomes: Mapping[str, bool], loops: Sequence[str] = (), prompt: str = "?") -> AnsweredQuestion:
    """Return a question that these models answered right or wrong."""
    answers = {name: Answer("a", right, name in loops, stopped=True) for name, right in outcomes.items()}
    return AnsweredQuestion("facts", prompt, answers)


def answers(kept: int = 16, correct: int = 16, loops: int = 0, asked: int = 16) -> AnswersResult:
    """Return answers, of which the pruned model has `kept` right and the original model `correct`."""
    questions = []
    for number in range(asked):
        repetitive = [PRUNED] if asked - number <= loops else []
        questions.append(question({DENSE: number < correct, PRUNED: number < kept}, repetitive))
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
    by_domain = ratios if isinstance(ratios, Mapping) else {f"domain {n}": ratio for n, ratio in enumerate(ratios)}
    made = Report("llama", "obs", dense=SizeResult(100, 80, 200), pruned=SizeResult(90, 70, 180))
    for name, ratio in by_domain.items():
        made.domains[name] = DomainResult(figure(ratio, margin=margin), tokens=9_000, documents=documents)
    made.unseen = None if unseen_ratio is None else unseen(unseen_ratio, source=source, margin=margin)
    made.answers = asked
    return made


def encoder(*shares: float | None, margin: float | None = None) -> Report:
    """Return the report of an encoder that keeps these shares of neighbours."""
    made = Report("bert", "obs", dense=SizeResult(100, 80, 200), pruned=SizeResult(90, 70, 180))
    for number, share in enumerate(shares):
        neighbours = None if share is None else Figure(pruned=share, margin=margin)
        made.domains[f"domain {number}"] = DomainResult(vectors=VectorResult(90, neighbours=neighbours))
    return made


def recovery(*pairs: tuple[float, float], has_dense: bool = True, **fields) -> RecoveryReport:
    """Return the report of a training, with the ratios of each domain before and after it."""
    made = RecoveryReport(tokens=400, steps=4, seconds=3.0, **fields)
    for number, pair in enumerate(pairs):
        perplexity = figure(*pair)
        if not has_dense:
            perplexity = Figure(pruned=perplexity.pruned, recovered=perplexity.recovered)
        made.domains[f"domain {number}"] = DomainResult(perplexity, documents=90)
    return made
