"""Whether a training made a model better."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import exp, isfinite, isnan, log
from statistics import fmean

from accelerate.utils import broadcast_object_list

from ..record.report import RecoveryReport


# Folding an adapter into the weights rounds them, so that a model which has learnt nothing may lose this much.
ROUNDING = 1e-4


class WorseModelWarning(UserWarning):
    """A training made a model worse on held-out text, or ended early."""


@dataclass
class RecoveryOutcome(RecoveryReport):
    """What a training did, and whether the model is worse for it.

    Attributes:
        worse: Whether the mean log perplexity on held-out text is higher than that of the model before the training,
            or no number.
        learning_rate: The highest learning rate of the training.
    """

    worse: bool = False
    learning_rate: float = 0.0

    def judge(self) -> None:
        """Set `worse` from `perplexity`; of several processes, the first one decides for all.

        Warns:
            WorseModelWarning: If the model is worse, or the training ended early.
        """
        before, after = (self.mean_log_perplexity(when) for when in ("pruned", "recovered"))
        worse = after > before + ROUNDING or not isfinite(after) and isfinite(before) or isnan(after)
        self.worse = broadcast_object_list([worse])[0]
        if self.worse:
            warnings.warn(self.verdict(), WorseModelWarning, stacklevel=3)
        elif self.stopped:
            warnings.warn(self.stopped, WorseModelWarning, stacklevel=3)

    def mean_log_perplexity(self, when: str) -> float:
        """The logarithm of the perplexity on held-out text, in the mean over the domains."""
        return fmean(log(perplexity[when]) for perplexity in self.perplexity.values())

    def verdict(self) -> str:
        """A sentence on a model that is worse, with both perplexities and the learning rate."""
        before, after = (_exp(self.mean_log_perplexity(when)) for when in ("pruned", "recovered"))
        return (
            f"Recovery made the model worse: its perplexity on held-out text was {before:.2f} and is {after:.2f}, in "
            f"the geometric mean over the domains; a learning rate below {self.learning_rate:g} may help."
        )

    def __str__(self) -> str:
        """The table of the report, and a sentence where the model is worse."""
        return "\n".join([super().__str__(), *([self.verdict()] if self.worse else [])])


def _exp(value: float) -> float:
    return exp(value) if isfinite(value) else value
