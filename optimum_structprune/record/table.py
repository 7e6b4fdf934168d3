"""Rows of figures, each of several models, and the forms in which they are shown: text, Markdown and HTML.

A record is the JSON of a report, of a training or of an evaluation. It names each figure of a model in the same way:
`{"parameters": {model: …}, "perplexity": {domain: {model: …}}, …}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, hypot, inf, isfinite, log10
from statistics import fmean, geometric_mean
from typing import Any

from ..forward.metrics import MANY_DOCUMENTS


UNKNOWN = "–"
MEASURED = ("margin", "tokens", "documents")  # what a record has of each perplexity beside it
PERCENT, RATIO = "percent", "ratio"
# What has one number for each model, with its label.
COUNTS = {
    "layers": "layers",
    "parameters": "parameters",
    "layer_parameters": "  in the layers",
    "weights": "bytes",
    "cache_per_token": "cache bytes per token",
}
# What has one number for each domain and model, as a record names it and as rows do, with the digits that are shown.
BY_DOMAIN = {"divergence": ("KL", 4, PERCENT), "agreement": ("top-1", 3, ""), "tasks": ("MTEB", 3, "")}
# What a record has of the vectors of texts, by domain and model, with its label.
EMBEDDINGS = {
    "cosine": "cosine",
    "cosine_p5": "cosine, 5th percentile,",
    "cosine_worst": "cosine, worst,",
    "neighbours": "neighbours kept",
    "retrieval": "translations found",
}
# What is more than text in one line of Markdown, with the addresses that GitHub's and the Hub's make links of.
ACTIVE = re.compile(r"[\\`*_~\[\]<&|$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure of several models: a value for each, None where it is not known, a list where it is one by layer or a
    range. `change` says how the last is compared with the first known one: in `PERCENT`, as a `RATIO`, or not at all.
    `margins` are the margins of error of the values and of the ratio; a `note` stands in the place of a change.
    """

    label: str
    values: tuple[float | Sequence[float] | None, ...]
    digits: int = 0
    change: str = ""
    margins: tuple[float | None, ...] = ()
    tokens: int | None = None
    documents: int | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Gives the last value (by layer, its mean) as a multiple of the first known; None where one is unknown."""
        known = [value for value in self.values[:-1] if value is not None][:1]
        ends = [fmean(value) if isinstance(value, Sequence) else value or 0.0 for value in (*known, self.values[-1])]
        is_comparable = self.change and len(ends) == 2 and self.values[-1] is not None
        return ends[1] / ends[0] if is_comparable and ends[0] > 0 and all(map(isfinite, ends)) else None

    def cells(self) -> list[str]:
        """Shows the label, the values, with as many digits as their margins of error allow, and the change."""
        label = f"{self.label} ({self.tokens:,} tokens)" if self.tokens else self.label
        margins = self.margins or (None,) * (len(self.values) + 1)
        shown = [as_number(*pair, self.digits) for pair in zip(self.values, margins[:-1], strict=True)]
        ratio, rough = self.ratio, self.documents is not None and self.documents < MANY_DOCUMENTS
        if ratio is None:
            change = self.note
        elif self.change == PERCENT:
            change = f"{ratio - 1:+.1%}"
        else:
            change = f"x {as_number(ratio, margins[-1], 1 if rough else 3)}{' rough' * rough}"
        return [label, *shown, change]


def as_number(value: float | Sequence[float] | None, margin: float | None = None, digits: int = 0) -> str:
    """Shows a value and its margin of error, with the digits up to the first one of the margin, and at most 3."""
    if value is None:
        return UNKNOWN
    if isinstance(value, Sequence):
        return "-".join(f"{end:,.{digits}f}" for end in sorted({min(value), max(value)}))
    if margin is None or not isfinite(margin):
        return f"{value:,.{digits}f}"
    digits = min(max(-floor(log10(margin)), 0), 3) if margin > 0 else 3
    return f"{value:,.{digits}f} ± {margin:.{digits}f}"


def models_of(record: Record) -> list[str]:
    """The names by which a record calls its models, in its order."""
    kinds = ("perplexity", "embeddings", "run_memory")
    measured = [figures for kind in kinds for figures in (record.get(kind) or {}).values()]
    by_model = [record.get("parameters"), *measured, record.get("figures")]
    return list(dict.fromkeys(name for figures in by_model for name in figures or ()))


def size_rows(record: Record) -> list[Row]:
    """Widths, numbers of parameters and bytes."""
    models = models_of(record)
    rows = [_row(f"width {kind}", widths, models, change=PERCENT) for kind, widths in widths_of(record).items()]
    known = [(label, record[name]) for name, label in COUNTS.items() if any((record.get(name) or {}).values())]
    return rows + [_row(label, by_model, models, change=PERCENT) for label, by_model in known]


def quality_rows(record: Record) -> list[Row]:
    """Perplexity by domain and its geometric mean, bits per byte, what `BY_DOMAIN` and `EMBEDDINGS` name, answers."""
    models, rows = models_of(record), []
    fields = [record.get(f"perplexity_{name}") or {} for name in MEASURED]
    for group, domains in _groups(record).items():
        title = f", {group}" if group else ""
        of_group = [
            _row(f"perplexity {name}{title}", by_model, models, 2, RATIO, *(field.get(name) for field in fields))
            for name, by_model in domains.items()
        ]
        rows += of_group
        if len(of_group) > 1:
            columns = zip(*(row.values for row in of_group), strict=True)
            means, none = tuple(map(_geometric_mean, columns)), (None for _ in models)
            each = [row.ratio for row in of_group], ((row.margins or (None,))[-1] for row in of_group)
            rows.append(Row(f"  geometric mean{title}", means, 2, RATIO, (*none, margin_of_mean(*each))))
    if (other := record.get("other") or {}).get("perplexity"):
        label = f"perplexity other text, {other['source']}"
        rows.append(_row(label, other["perplexity"], models, 2, RATIO, *(other[name] for name in MEASURED)))
    if bits := record.get("bits_per_byte"):
        by_column = [[by_model.get(model) for by_model in bits.values()] for model in models]
        rows.append(Row("bits per byte", tuple(None if None in values else fmean(values) for values in by_column), 3))
    for field, (label, digits, change) in BY_DOMAIN.items():
        for name, found in (record.get(field) or {}).items():
            by_model = _by_model(found)  # two pruned models beside each other are no change
            rows.append(_row(f"{label} {name}", by_model, models, digits, change * ("recovered" in by_model)))
    for figure, label in EMBEDDINGS.items():
        for name, by_model in (record.get("embeddings") or {}).items():
            known, margin = (
                {model: found.get(key) for model, found in by_model.items()} for key in (figure, f"{figure}_margin")
            )
            if {*known.values()} != {None}:
                rows.append(_row(f"{label} {name}", known, models, 3, "", margin))
    return rows + (_figure_rows(record, models) if record.get("figures") else [])


def speed_rows(record: Record) -> list[Row]:
    """Tokens per second, the speed-up over the first model where its quartiles show one, and memory, by shape."""
    models, rows = models_of(record), []
    for stage, work in (("prefill", "reading"), ("decode", "writing")):
        for shape, by_model in (record.get(stage) or {}).items():
            rates = {model: timed["tokens_per_second"] for model, timed in by_model.items()}
            ratios = {model: timed["speedup"] for model, timed in list(by_model.items())[1:]}
            rows.append(_row(f"{work} tokens/s, {shape}", rates, models, 1))
            if ratios:
                quartiles = {model: [ratio["low"], ratio["high"]] for model, ratio in ratios.items()}
                shown = [model for model, (low, high) in quartiles.items() if not low <= 1 <= high]
                medians = {model: ratios[model]["median"] for model in shown}
                note = "" if models[-1] in medians else "not shown"
                rows.append(_row(f"{work} speed-up, {shape}", medians, models, 3, note=note))
                rows.append(_row(f"{work} quartiles, {shape}", quartiles, models, 3))
    memory = (record.get("run_memory") or {}).items()
    return rows + [_row(f"memory, {shape}", by_model, models, change=PERCENT) for shape, by_model in memory]


def _figure_rows(record: Record, models: Sequence[str]) -> list[Row]:
    """The figures of answers, and how those of the last model differ from the first one's on the same questions."""
    figures, rows = record["figures"], []
    for name in dict.fromkeys(name for row in figures.values() for name in row if not name.endswith("_margin")):
        keys = name, f"{name}_margin"
        values, margins = ({model: found.get(key) for model, found in figures.items()} for key in keys)
        note, pair = "", (record.get("paired") or {}).get(name)
        if pair:
            difference = "+" * (pair["difference"] >= 0) + as_number(pair["difference"], pair["margin"], 3)
            note = f"{difference}, {pair['verdict']} (p = {pair['p_value']:.3f})"
        rows.append(_row(f"answers {name}", values, models, 0 if name == "tokens" else 3, "", margins, note=note))
    return rows


def _row(
    label: str,
    by_model: Mapping[str, Any],
    models: Sequence[str],
    digits: int = 0,
    change: str = "",
    margins: Mapping[str, float | None] | None = None,
    *counted: int | None,
    note: str = "",
) -> Row:
    values, each = tuple(map(by_model.get, models)), tuple(map((margins or {}).get, (*models, "ratio")))
    tokens, documents = counted or (None, None)
    return Row(label, values, digits, change, each if margins else (), tokens, documents, note)


def _by_model(figure: Any) -> Mapping[str, Any]:
    """Gives a figure by model; one that stands alone is the smaller model's."""
    return figure if isinstance(figure, Mapping) else {"after": figure, "model": figure}


def _groups(record: Record) -> dict[str, dict[str, Any]]:
    """The domains whose mean says something: those of kinds that were calibrated on, and all others."""
    perplexity = record.get("perplexity") or {}
    if record.get("calibrated") is None:
        return {"": perplexity}
    known = {*record["calibrated"], *(record.get("shared") or ())}
    groups: dict[str, dict[str, Any]] = {"calibrated on": {}, "other text": {}}
    for name, by_model in perplexity.items():
        groups["calibrated on" if name in known else "other text"][name] = by_model
    return groups


def widths_of(record: Record) -> dict[str, dict[str, list[int]]]:
    """The widths of the layers by kind of space and model."""
    full = record.get("dense_widths")
    return {
        kind: dict(widths) if full is None else {"before": [full[kind]], "after": [*widths.values()]}
        for kind, widths in sorted((record.get("widths") or {}).items())
    }


def _geometric_mean(values: Sequence[Any]) -> float | None:
    usable = all(value is not None and value > 0 and isfinite(value) for value in values)
    return geometric_mean(values) if usable else None


def margin_of_mean(ratios: Sequence[float | None], margins: Iterable[float | None]) -> float | None:
    """Gives the margin of error of the geometric mean of ratios that were measured on texts of their own."""
    if (mean := _geometric_mean(ratios)) is None:
        return None
    each = (inf if margin is None else margin / (ratio or 1) for ratio, margin in zip(ratios, margins, strict=True))
    margin = mean * hypot(*each) / len(ratios)
    return margin if isfinite(margin) else None


def side_by_side(records: Iterable[tuple[Record, Mapping[str, str]]]) -> dict[str, Any]:
    """One record of several models, from records with the names that their models are to have."""
    joined: dict[str, Any] = {f"perplexity_{name}": {} for name in MEASURED[1:]}
    items: dict[str, dict[str, Any]] = {}
    for record, names in records:

        def named(figure: Any, names: Mapping[str, str] = names) -> dict[str, Any]:
            return {names[model]: value for model, value in _by_model(figure).items() if model in names}

        joined |= {field: record[field] for field in ("seq_length", "prefix") if field in record}
        for field in (*COUNTS, "figures"):
            if figure := record.get(field):
                joined.setdefault(field, {}).update(named(figure))
        for field in ("widths", "perplexity", "perplexity_margin", "bits_per_byte", "embeddings", *BY_DOMAIN):
            for key, figure in (widths_of(record) if field == "widths" else record.get(field) or {}).items():
                joined.setdefault(field, {}).setdefault(key, {}).update(named(figure))
        for name in MEASURED[1:]:
            joined[f"perplexity_{name}"] |= record.get(f"perplexity_{name}") or {}
        for item in record.get("answers") or ():
            if answers := named(item["answers"]):
                items.setdefault(item["prompt"], {**item, "answers": {}})["answers"] |= answers
    return {**joined, "answers": [*items.values()]} if items else joined


def cells(models: Sequence[str], rows: Iterable[Row]) -> list[list[str]]:
    """Rows as text under the names of the models; the last column, of changes, has no name."""
    table = [["", *models, ""], *(row.cells() for row in rows)]
    return table if any(line[-1] for line in table) else [line[:-1] for line in table]


def as_text(record: Record) -> str:
    """All figures of a record as a table of text."""
    return aligned(cells(models_of(record), [*size_rows(record), *quality_rows(record), *speed_rows(record)]))


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as lines of text; the first column is aligned left, the others right."""
    sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))])
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def escaped(words: str) -> str:
    """A text as Markdown that shows it, in one line, whatever is in it."""
    return ACTIVE.sub(r"\\\g<0>", re.sub(r"\s+", " ", words))


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells of text as a Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(map(escaped, row))} |" for row in table]
    return "\n".join([head, f"|{'---|' * len(table[0])}", *body])
