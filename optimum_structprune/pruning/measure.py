"""How good a model is before and after, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isnan
from typing import TYPE_CHECKING

from ..errors import StructPruneError
from ..forward.metrics import model_outputs, output_error, perplexity
from ..saving.report import Report


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..domains.load import Domain


class Measure:
    """Perplexity by domain, or for models that do not predict the next token, the error of the last hidden states.

    Args:
        model: The dense model, which is measured at once.
        domains: The domains with their held-out samples.
        causal: Whether the model predicts the next token.

    Raises:
        StructPruneError: If the perplexity of the dense model is not a number.
    """

    def __init__(self, model: PreTrainedModel, domains: Sequence[Domain], causal: bool):
        self.heldout = {domain.name: domain.heldout for domain in domains}
        self.causal = causal
        self.dense = {name: self._of(model, name) for name in self.heldout}

    def ratios(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity as a multiple of the dense model's, by domain; infinity where it is not a number."""
        ratios = {name: perplexity(model, samples) / self.dense[name] for name, samples in self.heldout.items()}
        return {name: inf if isnan(ratio) else ratio for name, ratio in ratios.items()}

    def after(self, model: PreTrainedModel, report: Report) -> None:
        """Put the figures of the smaller model into the report, beside those of the dense one.

        Raises:
            StructPruneError: If the perplexity of the smaller model is not a number.
        """
        for name, before in self.dense.items():
            after = self._of(model, name)
            if isinstance(before, float):
                report.perplexity[name] = {"before": before, "after": after}
            else:
                report.output_error[name] = output_error(after, before)

    def _of(self, model: PreTrainedModel, name: str):
        samples: Tensor = self.heldout[name]
        if not self.causal:
            return model_outputs(model, samples)
        value = perplexity(model, samples)
        if isnan(value):
            raise StructPruneError(
                f"The perplexity on held-out text of the domain {name!r} is not a number; load the model in float32 "
                "or bfloat16, or check its weights."
            )
        return value
