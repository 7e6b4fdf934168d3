"""What came of a run in two lines: the figures that decide, and what the model is good for by fixed rules."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from statistics import geometric_mean
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a model may lose at most for one advice.

    Attributes:
        advice: What the model is good for.
        mean: The most that perplexity may grow, as a factor, in the geometric mean over the kinds of text.
        worst: The same for each single kind.
        kept: The least share of the right answers of the dense model that are still right.
        loops: The most that may loop beyond those of the dense model, as a share of the questions.
    """

    advice: str
    mean: float
    worst: float
    kept: float
    loops: float


# The figures of docs/how_much.md stand behind these limits: two models, with and without their answers.
RULES = (
    Rule("use it as it is", 1.05, 1.05, 0.9, 1 / 16),
    Rule("use it on the kinds of text that you calibrated on, and try it on yours", 1.2, 1.3, 0.85, 1 / 8),
    Rule("train it before you use it: --recover, or `structprune recover`", 1.6, 2.0, 0.4, 1 / 4),
)
LAST = "do not use it: remove less, or take it as the beginning of a long training"


def verdict(report: Mapping[str, Any]) -> list[str]:
    """The figures that decide, and the advice that follows; nothing where perplexity was not measured."""
    ratios = _ratios(report)
    if not ratios:
        return []
    mean, kind = geometric_mean(ratios.values()), max(ratios, key=ratios.__getitem__)
    worst = ratios[kind]
    kept, loops, answers = _answers(report)
    parameters = report["parameters"]
    size = f"{1 - parameters['after'] / parameters['before']:.1%} smaller"
    figures = [
        size,
        f"text x {mean:.2f}, at worst x {worst:.2f} ({kind})",
        answers,
        "speed: structprune evaluate --speed",
    ]
    rules = RULES if answers else RULES[1:]
    met = (
        rule
        for rule in rules
        if mean <= rule.mean and worst <= rule.worst and kept >= rule.kept and loops <= rule.loops
    )
    advice = next((rule.advice for rule in met), LAST)
    unasked = "" if answers else "; answers were not asked, so it can say no more"
    return ["; ".join(filter(None, figures)), f"verdict: {advice}{unasked}"]


def _ratios(report: Mapping[str, Any]) -> dict[str, float]:
    """The last model's perplexity as a multiple of the first one's, by kind of text."""
    measured, trained = report.get("perplexity") or {}, (report.get("recovery") or {}).get("perplexity") or {}
    if trained and all("dense" in by_model for by_model in trained.values()):  # else it was trained without a teacher
        measured = trained
    ratios = {}
    for kind, by_model in measured.items():
        first, *_, last = [inf if value is None else value for value in by_model.values()] or [inf]
        ratios[kind] = last / first if isfinite(last) and 0 < first < inf else inf
    return ratios


def _answers(report: Mapping[str, Any]) -> tuple[float, float, str]:
    """The share of the first model's right answers that the last keeps, the share of the questions that it loops on
    beyond the first, and both in words; empty where nothing was asked.
    """
    items = (report.get("recovery") or {}).get("answers") or report.get("answers") or []
    pairs = [(answers[0], answers[-1]) for answers in ([*item["answers"].values()] for item in items)]
    if not pairs:
        return 1.0, 0.0, ""
    right = [last["right"] for first, last in pairs if first["right"]]
    kept = sum(right) / len(right) if right else 1.0
    loops = [sum(answer["loops"] for answer in model) for model in zip(*pairs, strict=True)]
    words = f"{sum(right)} of {len(right)} right answers stay right, loops {loops[0]} → {loops[1]}"
    return kept, (loops[1] - loops[0]) / len(pairs), words
