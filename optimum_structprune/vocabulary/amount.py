"""Compute the numbers of tokens that a config allows, from a model without weights."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.spec import VOCAB, ArchSpec, Space, Width, Widths
from ..config.pruning import CACHE, SPEED, StructPruneConfig
from ..system.errors import StructPruneError
from ..widths.allocation import widths_of
from ..widths.budget import Budget, budget_of, check_reach
from ..widths.legal import check_may_differ, choices, legal_widths, smallest_widths
from ..widths.speed import USES, use_of
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
    if not config.may_remove_tokens or described.offloaded:
        return config
    if set(config.budget or {}) == {SPEED} and not USES[use_of(config, described.plain_model)].decodes:
        return config  # a head that runs once for many tokens takes no time

    arch = described.arch
    if large_vocabulary(arch, described.plain_model.num_parameters()) is None:
        return config

    if tokenizer is not None:
        try:
            Vocabulary.of(tokenizer)
        except StructPruneError as error:
            logger.info("No tokens are removed: %s", error)
            return config

    targets = [name for name in config.targets_or_default if arch.of(name)]
    if not targets:
        targets = list(arch.channels)
    return replace(config, targets=tuple([VOCAB] + targets))


def without_tokens(config: StructPruneConfig, limits: Mapping[str, float] | None = None) -> StructPruneConfig | None:
    """Return the config of the other spaces, or None without other spaces. `limits` replace the budget."""
    if config.widths is not None:
        widths = {name: width for name, width in config.widths.items() if name != VOCAB}
        if not widths:
            return None
        return replace(config, widths=widths)

    targets = tuple(name for name in config.targets_or_default if name != VOCAB)
    if not targets:
        return None
    if limits is None:
        return replace(config, targets=targets)
    return replace(config, targets=targets, budget=dict(limits))


def widths_with_tokens(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> Widths:
    """Return the final widths of all spaces: the widths in the config, or the largest widths within its budget.

    If tokens share the budget with other spaces, the number of removed tokens depends on text. These widths then keep
    all tokens, and the other spaces meet the budget as far as they can.

    Raises:
        StructPruneError: If the config asks for a share of the layers, or its widths or its budget cannot be met.
    """
    if config.widths is not None:
        return _widths_of_config(config, arch, model)
    if config.budget is None:
        raise StructPruneError(_advice_against_sparsity(config, arch))

    budget = VocabBudget.of(config, arch, model)
    config_without_tokens = without_tokens(config)
    if config_without_tokens is None:
        return {VOCAB: budget.largest({})}

    widths: dict[str, Width] = {VOCAB: budget.rows}
    if budget.is_met_by(budget.smallest):
        widths.update(widths_of(config_without_tokens, arch, model))
    else:
        widths.update(budget.smallest)
    return widths


def _widths_of_config(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> Widths:
    """Return the widths that a config names."""
    assert config.widths is not None
    number = cast("int", config.widths[VOCAB])
    legal_widths(replace(config, widths={VOCAB: number}), arch, model.config)  # raises if it is illegal

    widths: dict[str, Width] = {VOCAB: number}
    config_without_tokens = without_tokens(config)
    if config_without_tokens is not None:
        widths.update(widths_of(config_without_tokens, arch, model))
    return widths


def _advice_against_sparsity(config: StructPruneConfig, arch: ArchSpec) -> str:
    """Return the error for tokens among the targets of a sparsity."""
    example = "widths"
    if arch.of(VOCAB):
        half = arch.of(VOCAB)[0].size // 128 * 64
        example = f"widths={{{VOCAB!r}: {half}}}"
    return (
        f"targets={list(config.targets_or_default)} has {VOCAB!r}, whose parameters are outside of the layers, so "
        f"`sparsity` does not determine its width. Pass {example} or another number with the widths of other spaces, "
        f"or target {VOCAB!r} with a budget."
    )


def _with_tokens(widths: Widths, number: int) -> Widths:
    """Return widths of other spaces with a number of tokens."""
    all_widths = dict(widths)
    all_widths[VOCAB] = number
    return all_widths


@dataclass(frozen=True)
class VocabBudget:
    """A budget that includes tokens.

    Args:
        budget: The limits, and the function from widths to the limited figures.
        numbers: The numbers of tokens to choose from, ascending.
        smallest: The smallest widths of the other spaces that share the budget.
        rows: The number of tokens of the original model.
    """

    budget: Budget
    numbers: Sequence[int]
    smallest: Widths
    rows: int

    @classmethod
    def of(
        cls,
        config: StructPruneConfig,
        arch: ArchSpec,
        model: PreTrainedModel,
        allowed: range | None = None,
        order: Sequence[int] | None = None,
    ) -> VocabBudget:
        """Return the budget of a config.

        Args:
            config: The config.
            arch: The description of the model.
            model: The model.
            allowed: The numbers of tokens that the model can keep. The default is any number.
            order: The ids of all tokens, or None before text has ranked them.

        Raises:
            StructPruneError: If the smallest widths do not meet the budget, or the budget does not depend on tokens.
        """
        legal = legal_widths(replace(config, targets=(VOCAB,)), arch, model.config)[VOCAB]
        if CACHE in (config.budget or {}):
            raise StructPruneError(f"Tokens have no part in the {CACHE}. Remove {VOCAB!r} from `targets`.")

        rows = arch.of(VOCAB)[0].size
        numbers = [number for number in choices(config, arch, VOCAB, legal) if allowed is None or number in allowed]
        if not numbers:
            numbers = [rows]

        smallest: Widths = {}
        config_without_tokens = without_tokens(config)
        if config_without_tokens is not None:
            legal_by_space = legal_widths(config_without_tokens, arch, model.config)
            check_may_differ(config_without_tokens, arch, list(legal_by_space))
            smallest = smallest_widths(config_without_tokens, arch, legal_by_space)

        budget = budget_of(config, arch, model, list(smallest), order)
        names = [VOCAB] + list(smallest)
        check_reach(config, budget, _with_tokens(smallest, numbers[0]), names, arch)
        return cls(budget, numbers, smallest, rows)

    @property
    def is_shared(self) -> bool:
        """Return whether other spaces share the budget, so that the number of removed tokens depends on text."""
        return bool(self.smallest)

    def is_met_by(self, widths: Widths) -> bool:
        """Return whether a model with these widths, and full widths of all other spaces, meets the budget."""
        return self.budget.cost(widths) <= self.budget.limit

    def largest(self, widths: Widths) -> int:
        """Return the largest number of tokens that meets the budget with the given widths, or the smallest number."""

        def cost(number: int) -> float:
            return self.budget.cost(_with_tokens(widths, number))

        num_fitting = bisect_right(self.numbers, self.budget.limit, key=cost)
        return self.numbers[max(num_fitting - 1, 0)]

    @property
    def candidates(self) -> list[int]:
        """Return the numbers of tokens that meet the budget with some widths of the other spaces, ascending.

        The first number meets it by tokens alone, if possible. With the last number, the other spaces have their
        smallest widths.
        """
        min_number = self.largest({})
        max_number = max(self.largest(self.smallest), min_number)
        return [number for number in self.numbers if min_number <= number <= max_number]
