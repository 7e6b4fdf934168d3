"""The memory of a pruning, from shapes alone: what does not fit is refused, and a batch size is found that does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel

from ..arch.load import ModelInfo
from ..arch.spec import EXPERT, LAYER, ArchSpec, Widths
from ..config.pruning import AUTO, RunOptions, StructPruneConfig
from ..criteria import CRITERIA
from ..domains.resolve import texts_of
from ..errors import StructPruneError
from ..forward.metrics import TOKENS_AT_ONCE, evaluating
from ..method.layers import run_model
from ..sources.data import CalibrationData
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import process_count
from ..system.stages import readable_size
from .measure import PROBE_TOKENS, STRIDE
from .request import Request


FP32 = 4  # bytes
# How many activations of its widest matrix a layer holds at a time: both factors of a gated product, and the product.
WIDE = 3
# By how much the estimate of what comes on top of the model may lie off, either way; see docs/scaling.md.
ERROR = 0.15
# The most samples in a batch: larger ones brought no more speed wherever it was tried. A CPU computes no faster with
# more samples of a few hundred tokens, and what asks for too much there is killed.
MOST, MOST_ON_CPU = 32, 4


@dataclass(frozen=True)
class Need:
    """The memory of one process at its peak, in bytes: `weights` on the compute device, with the largest of offloaded
    layers; `hidden` states, and the dense predictions that trials are compared with; the most that a step holds beside
    them, `working`; and what the CPU's memory holds of what is offloaded, `host`.
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


def need_of(request: Request, offload: str | None = None) -> Need:
    """The memory that a pruning takes in each process, by shapes alone; `offload` says where its layers are to be."""
    config, described, widths, inputs = request.config, request.described, request.widths, request.inputs
    samples_at_once = request.options.samples_at_once
    if inputs is not None:  # what is no text has as many tokens as the model makes of it, which shapes do not say
        from ..domains.load import given_domains

        given = [domain.samples for domain in given_domains(inputs, float(config.holdout), config.searches)]
        length = max(samples.shape[1] if samples.ndim == 2 else 1 for samples in given)
        config = replace(config, num_samples=sum(map(len, given)), seq_length=length)
    offload = "disk" if described.offloaded else offload
    model, layers, settings = described.plain_model, described.arch.layer_params, described.plain_model.config
    itemsize, length = model.dtype.itemsize, config.seq_length
    channels = getattr(settings.get_text_config(), "hidden_size", 0)  # a config of one's own may not say it
    weights = model.num_parameters() - (sum(layers) - max(layers) if offload else 0)
    if config.rounds > 1:  # consumers that a round has masked keep their dense values until the last round
        weights += channels * sum(size for size, _ in _consumers(config, described.arch, widths))
    # The residual streams, and what the attention gives, which does not run again.
    streams = channels * config.num_samples * length * (3 if config.feedback else 2) // process_count()
    host = streams + (sum(layers) if offload == "cpu" else max(layers)) if offload else 0
    vocabulary = settings.get_text_config().vocab_size if described.arch.causal else 0
    hidden = (vocabulary * PROBE_TOKENS // STRIDE if config.searches else 0) + (0 if offload else streams)
    # A loss takes logits in the model's dtype and twice in fp32, for few tokens at a time; where layers are offloaded,
    # the head runs on a whole sample.
    part, domains = min(TOKENS_AT_ONCE, length), len(inputs or texts_of(config))
    loss = vocabulary * ((length if offload else part) * itemsize + part * 2 * FP32)
    # What is not counted here took 60 MB in measurements, whatever the size of the model.
    working = max(loss, _of_layer(config, described, widths, domains, channels, samples_at_once)) + 60 * 10**6
    return Need(itemsize * weights, itemsize * hidden, working, itemsize * host)


def _of_layer(
    config: StructPruneConfig, described: ModelInfo, widths: Widths, domains: int, channels: int, samples_at_once: int
) -> int:
    """The most bytes that a layer takes at a time while it is pruned, on top of its own when it is whole."""
    arch, itemsize, on_cpu = described.arch, described.plain_model.dtype.itemsize, described.device.type == "cpu"
    widest = max([channels, *(space.size * axis.per_unit for space in arch.spaces for axis in space.consumers)])
    at_once = min(samples_at_once, ceil(config.num_samples / domains)) * config.seq_length
    batch, tokens = itemsize * at_once * (WIDE * widest + 2 * channels), config.num_samples * config.seq_length
    steps, gone = [batch], []
    for layer, parameters in enumerate(arch.layer_params):
        units = [((space.width - space.width_in(widths)) * space.scale, space.unit_params) for space in arch.at(layer)]
        gone.append(itemsize * sum(count * each for count, each in units))
        if on_cpu:  # where smaller layers are made, so that both are there
            steps.append(itemsize * parameters - gone[-1])
    if EXPERT in widths:  # what enters the experts and what they are to give, while all of them are there
        steps.append((itemsize + FP32 * config.fits) * tokens * channels + batch)
    reads_gram = config.refit_reads_gram or CRITERIA.get(config.scored_by).needs_gram
    for size, of_experts in _consumers(config, arch, widths):
        # Moments are there twice: of a domain and of the mixture, and later in a factor of the Gram matrix.
        gram, weight = size * size if reads_gram else 0, channels * size
        error = weight if config.feedback and not of_experts else 0
        kept = itemsize * tokens * channels if of_experts else 0  # what enters the experts, until all are done
        if of_experts and EXPERT in widths:  # what they are to give and what one reads, when the layer has shrunk
            kept += FP32 * tokens * (2 * channels + size) - min(filter(None, gone), default=0)
            # What the ridge pulls toward is in the CPU's memory.
            kept += (itemsize * max(arch.layer_params) - max(gone)) // 3 if on_cpu else 0
        steps.append(2 * FP32 * (gram + error + weight) + kept + (batch if domains > 1 else 0))
    return max(steps)


def _consumers(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> list[tuple[int, bool]]:
    """How many components each consumer reads that is refitted, and whether it is an expert's."""
    whole = [name for name, refits in ((LAYER, config.feedback), (EXPERT, config.fits)) if refits and name in widths]
    return [
        (space.size * axis.per_unit, space.experts is not None)
        for space in arch.spaces
        if space.inside and (space.width_in(widths) < space.width or (EXPERT if space.experts else LAYER) in whole)
        for axis in space.consumers
    ]


def free_bytes(device: torch.device) -> int | None:
    """The bytes that a device has free for tensors; None where it does not say."""
    if device.type == "cuda":
        # What torch has reserved and does not use is free for its own tensors.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else None


def check_room(request: Request, inplace: bool) -> None:
    """Refuse a pruning that takes more memory than its device has free, at the lower end of the estimate's error."""
    config, described = request.config, request.described
    device, model, away = described.device, described.plain_model, described.offloaded
    if away and not inplace:
        raise StructPruneError(
            f"{described.name} is offloaded, and a copy of it would need as much room again; pass inplace=True."
        )
    need, free = need_of(request), free_bytes(device)
    copy = 0 if inplace else model.dtype.itemsize * model.num_parameters()
    if free is not None and (least := int(need.above * (1 - ERROR)) + copy) > free:
        advice = {
            "inplace=True": copy > 0,
            f"--offload {'disk' if device.type == 'cpu' else 'cpu or disk'}": not away,
            f"num_samples below {config.num_samples}": need.hidden > 0,
            f"batch_size below {request.options.batch_size}": request.options.samples_at_once > 1,
            "criterion='wanda' with refit='none', which take no Gram matrix": config.fits,
        }
        raise StructPruneError(
            f"Pruning takes at least {readable_size(least)} on {device} above the model (hidden states "
            f"{readable_size(need.hidden)}, working memory {readable_size(need.working)}, a copy of the model "
            f"{readable_size(copy)}), and {readable_size(free)} are free; what helps is "
            f"{' or '.join(text for text, helps in advice.items() if helps) or 'a device with more memory'}."
        )


def with_batch_size(data: CalibrationData, arch: ArchSpec, model: PreTrainedModel, widths: Widths) -> CalibrationData:
    """Gives the data the largest batch size up to `MOST` that fits, where the config says `auto`."""
    if data.options.batch_size != AUTO:
        return data
    described = ModelInfo(arch, model, compute_device(model), offloaded=is_offloaded(model))
    device, samples = described.device, max((domain.samples for domain in data.domains), key=len)

    @torch.no_grad()
    def attempt(batch_size: int) -> int:
        with evaluating(model):
            run_model(model.base_model, samples[:batch_size])  # type: ignore[arg-type]
        return batch_size

    size, free = max(min(len(samples), MOST_ON_CPU if device.type == "cpu" else MOST), 1), free_bytes(device)
    while size > 1 and free is not None:
        request = Request(data.config, described, widths, options=RunOptions(batch_size=size))
        if need_of(request).above * (1 + ERROR) <= free:
            break
        size //= 2
    try:  # on a CPU no error says that a batch is too large
        size = size if device.type == "cpu" else find_executable_batch_size(attempt, starting_batch_size=size)()
    except RuntimeError as error:
        raise StructPruneError(
            f"batch_size='auto' found no batch that {device} has room for: one sample of the shape "
            f"{tuple(samples.shape[1:])} is too much already. Choose --offload cpu or disk, or a smaller seq_length."
        ) from error
    return replace(data, options=replace(data.options, batch_size=size))
