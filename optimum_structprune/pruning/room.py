"""How much memory a pruning takes, from shapes alone, and what the machine has free: a pruning that does not fit is
refused before any text is read, and the batch size is chosen that fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, cast

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.load import ModelInfo
from ..arch.spec import LAYER, ArchSpec, Space, Widths
from ..config.pruning import AUTO, StructPruneConfig
from ..criteria import CRITERIA
from ..domains.load import given_domains
from ..domains.resolve import texts_of
from ..errors import StructPruneError
from ..forward.metrics import TOKENS_AT_ONCE, evaluating
from ..method.layers import run_model
from ..record.text import table
from ..sources.data import CalibrationData
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import process_count
from ..system.stages import readable_size


FP32 = 4  # bytes
# How many activations of its widest matrix a layer holds at a time: both factors of a gated product, and the product.
WIDE = 3
# What tensors that are not counted here took in measurements, whatever the size of the model.
UNCOUNTED_BYTES = 60 * 10**6
# By how much the estimate of what comes on top of the model may lie off, either way; see docs/scaling.md.
ERROR = 0.15
MAX_BATCH = 32  # samples; larger batches brought no more speed wherever it was tried
# A CPU computes no faster with more samples of a few hundred tokens, and what asks for too much there is killed.
MAX_BATCH_ON_CPU = 4


@dataclass(frozen=True)
class Need:
    """The memory of one process at its peak, in bytes.

    `weights` are those on the compute device: of layers that are offloaded, the largest. `hidden` are hidden states,
    `working` moments, factors, activations or logits, and `host` is what the CPU's memory holds of what is offloaded.
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
        sizes = {"on the device": self.weights + self.above, "  weights": self.weights}
        sizes |= {"  hidden states": self.hidden, "  working memory": self.working, "in CPU memory": self.host}
        return table([(label, readable_size(size)) for label, size in sizes.items()])


def memory_need(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    widths: Widths,
    inputs: Mapping[str, Tensor] | None = None,
    offload: str | None = None,
    processes: int = 1,
) -> Need:
    """The memory of each of several processes on its device, from the shapes of a model whose layers are on the `cpu`,
    on the `disk` or, with None, on the device.
    """
    itemsize, text = model.dtype.itemsize, model.config.get_text_config()
    samples, length, at_once = _text_size(config, inputs)
    stream = itemsize * samples * length * getattr(text, "hidden_size", 0)
    # Error feedback has the residual streams of both models; what the attention gives does not run again.
    feedback = config.fits and config.error_feedback > 0
    hidden = stream * (3 if feedback else 2) // processes
    # A loss takes logits in the model's dtype and twice in fp32, for few tokens at a time; where layers are offloaded,
    # the head runs on a whole sample.
    part, vocabulary = min(TOKENS_AT_ONCE, length), text.vocab_size if arch.causal else 0
    logits = vocabulary * ((length if offload else part) * itemsize + part * 2 * FP32)
    # Where layers go, error feedback refits all matrices but those of experts.
    others = arch.spaces if LAYER in widths and feedback else ()
    spaces = [s for s in arch.spaces if s.width_in(widths) < s.width or (s in others and s.experts is None)]
    matrices = _matrices(spaces, model)
    scores_by_gram = config.scored_by in CRITERIA.names() and CRITERIA.get(config.scored_by).needs_gram
    reads_gram = config.refit_reads_gram or scores_by_gram
    # The Gram matrix of all domains, that of one domain or else a factor, and copies of the weight; the tokens that
    # enter experts are kept until all are done.
    refits = [
        FP32 * size * (2 * size + 4 * rows if reads_gram else 2 * rows) + stream * expert
        for size, rows, expert in matrices
    ]
    refit = max(refits, default=0) + _activation_bytes(arch, model, at_once * length)
    working = max(logits, refit) + UNCOUNTED_BYTES
    weights, layers = itemsize * model.num_parameters(), [itemsize * number for number in arch.layer_params]
    if config.rounds > 1:  # what a round has masked keeps its dense values until the last one
        weights += itemsize * sum(size * rows for size, rows, _ in matrices)
    if offload is None:
        return Need(weights, hidden, working, 0)
    host = hidden + (sum(layers) if offload == "cpu" else max(layers))
    return Need(weights - sum(layers) + max(layers), 0, working, host)


def _text_size(config: StructPruneConfig, inputs: Mapping[str, Tensor] | None) -> tuple[int, int, int]:
    """The numbers of samples, of tokens in one, and of samples in a batch; of stored moments there are no samples."""
    count, length, domains = config.num_samples, config.seq_length, len(texts_of(config))
    if inputs is not None:
        given = given_domains(inputs, float(config.holdout), config.chooses)
        count, domains = sum(len(domain.samples) for domain in given), len(given)
        # What is no text has as many tokens as the model makes of it, which shapes do not say.
        length = max(samples.shape[1] if samples.ndim == 2 else 1 for samples in inputs.values())
    return (0, length, 0) if config.stats else (count, length, min(config.samples_at_once, ceil(count / domains)))


def _matrices(spaces: Sequence[Space], model: PreTrainedModel) -> list[tuple[int, int, bool]]:
    """The columns and rows of each consumer inside the layers, and whether it is one of several experts."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = []
    for space in spaces:
        for axis in space.consumers if space.inside else ():
            expert = axis.part is not None
            found.append((space.size * axis.per_unit, shapes[axis.param][(3 if expert else 1) - axis.dim], expert))
    return found


def _activation_bytes(arch: ArchSpec, model: PreTrainedModel, tokens: int) -> int:
    """The bytes of what a batch is in the widest layer; a token is in each expert that it goes to."""
    text = model.config.get_text_config()
    active = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k", None) or 1
    hidden = getattr(text, "hidden_size", 0)
    wide = [columns * (active if expert else 1) for columns, _, expert in _matrices(arch.spaces, model)]
    return model.dtype.itemsize * tokens * (WIDE * max([hidden, *wide]) + 2 * hidden)


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
    offload = "disk" if described.offloaded else None
    need = memory_need(config, described.arch, model, widths, inputs, offload, process_count())
    copy = 0 if inplace or described.offloaded else model.num_parameters() * model.dtype.itemsize
    lower_bound = int(need.above * (1 - ERROR)) + copy
    if free is not None and lower_bound > free:
        of_copy = f", beside a copy of the model, {readable_size(copy)}" if copy else ""
        advice = ["inplace=True"] * bool(copy) + ["--offload disk"] * (not described.offloaded)
        advice += ["a smaller num_samples or batch_size", "criterion='wanda' with refit='none'"]
        raise StructPruneError(
            f"Pruning takes at least {readable_size(lower_bound)} on {device} above the model "
            f"({readable_size(need.hidden)} of hidden states and {readable_size(need.working)} of working memory"
            f"{of_copy}), and {readable_size(free)} are free; what helps is {' or '.join(advice)}."
        )


def with_batch_size(data: CalibrationData, arch: ArchSpec, model: PreTrainedModel, widths: Widths) -> CalibrationData:
    """The data with a batch size that fits, where the config says `batch_size="auto"`.

    The estimate of the memory chooses where to begin, and a forward pass on the device says whether it fits; where it
    does not, accelerate's `find_executable_batch_size` tries smaller ones.
    """
    config = data.config
    if config.batch_size != AUTO:
        return data
    device = compute_device(model)
    free, base = free_bytes(device), cast("Any", model.base_model)
    samples = max((domain.samples for domain in data.domains), key=len)
    size = max(min(len(samples), MAX_BATCH_ON_CPU if device.type == "cpu" else MAX_BATCH), 1)
    offload = "disk" if is_offloaded(model) else None

    def estimate(batch_size: int) -> float:
        tried = replace(config, batch_size=batch_size)
        return memory_need(tried, arch, model, widths, None, offload, process_count()).above * (1 + ERROR)

    while size > 1 and free is not None and estimate(size) > free:
        size //= 2

    @torch.no_grad()
    def attempt(batch_size: int) -> int:
        with evaluating(model):
            run_model(base, samples[:batch_size])
        return batch_size

    try:
        if device.type != "cpu" and data.statistics is None:  # else no error says that a batch is too large
            size = find_executable_batch_size(attempt, starting_batch_size=size)()
    except RuntimeError as error:
        room = "" if free is None else f" in {readable_size(free)}"
        one = f"sample of {samples.shape[1]} tokens" if samples.ndim == 2 else "image"
        raise StructPruneError(
            f"batch_size='auto' found no batch that {device} has room for{room}: one {one} is too much already. "
            "Choose a smaller seq_length, or --offload cpu or disk."
        ) from error
    return replace(data, batch_size=size)
