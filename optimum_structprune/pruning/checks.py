"""Every wish that cannot be met, refused before any text is read."""

from __future__ import annotations

from collections.abc import Sequence

from ..arch.spec import EXPERT, HIDDEN, LAYER, ArchSpec
from ..calibration.gradients import check_gradients
from ..config.pruning import StructPruneConfig
from ..criteria.base import CRITERIA
from ..criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..errors import StructPruneError


def check_rounds(config: StructPruneConfig, arch: ArchSpec) -> None:
    """Refuse what the rounds cannot do with this model.

    Raises:
        StructPruneError: If a setting needs a perplexity or a gradient that the model does not give.
    """
    if config.scored_by in CRITERIA.names() and CRITERIA.get(config.scored_by).needs_gradient:
        check_gradients(arch)
    if not arch.causal and (config.reweights or config.max_perplexity_ratio is not None):
        raise StructPruneError(
            "adaptive_rate, objective='worst' and max_perplexity_ratio go by perplexity, which a model of type "
            f"{arch.model_type!r} does not have; leave them out."
        )


COARSE = (LAYER, EXPERT, HIDDEN)


def check_coarse(config: StructPruneConfig, names: Sequence[str]) -> None:
    """Refuse a criterion or a refit that the spaces do not have.

    Args:
        config: Names them.
        names: Spaces that are to shrink.

    Raises:
        StructPruneError: If the criterion does not exist, or judges whole layers where other spaces have to be judged
            too; or if the residual stream is to be refitted by biases.
    """
    others = [name for name in names if name != LAYER]
    if config.scored_by not in LAYER_CRITERIA.names():
        CRITERIA.get(config.scored_by)
    elif others:
        raise StructPruneError(
            f"criterion={config.criterion!r} judges whole layers, and nothing inside them; prune {LAYER!r} in a run "
            f"of its own, or choose a criterion for {others[0]!r}: {LAYER!r} is judged by {BLOCK_INFLUENCE!r} then."
        )
    if config.max_perplexity_ratio is not None and (wide := [name for name in names if name in COARSE]):
        raise StructPruneError(
            f"max_perplexity_ratio is held by rounds, and {wide[0]!r} goes before them; leave either out."
        )
    if HIDDEN in names and config.refit == "bias":
        raise StructPruneError(
            f"refit='bias' needs a bias in all that reads {HIDDEN!r}; use refit='least_squares' or 'none'."
        )
