"""One pruning under way: the model that shrinks, its records, and the step that prunes the units inside the layers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import dequantized, is_quantized, shrunk_skeleton, stays_packed
from ..arch.modules import adopt_config_
from ..arch.spec import VOCAB, ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..domains.manifest import Entry, Manifest, remember_text
from ..errors import InPlaceError
from ..method.loop import prune_layers_
from ..method.shrink import Masks
from ..record.plan import Plan
from ..record.report import Report
from ..sources.data import CalibrationData, source_of
from ..system.processes import unshared
from ..system.stages import give_back_free_memory, progress


# The kind of step inside the layers; those before are named as the spaces.
UNITS = "units"


class Step(NamedTuple):
    """One step of calibrate → score → remove, of a kind that `StructPruner.apply_step_` knows: it ends at `widths`."""

    kind: str
    widths: Widths


class Run(AbstractContextManager["Run"]):
    """The state that the steps of one pruning share.

    As a context, it makes sure that an error leaves no model behind that looks finished: a model that has begun to
    shrink in place refuses to be saved, and the error is an `InPlaceError`. `dense_model` is None where that shrinks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: ArchSpec,
        data: CalibrationData,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inplace: bool = True,
        report: Report | None = None,
    ):
        names = {*(data.config.widths or data.config.targets_or_default)}
        only_tokens = names == {VOCAB} and data.config.recovery is None
        if is_quantized(model) and not (only_tokens and stays_packed(model, arch.of(VOCAB)[0])):
            self.model, self.dense_model = dequantized(model, inplace), None
        else:
            self.model, self.dense_model = (model, None) if inplace else (deepcopy(model), model)
        vars(self.model).pop("prune_result", None)  # that of an earlier run, if there was one
        self.data = data
        self.tokenizer = self.dense_tokenizer = tokenizer  # the first becomes a new one with fewer tokens
        self.inplace = inplace  # whether the caller holds the model that shrinks
        self.arch = self.dense_arch = arch  # the first is that of the model as it is now
        self.report = report or Report(self.arch.model_type, self.config.scored_by)
        self.plan = Plan(self.arch.model_type, {})
        self.entries: list[Entry] = []  # of the text that chose the tokens or was trained on
        self.earlier: Manifest | None = None  # that of the dense model
        self.changed = False  # whether the model has lost something that cannot be put back

    @property
    def config(self) -> StructPruneConfig:
        """The config of the calibration data."""
        return self.data.config

    def start(self) -> None:
        """Begin the records, with what the dense model is and comes from."""
        self.plan = Plan.of(self.model, self.arch)
        self.earlier = Manifest.seen_by(self.dense_model or self.model)
        self.report.start(self.model, self.arch)

    def recover(self, teacher: PreTrainedModel | None) -> None:
        """Train the model as the config says, with the dense model as its teacher if that is given."""
        assert self.config.recovery is not None
        # Training libraries take seconds to import, and most runs do without.
        from ..recovery.recover import Recovery

        with self.report.timed("recovery"), unshared():
            remember_text(self.model, manifest=self.manifest())
            recovery = Recovery(self.config.recovery, self.config)
            recovery.recover_model(self.model, self.tokenizer, teacher, teacher_tokenizer=self.dense_tokenizer)
            assert recovery.report is not None
            self.report.recovery = recovery.report
            self.entries += recovery.entries

    def manifest(self) -> Manifest:
        """The record of the text of this run, and of earlier runs that the dense model comes from."""
        manifest = Manifest.of(self.config, self.data.domains, self.tokenizer)
        return manifest.with_entries(self.entries).after(self.earlier)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or not (self.inplace and self.changed):
            return
        reason = str(error) or type(error).__name__
        text = f"Pruning stopped ({reason}), and the model had already begun to change: load it again."

        def save_pretrained(*args: Any, **kwargs: Any) -> None:  # which `Trainer.save_model` and checkpoints call too
            raise InPlaceError(text)

        self.model.save_pretrained = save_pretrained  # type: ignore[method-assign]
        if isinstance(error, Exception):
            raise InPlaceError(text) from error


def prune_units_(run: Run, step: Step) -> Plan:
    """Bring all layers to the widths of a step, in one round or several; see `method.loop.prune_layers_`."""
    model, arch, config = run.model, run.arch, run.config
    smaller = shrunk_skeleton(model, arch, step.widths)
    rounds, source, checkpoint = [step.widths], None, None
    if config.rounds > 1:
        from ..widths.schedule import round_widths

        rounds = round_widths(config, arch, step.widths)
    if (folder := run.data.options.checkpoint_dir) is not None:
        from .checkpoint import LayerCheckpoint, run_key

        checkpoint = LayerCheckpoint(folder, run_key(run.data, model, step.widths))
        run.report.resumed = checkpoint.resume.check() is not None
    masks, count, every = Masks(model, arch, undoable=len(rounds) > 1), arch.num_layers, len(rounds) * arch.num_layers

    def finished(layer: int) -> None:
        give_back_free_memory()
        if checkpoint is not None and source is not None:
            checkpoint.save(layer, masks, source)

    try:
        for number, widths in enumerate(rounds):
            is_last = number + 1 == len(rounds)
            with run.report.timed(f"round {number + 1}"):
                method = run.data.method(model, arch)
                source = source_of(model, arch, run.data.own_batches, config.feedback_share)
                done = 0 if checkpoint is None else checkpoint.take_over_(masks, source, smaller)
                # The bar counts the layers of all rounds, for the time that is left.
                name = "pruning" if len(rounds) == 1 else f"round {number + 1}/{len(rounds)}"
                bar = {"desc": name, "initial": number * count + done, "total": every, "unit": "layer"}
                layers = progress(range(done, count), **bar)
                prune_layers_(masks, source, method, widths, smaller if is_last else None, layers, finished)
    except BaseException:  # Ctrl-C too
        if source is not None:
            masks.undo_(partial(source.at, changes=True))
        raise
    finally:
        run.changed = run.changed or masks.lost
    adopt_config_(model, smaller)
    return Plan(arch.model_type, masks.keep)
