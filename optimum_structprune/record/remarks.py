"""Sentences about a run, from the fields of its report: what went, what was compared and tried, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

from ..arch.spec import LAYER, MODEL, VOCAB
from ..config.pruning import LANGUAGES
from ..forward.metrics import MANY_DOCUMENTS
from .answers import as_lines, counts, sample_items
from .table import as_number, as_text, margin_of_mean


# A share that was removed is warned of where it is off by more than this part of what was asked for.
MOST_OFF = 0.1
# So many scripts and languages are named, those first that lose most; a language loses where it takes so much more.
MOST_SHOWN, LOSES = 6, 1.02
MOST_NAMED = 3  # languages in a verdict
MARGIN = "± covers the truth nine times in ten"
GAPS = "perplexity: of what is missing in text (masked words, or all that follows), per token of the dense model"
TEXTS = f"cosine of a sentence's vectors, dense and pruned; the share of its 10 nearest neighbours kept; {MARGIN}"
OVER = f"{MARGIN}, over documents; rough: fewer than {MANY_DOCUMENTS} of them"
CHANGED = "the weights have changed since they were measured: quality is that of the weights before"
# What the units of each kind of space are called.
NAMES = {
    "mlp": "FFN channels",
    "attention": "KV groups",
    "expert": "experts",
    "hidden": "channels of the residual stream",
    LAYER: "layers",
    VOCAB: "tokens of the vocabulary",
}


class Rule(NamedTuple):
    """An advice, and what a model may lose at most for it: factors of perplexity in the geometric mean over kinds of
    text, on the worst kind and on other text, the least share of right answers kept, and the most that loop anew.
    """

    advice: str
    mean: float
    worst: float
    other: float
    kept: float
    loops: float


# The figures of docs/how_much.md stand behind these limits: two models, with and without their answers.
RULES = (
    Rule("use it as it is", 1.05, 1.05, 1.05, 0.9, 1 / 16),
    Rule("use it on the kinds of text that you calibrated on, and try it on yours", 1.2, 1.3, 1.2, 0.85, 1 / 8),
    Rule("use it on the kinds of text that you calibrated on, not on other text", 1.2, 1.3, inf, 0.85, 1 / 8),
    Rule("train it before you use it: --recover, or `structprune recover`", 1.6, 2.0, inf, 0.4, 1 / 4),
)


# For an encoder, the least share of a text's 10 nearest neighbours that stays, in the mean and on the worst kind.
VECTOR_LIMITS = ((0.95, 0.93), (0.75, 0.7), (0.6, 0.5))
LAST = "do not use it: remove less, or take it as the beginning of a long training"


def removal_phrases(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields the removed share of each kind of space, as "384 of 1,536 FFN channels (25 %) in each of 30 layers"."""
    for kind, by_layer in sorted((report.get("widths") or {}).items()):
        full, name = report["dense_widths"][kind], NAMES.get(kind, f"units of {kind}")
        gone = [full - width for width in by_layer.values()]
        if not any(gone):
            continue
        share = sum(gone) / (full * len(gone))
        ends = sorted({min(gone), max(gone)})
        count = f"{' to '.join(map('{:,}'.format, ends))} of {full:,} {name}"
        count += f" ({share:.0%}{' in the mean' * (len(ends) > 1)})"
        where = "" if int(next(iter(by_layer))) == MODEL else f" in each of {len(gone)} layers"
        layers = ", ".join(map(str, report.get("removed_layers") or ())) if kind == LAYER else ""
        yield f"{count}{where}{layers and f': no. {layers}'}".replace("%", " %")


def target_summary(report: Mapping[str, Any]) -> str:
    """States what was asked for and what came of it, as a warning if far apart; empty if nothing was asked."""
    target, sparsity, counts = report.get("target"), report.get("sparsity", 0.0), report.get("parameters")
    if report.get("wish"):
        return _wish(report["wish"], report["parameters"])
    if target is None or not counts:
        return ""
    share = f"{1 - counts['after'] / counts['before']:.1%}"
    text = f"asked {target:.1%}, removed {sparsity:.1%} of the layers' parameters, which is {share} of all"
    if abs(sparsity - target) <= MOST_OFF * target:
        return text
    return f"warning: {text}; a smaller round_to or other targets may come nearer"


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines below the table of a report."""
    if report.get("changed"):
        yield f"warning: {CHANGED}"
    if summary := target_summary(report):
        yield summary
    for kind, by_layer in sorted((report.get("widths") or {}).items()):
        if len({*by_layer.values()}) > 1:
            yield f"{NAMES.get(kind, kind)} by layer: {' '.join(map(str, by_layer.values()))}"
    if report.get("embeddings"):
        yield TEXTS
        yield from [GAPS] if report.get("perplexity") else ()
    if report.get("perplexity_margin"):
        yield OVER
    records = report, report.get("recovery") or {}
    measured = [pair for record in records for pair in (record.get("perplexity") or {}).items()]
    if broken := sorted({name for name, by_model in measured if {None, inf} & {*by_model.values()}}):
        yield f"warning: a perplexity is infinite on {', '.join(broken)}; the model is of no use there"
    if (other := report.get("other")) and not other.get("tokens"):
        yield "other text than that of these kinds was not measured: there was none"
    elif other:
        simple = ", which is simpler than most" if other["source"] == "built-in" else ""
        words = f"; {other['respelled']:.1%} of its words are spelled otherwise now" if "respelled" in other else ""
        yield f"other text is {other['source']}{simple}; nothing was chosen by it{words}".replace("%", " %")
    if report.get("trimmed"):
        yield from _tokens(report, bool(measured or report.get("embeddings")))
    if scripts := report.get("scripts"):
        yield f"tokens that are gone, by script: {_by_number(scripts)}"
    if by_code := report.get("languages"):
        yield from _languages(by_code)
    shapes = report.get("shapes") or []
    for shape in shapes if len(shapes) > 1 else ():
        by_kind = shape["widths"].items()
        each = ((name, [width] if isinstance(width, int) else [*width.values()]) for name, width in by_kind)
        widths = ", ".join(f"{name} {as_number(width)}" for name, width in each)
        loss = "not finite" if shape["loss"] in (None, inf) else f"{shape['loss']:.4f}"
        yield f"{'taken' if shape['chosen'] else 'tried'}: {shape['proposed_by']} ({widths}), KL {loss}"


def _wish(wish: Mapping[str, Any], parameters: Mapping[str, int]) -> str:
    """Says what was found for a loss that was asked for, and what the next step would cost."""
    measured = wish["measured"].items()
    losses = [f"{as_number(100 * loss, margin and 100 * margin, 1)}% on {text}" for text, (loss, margin) in measured]
    beyond = any(loss - (margin or 0) > wish["loss"] for _, (loss, margin) in measured)
    trials = f"{len(wish['trials'])} pruning{'s' * (len(wish['trials']) > 1)} on trial"
    found = f"{1 - parameters['after'] / parameters['before']:.1%} smaller, which loses {' and '.join(losses)}"
    then = "more than 100%" if wish["next"] > 1 else f"about {wish['next']:.1%}"
    return (
        f"{'warning: ' * beyond}asked: a loss of {wish['loss']:.1%}; found by {trials}: {found}; "
        f"with 5% more gone {then}"
    ).replace("%", " %")


def _tokens(report: Mapping[str, Any], measured: bool) -> Iterator[str]:
    """Yields how many tokens went and stayed, and why."""
    trimmed = report["trimmed"]
    rest = "channels give the rest" if len(report["widths"]) > 1 else "nothing else goes"
    gone = f"{trimmed['tokens']:,} of {report['dense_widths'][VOCAB]:,} tokens go"
    if not measured:
        rest += "; no loss was measured, as the model reads more than text"
    yield f"{gone}, which are {trimmed['respelled']:.2%} of held-out text; {rest}".replace("%", " %")
    counts = (f"{name} {count:,}" for name, count in sorted(trimmed["reasons"].items()))
    yield f"tokens that stay, by reason: {', '.join(counts)}"
    if unreadable := _by_number(trimmed["unreadable"]):
        yield f"letters that cannot be read now, by script: {unreadable}"


def measurements_text(record: Mapping[str, Any]) -> str:
    """Renders an evaluation or a measurement of speed as a table, its explanation, some answers, and warnings."""
    lines = [as_text(record)]
    if record.get("perplexity") and record.get("embeddings"):
        lines.append(f"{OVER}; {GAPS}")
    elif record.get("perplexity") and record.get("seq_length"):
        head = f", each begun with {record['prefix']!r}" if record["prefix"] else ""
        lines.append(f"{OVER}; samples of {record['seq_length']} tokens{head}")
    lines += [f"{MARGIN}, over questions"] if record.get("figures") and len(lines) == 1 else []
    lines += [TEXTS, *_languages(record.get("languages") or {})] if record.get("embeddings") else []
    lines += [speed_remark(record)] if record.get("run_memory") else []
    answers = map(as_lines, sample_items(record.get("answers") or ()))
    warnings = map("warning: {}".format, record.get("warnings") or ())
    return "\n\n".join(["\n".join(lines), *answers, *warnings])


def speed_remark(record: Mapping[str, Any]) -> str:
    """States how speed was measured."""
    return (
        f"speed on {record['device']} ({record['clock']} time, threads: {record['threads']}, repeats in turns: "
        f"{record['repeats']}, new tokens: {record['new_tokens']}); the speed-up is the median of the pairs with the "
        f"first model, not shown where its quartiles lie on both sides of 1; memory: {record['memory_is']}"
    )


def _by_number(scripts: Mapping[str, int]) -> str:
    """Names the scripts of most tokens."""
    first = sorted(scripts.items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{name.title()} {count:,}" for name, count in first[:MOST_SHOWN])
    return shown + f" and {len(first) - MOST_SHOWN} others" * (len(first) > MOST_SHOWN)


def _languages(by_code: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the cost of the languages to keep, and of those that the dense model knew."""
    by_code = {code: cost for code, cost in by_code.items() if cost.get("after") is not None}
    if not by_code:
        return
    causal, known = any("known" in cost for cost in by_code.values()), known_ratios(by_code)
    losing = [code for code, ratio in known.items() if ratio > LOSES]
    unit, digits = ("bits per byte", 3) if causal else ("tokens", 0)

    def shown(codes: Sequence[str]) -> str:
        pairs = ((LANGUAGES[code], by_code[code]) for code in codes)
        return ", ".join(
            f"{name} {cost['before']:.{digits}f} to {cost['after']:.{digits}f}"
            + " (the dense model hardly knew it)" * (not cost.get("known", True))
            + (f" (cosine {as_number(cost['cosine'], cost['cosine_margin'], 3)})" if cost.get("cosine") else "")
            for name, cost in pairs
        )

    if wanted := [code for code, cost in by_code.items() if cost["wanted"]]:
        yield f"{unit} in the languages to keep: {shown(wanted)}"
    all_of = f"of {len(known)} language{'s' * (len(known) != 1)}{' that the dense model knew' * causal},"
    worst = f": {shown(losing[:MOST_SHOWN])}" if losing else ""
    yield f"{all_of} {len(losing) or 'none'} now take{'' if len(losing) > 1 else 's'} more {unit}{worst}"


def known_ratios(by_code: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Gives the cost of each language that the dense model knew, as a multiple of the dense one's, greatest first."""
    measured = {code: cost for code, cost in by_code.items() if cost.get("after") is not None}
    ratios = {code: cost["after"] / cost["before"] for code, cost in measured.items() if cost.get("known", True)}
    return {code: ratios[code] for code in sorted(ratios, key=lambda code: -ratios[code])}


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Gives the figures that decide and the advice that follows; nothing where no loss was measured."""
    if report.get("embeddings"):
        return _verdict_on_vectors(report)
    ratios = _ratios(report)
    if not (ratios and report.get("parameters")):  # a training of a model that nothing was pruned from has no sizes
        return []
    mean, kind = geometric_mean(ratios.values()), max(ratios, key=ratios.__getitem__)
    trained = report.get("recovery") or {}
    # What the training has not measured again beside the dense model is of the model before it.
    old = judged(report) is report, not trained.get("other")
    then, before = (" before the training" * bool(trained.get("perplexity") and is_old) for is_old in old)
    worst, measured = ratios[kind], trained.get("other") or report.get("other") or {}
    kept, loops, answers = _answers(report)
    other = _ratios({"perplexity": {"": measured["perplexity"]}})[""] if measured.get("perplexity") else None
    parameters, far = report["parameters"], (measured.get("margin") or {}).get("ratio")
    by_kind = judged(report).get("perplexity_margin") or {}
    margin = margin_of_mean([*ratios.values()], ((by_kind.get(name) or {}).get("ratio") for name in ratios))
    at_worst = as_number(worst, margin, 2).partition(" ")[0]  # in the digits of the mean, which is not above it
    figures = [
        f"{1 - parameters['after'] / parameters['before']:.1%} smaller",
        f"kinds calibrated on x {as_number(mean, margin, 2)}, at worst x {at_worst} ({kind}){then}",
        "" if other is None else f"other text x {as_number(other, far, 2)}{before}",
        answers,
        "speed: structprune evaluate --speed",
    ]
    simple = (report.get("other") or {}).get("source") == "built-in"  # on such text a model loses least
    rules = RULES if answers and not simple else RULES[1:]
    far = mean if other is None else other
    by_text = (rule for rule in rules if mean <= rule.mean and worst <= rule.worst and far <= rule.other)
    met = (rule for rule in by_text if kept >= rule.kept and loops <= rule.loops)
    advice = next((rule.advice for rule in met), LAST)
    advice = advice.replace("train it before", "train it longer before") if trained.get("kept_step") else advice
    unasked = "" if answers else "; answers were not asked, so it can say no more: structprune evaluate --answers"
    bits = () if trained.get("perplexity") else (report.get("bits_per_byte") or {}).values()
    of_kinds = max((pair["after"] / pair["before"] for pair in bits if all(pair.values())), default=1.0)
    lost = _lost(report["languages"], of_kinds) if report.get("languages") else ""
    return ["; ".join(filter(None, figures)), f"verdict: {advice}{lost}{unasked}"]


def _verdict_on_vectors(report: Mapping[str, Any]) -> list[str]:
    """Gives the verdict on an encoder by its vectors and its loss, if any; none on less text than has neighbours."""
    shares = {name: by_model["after"].get("neighbours") for name, by_model in report["embeddings"].items()}
    if None in shares.values():
        return []
    mean, kind, parameters = fmean(shares.values()), min(shares, key=shares.__getitem__), report["parameters"]
    figures = (
        f"{1 - parameters['after'] / parameters['before']:.1%} smaller; "
        f"neighbours kept {mean:.2f}, at worst {shares[kind]:.2f} ({kind})"
    )
    ratios = [*_ratios(report).values()] or [1.0]
    loss, worst = geometric_mean(ratios), max(ratios)
    figures += f"; what is missing in text x {loss:.2f}, at worst x {worst:.2f}" * bool(report.get("perplexity"))
    levels = zip((*RULES[:2], RULES[-1]), VECTOR_LIMITS, strict=True)
    margins = (by_model["after"]["neighbours_margin"] or 0 for by_model in report["embeddings"].values())
    low = [share - (margin if isfinite(margin) else 0) for share, margin in zip(shares.values(), margins, strict=True)]
    found = fmean(low), min(low)  # so that it holds for other documents
    kept = (rule for rule, least in levels if found[0] >= least[0] and found[1] >= least[1])
    met = (rule.advice.partition(":")[0] for rule in kept if loss <= rule.mean and worst <= rule.worst)
    lost = _lost(report["languages"]) if report.get("languages") else ""
    return [figures, f"verdict: {next(met, LAST)}{lost}"]


def _lost(by_code: Mapping[str, Mapping[str, Any]], of_kinds: float = 1.0) -> str:
    """Names the languages that a verdict excludes: those that lose more than the kinds of text, at worst `of_kinds`,
    and those to keep that the dense model did not know. Where some are to keep, others are not named.
    """
    wanted = {code for code, cost in by_code.items() if cost["wanted"]} or {*by_code}
    unknown = [code for code, cost in by_code.items() if cost["wanted"] and not cost.get("known", True)]
    worse = [code for code, ratio in known_ratios(by_code).items() if ratio > max(LOSES, of_kinds) and code in wanted]
    lost = [LANGUAGES[code] for code in worse + unknown]
    more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
    return f"; not in {', '.join(lost[:MOST_NAMED])}{more}" if lost else ""


def judged(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Gives the record that a model is judged by: that of a training with the dense model, or else the report."""
    recovery = report.get("recovery") or {}
    trained = (recovery.get("perplexity") or {}).values()
    return recovery if trained and all("dense" in by_model for by_model in trained) else report


def _ratios(report: Mapping[str, Any]) -> dict[str, float]:
    """Gives the last model's perplexity as a multiple of the first one's, by kind of text."""
    ratios = {}
    for kind, by_model in (judged(report).get("perplexity") or {}).items():
        first, *_, last = [inf if value is None else value for value in by_model.values()] or [inf]
        ratios[kind] = last / first if isfinite(last) and 0 < first < inf else inf
    return ratios


def _answers(report: Mapping[str, Any]) -> tuple[float, float, str]:
    """Gives the share of right answers that is kept, the share of questions that loop anew, and both in words."""
    items = (report.get("recovery") or {}).get("answers") or report.get("answers") or []
    if not items or len(items[0]["answers"]) < 2:  # the model before was not asked
        return 1.0, 0.0, ""
    first, *_, last = counts(items, "loops")
    every = ([*item["answers"].values()] for item in items)
    right = [answers[-1]["right"] for answers in every if answers[0]["right"]]
    words = f"{sum(right)} of {len(right)} right answers stay right, loops {first} → {last}"
    return sum(right) / len(right) if right else 1.0, (last - first) / len(items), words
