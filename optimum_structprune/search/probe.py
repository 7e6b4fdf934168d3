"""Compare changed versions of a model with the model itself, from one layer on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.generation import last_logits_only
from ..arch.inference import run_model
from ..arch.spec import ArchSpec
from ..measure.losses import skipping_layers, values_of
from ..measure.predictions import Predictions, tokens_at_once
from ..method.layers import Batch, InMemory
from ..steps.data import CalibrationData, batches_of, source_of
from ..system.placement import is_spread
from ..system.processes import all_reduce_, process_count, process_index


# A probe has about this many tokens, over all domains, and compares every fourth prediction.
PROBE_TOKENS = 2048
STRIDE = 4


class Probe:
    """Text that runs through a model from one layer on, and the predictions of the original model for it.

    If layers pass on hidden states alone, the layers before the current layer do not run again. The probe stores the
    hidden states, and the original logits of one token in four. Each process has all of the text.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]):
        self.model = model
        self.batches = batches
        self.layer = 0  # the first layer that runs
        self.source = source_of(model, arch, batches)
        # accelerate moves the index of a spread model to its first device, and the head may be on another.
        self.takes_index = last_logits_only(model) and not is_spread(model)
        self.originals = [self._predictions(index) for index in range(len(batches))]

    @classmethod
    def of(cls, model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, tokens: int = PROBE_TOKENS) -> Probe:
        """Return a probe of about `tokens` tokens: the beginnings of samples, equally many of each domain."""
        per_domain = ceil(tokens / len(data.domains))
        # A sample has 128 tokens, because the first tokens of a text have little context.
        num_samples = max(per_domain // 128, 1)
        counts = [min(num_samples, len(domain.probe_or_heldout)) for domain in data.domains]
        # All samples have one length, because calls of layers are recorded for each length.
        length = ceil(per_domain / max(counts))

        domains = []
        for domain, count in zip(data.domains, counts, strict=True):
            domains.append(replace(domain, samples=domain.probe_or_heldout[:count, :length]))
        return cls(model, arch, batches_of(domains, data.options.batch_size))

    def advance(self) -> None:
        """Advance to the next layer."""
        self.source.advance(self.layer)
        self.layer += 1

    def losses(self, model: PreTrainedModel | None = None) -> Tensor:
        """Return the mean KL(original‖model) in nats per token of each domain, shape `(domains,)`."""
        num_domains = 1 + max(batch.domain for batch in self.batches)
        total = torch.zeros(num_domains)
        count = torch.zeros(num_domains)

        for index in range(process_index(), len(self.batches), process_count()):
            predictions = self._predictions(index, model)
            size = tokens_at_once(predictions.values.device, predictions.values.shape[1])
            kl = values_of(predictions, None, self.originals[index], size)["kl"]
            total[self.batches[index].domain] += float(kl.sum())
            count[self.batches[index].domain] += len(kl)

        all_reduce_([total, count])
        return total / count

    @torch.no_grad()
    def _predictions(self, index: int, model: PreTrainedModel | None = None) -> Predictions:
        """Return the predictions of every fourth token of a batch."""
        ids = self.batches[index].ids
        options = {}
        if self.takes_index:
            options["logits_to_keep"] = torch.arange(0, ids.shape[1], STRIDE)

        source = None
        if model is None and isinstance(self.source, InMemory):
            source = self.source
        with skipping_layers(source, index, self.layer):
            logits = run_model(model or self.model, ids, **options).logits
        if not self.takes_index:
            logits = logits[:, ::STRIDE]
        return Predictions(logits.flatten(0, 1))
