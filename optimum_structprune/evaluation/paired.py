"""Whether two models differ on the same items, or by no more than chance would have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..forward.metrics import standard_error
from ..record.answers import LEVEL, mcnemar


@dataclass(frozen=True)
class Paired:
    """How the scores of a model differ from those of the dense one on the same items: the mean difference with its
    standard error, the numbers of items on which the model scores more and less, how often chance alone gives as much
    (McNemar's exact test where every score is 0 or 1, else a t test), and `worse`, `better`, or `alike` above 0.05.
    """

    items: int
    difference: float
    stderr: float
    better: int
    worse: int
    p_value: float
    verdict: str


def paired(model: Mapping[int, float], dense: Mapping[int, float], *, less_is_better: bool = False) -> Paired:
    """Compare two models item by item; the more the score, the better, if not said otherwise."""
    if model.keys() != dense.keys():
        raise ValueError(f"{len(model)} and {len(dense)} items are not the same ones")
    differences = torch.tensor([model[item] - dense[item] for item in model], dtype=torch.float64)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    binary = {*model.values(), *dense.values()} <= {0.0, 1.0}
    p_value = mcnemar(better, worse) if binary else _t_test(differences)
    difference = float(differences.mean())
    verdict = "alike" if p_value >= LEVEL else "better" if (difference > 0) is not less_is_better else "worse"
    return Paired(len(differences), difference, standard_error(differences), better, worse, p_value, verdict)


def _t_test(differences: torch.Tensor) -> float:
    from scipy.stats import ttest_1samp

    # Nothing is known of the spread of one item, and there is none where all differ by the same.
    if len(differences) < 2 or not differences.std():
        return 1.0 if len(differences) < 2 or not differences.any() else 0.0
    return float(ttest_1samp(differences.numpy(), 0.0).pvalue)
