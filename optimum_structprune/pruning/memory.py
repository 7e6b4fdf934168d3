"""The memory of a pruning, from shapes alone; a pruning that does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import psutil
import torch

from ..arch.spec import EXPERT, LAYER
from ..criteria import CRITERIA
from ..domains.resolve import texts_of
from ..errors import StructPruneError
from ..forward.metrics import TOKENS_AT_ONCE
from ..method.calibrate import Moments
from ..method.layers import InMemory
from ..system.processes import process_count
from ..system.stages import readable_size
from .measure import PROBE_TOKENS, STRIDE
from .request import Request


FP32_BYTES = 4
# How many activations of its widest matrix a layer holds at a time: both factors of a gated product, and the product.
WIDE_ACTIVATIONS = 3
# What is not counted took so many bytes in measurements, whatever the size of the model.
UNCOUNTED_BYTES = 60 * 10**6
# By how much the estimate of what comes on top of the model may lie off, either way; see docs/scaling.md.
RELATIVE_ERROR = 0.15


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one process at its peak, in bytes.

    Attributes:
        weights: Those on the compute device; of offloaded layers the largest one.
        hidden: The hidden states on the device, and the dense predictions that trials are compared with.
        working: The most that a step holds beside them.
        host: What the CPU's memory holds of a model that is offloaded.
    """

    weights: int
    hidden: int
    working: int
    host: int

    @property
    def above(self) -> int:
        """The bytes on the compute device on top of the model's weights."""
        return self.hidden + self.working

    def __str__(self) -> str:
        """The sizes as a table."""
        from ..record.table import aligned

        sizes = {"on the device": self.weights + self.above, "  weights": self.weights}
        sizes |= {"  hidden states": self.hidden, "  working memory": self.working, "in CPU memory": self.host}
        return aligned([(label, readable_size(size)) for label, size in sizes.items()])


def estimate_memory(request: Request, offload: str | None = None) -> MemoryEstimate:
    """Add up what the sources and the steps of a pruning keep in each process, with layers on an `offload` place."""
    config, info, inputs = request.config, request.model_info, request.inputs
    if inputs is None:
        samples, length, domains = config.num_samples, config.seq_length, len(texts_of(config))
    else:
        from ..domains.load import given_domains

        given = [domain.samples for domain in given_domains(inputs, config.holdout, config.searches)]
        # What is no text has as many tokens as the model makes of it, which shapes do not say.
        length = max(rows.shape[1] if rows.ndim == 2 else 1 for rows in given)
        samples, domains = sum(map(len, given)), len(inputs)
    offload = "disk" if info.offloaded else offload
    model, layers, settings = info.plain_model, info.arch.layer_params, info.plain_model.config.get_text_config()
    itemsize, channels = model.dtype.itemsize, getattr(settings, "hidden_size", 0)  # a config of one's own may lack it
    weights = model.num_parameters() - (sum(layers) - max(layers) if offload else 0)
    if config.rounds > 1:  # consumers that a round has masked keep their dense values until the last round
        weights += channels * sum(size for size, _ in _consumers(request))
    streams = channels * samples * length * InMemory.streams(config.feedback) // process_count()
    host = streams + (sum(layers) if offload == "cpu" else max(layers)) if offload else 0
    vocabulary = settings.vocab_size if info.arch.causal else 0
    hidden = (vocabulary * PROBE_TOKENS // STRIDE if config.searches else 0) + (0 if offload else streams)
    # A loss takes logits in the model's dtype and twice in fp32, for few tokens at a time; where layers are offloaded,
    # the head runs on a whole sample.
    part = min(TOKENS_AT_ONCE, length)
    loss = vocabulary * ((length if offload else part) * itemsize + part * 2 * FP32_BYTES)
    batch = min(request.options.batch_size, ceil(samples / domains)) * length
    working = max(loss, *_steps(request, channels, samples * length, batch, domains > 1))
    return MemoryEstimate(itemsize * weights, itemsize * hidden, working + UNCOUNTED_BYTES, itemsize * host)


def _steps(request: Request, channels: int, tokens: int, batch: int, mixes: bool) -> Iterator[int]:
    """Yield the bytes that each step takes on top of a whole layer.

    Of the `tokens`, a `batch` runs at once. Where it `mixes` domains, moments are there beside a batch.
    """
    config, arch, widths, info = request.config, request.model_info.arch, request.widths, request.model_info
    itemsize, on_cpu = info.plain_model.dtype.itemsize, info.device.type == "cpu"
    widest = max([channels, *(space.size * axis.per_unit for space in arch.spaces for axis in space.consumers)])
    activations = itemsize * batch * (WIDE_ACTIVATIONS * widest + 2 * channels)
    yield activations
    removed = [0] * arch.num_layers
    for space in arch.spaces:
        units = (space.width - space.width_in(widths)) * space.scale
        removed[space.layer] += itemsize * units * space.unit_params
    if on_cpu:  # where smaller layers are made, so that both are there
        yield from (itemsize * size - gone for size, gone in zip(arch.layer_params, removed, strict=True))
    reads_gram = config.refit_reads_gram or CRITERIA.get(config.scored_by).needs_gram
    for size, of_expert in _consumers(request):
        # Moments are there twice: of a domain and of the mixture, and later in a factor of the Gram matrix.
        out = channels if config.feedback and not of_expert else 0
        step = 2 * (Moments.matrix_bytes(size, reads_gram, out) + FP32_BYTES * channels * size) + activations * mixes
        if of_expert:
            from ..sources.experts import WithExperts

            step += WithExperts.routed_bytes(tokens, channels, itemsize)
        if of_expert and EXPERT in widths:
            from ..removals.experts import ExpertRefit

            # When the layer has shrunk; on a CPU, the weights that the ridge pulls toward are copies there.
            step += ExpertRefit.fitting_bytes(tokens, channels, size) - min(filter(None, removed), default=0)
            step += (itemsize * max(arch.layer_params) - max(removed)) // 3 if on_cpu else 0
        yield step
    if EXPERT in widths:  # what enters the experts and what they are to give, while all of them are there
        yield (itemsize + FP32_BYTES * config.fits) * tokens * channels + activations


def _consumers(request: Request) -> list[tuple[int, bool]]:
    """List the number of components that each refitted consumer reads, and whether it is an expert's."""
    config, widths = request.config, request.widths
    whole = [name for name, refits in ((LAYER, config.feedback), (EXPERT, config.fits)) if refits and name in widths]
    return [
        (space.size * axis.per_unit, space.experts is not None)
        for space in request.model_info.arch.spaces
        if space.inside and (space.width_in(widths) < space.width or (EXPERT if space.experts else LAYER) in whole)
        for axis in space.consumers
    ]


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that a device has free for tensors; None if it does not say."""
    if device.type == "cuda":
        # What torch has reserved and does not use is free for its own tensors.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else None


def check_memory(request: Request, inplace: bool) -> None:
    """Refuse a pruning that takes more memory than its device has free, at the lower end of the estimate's error."""
    config, info, options = request.config, request.model_info, request.options
    device, model = info.device, info.plain_model
    if info.offloaded and not inplace:
        raise StructPruneError(
            f"{info.name} is offloaded, and a copy of it would need as much memory again; pass inplace=True."
        )
    estimate, free = estimate_memory(request), free_bytes(device)
    copy = 0 if inplace else model.dtype.itemsize * model.num_parameters()
    if free is not None and (least := int(estimate.above * (1 - RELATIVE_ERROR)) + copy) > free:
        advice = {
            "inplace=True": copy > 0,
            f"--offload {'disk' if device.type == 'cpu' else 'cpu or disk'}": not info.offloaded,
            f"num_samples below {config.num_samples}": estimate.hidden > 0,
            f"batch_size below {options.batch_size}": options.batch_size > 1,
            "criterion='wanda' with refit='none', which take no Gram matrix": config.fits,
        }
        raise StructPruneError(
            f"Pruning takes at least {readable_size(least)} on {device} above the model (hidden states "
            f"{readable_size(estimate.hidden)}, working memory {readable_size(estimate.working)}, a copy of the model "
            f"{readable_size(copy)}), and {readable_size(free)} are free; what helps is "
            f"{' or '.join(text for text, helps in advice.items() if helps) or 'a device with more memory'}."
        )
