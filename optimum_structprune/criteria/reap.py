"""REAP: Router-weighted Expert Activation Pruning, https://arxiv.org/abs/2510.13999."""

from __future__ import annotations

from torch import Tensor

from ..arch.spec import EXPERT
from .registry import DEFAULT_CRITERIA, register_criterion


PAPER = "REAP, Lasby et al. 2025, arXiv:2510.13999"


@register_criterion(DEFAULT_CRITERIA[EXPERT], judges=EXPERT, paper=PAPER)
def reap(norms: Tensor, gates: Tensor) -> Tensor:
    """Return g · ‖f(x)‖ for each token that chose an expert f with the gate g, shape `(tokens,)`.

    The score of the expert is the mean over these tokens, equation 8 of REAP.
    """
    return norms * gates


@register_criterion("reap_sum", judges=EXPERT, summed=True, paper=PAPER)
def reap_sum(norms: Tensor, gates: Tensor) -> Tensor:
    """Return the same values as `reap`, whose sum and not mean is the score of an expert.

    Deviation from REAP: an expert that many tokens choose scores higher.
    """
    return norms * gates
