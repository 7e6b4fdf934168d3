"""How good a model is before and after, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, inf, isnan
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..domains.load import Domain
from ..errors import StructPruneError
from ..forward.layers import Batch, LayerRunner
from ..forward.metrics import evaluating, model_outputs, output_error, perplexity, total_loss
from ..forward.placement import Placement
from ..record.report import Report
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import add_up_, own_part, process_count


class Measure:
    """Perplexity by domain, or for models that do not predict the next token, the error of the last hidden states.

    Choices are made by `ratios` on the probe of each domain where it has one, and what is reported is measured on the
    held-out samples.
    """

    def __init__(self, model: PreTrainedModel, domains: Sequence[Domain], arch: ArchSpec):
        self.heldout = {domain.name: domain.heldout for domain in domains}
        self.probes = {domain.name: domain.probe for domain in domains if domain.probe is not None}
        self.dense = self._of_all(model, arch)
        chosen_by = self.probes if arch.causal else {}
        self.dense_probes = self._perplexities(model, arch, chosen_by) if chosen_by else self.dense

    def ratios(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, float]:
        """Perplexity as a multiple of the dense model's, by domain; infinity where it is not a number."""
        perplexities = self._perplexities(model, arch, self.probes or self.heldout)
        ratios = {name: value / self.dense_probes[name] for name, value in perplexities.items()}
        return {name: inf if isnan(ratio) else ratio for name, ratio in ratios.items()}

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Put the figures of the smaller model into the report, beside those of the dense one."""
        figures = self._of_all(model, arch)
        for name, before in self.dense.items():
            if isinstance(before, float):
                report.perplexity[name] = {"before": before, "after": figures[name]}
            else:
                report.output_error[name] = output_error(figures[name], before)

    def _of_all(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, Any]:
        if not arch.causal:
            return {name: model_outputs(model, samples) for name, samples in self.heldout.items()}
        perplexities = self._perplexities(model, arch, self.heldout)
        for name, value in perplexities.items():
            if isnan(value):
                raise StructPruneError(
                    f"The perplexity on held-out text of the domain {name!r} is not a number; load the model in "
                    "float32 or bfloat16, or check its weights."
                )
        return perplexities

    def _perplexities(
        self, model: PreTrainedModel, arch: ArchSpec, by_domain: Mapping[str, Tensor]
    ) -> dict[str, float]:
        texts = [own_part(samples) for samples in by_domain.values()]
        if is_offloaded(model):
            values = layerwise_perplexities(model, arch, texts)
        else:
            values = [perplexity(model, text) for text in texts]
        if process_count() == 1:
            return dict(zip(by_domain, values, strict=True))
        counts = torch.tensor([float(text[:, 1:].numel()) for text in texts], dtype=torch.float64)
        losses = torch.tensor(values, dtype=torch.float64).log() * counts
        device = compute_device(model)
        sums = [losses.to(device), counts.to(device)]
        add_up_(sums)
        return dict(zip(by_domain, (sums[0] / sums[1]).exp().tolist(), strict=True))


@torch.no_grad()
def layerwise_perplexities(model: PreTrainedModel, arch: ArchSpec, texts: Sequence[Tensor]) -> list[float]:
    """The perplexity over each of several texts; see `perplexity`. Every layer is brought in once for all of them.
    `texts` has the shape `(samples, seq_length)`.
    """
    batches = [Batch(number, ids) for number, text in enumerate(texts) for ids in text.split(1)]
    with evaluating(model):
        runner, placement = LayerRunner(model, arch, batches), Placement(model, arch)
        for layer in range(arch.num_layers):
            with placement.at(layer):
                runner.pass_through(layer)
        losses = [0.0] * len(texts)
        for index, batch in enumerate(batches):
            with runner.skipping(arch.num_layers, index):
                losses[batch.domain] += total_loss(model, batch.ids)
    return [exp(loss / text[:, 1:].numel()) for loss, text in zip(losses, texts, strict=True)]
