"""The state of one pruning, and the interface of its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import evaluating
from ..arch.load import describe
from ..arch.meta import dequantized, is_quantized, stays_packed
from ..arch.spec import VOCAB, ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..domains.manifest import Entry, Manifest
from ..method.plan import Plan
from ..record.report import Report
from ..system.errors import InPlaceError
from .data import CalibrationData


if TYPE_CHECKING:
    from ..domains.unseen import UnseenText


@dataclass
class RunState:
    """The state that the steps of one pruning share.

    Attributes:
        model: The model to prune. Each step makes it smaller.
        arch: The description of the current model.
        data: The calibration text, in the tokens of the current model.
        tokenizer: The tokenizer of the current model.
        plan: The kept units of the original model.
        report: The figures of the run.
        original_model: The original model, or None if `model` is pruned in place.
        earlier: The text that earlier runs of the original model have read.
        inplace: Whether the caller holds `model`.
        entries: The text that was counted to choose tokens, that measured the model, or that trained it.
        changed: Whether weights were removed that cannot be restored.
        chosen: The widths that a search has chosen for all spaces; None without a search.
    """

    model: PreTrainedModel
    arch: ArchSpec
    data: CalibrationData
    tokenizer: PreTrainedTokenizerBase | None
    plan: Plan
    report: Report
    original_model: PreTrainedModel | None = None
    earlier: Manifest | None = None
    inplace: bool = True
    entries: list[Entry] = field(default_factory=list)
    changed: bool = False
    chosen: Widths | None = None

    def __post_init__(self) -> None:
        self.original_arch = self.arch
        self.original_tokenizer = self.tokenizer
        self._reads_languages = False

    @classmethod
    def start(
        cls,
        model: PreTrainedModel,
        arch: ArchSpec,
        data: CalibrationData,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inplace: bool = True,
        report: Report | None = None,
        earlier: Manifest | None = None,
    ) -> RunState:
        """Return the state before the first step. Without `inplace`, it holds a copy of the model.

        A quantized model is dequantized, unless only tokens are removed and this does not change its packed weights.
        """
        original_model = None
        if is_quantized(model) and not _stays_packed(model, arch, data.config):
            model = dequantized(model, inplace)
        elif not inplace:
            original_model = model
            model = deepcopy(model)

        report = report or Report(model_type=arch.model_type, criterion=data.config.scored_by)
        return cls(
            model=model,
            arch=arch,
            data=data,
            tokenizer=tokenizer,
            plan=Plan(arch.model_type, {}),
            report=report,
            original_model=original_model,
            earlier=earlier,
            inplace=inplace,
        )

    @property
    def config(self) -> StructPruneConfig:
        """Return the config of the run. It does not change after the calibration text has been read."""
        return self.data.config

    def add_languages(self) -> None:
        """Add text of the configured languages to the calibration text, unless it was added before."""
        if self.config.languages and not self._reads_languages:
            self.data = self.data.with_languages(self.tokenizer)
            self._reads_languages = True

    @cached_property
    def unseen(self) -> UnseenText:
        """Read unseen text, and enter it into the manifest. The first access needs the original model."""
        from ..domains.unseen import unseen_text  # runs without measurements read none

        assert self.original_tokenizer is not None
        with self.report.timed("unseen text"):
            text = unseen_text(self.config, self.model, self.original_tokenizer, self.data.domains, self.earlier)
        self.entries += text.entries
        return text

    def manifest(self) -> Manifest:
        """Return the record of the text of this run and of the earlier runs of the original model."""
        manifest = Manifest.of(self.config, self.data.domains, self.tokenizer)
        manifest = manifest.with_entries(self.entries)
        return manifest.after(self.earlier)


def _stays_packed(model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig) -> bool:
    """Return whether a quantized model can be pruned without dequantization."""
    names = set(config.widths or config.targets_or_default)
    if names != {VOCAB} or config.recovery is not None:
        return False
    return stays_packed(model, arch.of(VOCAB)[0])


class Step(ABC):
    """One step of a pruning, which removes units of one kind.

    Args:
        widths: The target widths by space.
    """

    def __init__(self, widths: Widths):
        self.widths = widths

    def apply(self, state: RunState) -> None:
        """Prune the model of a run, and update the plan and the description of the model."""
        # An earlier step may have removed all layers that have a space.
        widths = {name: width for name, width in self.widths.items() if state.arch.of(name)}
        if not widths:
            return

        with evaluating(state.model):
            plan = self.prune_(state, widths)

        state.plan = state.plan.then(plan)
        state.arch = describe(state.model, state.config.arch_file)

    @abstractmethod
    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune `state.model` to the widths, and return the kept units.

        A step sets `state.changed` before it removes weights that cannot be restored. If it fails earlier, it must
        restore the model.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.widths)})"


@contextmanager
def refusing_half_pruned(state: RunState) -> Iterator[None]:
    """Mark a model that was half pruned in place when an error occurs inside `with`.

    The model then cannot be saved, and the error becomes an `InPlaceError`.
    """
    try:
        yield
    except BaseException as error:
        if not (state.inplace and state.changed):
            raise

        reason = str(error) or type(error).__name__
        message = f"Pruning stopped ({reason}), and the model had already begun to change: load it again."

        def save_pretrained(*args: Any, **kwargs: Any) -> None:
            # `Trainer.save_model` and checkpoints call it too.
            raise InPlaceError(message)

        state.model.save_pretrained = save_pretrained  # type: ignore[method-assign]
        if isinstance(error, Exception):
            raise InPlaceError(message) from error
        raise
