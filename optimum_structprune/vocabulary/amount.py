"""How much of a vocabulary may go, from a config and a model without weights."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.spec import VOCAB, ArchSpec, Space, Widths
from ..config.pruning import CACHE, StructPruneConfig
from ..errors import StructPruneError
from ..widths import allocation
from .tokens import Vocabulary


logger = logging.getLogger(__name__)


def large_vocabulary(arch: ArchSpec, parameters: int) -> Space | None:
    """Gives the space of the tokens if their rows are more than a fifth of all `parameters`, else None."""
    return next((space for space in arch.of(VOCAB) if space.unit_params * space.size > parameters / 5), None)


def with_tokens(
    config: StructPruneConfig, described: ModelInfo, tokenizer: PreTrainedTokenizerBase | None = None
) -> StructPruneConfig:
    """Adds the tokens to the targets of a budget without any, if they are a large part of the model."""
    arch, model = described.arch, described.plain_model
    if config.removes_tokens is not None or described.offloaded:
        return config
    if large_vocabulary(arch, model.num_parameters()) is None:
        return config
    try:
        if tokenizer is not None:
            Vocabulary.of(tokenizer)
    except StructPruneError as error:
        logger.info("No tokens go: %s", error)
        return config
    return replace(config, targets=(VOCAB, *(tuple(filter(arch.of, config.targets_or_default)) or arch.channels)))


def without_tokens(config: StructPruneConfig, limit: float | None = None) -> StructPruneConfig | None:
    """Gives the config of the other spaces, within a `limit` if there is one; None if nothing else goes."""
    if config.widths is not None:
        widths = {name: width for name, width in config.widths.items() if name != VOCAB}
        return replace(config, widths=widths) if widths else None
    targets = tuple(name for name in config.targets_or_default if name != VOCAB)
    budget = config.budget if limit is None else dict.fromkeys(config.budget or {}, limit)
    return replace(config, targets=targets, budget=budget) if targets else None


def widths_with_tokens(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> Widths:
    """Gives the final widths, tokens among them: as given, or the largest within a budget.

    Where other spaces give up something for that too, text says how many tokens go: none yet.
    """
    rest = without_tokens(config)
    if config.widths is not None:
        number = cast("int", config.widths[VOCAB])
        allocation.legal_widths(replace(config, widths={VOCAB: number}), arch, model.config)  # refuses others
        return {VOCAB: number, **({} if rest is None else allocation.widths_of(rest, arch, model))}
    if config.budget is None:
        example = f"widths={{{VOCAB!r}: {arch.of(VOCAB)[0].size // 128 * 64}}}" if arch.of(VOCAB) else "widths"
        raise StructPruneError(
            f"targets={list(config.targets_or_default)} has {VOCAB!r}, whose parameters lie outside of the layers, so "
            f"no share of those says how much of it goes; give {example} or another number, beside the widths of "
            f"other spaces, or target {VOCAB!r} with a budget."
        )
    room = Room.of(config, arch, model)
    if rest is None:
        return {VOCAB: room.largest({})}
    fits = room.budget.cost(room.smallest) <= room.budget.limit
    return {VOCAB: room.size, **(allocation.widths_of(rest, arch, model) if fits else room.smallest)}


@dataclass(frozen=True)
class Room:
    """A budget, the `numbers` of tokens to choose from, ascending, and the `smallest` other widths."""

    budget: allocation.Budget
    numbers: Sequence[int]
    smallest: Widths
    size: int

    @classmethod
    def of(cls, config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, may: range | None = None) -> Room:
        """Finds the numbers within `may`, if given; a budget that the fewest do not meet is refused."""
        rest, alone = without_tokens(config), replace(config, targets=(VOCAB,))
        sizes = allocation.legal_widths(alone, arch, model.config)[VOCAB]
        others = {} if rest is None else allocation.legal_widths(rest, arch, model.config)
        if CACHE in (config.budget or {}):
            raise StructPruneError(f"Tokens take no part of the {CACHE}; leave {VOCAB!r} out of targets.")
        if rest is not None:
            allocation.check_may_differ(rest, arch, list(others))
        size = arch.of(VOCAB)[0].size
        chosen = allocation.choices(config, arch, VOCAB, sizes)
        numbers = [number for number in chosen if may is None or number in may] or [size]
        smallest = {} if rest is None else allocation.smallest_widths(rest, arch, others)
        budget = allocation.budget_of(config, arch, model, list(others))
        allocation.check_reach(config, budget, budget.cost({**smallest, VOCAB: numbers[0]}), [VOCAB, *others], arch)
        return cls(budget, numbers, smallest, size)

    def met_by(self, number: int) -> bool:
        """Says whether the budget is met by a number of tokens and the full other widths."""
        return self.budget.cost({VOCAB: number}) <= self.budget.limit

    def largest(self, widths: Widths) -> int:
        """Gives the largest number of tokens within the budget beside other widths; the smallest if none is."""
        fitting = bisect_right(self.numbers, self.budget.limit, key=lambda n: self.budget.cost({**widths, VOCAB: n}))
        return self.numbers[max(fitting - 1, 0)]
