"""The state of one pruning, and the interface of its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import describe
from ..arch.meta import dequantized, is_quantized, stays_packed
from ..arch.spec import VOCAB, ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..domains.manifest import Entry, Manifest
from ..errors import InPlaceError
from ..forward.metrics import evaluating
from ..record.plan import Plan
from ..record.report import Report
from ..sources.data import CalibrationData


@dataclass
class RunState:
    """The state that the steps of one pruning share.

    Attributes:
        model: The model that shrinks.
        arch: The description of the model as it is now.
        data: The calibration text, in the tokens of the model as it is now.
        tokenizer: The tokenizer of the model as it is now.
        plan: The kept units of the dense model.
        report: The figures of the run.
        dense_model: The model before the pruning. None if it is the model that shrinks.
        earlier: The text that the dense model has seen in earlier runs.
        inplace: Whether the caller holds the model that shrinks.
        entries: The text that chose the tokens, that judged the model or that it was trained on.
        changed: Whether the model has lost weights that cannot be put back.
    """

    model: PreTrainedModel
    arch: ArchSpec
    data: CalibrationData
    tokenizer: PreTrainedTokenizerBase | None
    plan: Plan
    report: Report
    dense_model: PreTrainedModel | None = None
    earlier: Manifest | None = None
    inplace: bool = True
    entries: list[Entry] = field(default_factory=list)
    changed: bool = False

    def __post_init__(self) -> None:
        self.dense_arch = self.arch
        self.dense_tokenizer = self.tokenizer
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

        A quantized model is unpacked, unless only tokens are removed and its other weights can stay packed.
        """
        dense_model = None
        if is_quantized(model) and not _stays_packed(model, arch, data.config):
            model = dequantized(model, inplace)
        elif not inplace:
            dense_model = model
            model = deepcopy(model)
        plan = Plan(arch.model_type, {})
        report = report or Report(arch.model_type, data.config.scored_by)
        return cls(model, arch, data, tokenizer, plan, report, dense_model, earlier, inplace)

    @property
    def config(self) -> StructPruneConfig:
        """The config of the run. It does not change after the calibration text has been read."""
        return self.data.config

    def add_languages(self) -> None:
        """Add text of the languages to keep to the calibration text, once."""
        if self.config.languages and not self._reads_languages:
            self.data = self.data.with_languages(self.tokenizer)
            self._reads_languages = True

    def manifest(self) -> Manifest:
        """Return the record of the text of this run, and of earlier runs that the dense model comes from."""
        manifest = Manifest.of(self.config, self.data.domains, self.tokenizer)
        return manifest.with_entries(self.entries).after(self.earlier)


def _stays_packed(model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig) -> bool:
    """Return whether a quantized model is pruned without being unpacked."""
    names = set(config.widths or config.targets_or_default)
    only_tokens = names == {VOCAB} and config.recovery is None
    return only_tokens and stays_packed(model, arch.of(VOCAB)[0])


class Step(ABC):
    """One step of a pruning: it removes one kind of units, and brings the model to `widths`."""

    def __init__(self, widths: Widths):
        self.widths = widths

    def apply(self, state: RunState) -> None:
        """Prune the model of a run. Its plan and the description of the model follow."""
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

        A step sets `state.changed` before it removes weights for good. If it fails earlier, it must leave the model as
        it was.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.widths)})"


@contextmanager
def refusing_half_pruned(state: RunState) -> Iterator[None]:
    """Let no model look finished after an error.

    A model that has begun to shrink in place refuses to be saved, and the error becomes an `InPlaceError`.
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
