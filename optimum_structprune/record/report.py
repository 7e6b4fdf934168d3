"""The numbers of a run and of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..arch.spec import LAYER, MODEL, ArchSpec
from ..plain_json import replace_json, versioned
from ..surgery.plan import Plan
from ..system.memory import model_bytes, peak_memory
from ..system.stages import stage
from .answers import Items, remark
from .details import Details
from .facts import as_text, facts_of, perplexity_facts, remarks


REPORT_NAME = "report.json"
RECOVERY_CONFIG_NAME = "recovery_config.json"
RECOVERY_REPORT_NAME = "recovery_report.json"


@dataclass
class RecoveryReport:
    """What training after pruning did and what it cost.

    Attributes:
        tokens: The number of training tokens seen.
        steps: The number of optimizer steps taken.
        seconds: The time spent in training.
        perplexity: The perplexity on held-out text, `{domain: {"dense": …, "pruned": …, "recovered": …}}`, without
            "dense" where there was no teacher.
        stopped: The reason why training ended early; empty where it did not.
        answers: The answers to a few questions of the dense, the pruned and the trained model, see `record.answers`.
    """

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: str = ""
    answers: Items = field(default_factory=list)

    def after(self, earlier: RecoveryReport | None) -> RecoveryReport:
        """A report with the outcome of this training and the cost of this and an earlier one."""
        if earlier is None:
            return self
        total = {name: getattr(self, name) + getattr(earlier, name) for name in ("tokens", "steps", "seconds")}
        return replace(self, **total, stopped=" ".join(filter(None, [earlier.stopped, self.stopped])))

    def __str__(self) -> str:
        """Perplexity per domain and in the mean, as a table, and the cost."""
        cost = f"recovery: {self.tokens:,} tokens, {self.steps} steps, {self.seconds:.0f} s"
        return "\n".join(
            [
                as_text(perplexity_facts(asdict(self)), compared=False),
                *([remark(self.answers)] if self.answers else []),
                cost,
                *filter(None, [self.stopped]),
            ]
        )


@dataclass
class Report:
    """What was done and what it cost.

    Attributes:
        model_type: The model type.
        criterion: The criterion that scored the units inside layers, which the config need not name.
        parameters: The number of parameters, `{"before": …, "after": …}`.
        layer_parameters: The number of parameters in the layers alone, `{"before": …, "after": …}`.
        widths: The number of kept units, by space and layer.
        dense_widths: The full width, by space.
        calibration_tokens: The number of tokens that some round used, by domain.
        perplexity: The perplexity on held-out text per token of the dense tokenizer, `{domain: {"before": …, "after":
            …}}`.
        perplexity_stderr: Their standard errors over samples, and that of "ratio", the one after over the one before.
        perplexity_tokens: The number of tokens that they were measured on, by domain.
        bits_per_byte: The loss per byte of that text in bits, `{domain: {"before": …, "after": …}}`.
        asked: The share of the layers' parameters that was to go; None where that was not said as a share.
        recovery: What training did and what it cost; None where there was none.
        output_error: For a model that does not predict the next token, the squared error of the last hidden states on
            held-out text against the dense model's, relative to their variance, by domain.
        seconds: The time spent, by stage.
        domain_seconds: The time spent in calibration, by domain.
        rounds: For rounds that are measured: the widths of each, the weights of the domains in it, the ratio of
            perplexities after it (empty after the last, see `perplexity`), and whether it holds a limit on perplexity.
        shapes: For widths that follow from measured losses: the shapes that were pruned on trial, what proposed each,
            and its loss, KL(dense‖model) in nats per token.
        answers: The answers to a few questions before and after, see `record.answers`; empty where none were asked.
        balances: Where tokens and layers compete for one budget: the numbers of tokens that were compared, and the
            losses in nats per token that the missing tokens, and then the layers, would bring.
        words: Where tokens are gone, the number of tokens that a word takes in a sentence of each of 30 languages, by
            the language's code, `{"before": …, "after": …}`.
        scripts: How many of the tokens that are gone are of each script, as Unicode names it.
        unread: Where no tokens are gone and their rows are much of the model, how many are of scripts that the text
            next to never shows, and their parameters, `{"tokens": …, "parameters": …}`.
        details: What the run saw while it pruned, which is saved in a file of its own.
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
    asked: float | None = None
    recovery: RecoveryReport | None = None
    output_error: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    domain_seconds: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    answers: Items = field(default_factory=list)
    balances: list[dict[str, Any]] = field(default_factory=list)
    words: dict[str, dict[str, float]] = field(default_factory=dict)
    scripts: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    details: Details = field(default_factory=Details, repr=False, compare=False)

    def start(self, model: PreTrainedModel, arch: ArchSpec) -> None:
        """Enter the sizes of the dense model."""
        self.parameters["before"], self.layer_parameters["before"] = model.num_parameters(), sum(arch.layer_params)
        self.details.model = {
            "name": model.name_or_path,
            "dtype": str(model.dtype).removeprefix("torch."),
            "bytes": {"before": model_bytes(model)},
        }

    def finish(self, model: PreTrainedModel, arch: ArchSpec, dense: ArchSpec, plan: Plan) -> None:
        """Enter the sizes and widths of the smaller model."""
        self.parameters["after"], self.layer_parameters["after"] = model.num_parameters(), sum(arch.layer_params)
        self.details.model["bytes"]["after"] = model_bytes(model)
        kept = {MODEL, *plan.keep.get((MODEL, LAYER), range(dense.num_layers))}
        for name, widths in plan.widths().items():
            full = dense.widths(name)
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        values = asdict(replace(self, details=Details()))
        del values["details"]
        return {**values, "sparsity": self.sparsity}

    def save(self, path: str | Path) -> None:
        """Write JSON; a number that is not finite, which JSON does not have, is null."""
        replace_json(path, versioned(self.to_dict()))

    def __str__(self) -> str:
        """Widths, parameters and perplexity per domain, as a table, and what else there is to say."""
        values = self.to_dict()
        lines = [as_text(facts_of(values)), *remarks(values), *([remark(self.answers)] if self.answers else [])]
        return "\n".join([*lines, *([] if self.recovery is None else ["", str(self.recovery)])])
