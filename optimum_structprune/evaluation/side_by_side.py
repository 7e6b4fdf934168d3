"""Several models side by side: size, widths, perplexity, tasks, speed and cache, as a table, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, geometric_mean
from typing import Any

from transformers import PreTrainedModel

from ..arch.load import describe
from ..errors import StructPruneError
from ..forward.generation import bytes_of, cache_name
from ..record.text import table
from .evaluate import Evaluation
from .ideal import work_of
from .pictures import Point
from .speed import Speed


Value = int | float | str | None


@dataclass
class Facts:
    """What is known of one model.

    Attributes:
        parameters: The number of parameters.
        weights: The bytes of the weights in memory.
        layers: The number of layers; None where the architecture is not described.
        widths: The widths of the layers, in order, by kind of space.
        cache_per_token: The bytes of keys and values per token; None for a model that keeps none.
        perplexity: The perplexity by domain.
        tasks: The scores by task, `{"piqa": {"acc": …, …}}`.
        read: The tokens of a prompt read per second; None where it was not measured.
        write: The tokens written per second.
    """

    parameters: int
    weights: int
    layers: int | None = None
    widths: dict[str, list[int]] = field(default_factory=dict)
    cache_per_token: int | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    read: float | None = None
    write: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, evaluation: Evaluation | None = None, arch_file: str | None = None) -> Facts:
        """The sizes of a causal language model, and what `evaluate` has measured of it."""
        cached = cache_name(model) is not None
        facts = cls(
            parameters=model.num_parameters(),
            weights=bytes_of(model.parameters()),
            cache_per_token=work_of(model).cache_per_token if cached else None,
        )
        try:
            arch = describe(model, arch_file)
        except StructPruneError:  # a model of another kind has no widths that are known
            pass
        else:
            facts.layers = arch.num_layers
            facts.widths = {name: [*arch.widths(name).values()] for name in arch.names}
        if evaluation is not None:
            facts.perplexity = {name: found["model"] for name, found in evaluation.perplexity.items()}
            facts.tasks = {name: dict(scores["model"]) for name, scores in evaluation.tasks.items()}
        return facts

    def row(self) -> dict[str, Value]:
        """The facts as one line of a table, by column."""
        row: dict[str, Value] = {"parameters": self.parameters, "bytes": self.weights, "layers": self.layers}
        for name, widths in self.widths.items():
            low, high = min(widths), max(widths)
            row[f"width {name}"] = low if low == high else f"{low}-{high}"
        row["cache bytes per token"] = self.cache_per_token
        for name, value in self.perplexity.items():
            row[f"perplexity {name}"] = value
        if len(self.perplexity) > 1:
            row["perplexity, geometric mean"] = geometric_mean(self.perplexity.values())
        for name, scores in self.tasks.items():
            for metric, value in scores.items():
                if metric != "items" and "_stderr" not in metric:
                    row[f"{name} {metric}"] = value
        if self.read is not None:
            row |= {"tokens read per second": self.read, "tokens written per second": self.write}
        return row


@dataclass
class SideBySide:
    """Facts of several models; `str` of it is a table with one column for each.

    Attributes:
        models: The facts by model.
        notes: What the numbers do not say.
    """

    models: dict[str, Facts]
    notes: list[str] = field(default_factory=list)

    def add_speed(self, speed: Speed) -> None:
        """Enter the speeds that `measure_speed` has measured, of the first batch size and prompt."""
        for one in reversed(speed.measurements):
            facts = self.models[one.model]
            facts.read, facts.write = one.prefill.tokens_per_second, one.decode.tokens_per_second
        first = speed.measurements[0]
        self.notes.append(
            f"speed: batch {first.batch_size}, a prompt of {first.prompt} tokens, {speed.new_tokens} written, "
            f"{speed.device}, {speed.threads} thread{'' if speed.threads == 1 else 's'}."
        )

    @property
    def quality(self) -> str | None:
        """What the picture shows: `perplexity`, `accuracy`, or None where neither was measured."""
        first = next(iter(self.models.values()))
        return "perplexity" if first.perplexity else "accuracy" if first.tasks else None

    def points(self) -> list[Point]:
        """The models by parameters and quality: the geometric mean of perplexities, or the mean accuracy."""
        if self.quality == "perplexity":
            means = {name: geometric_mean(facts.perplexity.values()) for name, facts in self.models.items()}
        else:
            means = {name: fmean(_accuracies(facts.tasks)) for name, facts in self.models.items()}
        return [Point(name, facts.parameters, means[name]) for name, facts in self.models.items()]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain values."""
        return asdict(self)

    def to_csv(self) -> str:
        """One line for each model, with a head."""
        return as_csv([{"model": name, **facts.row()} for name, facts in self.models.items()])

    def __str__(self) -> str:
        """A table, and the notes."""
        rows = {name: facts.row() for name, facts in self.models.items()}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [["", *rows], *([column, *(_shown(row.get(column)) for row in rows.values())] for column in columns)]
        return "\n".join([table(lines), *self.notes])


def as_csv(rows: Sequence[Mapping[str, Value]]) -> str:
    """Rows as CSV, with a head of all columns."""
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _accuracies(tasks: Mapping[str, Mapping[str, float]]) -> Iterator[float]:
    """The length-normalised accuracy of each task, or the plain one where there is none."""
    for scores in tasks.values():
        plain = [value for metric, value in scores.items() if metric != "items" and "_stderr" not in metric]
        yield scores.get("acc_norm", scores.get("acc", plain[0]))


def _shown(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 10 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else value
