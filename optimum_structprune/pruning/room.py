"""How much memory a pruning takes, from shapes alone, and what the machine has free: a pruning that does not fit is
refused before any text is read, and the batch size is chosen that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.load import ModelInfo
from ..arch.spec import EXPERT, LAYER, ArchSpec, Widths
from ..config.pruning import AUTO, StructPruneConfig
from ..criteria import CRITERIA
from ..domains.resolve import texts_of
from ..errors import StructPruneError
from ..forward.metrics import TOKENS_AT_ONCE, evaluating
from ..method.layers import run_model
from ..method.refit import ROWS
from ..method.score import COLUMNS
from ..sources.data import CalibrationData
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import process_count
from ..system.stages import readable_size
from .measure import PROBE_TOKENS, STRIDE


FP32, FP64 = 4, 8  # bytes
# How many activations of its widest matrix a layer holds at a time: both factors of a gated product, and the product.
WIDE = 3
# What tensors that are not counted here took in measurements, whatever the size of the model.
BESIDE = 60 * 10**6
# By how much the estimate of what comes on top of the model may lie off, either way; see docs/scaling.md.
ERROR = 0.15
MOST = 32  # samples; larger batches brought no more speed wherever it was tried
# A CPU computes no faster with more samples of a few hundred tokens, and what asks for too much there is killed.
MOST_ON_CPU = 4


@dataclass(frozen=True)
class Need:
    """The memory of one process at its peak, in bytes.

    `weights` are those on the compute device: of layers that are offloaded, the largest.
    `hidden` holds hidden states and the dense model's predictions that trials are compared with; `working` the
    statistics, factors and activations of the `stage`; `host` what the CPU's memory holds of what is offloaded.
    """

    stage: str
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
        sizes |= {"  hidden states": self.hidden, f"  {self.stage}": self.working, "in CPU memory": self.host}
        return aligned([(label, readable_size(size)) for label, size in sizes.items()])


class Text(NamedTuple):
    """How much text runs: the calibration tokens, those of a sample, the samples of a batch, and the domains."""

    tokens: int
    length: int
    batch: int
    domains: int

    @classmethod
    def of(cls, config: StructPruneConfig, model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> Text:
        """The samples that a config asks for, or those that are given."""
        domains, count, length = len(texts_of(config)), config.num_samples, config.seq_length
        if inputs is not None:
            from ..domains.load import given_domains

            given = given_domains(inputs, float(config.holdout), config.chooses)
            domains, count = len(given), sum(len(domain.samples) for domain in given)
            # What is no text has as many tokens as the model makes of it, which shapes do not say.
            length = max(samples.shape[1] if samples.ndim == 2 else 1 for samples in inputs.values())
        return cls(count * length, length, min(config.samples_at_once, ceil(count / domains)), domains)


class Matrix(NamedTuple):
    """A matrix of `out` rows and `size` columns of which `kept` stay; it may be one of several experts."""

    size: int
    kept: int
    out: int
    expert: bool


@dataclass(frozen=True)
class Workload:
    """A pruning of a model, of which shapes are enough, to given widths; a weight has `itemsize` bytes."""

    config: StructPruneConfig
    arch: ArchSpec
    model: PreTrainedModel
    widths: Widths
    itemsize: int
    text: Text

    @property
    def weights(self) -> int:
        """The bytes of the dense model."""
        return self.itemsize * self.model.num_parameters()

    def need(self, offload: str | None = None, processes: int = 1) -> Need:
        """The memory of each of several processes on its device, with layers on the `cpu`, on the `disk` or there."""
        layers = [self.itemsize * parameters for parameters in self.arch.layer_params]
        weights = self.weights if offload is None else self.weights - sum(layers) + max(layers)
        if self.config.rounds > 1:
            # Consumers that a round has masked keep their dense values until the last round.
            weights += self.itemsize * sum(matrix.size * matrix.out for matrix in self._matrices)
        # The residual streams, and what the attention gives, which does not run again.
        streams = self._hidden * self.itemsize * self.text.tokens * (3 if self._feedback else 2) // processes
        vocabulary = self.model.config.get_text_config().vocab_size if self.arch.causal else 0
        predictions = self.itemsize * vocabulary * PROBE_TOKENS // STRIDE if self.config.searches else 0
        # A loss takes logits in the model's dtype and twice in fp32, for few tokens at a time; where layers are
        # offloaded, the head runs on a whole sample.
        part = min(TOKENS_AT_ONCE, self.text.length)
        logits = vocabulary * ((part if offload is None else self.text.length) * self.itemsize + part * 2 * FP32)
        working, stage = max([(logits, "perplexity"), *self._stages()])
        if offload is None:
            return Need(stage, weights, predictions + streams, working + BESIDE, 0)
        host = streams + (sum(layers) if offload == "cpu" else max(layers))
        return Need(stage, weights, predictions, working + BESIDE, host)

    def _stages(self) -> Iterator[tuple[int, str]]:
        """The working memory of each stage, in bytes, with its name."""
        batch, name = self._activations(), self.config.scored_by
        yield batch, "forward pass"
        for layer, parameters in enumerate(self.arch.layer_params):
            spaces = [(space, space.width - space.width_in(self.widths)) for space in self.arch.at(layer)]
            removed = sum(units * space.scale * space.unit_params for space, units in spaces)
            yield self.itemsize * max(parameters - removed, 0), "removal"
        if EXPERT in self.widths and self.config.fits:
            yield self._refit_of_experts() + batch, "refit of experts"
        criterion = CRITERIA.get(name) if name in CRITERIA.names() else None
        reads_gram = self.config.refit_reads_gram or criterion is not None and criterion.needs_gram
        for size, kept, out, expert in self._matrices:
            gram, weight = FP32 * size**2 if reads_gram else 0, FP32 * out * size
            # The cross-moment with the error; of experts, the tokens that enter them, kept until all are done.
            error = weight if self._feedback and not expert else 0
            moments = gram + (self.itemsize * self.text.tokens * self._hidden if expert else error)
            of_domain = gram + error if self.text.domains > 1 else 0
            yield moments + of_domain + 2 * weight + batch, "gathering"
            # Later a factor takes the place of a domain's moments, with some columns of its inverse, also in fp64; in
            # the refit it is that of the kept submatrix.
            columns = 2 * (FP32 + FP64) * min(COLUMNS, size) * size
            factor = gram + columns if criterion is not None and criterion.damped else 0
            fitted = FP32 * kept * (kept + 4 * out + min(ROWS, size)) - weight if self.config.fits else 0
            yield moments + 2 * weight + max(factor, fitted), "scoring and refit"

    def _refit_of_experts(self) -> int:
        """The bytes of what enters the experts of a layer and what they are to give, of all tokens, of what one expert
        reads, and of its Gram matrix with a factor.
        """
        size = max(space.size for space in self.arch.spaces if space.inside and space.experts is not None)
        weights = self.itemsize * max(self.arch.layer_params) // 3  # those that the ridge pulls toward
        through = self._hidden * (self.itemsize + 2 * FP32) + size * FP32
        return self.text.tokens * through + weights + FP32 * (3 * size**2 + 4 * size * self._hidden)

    @cached_property
    def _matrices(self) -> list[Matrix]:
        """The matrices that lose columns, and where layers go, those that may make up for it."""
        shorter = LAYER in self.widths and self._feedback
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.named_parameters()}
        return [
            Matrix(
                space.size * axis.per_unit,
                space.width_in(self.widths) * space.scale * axis.per_unit,
                shapes[axis.param][1 - axis.dim if axis.part is None else 3 - axis.dim],
                axis.part is not None,
            )
            for space in self.arch.spaces
            if space.inside and (space.width_in(self.widths) < space.width or (shorter and space.experts is None))
            for axis in space.consumers
        ]

    @cached_property
    def _feedback(self) -> bool:
        """Whether error feedback runs the dense residual stream beside the present one."""
        return self.config.fits and self.config.error_feedback > 0

    @cached_property
    def _hidden(self) -> int:
        """The number of channels of the residual stream."""
        named = getattr(self.model.config.get_text_config(), "hidden_size", 0)
        return named or max((matrix.out for matrix in self._matrices), default=0)

    def _activations(self) -> int:
        """The bytes of what a batch is in the widest layer; a token is in each expert that it goes to."""
        text = self.model.config.get_text_config()
        counts = (getattr(text, key, None) for key in ("num_experts_per_tok", "top_k"))
        active = next((count for count in counts if isinstance(count, int)), 1)
        axes = [(space.size, axis) for space in self.arch.spaces for axis in space.consumers]
        wide = (size * axis.per_unit * (1 if axis.part is None else active) for size, axis in axes)
        channels = WIDE * max([self._hidden, *wide]) + 2 * self._hidden
        return self.itemsize * self.text.batch * self.text.length * channels


def free_bytes(device: torch.device) -> int | None:
    """The bytes that a device has free for tensors; None where it does not say."""
    if device.type == "cuda":
        # What torch has reserved and does not use is free for its own tensors.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else None


def check_room(
    config: StructPruneConfig,
    described: ModelInfo,
    widths: Widths,
    inplace: bool,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse a pruning that takes more memory than the device that computes it has free.

    What is estimated is taken at the lower end of its error, so that nothing is refused that fits.
    """
    if described.offloaded and not inplace:
        raise StructPruneError(
            f"{described.name} is offloaded, and a copy of it would need as much room again; pass inplace=True."
        )
    device, model, free = described.device, described.plain_model, free_bytes(described.device)
    work = Workload(config, described.arch, model, widths, model.dtype.itemsize, Text.of(config, model, inputs))
    need = work.need("disk" if described.offloaded else None, process_count())
    copy = 0 if inplace or described.offloaded else work.weights
    lower_bound = int(need.above * (1 - ERROR)) + copy
    of_copy = f", beside a copy of the model, {readable_size(copy)}" if copy else ""
    if free is not None and lower_bound > free:
        advice = " or ".join(_advice(config, need, device, copy, described.offloaded))
        raise StructPruneError(
            f"Pruning takes at least {readable_size(lower_bound)} on {device} above the model "
            f"({readable_size(need.hidden)} of hidden states and {readable_size(need.working)} for {need.stage}"
            f"{of_copy}), and {readable_size(free)} are free; what helps is {advice}."
        )


def _advice(config: StructPruneConfig, need: Need, device: torch.device, copy: int, offloaded: bool) -> list[str]:
    advice = {
        "inplace=True": copy > 0,
        f"--offload {'disk' if device.type == 'cpu' else 'cpu or disk'}": not offloaded,
        f"num_samples below {config.num_samples}": need.hidden > 0,
        f"batch_size below {config.batch_size}": config.samples_at_once > 1,
        "criterion='wanda' with refit='none', which take no Gram matrix": config.fits,
    }
    return [text for text, helps in advice.items() if helps] or ["a device with more memory"]


def with_batch_size(data: CalibrationData, arch: ArchSpec, model: PreTrainedModel, widths: Widths) -> CalibrationData:
    """The data with a batch size that fits, where the config says `batch_size="auto"`.

    The estimate of the memory chooses where to begin, and a forward pass on the device says whether it fits; where it
    does not, accelerate's `find_executable_batch_size` tries smaller ones.
    """
    config = data.config
    if config.batch_size != AUTO:
        return data
    device = compute_device(model)
    free = free_bytes(device)
    base: Any = model.base_model
    samples = max((domain.samples for domain in data.domains), key=len)
    work = Workload(config, arch, model, widths, model.dtype.itemsize, Text.of(config, model))
    limit = min(len(samples), MOST_ON_CPU if device.type == "cpu" else MOST)
    start = largest_estimated(work, limit, free, is_offloaded(model))

    @torch.no_grad()
    def attempt(batch_size: int) -> int:
        with evaluating(model):
            run_model(base, samples[:batch_size])
        return batch_size

    try:
        silent = device.type == "cpu"  # no error says that a batch is too large
        size = start if silent else find_executable_batch_size(attempt, starting_batch_size=start)()
    except RuntimeError as error:
        room, text = "" if free is None else f" in {readable_size(free)}", samples.ndim == 2
        raise StructPruneError(
            f"batch_size='auto' found no batch that {device} has room for{room}: one "
            f"{f'sample of {samples.shape[1]} tokens' if text else 'image'} is too much already. Choose "
            f"{'a smaller seq_length, or ' * text}--offload cpu or disk."
        ) from error
    return replace(data, batch_size=size)


def largest_estimated(work: Workload, limit: int, free: int | None, offloaded: bool) -> int:
    """The largest of `limit`, its half, its quarter and so on that is estimated to fit, at least 1."""
    size = max(limit, 1)
    while size > 1 and free is not None:
        need = replace(work, text=work.text._replace(batch=size)).need("disk" if offloaded else None, process_count())
        if need.above * (1 + ERROR) <= free:
            break
        size //= 2
    return size
