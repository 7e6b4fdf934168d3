"""The number of tokens that a config and a model without weights allow."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.spec import VOCAB, ArchSpec, Space, Width, Widths
from ..config.pruning import CACHE, StructPruneConfig
from ..errors import StructPruneError
from ..widths.allocation import widths_of
from ..widths.budget import Budget, budget_of, check_reach
from ..widths.legal import check_may_differ, choices, legal_widths, smallest_widths
from .tokens import Vocabulary


logger = logging.getLogger(__name__)

# A vocabulary with a larger share of the parameters is large.
LARGE_SHARE = 0.2


def large_vocabulary(arch: ArchSpec, parameters: int) -> Space | None:
    """Return the space of the tokens if their rows have more than a fifth of all `parameters`, else None."""
    for space in arch.of(VOCAB):
        if space.unit_params * space.size > LARGE_SHARE * parameters:
            return space
    return None


def with_tokens(
    config: StructPruneConfig, described: ModelInfo, tokenizer: PreTrainedTokenizerBase | None = None
) -> StructPruneConfig:
    """Add the tokens to the targets of a budget without targets, if the vocabulary is large."""
    arch, model = described.arch, described.plain_model
    if not config.may_remove_tokens or described.offloaded:
        return config
    if large_vocabulary(arch, model.num_parameters()) is None:
        return config
    if tokenizer is not None:
        try:
            Vocabulary.of(tokenizer)
        except StructPruneError as error:
            logger.info("No tokens are removed: %s", error)
            return config

    others = tuple(name for name in config.targets_or_default if arch.of(name))
    return replace(config, targets=(VOCAB, *(others or arch.channels)))


def without_tokens(config: StructPruneConfig, limit: float | None = None) -> StructPruneConfig | None:
    """Return the config of the other spaces, or None if there are none. `limit` replaces the limit of the budget."""
    if config.widths is not None:
        widths = {name: width for name, width in config.widths.items() if name != VOCAB}
        if not widths:
            return None
        return replace(config, widths=widths)

    targets = tuple(name for name in config.targets_or_default if name != VOCAB)
    if not targets:
        return None
    if limit is None:
        return replace(config, targets=targets)
    (figure,) = config.budget or {}
    return replace(config, targets=targets, budget={figure: limit})


def widths_with_tokens(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> Widths:
    """Return the final widths of all spaces, as the config states them, or the largest within its budget.

    Where tokens share the budget with other spaces, only text can decide how many tokens are removed. Until then, all
    of them are kept here, and the other spaces meet the budget as far as they can.

    Raises:
        StructPruneError: If the config asks for a share of the layers, or its widths or its budget cannot be met.
    """
    if config.widths is not None:
        return _given_widths(config, arch, model)
    if config.budget is None:
        raise StructPruneError(_advice_against_sparsity(config, arch))

    budget = VocabBudget.of(config, arch, model)
    others = without_tokens(config)
    if others is None:
        return {VOCAB: budget.largest({})}

    undecided: dict[str, Width] = {VOCAB: budget.rows}
    if budget.is_met_by(budget.smallest):
        return undecided | dict(widths_of(others, arch, model))
    return undecided | dict(budget.smallest)


def _given_widths(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> Widths:
    """Return the widths that a config states."""
    assert config.widths is not None
    number = cast("int", config.widths[VOCAB])
    legal_widths(replace(config, widths={VOCAB: number}), arch, model.config)  # raises if it is illegal
    widths: dict[str, Width] = {VOCAB: number}
    others = without_tokens(config)
    if others is not None:
        widths.update(widths_of(others, arch, model))
    return widths


def _advice_against_sparsity(config: StructPruneConfig, arch: ArchSpec) -> str:
    """Return the error for tokens among the targets of a sparsity."""
    example = "widths"
    if arch.of(VOCAB):
        half = arch.of(VOCAB)[0].size // 128 * 64
        example = f"widths={{{VOCAB!r}: {half}}}"
    return (
        f"targets={list(config.targets_or_default)} has {VOCAB!r}, whose parameters lie outside of the layers, so "
        f"no share of those says how much of it goes; give {example} or another number, beside the widths of "
        f"other spaces, or target {VOCAB!r} with a budget."
    )


def _with_tokens(widths: Widths, number: int) -> Widths:
    """Return widths of other spaces with a number of tokens."""
    all_widths = dict(widths)
    all_widths[VOCAB] = number
    return all_widths


@dataclass(frozen=True)
class VocabBudget:
    """A budget in which tokens have a part.

    Args:
        budget: The limit, and the function from widths to what it limits.
        numbers: The numbers of tokens to choose from, ascending.
        smallest: The smallest widths of the other spaces that share the budget.
        rows: The number of tokens of the dense model.
    """

    budget: Budget
    numbers: Sequence[int]
    smallest: Widths
    rows: int

    @classmethod
    def of(
        cls, config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, allowed: range | None = None
    ) -> VocabBudget:
        """Return the budget of a config. `allowed` are the numbers of tokens that the model can keep, if known.

        Raises:
            StructPruneError: If the smallest widths do not meet the budget, or it limits what tokens have no part in.
        """
        legal = legal_widths(replace(config, targets=(VOCAB,)), arch, model.config)[VOCAB]
        if CACHE in (config.budget or {}):
            raise StructPruneError(f"Tokens have no part in the {CACHE}. Leave {VOCAB!r} out of `targets`.")

        rows = arch.of(VOCAB)[0].size
        numbers = [number for number in choices(config, arch, VOCAB, legal) if allowed is None or number in allowed]
        if not numbers:
            numbers = [rows]

        smallest: Widths = {}
        others = without_tokens(config)
        if others is not None:
            legal_others = legal_widths(others, arch, model.config)
            check_may_differ(others, arch, list(legal_others))
            smallest = smallest_widths(others, arch, legal_others)

        budget = budget_of(config, arch, model, list(smallest))
        least = budget.cost(_with_tokens(smallest, numbers[0]))
        names = [VOCAB] + list(smallest)
        check_reach(config, budget, least, names, arch)
        return cls(budget, numbers, smallest, rows)

    @property
    def is_shared(self) -> bool:
        """Whether other spaces share the budget, so that text decides how many tokens are removed."""
        return bool(self.smallest)

    def is_met_by(self, widths: Widths) -> bool:
        """Return whether a model with these widths, and all other spaces in full, meets the budget."""
        return self.budget.cost(widths) <= self.budget.limit

    def largest(self, widths: Widths) -> int:
        """Return the largest number of tokens that meets the budget beside other widths, else the smallest number."""

        def cost(number: int) -> float:
            return self.budget.cost(_with_tokens(widths, number))

        num_fitting = bisect_right(self.numbers, self.budget.limit, key=cost)
        return self.numbers[max(num_fitting - 1, 0)]

    @property
    def candidates(self) -> list[int]:
        """The numbers of tokens that meet the budget beside some widths of the other spaces, ascending.

        The first one meets it by tokens alone, if that is possible. With the last one, the other spaces have their
        smallest widths.
        """
        fewest = self.largest({})
        most = self.largest(self.smallest)
        return [number for number in self.numbers if fewest <= number <= max(most, fewest)]
