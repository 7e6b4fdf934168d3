"""One pruning under way: the model that shrinks, what it is compared with, and the record of both."""

from __future__ import annotations

from copy import deepcopy
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import describe
from ..arch.spec import LAYER, MODEL, ArchSpec
from ..config.pruning import StructPruneConfig
from ..errors import InPlaceError
from ..record.details import Choice
from ..record.report import Report
from ..surgery.plan import Plan
from ..system.processes import alone
from .evidence import Evidence
from .measure import Measure


class Run:
    """What the steps of one pruning share.

    As a context, it makes sure that an error leaves no model behind that looks finished: what was only masked is
    undone; a model that has begun to shrink in place refuses to be saved, and the error is an `InPlaceError`.

    Attributes:
        config: How to prune.
        model: The model that shrinks.
        evidence: What is known of the text.
        tokenizer: The tokenizer of the model.
        inplace: Whether the caller holds the model that shrinks.
        report: The numbers of the run.
        plan: The kept units of the dense model so far.
        measure: The figures of the dense model on held-out text; None until `start`.
        teacher: The model that recovery learns from; None where there is none in memory.
        layers: The layers that stay, where measured losses have chosen them; None where a criterion does.
        rounds: The `Rounds` that have begun and have not ended; None between them.
        choices: How the units inside the layers were chosen, in summary, by layer of the dense model and space.
        changed: Whether the model has lost something that cannot be put back.
    """

    def __init__(
        self,
        config: StructPruneConfig,
        model: PreTrainedModel,
        evidence: Evidence,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inplace: bool = True,
        report: Report | None = None,
    ):
        self.config, self.model, self.evidence = config, model, evidence
        self.tokenizer, self.inplace = tokenizer, inplace
        arch = self.arch
        self.report = report or Report(arch.model_type, config.scored_by)
        self.plan = Plan(arch.model_type, {})
        self.measure: Measure | None = None
        self.teacher: PreTrainedModel | None = None
        self.layers: tuple[int, ...] | None = None
        self.rounds: Any = None
        self.choices: dict[tuple[int, str], Choice] = {}
        self.changed = False

    @property
    def arch(self) -> ArchSpec:
        """The description of the model as it is now."""
        return describe(self.model, self.config.arch_file)

    def start(self, dense: PreTrainedModel | None = None) -> None:
        """Measure the model while it is dense, and keep or write down what recovery learns from."""
        with self.report.timed("perplexity"):
            self.measure = Measure(self.model, self.evidence.domains, self.arch.causal, self.config.arch_file)
        self.report.start(self.model, self.arch)
        recovery = self.config.recovery
        if recovery is None or not recovery.distils:
            return
        if recovery.teacher_logits is not None:
            self._recovery(1, self._trainings()).write_teacher_logits(self.model, self.tokenizer)
        else:
            self.teacher = deepcopy(self.model) if dense is None else dense

    def compare(self) -> None:
        """Measure the model as it is now."""
        if self.measure is not None:
            with self.report.timed("perplexity"):
                self.measure.after(self.model, self.report)

    def recover(self, part: int, parts: int) -> None:
        """Train the model, if the config says so."""
        if self.config.recovery is None:
            return
        with self.report.timed("recovery"), alone():
            recovery = self._recovery(part, parts)
            recovery.recover_model(self.model, self.tokenizer, self.teacher)
            self.report.recovery = recovery.report.after(self.report.recovery)

    def finish(self, dense: ArchSpec) -> None:
        """Complete the report."""
        self.report.finish(self.model, self.arch, dense, self.plan)
        self.report.details.domains = self.evidence.names
        left = self.plan.keep.get((MODEL, LAYER), range(dense.num_layers))
        self.report.details.take({key: choice for key, choice in self.choices.items() if key[0] in left})
        self.report.calibration_tokens = {domain.name: domain.samples.numel() for domain in self.evidence.domains}
        self.report.domain_seconds = {
            self.evidence.names[number]: spent for number, spent in sorted(self.evidence.clock.seconds.items())
        }

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        if self.rounds is not None:
            self.rounds.undo_()
        if not (self.inplace and self.changed):
            return
        reason = str(error) or type(error).__name__
        text = f"Pruning stopped ({reason}), and the model had already begun to change: load it again."
        refuse_saving_(self.model, text)
        if isinstance(error, Exception):
            raise InPlaceError(text) from error

    def _trainings(self) -> int:
        recovery = self.config.recovery
        return self.config.rounds if recovery is not None and recovery.every_round else 1

    def _recovery(self, part: int, parts: int) -> Any:
        # Training libraries take seconds to import, and most runs do without.
        from ..recovery.recover import Recovery

        config = self.config.recovery
        assert config is not None
        return Recovery(config, self.config, part=part, parts=parts)


def refuse_saving_(model: PreTrainedModel, reason: str) -> None:
    """Make `model.save_pretrained`, and with it `Trainer.save_model` and checkpoints, raise an `InPlaceError`."""

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        raise InPlaceError(reason)

    model.save_pretrained = save_pretrained  # type: ignore[method-assign]
