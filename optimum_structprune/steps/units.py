"""The step that removes units inside the layers, in one round or several."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ..arch.meta import shrunk_skeleton
from ..arch.modules import adopt_config_
from ..arch.spec import Widths
from ..method.layers import Source
from ..method.loop import prune_layers_
from ..method.plan import Plan
from ..method.shrink import Masks
from ..system.stages import give_back_free_memory, progress
from ..widths.schedule import round_widths
from .base import RunState, Step
from .checkpoint import LayerCheckpoint, run_key
from .data import source_of


class ShrinkLayers(Step):
    """Remove channels and KV groups inside the layers; see `method.loop.prune_layers_`."""

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune all layers to the widths, and return the kept units."""
        state.add_languages()
        model = state.model
        arch = state.arch
        smaller = shrunk_skeleton(model, arch, widths)
        rounds = round_widths(state.config, arch, widths)
        checkpoint = _checkpoint_of(state, widths)
        masks = Masks(model, arch, undoable=len(rounds) > 1)
        source: Source | None = None

        def on_layer(layer: int) -> None:
            give_back_free_memory()
            if checkpoint is not None and source is not None:
                checkpoint.save(layer, masks, source)

        # Ctrl-C must restore the model too.
        try:
            for number, round_goal in enumerate(rounds):
                name = "pruning" if len(rounds) == 1 else f"round {number + 1}"
                with state.report.timed(name):
                    method = state.data.method(model, arch)
                    source = source_of(model, arch, state.data.own_batches, state.config.feedback_share)
                    finished_layers = 0
                    if checkpoint is not None:
                        finished_layers = checkpoint.resume_from(masks, source, smaller)

                    layers = _layers_of_round(arch.num_layers, number, len(rounds), finished_layers)
                    # Only the last round removes the units. The rounds before it mask them.
                    skeleton = None
                    if number + 1 == len(rounds):
                        skeleton = smaller
                    prune_layers_(masks, source, method, round_goal, skeleton, layers, on_layer)
        except BaseException:
            if source is not None:
                masks.undo_(partial(source.at, changes=True))
            raise
        finally:
            state.changed = state.changed or masks.irreversible

        adopt_config_(model, smaller)
        return Plan(arch.model_type, masks.keep)


def _layers_of_round(num_layers: int, number: int, num_rounds: int, finished_layers: int) -> Iterable[int]:
    """Return the layers to prune in round `number`, with a progress bar.

    The bar counts the layers of all rounds, so that it shows the remaining time of the run.
    """
    description = "Pruning"
    if num_rounds > 1:
        description += f", round {number + 1} of {num_rounds}"

    return progress(
        range(finished_layers, num_layers),
        desc=description,
        initial=number * num_layers + finished_layers,
        total=num_rounds * num_layers,
        unit="layer",
    )


def _checkpoint_of(state: RunState, widths: Widths) -> LayerCheckpoint | None:
    """Return the checkpoint of a run if a folder is configured, and record whether the run resumes from it."""
    folder = state.data.options.checkpoint_dir
    if folder is None:
        return None

    checkpoint = LayerCheckpoint(folder, run_key(state.data, state.model, widths))
    state.report.resumed = checkpoint.resume.check() is not None
    return checkpoint
