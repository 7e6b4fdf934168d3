"""The numbers of a run and of a training, and all that a run leaves beside its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..arch.meta import is_offloaded, skeleton
from ..arch.spec import LAYER, MODEL, ArchSpec
from ..config.pruning import StructPruneConfig
from ..domains.manifest import Manifest
from ..system.stages import model_bytes, stage
from ..written import Record
from .plan import Plan


REPORT_NAME = "report.json"
RECOVERY_CONFIG_NAME = "recovery_config.json"
RECOVERY_REPORT_NAME = "recovery_report.json"
PERPLEXITY = "KL says whether the model does as the dense one does, perplexity only how well the text is predicted"


@dataclass
class RecoveryReport:
    """The numbers of a training after pruning; see `saving/schemas/report.schema.json`."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_margin: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_tokens: dict[str, int] = field(default_factory=dict)
    perplexity_documents: dict[str, int] = field(default_factory=dict)
    divergence: dict[str, dict[str, float]] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    kept_step: int = 0
    stopped: str = ""
    answers: Sequence[Mapping[str, Any]] = field(default_factory=list)
    learning_rate: float = 0.0
    teacher: str = ""
    earlier: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        """Perplexity and KL to the teacher by kind of text, as a table, and the cost."""
        from .answers import remark  # what makes text is imported where text is asked for
        from .table import as_text

        cost = f"recovery: {self.tokens:,} tokens, {self.steps} steps, {self.seconds:.0f} s; {self.kept}"
        lines = [as_text(asdict(self)), PERPLEXITY * bool(self.divergence), *remark(self.answers), cost, self.stopped]
        return "\n".join(filter(None, lines))

    @property
    def kept(self) -> str:
        """States which step of the training is kept."""
        if not self.kept_step:
            return "no checkpoint was better than the pruned model, which is kept"
        return f"step {self.kept_step} is kept"


@dataclass
class Report(Record):
    """The numbers of a pruning. Each field has its sentence in `saving/schemas/report.schema.json`."""

    model_type: str
    criterion: str
    parameters: dict[str, int] = field(default_factory=dict)
    layer_parameters: dict[str, int] = field(default_factory=dict)
    widths: dict[str, dict[int, int]] = field(default_factory=dict)
    dense_widths: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_margin: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_tokens: dict[str, int] = field(default_factory=dict)
    perplexity_documents: dict[str, int] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    target: float | None = None
    recovery: RecoveryReport | None = None
    embeddings: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    wish: dict[str, Any] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = field(default_factory=list)
    languages: dict[str, dict[str, Any]] = field(default_factory=dict)
    scripts: dict[str, int] = field(default_factory=dict)
    trimmed: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    changed: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    removed_layers: list[int] = field(default_factory=list)
    resumed: bool = False

    def start(self, model: PreTrainedModel, arch: ArchSpec) -> None:
        """Enter the sizes of the dense model."""
        if is_offloaded(model):  # what is tied has come apart there, and would count twice
            model = skeleton(model, model.config).eval().to(model.dtype)
        self.parameters["before"], self.layer_parameters["before"] = model.num_parameters(), sum(arch.layer_params)
        self.model = {"name": model.name_or_path, "dtype": str(model.dtype).removeprefix("torch.")}
        self.weights["before"] = model_bytes(model)

    def finish(self, model: PreTrainedModel, arch: ArchSpec, dense_arch: ArchSpec, plan: Plan) -> None:
        """Enter the sizes and widths of the smaller model."""
        if is_offloaded(model):
            model = skeleton(model, model.config).eval().to(model.dtype)
        self.parameters["after"], self.layer_parameters["after"] = model.num_parameters(), sum(arch.layer_params)
        self.weights["after"] = model_bytes(model)
        kept = {MODEL, *plan.keep.get((MODEL, LAYER), range(dense_arch.num_layers))}
        for name, widths in plan.widths().items():
            full = dense_arch.widths(name)
            self.widths[name] = {**{layer: width for layer, width in full.items() if layer in kept}, **widths}
            self.dense_widths[name] = max(full.values())
        self.removed_layers = sorted({*range(dense_arch.num_layers)} - kept)

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Add the time spent inside `with` to a stage, without that of stages inside it."""
        return stage(name, self.seconds)

    @property
    def sparsity(self) -> float:
        """The share of the layers' parameters that was removed."""
        before = self.layer_parameters["before"]  # 0 where the layers are not described
        return 1 - self.layer_parameters["after"] / before if before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**super().to_dict(), "sparsity": self.sparsity}

    def __str__(self) -> str:
        """Widths, parameters and perplexity per domain, as a table, what else there is to say, and a verdict."""
        from .answers import remark
        from .remarks import remarks, verdict
        from .table import as_text

        values = self.to_dict()
        recovery = [] if self.recovery is None else ["", str(self.recovery)]
        return "\n".join([as_text(values), *remarks(values), *remark(self.answers), *recovery, *verdict(values)])


def enter_figures(record: Any, text: str, figures: Mapping[str, Any], is_other: bool = False) -> None:
    """Enter the figures of a text into a record by their fields, or those of other text into the field `other`."""
    for field_name, value in figures.items():
        if is_other:
            record.other[field_name.removeprefix("perplexity_")] = value
        else:
            getattr(record, field_name)[text] = value


class PruneRecords(NamedTuple):
    """The records of a pruning, which are saved beside the model.

    Attributes:
        config: The config, with the general text that was read.
        plan: The kept units of the dense model.
        report: The figures of the run.
        manifest: The text of the run, and of the runs that the dense model comes from.
        checksums: The dtype, shape and CRC-32 of each weight that the report describes, by name.
    """

    config: StructPruneConfig
    plan: Plan
    report: Report
    manifest: Manifest
    checksums: Mapping[str, Any]
