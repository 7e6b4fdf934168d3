"""How good a model is before and after, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..forward.metrics import model_outputs, output_error, perplexity
from ..saving.report import Report


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..domains.load import Domain


class Measure:
    """Perplexity by domain, or for models that do not predict the next token, how far hidden states have moved."""

    def __init__(self, domains: Sequence[Domain], causal: bool):
        self.heldout = {domain.name: domain.heldout for domain in domains}
        self.causal = causal

    def before(self, model: PreTrainedModel) -> None:
        """Remember what the dense model gives."""
        self.dense = {name: self._of(model, samples) for name, samples in self.heldout.items()}

    def ratios(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity as a multiple of the dense model's, by domain."""
        return {name: self._of(model, samples) / self.dense[name] for name, samples in self.heldout.items()}

    def after(self, model: PreTrainedModel, report: Report) -> None:
        """Enter what the smaller model gives beside it."""
        for name, samples in self.heldout.items():
            before, after = self.dense[name], self._of(model, samples)
            if isinstance(before, float):
                report.perplexity[name] = {"before": before, "after": after}
            else:
                report.output_error[name] = output_error(after, before)

    def _of(self, model: PreTrainedModel, samples: Tensor):
        return perplexity(model, samples) if self.causal else model_outputs(model, samples)
