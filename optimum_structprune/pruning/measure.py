"""How good a model is before and after, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isnan

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..domains.load import Domain
from ..errors import StructPruneError
from ..forward.layers import Batch, LayerRunner
from ..forward.metrics import (
    evaluating,
    model_outputs,
    output_error,
    perplexity_errors,
    perplexity_of,
    sample_losses,
    total_loss,
)
from ..forward.placement import Placement
from ..record.report import Report
from ..system.offloading import is_offloaded
from ..system.processes import every_process_runs, of_all, own_part


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
        self.dense_probes = self._losses(model, arch, chosen_by) if chosen_by else self.dense

    def ratios(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, float]:
        """Perplexity as a multiple of the dense model's, by domain; infinity where it is not a number."""
        losses = self._losses(model, arch, self.probes or self.heldout)
        ratios = {name: perplexity_of(of) / perplexity_of(self.dense_probes[name]) for name, of in losses.items()}
        return {name: inf if isnan(ratio) else ratio for name, ratio in ratios.items()}

    def after(self, model: PreTrainedModel, arch: ArchSpec, report: Report) -> None:
        """Put the figures of the smaller model into the report, beside those of the dense one."""
        figures = self._of_all(model, arch)
        for name, before in self.dense.items():
            if arch.causal:
                losses = {"before": before, "after": figures[name]}
                report.perplexity[name] = {when: perplexity_of(of) for when, of in losses.items()}
                report.perplexity_stderr[name] = perplexity_errors(losses)
                report.perplexity_tokens[name] = self.heldout[name][:, 1:].numel()
            else:
                report.output_error[name] = output_error(figures[name], before)

    def _of_all(self, model: PreTrainedModel, arch: ArchSpec) -> dict[str, Tensor]:
        if not arch.causal:
            return {name: model_outputs(model, samples) for name, samples in self.heldout.items()}
        losses = self._losses(model, arch, self.heldout)
        for name, of in losses.items():
            if of.isnan().any():
                raise StructPruneError(
                    f"The perplexity on held-out text of the domain {name!r} is not a number; load the model in "
                    "float32 or bfloat16, or check its weights."
                )
        return losses

    def _losses(self, model: PreTrainedModel, arch: ArchSpec, by_domain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean loss of each sample by domain, of all processes, shape `(samples,)`, fp64."""
        texts = [own_part(samples) for samples in by_domain.values()]
        if is_offloaded(model):
            values = layerwise_losses(model, arch, texts)
        else:
            values = [sample_losses(model, text) for text in texts]
        by_process = zip(*of_all(values), strict=True)
        return {
            name: parts[0] if every_process_runs(samples) else torch.cat(parts)
            for (name, samples), parts in zip(by_domain.items(), by_process, strict=True)
        }


@torch.no_grad()
def layerwise_losses(model: PreTrainedModel, arch: ArchSpec, texts: Sequence[Tensor]) -> list[Tensor]:
    """The losses of the samples of each of several texts; see `sample_losses`. Every layer is brought in once for all
    of them. `texts` has the shape `(samples, seq_length)`.
    """
    batches = [Batch(number, ids) for number, text in enumerate(texts) for ids in text.split(1)]
    with evaluating(model):
        runner, placement = LayerRunner(model, arch, batches), Placement(model, arch)
        for layer in range(arch.num_layers):
            with placement.at(layer):
                runner.pass_through(layer)
        losses = []
        for index, batch in enumerate(batches):
            with runner.skipping(arch.num_layers, index):
                losses.append(total_loss(model, batch.ids) / batch.ids[:, 1:].numel())
    return list(torch.tensor(losses, dtype=torch.float64).split([len(text) for text in texts]))
