"""The records of a pruning, a training and an evaluation, which are saved with a model.

Records do not know their printed form. The modules `view` and `comparison` enter it in `PRINTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from ..arch.meta import is_offloaded, skeleton
from ..arch.spec import LAYER, MODEL, ArchSpec
from ..config.fields import read_json
from ..config.pruning import StructPruneConfig
from ..domains.manifest import Manifest
from ..method.plan import Plan
from ..system.codec import from_plain
from ..system.stages import model_bytes, stage
from ..system.written import RECORD_VERSION, Record
from .figures import AnswersResult, FileResult, Measurements, SizeResult, TrimResult


REPORT_NAME = "report.json"
RECOVERY_CONFIG_NAME = "recovery_config.json"
RECOVERY_REPORT_NAME = "recovery_report.json"
EVALUATION_NAME = "evaluation.json"
SPEED_NAME = "speed.json"
# The functions that return the lines of a record, by its class.
PRINTERS: dict[type, Callable[[Any], list[str]]] = {}
AnyResult = TypeVar("AnyResult", bound="ResultRecord")


class ResultRecord(Record):
    """Base of the dataclasses that hold the measurements of a run and are saved as JSON."""

    version = RECORD_VERSION

    def __str__(self) -> str:
        """Return the printed form."""
        return "\n".join(PRINTERS[type(self)](self))

    @classmethod
    def from_dict(cls: type[AnyResult], values: Mapping[str, Any], name: str = "The record") -> AnyResult:
        """Return the record with these plain values. A number that is null is infinite.

        Raises:
            StructPruneError: If a field is missing, unknown, or of another type.
        """
        return from_plain(cls, values, name, null=inf)

    @classmethod
    def load(cls: type[AnyResult], path: str | Path) -> AnyResult | None:
        """Return the record in a file, or None if there is no file.

        Raises:
            StructPruneError: If the file cannot be read, or another version wrote it.
        """
        if not Path(path).is_file():
            return None

        values = read_json(path, RECORD_VERSION)
        # Earlier runs searched for a loss.
        values.pop("loss_search", None)
        return cls.from_dict(values, str(path))


@dataclass
class CurvePoint:
    """The validation loss at one point of a training.

    Attributes:
        tokens: The number of training tokens up to this point.
        kl: The mean KL divergence from the teacher on validation text, in nats per token.
    """

    tokens: int
    kl: float


@dataclass(kw_only=True)
class RecoveryReport(Measurements, ResultRecord):
    """The measurements of a training after pruning: the columns `original`, `pruned` and `recovered`.

    The domains `validation text` and `answers` have only the divergence.

    Attributes:
        tokens: The number of training tokens.
        steps: The number of optimizer steps.
        seconds: The duration of the training.
        kept_step: The optimizer step whose checkpoint was kept; 0 if no checkpoint was better than the pruned model.
        stopped: The reason why training ended early; empty where it did not.
        learning_rate: The initial learning rate.
        teacher: The name or folder of the teacher; empty where there was none.
        earlier: The configs of previous trainings of this model, the first one first.
        curve: The validation loss during training.
    """

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    kept_step: int = 0
    stopped: str = ""
    learning_rate: float = 0.0
    teacher: str = ""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)

    @property
    def checkpoint_phrase(self) -> str:
        """Return a phrase that names the kept checkpoint, and the text on which it is worse than the pruned model.

        The mean over all validation samples chooses the checkpoint, so it may be worse on one kind of text.
        """
        if not self.kept_step:
            return "no checkpoint was better than the pruned model, so the pruned model is kept"

        phrase = f"best checkpoint: step {self.kept_step}"
        if self.kept_step == self.steps:
            phrase += " (last)"
        worse = self._worse_divergences()
        if worse:
            phrase += f", but farther from the original model on {' and '.join(worse)}"
        return phrase

    def _worse_divergences(self) -> list[str]:
        """Return the texts whose divergence from the original model rose, with the values before and after."""
        figures = {name: domain.divergence for name, domain in self.domains.items()}
        if self.unseen is not None:
            figures["unseen text"] = self.unseen.divergence

        worse = []
        for name, figure in figures.items():
            if figure is None or figure.pruned is None or figure.recovered is None:
                continue
            if round(figure.recovered, 3) > round(figure.pruned, 3):
                worse.append(f"{name} (KL {figure.pruned:.3f} → {figure.recovered:.3f})")
        return worse


@dataclass
class ShapeSpeed:
    """The speed-up of the shape of a pruned model over the original shape.

    Attributes:
        wish: The requested speed-up.
        predicted: The predicted speed-up.
        measured: The median of the measured speed-ups over pairs of runs, with random weights.
        low: The lower end of its 90 % confidence interval.
        high: The upper end of the interval.
        use: The use: `encode`, `query`, `decode` or `prompt`.
        batch_size: The number of texts that run together.
        tokens: The number of tokens in each text.
        threads: The number of threads of torch.
        clock: The clock: `wall` for elapsed time, `cpu` for processor time.
        device: The device.
        machine: The name of the processor.
    """

    wish: float
    predicted: float
    measured: float
    low: float
    high: float
    use: str
    batch_size: int
    tokens: int
    threads: int
    clock: str
    device: str
    machine: str

    @property
    def is_met(self) -> bool:
        """Return whether the interval reaches the requested speed-up."""
        return self.high >= self.wish

    def __str__(self) -> str:
        """Return the requested, the predicted and the measured speed-up with the conditions."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"Speed ({self.use}): {self.measured:.2f}× the original, {self.low:.2f}× to {self.high:.2f}×; requested "
            f"{self.wish:.2f}×, predicted {self.predicted:.2f}×. Batch {self.batch_size}, {self.tokens} tokens, "
            f"{threads} of {self.machine}, {self.clock} time."
        )


@dataclass
class OriginalModel:
    """The original model of a run.

    Attributes:
        name: Its id on the Hub, or its folder.
        dtype: Its dtype during the pruning.
        base_model: Its id on the Hub if the user has given one.
        license: Its license if the user has given one.
    """

    name: str = ""
    dtype: str = ""
    base_model: str = ""
    license: str = ""


@dataclass(kw_only=True)
class Report(Measurements, ResultRecord):
    """The measurements of a pruning: the columns `original` and `pruned`. `latest` has the columns of a training too.

    Attributes:
        model_type: The model type.
        criterion: The criterion that scored the units inside layers.
        model: The original model.
        original: The size of the original model.
        pruned: The size of the pruned model.
        widths: The number of kept units, by kind of space and layer of the original model.
        original_widths: The full width, by kind of space.
        removed_layers: The layers of the original model that were removed, from 0.
        target: The share of the layer parameters that was requested; None where no share was requested.
        trimmed: The result of vocabulary trimming; None where no token was removed.
        shapes: The widths that were tried, for searches that measure losses.
        file: The size of the file that is served; None where the budget does not limit it.
        speed: The speed-up of the shape; None where no speed was requested.
        recovery: The training after pruning; None where there was none.
        seconds: The duration by stage.
        measured: Whether the run measured the models; see `RunOptions.measure`.
        changed: Whether the saved weights differ from the measured ones.
        resumed: Whether the run continued an interrupted one. `seconds` then covers the last run only.
    """

    model_type: str
    criterion: str
    model: OriginalModel = field(default_factory=OriginalModel)
    original: SizeResult = field(default_factory=SizeResult)
    pruned: SizeResult = field(default_factory=SizeResult)
    widths: dict[str, dict[int, int]] = field(default_factory=dict)
    original_widths: dict[str, int] = field(default_factory=dict)
    removed_layers: list[int] = field(default_factory=list)
    target: float | None = None
    trimmed: TrimResult | None = None
    shapes: list[dict[str, Any]] = field(default_factory=list)
    file: FileResult | None = None
    speed: ShapeSpeed | None = None
    recovery: RecoveryReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    measured: bool = True
    changed: bool = False
    resumed: bool = False

    def start(self, model: PreTrainedModel, arch: ArchSpec) -> None:
        """Enter the size of the original model."""
        self.original = _size(model, arch)
        self.model = OriginalModel(model.name_or_path or "", str(model.dtype).removeprefix("torch."))

    def finish(self, model: PreTrainedModel, arch: ArchSpec, original_arch: ArchSpec, plan: Plan) -> None:
        """Enter the size and the widths of the pruned model."""
        self.pruned = _size(model, arch)
        all_layers = range(original_arch.num_layers)
        kept_layers = set(plan.keep.get((MODEL, LAYER), all_layers))
        self.removed_layers = [layer for layer in all_layers if layer not in kept_layers]

        for name, widths in plan.widths().items():
            full = original_arch.widths(name)
            by_layer = {layer: width for layer, width in full.items() if layer == MODEL or layer in kept_layers}
            by_layer.update(widths)
            self.widths[name] = by_layer
            self.original_widths[name] = max(full.values())

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Add the time spent inside `with` to a stage, without the time of nested stages."""
        return stage(name, self.seconds)

    @property
    def is_quantized_only(self) -> bool:
        """Return whether a search found that the whole original model in fewer bits is best."""
        return any(shape["chosen"] and not shape["widths"] for shape in self.shapes)

    @property
    def final_widths(self) -> dict[str, int | dict[int, int]]:
        """Return the widths that became smaller: one number, or one per layer if layers differ."""
        final: dict[str, int | dict[int, int]] = {}
        for name, by_layer in self.widths.items():
            numbers = set(by_layer.values())
            if numbers != {self.original_widths[name]}:
                final[name] = numbers.pop() if len(numbers) == 1 else by_layer
        return final

    @property
    def sparsity(self) -> float:
        """Return the share of the layer parameters that was removed."""
        if not self.original.layer_parameters:
            return 0.0
        return 1 - self.pruned.layer_parameters / self.original.layer_parameters

    @property
    def removed(self) -> float:
        """Return the share of all parameters that was removed."""
        if not self.original.parameters:
            return 0.0
        return 1 - self.pruned.parameters / self.original.parameters

    def latest(self, answers: AnswersResult | None = None) -> Measurements:
        """Return the table of the latest model: the columns of the pruning, and of the training after it.

        A training counts on a text if the original model was measured on it too. After vocabulary trimming, the
        interval on unseen text includes the loss that technical text may have.

        Args:
            answers: Answers that were collected later; by default those of the run.
        """
        table = Measurements(
            domains=self.domains, unseen=self.unseen, languages=self.languages, answers=answers or self.answers
        )
        split_words = None if self.unseen is None else self.unseen.split_words

        recovery = self.recovery
        if recovery is not None:
            if recovery.has_original or recovery.has_vectors:
                table.domains = recovery.domains
            trained = recovery.unseen_perplexity
            if trained is not None and trained.original is not None:
                table.unseen = recovery.unseen
            # A training that gained nothing leaves the pruned model with its answers.
            if answers is None and (recovery.answers is not None or recovery.kept_step):
                table.answers = recovery.answers

        if table.unseen is not None:
            table.unseen = table.unseen.with_technical_margin(split_words)
        return table


@dataclass
class Spread:
    """The median and the quartiles of several measurements.

    Attributes:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
    """

    median: float
    low: float
    high: float

    @property
    def contains_one(self) -> bool:
        """Return whether the quartiles lie on both sides of 1, so that no speed-up is shown."""
        return self.low <= 1 <= self.high


@dataclass
class Timing:
    """The speed of one model on one shape.

    Attributes:
        seconds: The duration of each repeat.
        tokens_per_second: The tokens of all sequences divided by the median duration; for encoders, the texts.
        speedup: The speed-up over the first model, with quartiles over the pairs of runs.
    """

    seconds: list[float]
    tokens_per_second: float
    speedup: Spread


@dataclass
class Speed(ResultRecord):
    """The result of `measure_speed`. `str(speed)` is a table.

    Attributes:
        prefill: The speed of reading a prompt and choosing the first token, by shape (such as "batch 1, prompt 128")
            and model.
        decode: The speed of generating the next tokens, by shape and model.
        run_memory: The bytes of memory, by shape and model. `memory_is` describes them.
        new_tokens: The number of tokens generated after each prompt.
        repeats: The number of runs of each model. The models take turns.
        threads: The number of threads of torch.
        clock: The unit of the seconds: `wall` is elapsed time, `cpu` is processor time over all threads.
        device: The device of the first model.
        memory_is: The meaning of `run_memory`.
        encode: The speed of encoders in making the hidden states of texts, by shape and model.
    """

    prefill: dict[str, dict[str, Timing]]
    decode: dict[str, dict[str, Timing]]
    run_memory: dict[str, dict[str, int]]
    new_tokens: int
    repeats: int
    threads: int
    clock: str
    device: str
    memory_is: str
    encode: dict[str, dict[str, Timing]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """Return the names of the models."""
        return list(next(iter(self.run_memory.values()), {}))


@dataclass(kw_only=True)
class Evaluation(Measurements, ResultRecord):
    """The result of `evaluate`: the columns `original` and `pruned`. `str(evaluation)` is a table.

    Attributes:
        model: The name or the folder of the model. Its column is called `pruned`.
        original: The name or the folder of the original model; None if the model was measured alone.
        seq_length: The number of tokens in a sample. All tokens but the first are predicted.
        prefix: The token that each sample begins with; None where the tokenizer has none.
        calibrated: The domains of a kind that the model was calibrated on; None without a record of the calibration.
        shared: The domains that share text with the calibration; None without a record of the calibration.
        warnings: The reasons why these figures may be too good.
    """

    model: str
    original: str | None = None
    seq_length: int = 0
    prefix: str | None = None
    calibrated: list[str] | None = None
    shared: list[str] | None = None
    warnings: list[str] = field(default_factory=list)

    def is_calibration_domain(self, name: str) -> bool:
        """Return whether a domain is of a kind that the model was calibrated on."""
        return name in (self.calibrated or ()) or name in (self.shared or ())


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
    """The result of `structprune evaluate`; the original model comes first where there is one.

    Attributes:
        models: The measurements by the name of the model.
        speed: The speed of the models; None where it was not measured.
    """

    models: dict[str, MeasuredModel] = field(default_factory=dict)
    speed: Speed | None = None

    @property
    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations of the models that have one."""
        return [model.evaluation for model in self.models.values() if model.evaluation is not None]


def _size(model: PreTrainedModel, arch: ArchSpec) -> SizeResult:
    """Return the size of a model."""
    if is_offloaded(model):
        # Offloading separates tied weights, which would count twice.
        model = skeleton(model, model.config).eval().to(model.dtype)
    return SizeResult(model.num_parameters(), sum(arch.layer_params), model_bytes(model))


class PruneRecords(NamedTuple):
    """The records of a pruning, which are saved with the model.

    Attributes:
        config: The config, with the general text that was read.
        plan: The kept units of the original model.
        report: The measurements of the run.
        manifest: The text that was used, by this run and by earlier ones.
        shapes: The shape of each weight by name.
        checksums: The dtype, the shape and two checksums of each measured weight by name, as
            `system.fingerprint.checksums` returns them; None if nothing was measured.
    """

    config: StructPruneConfig
    plan: Plan
    report: Report
    manifest: Manifest
    shapes: Mapping[str, torch.Size]
    checksums: Mapping[str, Any] | None
