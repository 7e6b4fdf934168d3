"""One table of facts of any result: what is known of several models, as rows that text, Markdown and HTML show."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, inf, isfinite
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any

from ..arch.spec import LAYER, MODEL, VOCAB
from ..config.pruning import LANGUAGES
from ..forward.metrics import ENOUGH, FEWEST
from .text import digits_of, plus_minus, spark_line, table


if TYPE_CHECKING:
    from .records import Records


UNKNOWN = "–"
PERCENT, RATIO = "percent", "ratio"
ROUGH = " rough"
# A share that was removed is warned of where it is off by more than this part of what was asked for.
MOST_OFF = 0.1
# So many scripts and languages are named, those first that lose most; a language loses where it takes so much more.
MOST_SHOWN, LOSES = 6, 1.02
# Tokens that the text never shows are named where they have more than this part of the parameters.
LEAST_SHOWN = 0.01
COUNTS = {
    "layers": "layers",
    "parameters": "parameters",
    "layer_parameters": "  in the layers",
    "weights": "bytes",
    "cache_per_token": "cache bytes per token",
}

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


@dataclass
class Facts:
    """What was measured of one model: widths of the layers by kind of space; by domain the perplexity, its bits per
    byte, the number of tokens, the standard errors of it and of its ratio to another model's, and the error of the
    last hidden states; the figures of its answers (`{"right": …}`); KL to the dense model.
    """

    widths: dict[str, list[int]] = field(default_factory=dict)
    layers: int | None = None
    parameters: int | None = None
    layer_parameters: int | None = None
    weights: int | None = None
    cache_per_token: int | None = None
    perplexity: dict[str, float | None] = field(default_factory=dict)
    stderr: Mapping[str, float | None] = field(default_factory=dict)
    ratio_stderr: Mapping[str, float | None] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    bits_per_byte: Mapping[str, float | None] = field(default_factory=dict)
    output_error: dict[str, float | None] = field(default_factory=dict)
    answers: Mapping[str, float] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One fact of several models: a value for each, None where it is not known, a list where it is one by layer.
    `change` says how the last is compared with the first: in `PERCENT`, as a `RATIO`, or not at all; `errors` are the
    standard errors of the values, and behind them that of the ratio.
    """

    label: str
    values: tuple[float | Sequence[int] | None, ...]
    digits: int = 0
    change: str = ""
    errors: tuple[float | None, ...] = ()
    tokens: int | None = None

    @property
    def ratio(self) -> float | None:
        """The last value, in the mean over the layers, as a multiple of the first; None where that is not known."""
        first, last = (fmean(value) if isinstance(value, Sequence) else value for value in self._ends())
        if not self.change or first is None or last is None or not (first > 0 and isfinite(first) and isfinite(last)):
            return None
        return last / first

    def cells(self) -> list[str]:
        """The values as text, with as many digits as their standard errors allow."""
        errors = self.errors or (None,) * len(self.values)
        shown = (
            (value, error, digits_of(error, self.digits)) for value, error in zip(self.values, errors, strict=False)
        )
        return [_shown(value, digits) + plus_minus(error, digits) for value, error, digits in shown]

    def compared(self) -> str:
        """The change as text."""
        if self.ratio is None:
            return ""
        if self.change != RATIO:
            return f"{self.ratio - 1:+.1%}"
        rough, error = self.tokens is not None and self.tokens < ENOUGH, (self.errors or (None,))[-1]
        digits = digits_of(error, 1 if rough else 3)
        return f"x {self.ratio:.{digits}f}{plus_minus(error, digits)}{ROUGH * rough}"

    def spark(self) -> str:
        """A bar for each layer of the last model, where they differ."""
        full, last = self._ends()
        uneven = isinstance(full, Sequence) and isinstance(last, Sequence) and len(set(last)) > 1
        return spark_line([width / max(full) for width in last]) if uneven else ""

    def _ends(self) -> tuple[Any, Any]:
        return self.values[0], self.values[-1]


def _shown(value: float | Sequence[int] | None, digits: int) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, Sequence):
        low, high = min(value), max(value)
        return f"{low:,}" if low == high else f"{low:,}-{high:,}"
    return f"{value:,.{digits}f}"


def size_rows(models: Sequence[Facts]) -> list[Row]:
    """Widths, numbers of parameters and bytes."""
    widths = [Row(f"width {kind}", of, change=PERCENT) for kind, of in _by_name([facts.widths for facts in models])]
    counts = [
        Row(label, tuple(getattr(facts, name) for facts in models), 0, PERCENT) for name, label in COUNTS.items()
    ]
    return [*widths, *_known(counts)]


def quality_rows(models: Sequence[Facts]) -> list[Row]:
    """Perplexity by domain and its geometric mean, mean bits per byte, output errors, and figures of answers."""
    rows = [
        Row(
            f"perplexity {name}",
            of,
            2,
            RATIO,
            (*(facts.stderr.get(name) for facts in models), models[-1].ratio_stderr.get(name)),
            models[-1].tokens.get(name),
        )
        for name, of in _by_name([facts.perplexity for facts in models])
    ]
    if len(rows) > 1:
        means = tuple(_mean([row.values[number] for row in rows]) for number in range(len(models)))
        rows.append(Row("  geometric mean", means, 2, RATIO, (*(None for _ in models), _error_of_mean(rows))))
    bits = tuple(_mean([*facts.bits_per_byte.values()], fmean) for facts in models)
    rows += _known([Row("bits per byte", bits, 3)])
    rows += [Row(f"output error {name}", of, 4) for name, of in _by_name([facts.output_error for facts in models])]
    rows += [Row(f"KL {name}", of, 4) for name, of in _by_name([facts.divergence for facts in models])]
    figures = [{f"answers {name}": facts.answers[name] for name in figure_names(facts.answers)} for facts in models]
    return [*rows, *(Row(label, of, 3) for label, of in _by_name(figures))]


def figure_names(figures: Mapping[str, float]) -> list[str]:
    """What was found of answers, without the standard errors."""
    return [name for name in figures if not name.endswith("_stderr")]


def rows(models: Mapping[str, Facts]) -> list[Row]:
    """All that is known of some of the models, which have the same order in each row."""
    every = list(models.values())
    return [*size_rows(every), *quality_rows(every)]


def cells(names: Sequence[str], of: Sequence[Row], compared: bool = True) -> list[list[str]]:
    """Rows as text under the names of the models; the last columns are the change and bars of the layers."""
    more = [Row.compared, *([Row.spark] if any(row.spark() for row in of) else [])] if compared else []
    head = ["", *names, *("" for _ in more)]
    titles = [f"{row.label} ({row.tokens:,} tokens)" if row.tokens else row.label for row in of]
    return [
        head,
        *([title, *row.cells(), *(shown(row) for shown in more)] for title, row in zip(titles, of, strict=True)),
    ]


def as_text(models: Mapping[str, Facts], compared: bool = True) -> str:
    """All facts of the models as a table of text."""
    return table(cells(list(models), rows(models), compared))


def as_csv(models: Mapping[str, Facts]) -> str:
    """All facts of the models as comma-separated values, a line for each model; of widths the least and the most."""
    every, text = rows(models), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *(row.label.strip() for row in every)])
    for name, *values in zip(models, *(row.values for row in every), strict=True):
        cells = (_shown(value, 0).replace(",", "") if isinstance(value, Sequence) else value for value in values)
        writer.writerow([name, *cells])
    return text.getvalue()


def facts_of(report: Mapping[str, Any]) -> dict[str, Facts]:
    """The facts of a run from the fields of its report: those of the model before it and after."""
    models = {}
    for when in ("before", "after"):
        widths = {kind: [*by_layer.values()] for kind, by_layer in sorted(report["widths"].items())}
        if when == "before":
            widths = {kind: [report["dense_widths"][kind]] * len(of) for kind, of in widths.items()}
        models[when] = Facts(
            widths=widths,
            parameters=report["parameters"].get(when),
            layer_parameters=report["layer_parameters"].get(when),
            **_measured(report, when),
            output_error={
                name: 0.0 if when == "before" else error for name, error in (report.get("output_error") or {}).items()
            },
        )
    return models


def perplexity_facts(record: Mapping[str, Any]) -> dict[str, Facts]:
    """The facts by model that the `perplexity` of a record holds, `{domain: {model: perplexity}}`, with its errors."""
    perplexity = record.get("perplexity") or {}
    names = dict.fromkeys(name for by_model in perplexity.values() for name in by_model)
    return {name: Facts(**_measured(record, name)) for name in names}


def quality_of_evaluation(record: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The fields of `Facts` that the record of an evaluation has of "model" or of "dense"."""
    return {
        **_measured({**record, "perplexity_tokens": record["tokens"]}, model),
        "divergence": record["divergence"] if model == "model" else {},
        "answers": record["figures"].get(model, {}),
    }


def _measured(record: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The fields of `Facts` that are about the perplexity of a model."""
    errors, bits = record.get("perplexity_stderr") or {}, record.get("bits_per_byte") or {}
    return {
        "perplexity": {name: of.get(model) for name, of in (record.get("perplexity") or {}).items()},
        "stderr": {name: of.get(model) for name, of in errors.items()},
        "ratio_stderr": {name: of.get("ratio") for name, of in errors.items()},
        "tokens": record.get("perplexity_tokens") or {},
        "bits_per_byte": {name: bits[name].get(model) for name in record.get("perplexity") or {} if name in bits},
    }


def target_and_result(target: float, removed: float, of_model: float) -> str:
    """What was asked for and what came of it, as a warning where they are far apart."""
    text = f"asked {target:.1%}, removed {removed:.1%} of the layers' parameters, which is {of_model:.1%} of all"
    return (
        f"warning: {text}; a smaller round_to or other targets may come nearer"
        if misses_target(target, removed)
        else text
    )


def target_summary(report: Mapping[str, Any]) -> str:
    """What `given` says of a run, by its report."""
    counts = report["parameters"]
    return target_and_result(report["target"], report["sparsity"], 1 - counts["after"] / counts["before"])


def misses_target(target: float, removed: float) -> bool:
    """Whether what was removed is not what was asked for, by more than a tenth of it."""
    return abs(removed - target) > MOST_OFF * target


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """What a report says beside its table: what was compared and tried."""
    if report.get("changed"):
        yield f"warning: {CHANGED}"
    if report.get("target") is not None:
        yield target_summary(report)
    if report.get("perplexity_stderr"):
        yield f"± is the standard error over {FEWEST} samples or more; rough: on fewer than {ENOUGH:,} tokens"
    for of in report.get("balances") or ():
        layers = of["layers_loss"]  # null in JSON where it is infinite
        known = "" if layers == 0 or of.get("measured", True) else ", as predicted"
        too_much = layers in (None, inf)
        rest = "asks more of the layers than they have" if too_much else f"{layers:.4f} in the layers{known}"
        kept = f"{of['tokens']:,} tokens kept loses {of['tokens_loss']:.4f} nats, and {rest}"
        yield f"{'taken' if of['chosen'] else 'compared'}: {kept}"
    yield from languages(report)
    shapes = report.get("shapes") or []
    for shape in shapes if len(shapes) > 1 else ():
        numbers = {name: [of] if isinstance(of, int) else [*of.values()] for name, of in shape["widths"].items()}
        widths = ", ".join(f"{name} {_shown(of, 0)}" for name, of in numbers.items())
        loss = "not finite" if shape["loss"] in (None, inf) else f"{shape['loss']:.4f}"
        yield f"{'taken' if shape['chosen'] else 'tried'}: {shape['proposed_by']} ({widths}), KL {loss}"
    rounds = report.get("rounds") or []
    if rounds and rounds[-1]["shares"] != rounds[0]["shares"]:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in rounds[-1]["shares"].items())
        yield f"shares in the last round: {shares}"


def languages(report: Mapping[str, Any]) -> Iterator[str]:
    """How much of a vocabulary the text has no use for, and which scripts and languages a smaller one is hard on."""
    unread = report.get("unread") or {"tokens": 0, "parameters": 0}
    if (share := unread["parameters"] / report["parameters"]["after"] if unread["tokens"] else 0.0) > LEAST_SHOWN:
        tokens = f"{unread['tokens']:,} tokens, {share:.0%} of the parameters"
        yield f"{tokens}, are of scripts that the text next to never shows; --target vocab with a budget removes such"
    scripts = sorted((report.get("scripts") or {}).items(), key=lambda pair: -pair[1])
    if scripts:
        shown = ", ".join(f"{name.title()} {count:,}" for name, count in scripts[:MOST_SHOWN])
        others = f" and {len(scripts) - MOST_SHOWN} others" if len(scripts) > MOST_SHOWN else ""
        yield f"tokens that are gone, by script: {shown}{others}"
    if by_code := report.get("languages"):
        yield from _cost_by_language(by_code)


def _cost_by_language(by_code: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What fewer tokens cost the languages to keep, and those that the dense model knew: bits per byte, or tokens of
    models that do not predict the next one.
    """
    by_code = {code: of for code, of in by_code.items() if of.get("after") is not None}
    if not by_code:
        return
    causal = any("known" in of for of in by_code.values())
    ratios = {code: of["after"] / of["before"] for code, of in by_code.items()}
    known = [code for code in sorted(ratios, key=lambda code: -ratios[code]) if by_code[code].get("known", True)]
    losing = [code for code in known if ratios[code] > LOSES]
    unit, digits = ("bits per byte", 3) if causal else ("tokens", 0)

    def shown(codes: Sequence[str]) -> str:
        pairs = ((LANGUAGES[code], by_code[code]) for code in codes)
        return ", ".join(f"{name} {of['before']:.{digits}f} to {of['after']:.{digits}f}" for name, of in pairs)

    if wanted := [code for code, of in by_code.items() if of["wanted"]]:
        yield f"{unit} in the languages to keep: {shown(wanted)}"
    all_of = f"of {len(known)} languages that the dense model knew," if causal else f"of {len(known)} languages,"
    worst = f": {shown(losing[:MOST_SHOWN])}" if losing else ""
    yield f"{all_of} {len(losing) or 'none'} now take{'' if len(losing) > 1 else 's'} more {unit}{worst}"


def _by_name(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The values of all models for each name that one of them has."""
    for name in dict.fromkeys(name for values in models for name in values):
        yield name, tuple(values.get(name) for values in models)


def _known(table_rows: Sequence[Row]) -> list[Row]:
    return [row for row in table_rows if any(value is not None for value in row.values)]


def _mean(values: Sequence[Any], mean: Callable[[Sequence[Any]], float] = geometric_mean) -> float | None:
    usable = all(value is not None and value > 0 and isfinite(value) for value in values)
    return mean(values) if values and usable else None


def _error_of_mean(of: Sequence[Row]) -> float | None:
    """The standard error of the geometric mean of ratios that were measured on texts of their own."""
    parts = [(row.errors[-1] or inf) / row.ratio for row in of if row.ratio]
    mean = _mean([row.ratio for row in of])
    return None if mean is None or not isfinite(hypot(*parts)) else mean * hypot(*parts) / len(of)


def removed(report: Mapping[str, Any]) -> Iterator[str]:
    """What went of each kind of space, such as "384 of 1,536 FFN channels (25 %) in each of 30 layers"."""
    for kind, by_layer in sorted(report["widths"].items()):
        full, name = report["dense_widths"][kind], NAMES.get(kind, f"units of {kind}")
        gone = [full - width for width in by_layer.values()]
        if not any(gone):
            continue
        share = sum(gone) / (full * len(gone))
        if len({*gone}) > 1:
            count = f"{min(gone):,} to {max(gone):,} of {full:,} {name} ({share:.0%} in the mean)"
        else:
            count = f"{gone[0]:,} of {full:,} {name} ({share:.0%})"
        where = "" if int(next(iter(by_layer))) == MODEL else f" in each of {len(gone)} layers"
        yield f"{count}{where}".replace("%", " %")


@dataclass(frozen=True)
class Table:
    """A table of text cells under a head; `bars` are shares from 0 to 1, drawn at the end of each row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()


def quality_of_run(records: Records) -> dict[str, Facts]:
    """What a pruning has measured, of the dense and of the pruned model."""
    facts = facts_of(records.report)
    return {"dense": facts["before"], "pruned": facts["after"]}


def other_text(records: Records) -> dict[str, Facts]:
    """What was measured later on text that the run has not seen, by model; empty where nothing was."""
    perplexity, shared = records.evaluation.get("perplexity", {}), records.evaluation.get("shared") or ()
    of_kind = {name: of for name, of in perplexity.items() if name not in shared}
    return perplexity_facts({**records.evaluation, "perplexity": of_kind})


def quality_tables(records: Records) -> Iterator[Table]:
    """Perplexity by domain and figures of answers, dense, pruned and recovered: held-out and other text apart."""
    what = "Outputs on the kinds of input" if records.report.get("output_error") else "Perplexity on the kinds of text"
    models = {
        f"{what} that it was calibrated on": quality_of_run(records),
        "Perplexity on the kinds of text that it was trained on": perplexity_facts(records.recovery),
    }
    last = "recovered" if records.recovery else "pruned"
    perplexities, shared = records.evaluation.get("perplexity", {}), records.evaluation.get("shared")
    for title, names in _by_kinship(list(perplexities), shared).items():
        of_kind = {name: perplexities[name] for name in names}
        tokens = records.evaluation.get("tokens", {})
        measured = perplexity_facts({**records.evaluation, "perplexity": of_kind, "perplexity_tokens": tokens})
        models[title] = {last if name == "model" else name: facts for name, facts in measured.items()}
    figures = records.evaluation.get("figures", {})
    models["Figures of the answers"] = {
        label: Facts(answers=figures[name]) for label, name in (("dense", "dense"), (last, "model")) if name in figures
    }
    for caption, facts_by_model in models.items():
        if rows := quality_rows([*facts_by_model.values()]):
            yield _quality_table(caption, list(facts_by_model), rows)


def _quality_table(caption: str, models: Sequence[str], rows: Sequence[Row]) -> Table:
    """What was lost first, where it can be said, and what it was measured on last; bars are as long as the losses."""
    columns = {
        "": [row.label.removeprefix("perplexity ").strip() for row in rows],
        "loss": [row.compared() for row in rows],
        **dict(zip(models, zip(*(row.cells() for row in rows), strict=True), strict=True)),
        "tokens": [f"{row.tokens:,}" if row.tokens else "" for row in rows],
    }
    columns = {head: column for head, column in columns.items() if any(column)}
    lost = [max((row.ratio or 1.0) - 1, 0.0) for row in rows]
    bars = [loss / max(lost) for loss in lost] if any(lost) else []
    return Table(caption, [*columns], [*zip(*columns.values(), strict=True)], bars)


def _by_kinship(names: Sequence[str], shared: Sequence[str] | None) -> dict[str, list[str]]:
    """The domains of an evaluation by what they have to do with the calibration, under the heading of each kind."""
    if shared is None:
        return {"Perplexity on other text, which may have been calibrated on": list(names)}
    return {
        "Perplexity on other text": [name for name in names if name not in shared],
        "Perplexity on text that was calibrated or trained on": [name for name in names if name in shared],
    }
