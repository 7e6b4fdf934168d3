"""The reports of a pruning and of a training, and the records that are saved with a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedModel

from ..arch.meta import is_offloaded, skeleton
from ..arch.spec import LAYER, MODEL, ArchSpec
from ..config.fields import read_mapping
from ..config.pruning import StructPruneConfig
from ..domains.manifest import Manifest
from ..errors import StructPruneError
from ..system.stages import model_bytes, stage
from ..written import RECORD_VERSION, VERSION_KEY, replace_json, unversioned, versioned
from .fields import decode, encode
from .figures import AnswersResult, DomainResult, LanguageResult, SizeResult, TrimResult, UnseenResult
from .plan import Plan


REPORT_NAME = "report.json"
RECOVERY_CONFIG_NAME = "recovery_config.json"
RECOVERY_REPORT_NAME = "recovery_report.json"
AnyResult = TypeVar("AnyResult", bound="ResultRecord")


class ResultRecord:
    """Base of the dataclasses that hold the measurements of a run and are saved as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, without fields that are None."""
        values: dict[str, Any] = encode(self)
        return values

    @classmethod
    def from_dict(cls: type[AnyResult], values: Mapping[str, Any], name: str = "The record") -> AnyResult:
        """Return the record with these plain values.

        Raises:
            StructPruneError: If a field is missing, unknown, or of another type.
        """
        return decode(cls, values, name)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON. A number that is not finite becomes null."""
        replace_json(path, versioned(self.to_dict(), RECORD_VERSION))

    @classmethod
    def load(cls: type[AnyResult], path: str | Path) -> AnyResult | None:
        """Return the record in a file, or None if there is no file or an earlier version wrote it.

        Raises:
            StructPruneError: If the file cannot be read, or a later version wrote it.
        """
        if not Path(path).is_file():
            return None

        document = read_mapping(Path(path), json.loads)
        try:
            values = unversioned(document, RECORD_VERSION)
        except StructPruneError as error:
            raise StructPruneError(f"{path}: {error}") from error

        if document.get(VERSION_KEY, 1) < RECORD_VERSION:
            return None
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


@dataclass
class RecoveryReport(ResultRecord):
    """The measurements of a training after pruning.

    Attributes:
        tokens: The number of training tokens.
        steps: The number of optimizer steps.
        seconds: The duration of the training.
        domains: The results by domain; `validation text` and `answers` have only the divergence.
        unseen: The results on unseen text; None where it was not measured.
        kept_step: The optimizer step whose checkpoint was kept; 0 if no checkpoint was better than the pruned model.
        stopped: The reason why training ended early; empty where it did not.
        answers: The answers of the models to test questions; None where no questions were asked.
        learning_rate: The initial learning rate.
        teacher: The name or folder of the teacher; empty where there was none.
        earlier: The configs of previous trainings of this model, the first one first.
        curve: The validation loss during training.
    """

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    domains: dict[str, DomainResult] = field(default_factory=dict)
    unseen: UnseenResult | None = None
    kept_step: int = 0
    stopped: str = ""
    answers: AnswersResult | None = None
    learning_rate: float = 0.0
    teacher: str = ""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)

    def domain(self, name: str) -> DomainResult:
        """Return the result of a domain, and add an empty one if the domain is new."""
        return self.domains.setdefault(name, DomainResult())

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

    @property
    def has_dense(self) -> bool:
        """Return whether the original model was measured on the same text as the trained one."""
        perplexities = [domain.perplexity for domain in self.domains.values() if domain.perplexity is not None]
        return bool(perplexities) and all(figure.dense is not None for figure in perplexities)

    def __str__(self) -> str:
        """Return the printed form: a table and the cost of the training."""
        from .summary import recovery_lines

        return "\n".join(recovery_lines(self))


@dataclass
class DenseModel:
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


@dataclass
class Report(ResultRecord):
    """The measurements of a pruning.

    Attributes:
        model_type: The model type.
        criterion: The criterion that scored the units inside layers.
        model: The original model.
        dense: The size of the original model.
        pruned: The size of the pruned model.
        widths: The number of kept units, by kind of space and layer of the original model.
        dense_widths: The full width, by kind of space.
        removed_layers: The layers of the original model that were removed, from 0.
        target: The share of the layer parameters that was requested; None where no share was requested.
        domains: The results by calibration domain.
        unseen: The results on unseen text; None where there was none.
        languages: The results by language code, where tokens were removed or languages were named.
        answers: The answers of the models to test questions; None where no questions were asked.
        trimmed: The result of vocabulary trimming; None where no token was removed.
        shapes: The widths that were tried, for allocations that measure losses.
        wish: The result of a search for a size by its loss: the requested `loss`, the losses on text that was held
            out from the trials (`measured`), the expected loss with 5% fewer parameters (`next`), and the `trials`.
        recovery: The training after pruning; None where there was none.
        seconds: The duration by stage.
        changed: Whether the saved weights differ from the measured ones.
        resumed: Whether the run continued an interrupted one. `seconds` then covers the last run only.
    """

    model_type: str
    criterion: str
    model: DenseModel = field(default_factory=DenseModel)
    dense: SizeResult = field(default_factory=SizeResult)
    pruned: SizeResult = field(default_factory=SizeResult)
    widths: dict[str, dict[int, int]] = field(default_factory=dict)
    dense_widths: dict[str, int] = field(default_factory=dict)
    removed_layers: list[int] = field(default_factory=list)
    target: float | None = None
    domains: dict[str, DomainResult] = field(default_factory=dict)
    unseen: UnseenResult | None = None
    languages: dict[str, LanguageResult] = field(default_factory=dict)
    answers: AnswersResult | None = None
    trimmed: TrimResult | None = None
    shapes: list[dict[str, Any]] = field(default_factory=list)
    wish: dict[str, Any] = field(default_factory=dict)
    recovery: RecoveryReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    changed: bool = False
    resumed: bool = False

    def start(self, model: PreTrainedModel, arch: ArchSpec) -> None:
        """Enter the size of the original model."""
        self.dense = _size(model, arch)
        self.model = DenseModel(model.name_or_path or "", str(model.dtype).removeprefix("torch."))

    def finish(self, model: PreTrainedModel, arch: ArchSpec, dense_arch: ArchSpec, plan: Plan) -> None:
        """Enter the size and the widths of the pruned model."""
        self.pruned = _size(model, arch)
        all_layers = range(dense_arch.num_layers)
        kept_layers = set(plan.keep.get((MODEL, LAYER), all_layers))
        self.removed_layers = [layer for layer in all_layers if layer not in kept_layers]

        for name, widths in plan.widths().items():
            full = dense_arch.widths(name)
            by_layer = {layer: width for layer, width in full.items() if layer == MODEL or layer in kept_layers}
            by_layer.update(widths)
            self.widths[name] = by_layer
            self.dense_widths[name] = max(full.values())

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Add the time spent inside `with` to a stage, without the time of nested stages."""
        return stage(name, self.seconds)

    @property
    def sparsity(self) -> float:
        """Return the share of the layer parameters that was removed."""
        if not self.dense.layer_parameters:
            return 0.0
        return 1 - self.pruned.layer_parameters / self.dense.layer_parameters

    @property
    def removed(self) -> float:
        """Return the share of all parameters that was removed."""
        if not self.dense.parameters:
            return 0.0
        return 1 - self.pruned.parameters / self.dense.parameters

    @property
    def latest_answers(self) -> AnswersResult | None:
        """Return the answers of the latest model, or None if it was not asked."""
        if self.recovery is None:
            return self.answers
        if self.recovery.answers is None and not self.recovery.kept_step:
            # The training gained nothing, so the model is the pruned model.
            return self.answers
        return self.recovery.answers

    def __str__(self) -> str:
        """Return the printed form: sizes, losses on each domain, answers, and a verdict."""
        from .summary import report_lines

        return "\n".join(report_lines(self))


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
        checksums: The dtype, the shape and two checksums of each measured weight by name, as
            `system.fingerprint.checksums` returns them.
    """

    config: StructPruneConfig
    plan: Plan
    report: Report
    manifest: Manifest
    checksums: Mapping[str, Any]
