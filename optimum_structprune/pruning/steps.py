"""The steps of a run, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..arch.spec import EXPERT, HIDDEN, LAYER, ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..widths.schedule import legal_round_widths, round_widths


# The kinds of step: three remove something from the whole model or before all else, the others prune inside layers.
UNITS, FLOOR = "units", "floor"
WHOLE_MODEL = (LAYER, EXPERT, HIDDEN)


@dataclass(frozen=True)
class Step:
    """One pass of calibrate → score → remove.

    Attributes:
        kind: What is removed: `LAYER`, `EXPERT`, `HIDDEN`, `UNITS`, or `FLOOR` for units within a perplexity limit.
        widths: The widths that the step reaches.
        target: The widths that the last step of this kind reaches.
        number: The number of this step among those of its kind that belong together, from 1.
        count: How many of them there are; where units go, all but the last only mask them.
        part: The number of the training that follows this step, from 1; 0 where none follows.
        parts: The number of trainings.
    """

    kind: str
    widths: Widths
    target: Widths
    number: int = 1
    count: int = 1
    part: int = 0
    parts: int = 1

    @property
    def last(self) -> bool:
        """Whether it is the last of those that belong together."""
        return self.number == self.count


def steps(config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig, widths: Widths) -> list[Step]:
    """The steps that bring a model to its final widths.

    Layers go first, then experts, then channels of the residual stream, then units inside the layers, in
    `config.rounds` rounds. Where training follows every round, each round is such a sequence of its own.
    """
    if config.recovery is None or not config.recovery.every_round:
        return _with_training(list(_sequence(config, arch, model_config, widths)), 1, 1)
    alone = replace(config, rounds=1)
    goals = legal_round_widths(config, arch, model_config, widths)
    return [
        step
        for part, goal in enumerate(goals, start=1)
        for step in _with_training(list(_sequence(alone, arch, model_config, goal)), part, len(goals))
    ]


def _sequence(
    config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig, widths: Widths
) -> Iterator[Step]:
    for kind in WHOLE_MODEL:
        if kind in widths:
            target = {kind: widths[kind]}
            course = round_widths(config, arch, target) if kind == LAYER else [target]
            yield from _numbered(kind, course, target)
    inside = {name: width for name, width in widths.items() if name not in WHOLE_MODEL}
    if not inside:
        return
    if config.max_perplexity_ratio is not None:
        yield Step(FLOOR, inside, inside)
        return
    # Where the rounds on the way are saved, each of them has to be a model that can be.
    course = (
        legal_round_widths(config, arch, model_config, inside)
        if config.keep_rounds
        else round_widths(config, arch, inside)
    )
    yield from _numbered(UNITS, course, inside)


def _numbered(kind: str, course: Sequence[Widths], target: Widths) -> Iterator[Step]:
    for number, widths in enumerate(course, start=1):
        yield Step(kind, widths, target, number, len(course))


def _with_training(sequence: list[Step], part: int, parts: int) -> list[Step]:
    return [*sequence[:-1], replace(sequence[-1], part=part, parts=parts)]
