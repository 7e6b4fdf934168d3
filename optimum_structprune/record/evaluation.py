"""The results of `evaluate` and of `structprune evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .figures import AnswersResult, DomainResult, LanguageResult, SizeResult
from .report import ResultRecord
from .speed import Speed


# The name of the original model in tables.
ORIGINAL = "original"


@dataclass
class Evaluation(ResultRecord):
    """The result of `evaluate`. `str(evaluation)` is a table.

    Attributes:
        model: The name or the folder of the model. Its figures are called `pruned`.
        original: The name or the folder of the original model, whose figures are called `dense`. None if the model
            was measured alone.
        seq_length: The number of tokens in a sample. All tokens but the first are predicted.
        prefix: The token that each sample begins with; None where the tokenizer has none.
        domains: The results by domain.
        languages: For encoders with another tokenizer, the results in 30 languages.
        answers: The answers to questions; None where no questions were asked.
        calibrated: The domains of a kind that the model was calibrated on; None without a record of the calibration.
        shared: The domains that share text with the calibration; None without a record of the calibration.
        warnings: The reasons why these figures may be too good.
    """

    model: str
    original: str | None = None
    seq_length: int = 0
    prefix: str | None = None
    domains: dict[str, DomainResult] = field(default_factory=dict)
    languages: dict[str, LanguageResult] = field(default_factory=dict)
    answers: AnswersResult | None = None
    calibrated: list[str] | None = None
    shared: list[str] | None = None
    warnings: list[str] = field(default_factory=list)

    def is_calibration_domain(self, name: str) -> bool:
        """Return whether a domain is of a kind that the model was calibrated on."""
        return name in (self.calibrated or ()) or name in (self.shared or ())

    def __str__(self) -> str:
        """Return a table of all figures, some answers, and the warnings."""
        from .measured import measurement_lines

        name = "model" if self.original is None else "pruned"
        measurement = Measurement({name: MeasuredModel(self.model, evaluation=self)})
        return "\n".join(measurement_lines(measurement))


@dataclass
class MeasuredModel:
    """The measurements of one model.

    Attributes:
        path: Its folder or its id on the Hub.
        size: Its size; None where it was not measured.
        widths: The widths of the layers, by kind of space.
        evaluation: Its evaluation; None where it was not evaluated. The figures of the original model are in the
            evaluations of the models that are compared with it.
    """

    path: str
    size: SizeResult | None = None
    widths: dict[str, list[int]] = field(default_factory=dict)
    evaluation: Evaluation | None = None


@dataclass
class Measurement(ResultRecord):
    """The measurements of several models; the original model comes first where there is one.

    Attributes:
        models: The measurements by the name of the model.
        speed: The speed of the models; None where it was not measured.
    """

    models: dict[str, MeasuredModel] = field(default_factory=dict)
    speed: Speed | None = None

    def columns(self) -> dict[str, MeasuredModel]:
        """Return the models of a table by name, with the original model if any figure belongs to it."""
        models = dict(self.models)
        is_compared = any(evaluation.original is not None for evaluation in self.evaluations.values())
        has_original = any(model.evaluation is None for model in models.values())

        if is_compared and not has_original:
            models = {ORIGINAL: MeasuredModel(ORIGINAL)}
            models.update(self.models)
        return models

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Return the evaluations by the name of the model."""
        evaluations = {}
        for name, model in self.models.items():
            if model.evaluation is not None:
                evaluations[name] = model.evaluation
        return evaluations
