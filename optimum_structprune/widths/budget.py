"""From the amount in a config to the final widths: those of a share or as given, or the largest within a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from torch import Tensor
from transformers import PreTrainedModel

from ..arch.meta import shrunk_skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, MODEL, VOCAB, ArchSpec, Space, Width, Widths
from ..config.pruning import CACHE, StructPruneConfig
from ..errors import StructPruneError
from .allocation import check_may_differ, choices, legal_widths, smallest_widths, target_widths


# A vocabulary is large where its rows are more than this share of a model.
LARGE_VOCABULARY = 0.2


def widths_of(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    scores: Mapping[tuple[int, str], Tensor] | None = None,
) -> Widths:
    """The final widths, in whichever way a config says how much is removed; see `target_widths`."""
    legal = legal_widths(config, arch, model.config)
    if config.budget is not None:
        widths = _within_budget(config, arch, model, legal, scores)
    elif VOCAB in (config.widths or ()):
        widths = _with_fewer_tokens(config, arch, legal, scores)
    else:
        widths = target_widths(config, arch, legal, scores)
    biased = biased_spaces(config, arch, widths)
    shrunk_config(model.config, arch, widths, biased)  # which may refuse together what it accepts one by one
    return widths


def _within_budget(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    legal: Mapping[str, Sequence[int]],
    scores: Mapping[tuple[int, str], Tensor] | None,
) -> Widths:
    """The largest widths that keep to a budget: one unit more would exceed it, where `round_to` is 1 (with other
    allocations than `uniform`, to within the cheapest step of one layer).
    """
    budget = budget_of(config, arch, model, legal)
    cost, dense, limit = budget.cost, budget.dense, budget.limit
    if budget.name == CACHE:
        saves = [kind for kind in legal if cost(smallest_widths(config, arch, {kind: legal[kind]})) < dense]
        if VOCAB in legal and VOCAB not in saves:
            raise StructPruneError(f"Tokens take no part of the {CACHE}; leave {VOCAB!r} out of targets.")
        legal = {kind: legal[kind] for kind in saves}
    check_may_differ(config, arch, list(legal))
    smallest = smallest_widths(config, arch, legal)
    _check_reach(config, budget, cost(smallest), list(legal), arch)

    def fits(widths: Widths) -> bool:
        return cost(widths) <= limit

    if VOCAB in legal and len(legal) > 1:  # measured losses are to say how many tokens go: none yet
        rest = {name: width for name, width in smallest.items() if name != VOCAB}
        others = widths_of(replace(config, targets=tuple(rest)), arch, model) if fits(rest) else rest
        return {VOCAB: arch.of(VOCAB)[0].size, **others}
    best = _filled_up(smallest, config, arch, legal, fits)
    if VOCAB in legal:
        return best

    # A bisection over the number of parameters to remove, until the bounds are closer than what goes with a unit. The
    # widths for a number lie on either side of it, so the largest that fit are not always those for the smallest one.
    too_little, enough = 0.0, float(removed_parameters(arch, smallest))
    cheapest = min(space.unit_params * space.scale for name in legal for space in arch.of(name))
    trial = enough * (dense - limit) / (dense - cost(smallest))
    while enough - too_little > cheapest / 2:
        by_sparsity = replace(config, budget=None, targets=tuple(legal), sparsity=trial / sum(arch.layer_params))
        widths = target_widths(by_sparsity, arch, legal, scores)
        if fits(widths):
            enough, best = trial, max(_filled_up(widths, config, arch, legal, fits), best, key=cost)
        else:
            too_little = trial
        trial = (too_little + enough) / 2
    return best


def _with_fewer_tokens(
    config: StructPruneConfig,
    arch: ArchSpec,
    legal: Mapping[str, Sequence[int]],
    scores: Mapping[tuple[int, str], Tensor] | None,
) -> Widths:
    """The given widths where tokens are among them: these go first, and all others are of a model without them."""
    given = config.widths or {}
    tokens = {VOCAB: cast("Width", given[VOCAB])}
    others = {name: width for name, width in given.items() if name != VOCAB}
    rest = {name: sizes for name, sizes in legal.items() if name != VOCAB}
    return {**tokens, **(target_widths(replace(config, widths=others), arch, rest, scores) if others else {})}


def _filled_up(
    widths: Widths,
    config: StructPruneConfig,
    arch: ArchSpec,
    legal: Mapping[str, Sequence[int]],
    fits: Callable[[Widths], bool],
) -> Widths:
    """Larger widths where they still fit: a coarse step of one space may leave room for a finer one of another."""
    filled = dict(widths)
    for name, width in widths.items():
        if isinstance(width, int):
            larger = [choice for choice in choices(config, arch, name, legal[name]) if choice > width]
            # What fits comes first: a larger width never takes less.
            fitting = bisect_left(larger, True, key=lambda choice: not fits({**filled, name: choice}))
            filled[name] = [width, *larger][fitting]
    return filled


class Budget(NamedTuple):
    """What a config limits, how much of it there may be and is in the dense model, and how much with given widths."""

    name: str
    limit: float
    dense: float
    cost: Callable[[Widths], float]


def budget_of(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    names: Collection[str],
) -> Budget:
    """The budget of a config whose spaces `names` may shrink; a number below 1 is a share of what is there."""
    ((name, limit),) = (config.budget or {}).items()
    cost_of = _cost_of(config, arch, model, names)
    costs: dict[str, float] = {}

    def cost(widths: Widths) -> float:  # a search asks for few widths many times, each at the price of a skeleton
        asked = repr(sorted(widths.items()))
        if asked not in costs:
            costs[asked] = cost_of(widths)
        return costs[asked]

    dense = cost({})
    return Budget(name, limit if limit >= 1 else int(limit * dense), dense, cost)


def check_fewest_tokens(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, may: range) -> None:
    """Refuse a budget that is not met with the fewest tokens of `may` and all that may go from the other spaces."""
    legal = legal_widths(config, arch, model.config)
    budget, fewest = budget_of(config, arch, model, legal), token_numbers(config, arch, legal, may)[0]
    least = budget.cost({**smallest_widths(config, arch, legal), VOCAB: fewest})
    _check_reach(config, budget, least, list(legal), arch)


def token_numbers(
    config: StructPruneConfig, arch: ArchSpec, legal: Mapping[str, Sequence[int]], may: range
) -> list[int]:
    """The numbers of tokens in `may` that a budget may choose, ascending; where there are none, that of all tokens."""
    return [number for number in choices(config, arch, VOCAB, legal[VOCAB]) if number in may] or [
        arch.of(VOCAB)[0].size
    ]


def _check_reach(config: StructPruneConfig, budget: Budget, least: float, names: list[str], arch: ArchSpec) -> None:
    name, limit, dense, _ = budget
    if limit >= dense:
        raise StructPruneError(
            f"budget {name}={limit:,} is met by the dense model, which has {dense:,}; ask for less."
        )
    kinds = ("attention", LAYER) if name == CACHE else (VOCAB, *arch.channels, "attention", LAYER)
    others = [kind for kind in kinds if kind in arch.offered and kind not in (*names, *config.shrinking)]
    if not names:
        advice = f"target {' or '.join(map(repr, others))}" if others else "budget something else"
        raise StructPruneError(
            f"budget {name}={limit:,} is not met by the dense model, which has {dense:,}, and targets="
            f"{list(config.shrinking)} leave that as it is; {advice}."
        )
    if limit < least:
        beside = ", ".join(repr(kind) for kind in others if kind != LAYER)
        advice = f", or add targets: {beside}" * bool(beside) + f", or target {LAYER!r} alone" * (LAYER in others)
        raise StructPruneError(
            f"budget {name}={limit:,} cannot be met: with all that may go from {', '.join(names)} the model still has "
            f"{least:,} of {dense:,}; allow that{advice}{'; a share of the dense model lies below 1' * (limit < 101)}."
        )


def _cost_of(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]
) -> Callable[[Widths], float]:
    """A function of the widths: what the budget limits, of a model that has them."""
    ((name, _),) = (config.budget or {}).items()
    if name in ("parameters", "bytes"):
        size, biased = model.dtype.itemsize if name == "bytes" else 1, biased_spaces(config, arch, names)
        if any(space.layer == MODEL for kind in names if kind != VOCAB for space in arch.of(kind)):
            # Such a space also has parameters outside of the layers, which its `unit_params` leave out.
            return lambda widths: size * shrunk_skeleton(model, arch, widths, biased).num_parameters()
        dense = shrunk_skeleton(model, arch, {}, biased).num_parameters() if biased else model.num_parameters()
        return lambda widths: size * (dense - removed_parameters(arch, widths))
    from ..forward.generation import cached_values, flops_per_token, why_not_counted

    def cost(widths: Widths) -> float:
        smaller = shrunk_skeleton(model, arch, widths)
        if name == CACHE:
            reason = "it does not generate, or does not run without weights"
            if values := cached_values(smaller, arch):
                return model.dtype.itemsize * values
        elif not (reason := why_not_counted(smaller, arch)):
            return flops_per_token(smaller, arch, config.seq_length)
        raise StructPruneError(
            f"The {name} of this {arch.model_type} model are not known: {reason}; give the budget in parameters or "
            "bytes."
        )

    return cost


def budget_without_vocab(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, number: int, cut: bool = True
) -> StructPruneConfig | None:
    """The config of what the other spaces still have to give up for a budget once only `number` tokens are there; None
    where that is nothing. It is for the model without the others, or where `cut` is false, for the one that has them.
    """
    others = tuple(name for name in config.shrinking if name != VOCAB)
    name, limit, dense, cost = budget_of(config, arch, model, config.shrinking)
    smaller = cost({VOCAB: number})
    if smaller <= limit or not others:
        return None
    return replace(config, targets=others, budget={name: limit if cut else limit + dense - smaller})


def removed_parameters(arch: ArchSpec, widths: Widths) -> int:
    """The number of parameters that the layers lose at given widths."""
    spaces = (*arch.model_spaces, *arch.spaces)
    return sum((space.width - space.width_in(widths)) * space.scale * space.unit_params for space in spaces)


def biased_spaces(config: StructPruneConfig, arch: ArchSpec, names: Collection[str]) -> tuple[str, ...]:
    """The spaces whose consumers get a bias: those inside the layers with `refit="bias"`, and none otherwise."""
    if config.refit != "bias":
        return ()
    inside = tuple(name for name in names if arch.of(name)[0].inside and arch.of(name)[0].layer != MODEL)
    for name in inside:
        if any(space.bias_flag is None and not space.biased for space in arch.of(name)):
            raise StructPruneError(
                f"refit='bias' needs a bias in the projections of {name!r}, which a {arch.model_type} config cannot "
                "express; use refit='least_squares' or 'none'."
            )
    return inside


def large_vocabulary(arch: ArchSpec, parameters: int) -> Space | None:
    """The space of the tokens where their rows are a large part of the `parameters` of a model, else None."""
    return next(
        (space for space in arch.of(VOCAB) if space.unit_params * space.size > LARGE_VOCABULARY * parameters), None
    )
