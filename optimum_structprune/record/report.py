"""The numbers of a run and of a training."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from ..arch.spec import LAYER, MODEL, ArchSpec
from ..config.fields import read_json
from ..errors import StructPruneError, one_line
from ..plain_json import Record
from ..system.stages import model_bytes, peak_memory, stage
from .plan import Plan


if TYPE_CHECKING:
    from .answers import Items


REPORT_NAME = "report.json"
DETAILS_NAME = "pruning_details.json"
RECOVERY_CONFIG_NAME = "recovery_config.json"
RECOVERY_REPORT_NAME = "recovery_report.json"
PERPLEXITY = (
    "perplexity says how well the text itself is predicted, and not whether the model does as the dense one does:"
)


@dataclass
class RecoveryReport:
    """What training after pruning did, and what it cost; see `saving/schemas/report.schema.json`."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_stderr: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_tokens: dict[str, int] = field(default_factory=dict)
    divergence: dict[str, dict[str, float]] = field(default_factory=dict)
    kept_step: int = 0
    stopped: str = ""
    answers: "Items" = field(default_factory=list)

    def __str__(self) -> str:
        """KL to the teacher and perplexity by kind of text, as tables, and the cost."""
        from .answers import remark  # what makes text is imported where text is asked for
        from .facts import as_text, perplexity_facts

        cost = f"recovery: {self.tokens:,} tokens, {self.steps} steps, {self.seconds:.0f} s; {self.kept}"
        return "\n".join(
            [
                *([self._divergences(), PERPLEXITY] if self.divergence else []),
                as_text(perplexity_facts(asdict(self)), compared=False),
                *remark(self.answers),
                cost,
                *filter(None, [self.stopped]),
            ]
        )

    @property
    def kept(self) -> str:
        """What came of the training in words."""
        if not self.kept_step:
            return "no checkpoint was better than the pruned model, which is kept"
        return f"step {self.kept_step} is kept"

    def _divergences(self) -> str:
        from .text import table

        rows = [["KL to the dense model", "pruned", "recovered", "closed"]]
        for name, of in self.divergence.items():
            closed = 1 - of["recovered"] / of["pruned"] if of["pruned"] else 0.0
            rows.append([name, f"{of['pruned']:.4f}", f"{of['recovered']:.4f}", f"{closed:.0%}"])
        return table(rows)


@strict
@dataclass
class Details(Record):
    """What a run saw while it pruned: the `name` and `dtype` of the dense model and the `bytes` of the weights
    "before" and "after", the most bytes that this process had held when a stage ended, by kind of memory, and whether
    the run went on where another was stopped, so that its times are those of the rest.
    """

    model: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    resumed: bool = False

    @classmethod
    def load(cls, path: str | Path) -> "Details":
        """Read what `save` wrote."""
        data = read_json(path)
        try:
            return cls(**data)
        except (TypeError, StrictDataclassError) as error:
            raise StructPruneError(f"{path} is not the record of a pruning: {one_line(error)}") from error


@dataclass
class Report(Record):
    """What was done and what it cost, with what the run saw as `details`, which are saved in a file of their own. Each
    other field has its sentence in `saving/schemas/report.schema.json`.
    """

    model_type: str
    criterion: str
    parameters: dict[str, int] = field(default_factory=dict)
    layer_parameters: dict[str, int] = field(default_factory=dict)
    widths: dict[str, dict[int, int]] = field(default_factory=dict)
    dense_widths: dict[str, int] = field(default_factory=dict)
    calibration_tokens: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_stderr: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity_tokens: dict[str, int] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    target: float | None = None
    recovery: RecoveryReport | None = None
    output_error: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    answers: "Items" = field(default_factory=list)
    balances: list[dict[str, Any]] = field(default_factory=list)
    languages: dict[str, dict[str, Any]] = field(default_factory=dict)
    scripts: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    changed: bool = False
    details: Details = field(default_factory=Details, repr=False, compare=False)

    def start(self, model: PreTrainedModel, arch: ArchSpec) -> None:
        """Enter the sizes of the dense model."""
        self.parameters["before"], self.layer_parameters["before"] = model.num_parameters(), sum(arch.layer_params)
        self.details.model = {
            "name": model.name_or_path,
            "dtype": str(model.dtype).removeprefix("torch."),
            "bytes": {"before": model_bytes(model)},
        }

    def finish(self, model: PreTrainedModel, arch: ArchSpec, dense_arch: ArchSpec, plan: Plan) -> None:
        """Enter the sizes and widths of the smaller model."""
        self.parameters["after"], self.layer_parameters["after"] = model.num_parameters(), sum(arch.layer_params)
        self.details.model["bytes"]["after"] = model_bytes(model)
        kept = {MODEL, *plan.keep.get((MODEL, LAYER), range(dense_arch.num_layers))}
        for name, widths in plan.widths().items():
            full = dense_arch.widths(name)
            self.widths[name] = {**{layer: width for layer, width in full.items() if layer in kept}, **widths}
            self.dense_widths[name] = max(full.values())

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside `with` to a stage, without that of stages inside it, and note the memory taken."""
        with stage(name, self.seconds):
            yield
        self.details.memory[name] = peak_memory()

    @property
    def sparsity(self) -> float:
        """The share of the layers' parameters that was removed."""
        return 1 - self.layer_parameters["after"] / self.layer_parameters["before"]

    def missed_target(self) -> str:
        """What was asked for and what was removed, where they are far apart; else nothing."""
        from .facts import misses_target, target_summary

        missed = self.target is not None and misses_target(self.target, self.sparsity)
        return target_summary(self.to_dict()).removeprefix("warning: ") if missed else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        values = asdict(replace(self, details=Details()))
        del values["details"]
        return {**values, "sparsity": self.sparsity}

    def __str__(self) -> str:
        """Widths, parameters and perplexity per domain, as a table, what else there is to say, and a verdict."""
        from .answers import remark
        from .facts import as_text, facts_of, remarks
        from .verdict import verdict

        values = self.to_dict()
        lines = [as_text(facts_of(values)), *remarks(values), *remark(self.answers)]
        recovery = [] if self.recovery is None else ["", str(self.recovery)]
        return "\n".join([*lines, *recovery, *verdict(values)])
