"""The peak memory of a pruning: an estimate from shapes alone, and a check against the free memory of the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

import torch

from ..arch.spec import EXPERT, LAYER, MODEL, VOCAB
from ..criteria import reads_gram
from ..domains.load import MEASURED_TOKENS, texts_of
from ..errors import StructPruneError
from ..measure.predictions import TOKENS_PER_PASS, tokens_at_once
from ..measure.probe import PROBE_TOKENS, STRIDE
from ..method.calibrate import FP64_BYTES, TOKENS_AT_ONCE, Moments
from ..method.devices import free_bytes, rows_at_once
from ..system.placement import bytes_by_device
from ..system.processes import process_count
from ..system.stages import readable_size


if TYPE_CHECKING:
    from .request import PruningRequest


FP32_BYTES = 4
# Memory that the estimate leaves out. Measurements gave this size for small and large models alike.
UNCOUNTED_BYTES = 60 * 10**6
# The relative error of the estimated memory above the model's weights, in both directions; see docs/scaling.md.
RELATIVE_ERROR = 0.15


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak memory of one process, in bytes."""

    weights: int  # on the compute device; of offloaded layers, the largest layer alone
    hidden: int  # hidden states on the device, and the dense logits that trials are compared with
    working: int  # the largest step, on top of the weights and the hidden states
    host: int  # CPU memory of a model that is offloaded

    @property
    def above(self) -> int:
        """Return the bytes on the compute device on top of the model's weights."""
        return self.hidden + self.working

    def __str__(self) -> str:
        """Return the sizes as a table."""
        from ..record.table import aligned

        sizes = {
            "on the device": self.weights + self.above,
            "  weights": self.weights,
            "  hidden states": self.hidden,
            "  working memory": self.working,
            "in CPU memory": self.host,
        }
        return aligned([(label, readable_size(size)) for label, size in sizes.items()])


@dataclass(frozen=True)
class CalibrationSize:
    """The size of the calibration text: the number of samples and domains, and the tokens in a sample."""

    samples: int
    seq_length: int
    domains: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens in all samples."""
        return self.samples * self.seq_length

    @classmethod
    def of(cls, request: PruningRequest) -> CalibrationSize:
        """Return the size of the calibration text of a request, or of its `inputs`."""
        config = request.config
        if request.inputs is None:
            return cls(config.num_samples, config.seq_length, len(texts_of(config)))

        from ..domains.load import given_domains

        has_probe = config.allocation != "uniform"
        samples = [domain.samples for domain in given_domains(request.inputs, config.holdout, has_probe)]

        # The number of tokens of an image depends on the model and cannot be read from the shape of the image.
        seq_length = max((rows.shape[1] for rows in samples if rows.ndim == 2), default=1)
        num_samples = sum(len(rows) for rows in samples)
        return cls(num_samples, seq_length, len(request.inputs))


def estimate_memory(request: PruningRequest, offload: str | None = None) -> MemoryEstimate:
    """Estimate the peak memory of each process of a pruning.

    Args:
        request: The resolved request.
        offload: Where layers are kept between their steps, "cpu" or "disk". None keeps them on the device. A model
            that is offloaded already counts as "disk".
    """
    model = request.model_info.plain_model
    itemsize = model.dtype.itemsize
    if request.model_info.offloaded:
        offload = "disk"

    size = CalibrationSize.of(request)
    hidden_states = _hidden_state_values(request, size)
    hidden = _trial_logit_values(request)
    if offload is None:
        hidden += hidden_states

    samples_at_once = min(request.options.batch_size, ceil(size.samples / size.domains))
    batch_tokens = samples_at_once * size.seq_length
    working = max(
        _loss_bytes(request, size, is_offloaded=offload is not None),
        _activation_bytes(request, batch_tokens),
        _measuring_bytes(request, size),
        _shrink_bytes(request),
        _refit_bytes(request, size, batch_tokens),
        _expert_bytes(request, size, batch_tokens),
    )
    if offload is None and _tries_divisions(request):
        # The text of a trial has fewer hidden states than the text of the run.
        working = max(working, _trial_bytes(request, size, batch_tokens) - itemsize * hidden)

    return MemoryEstimate(
        weights=itemsize * _weight_values(request, offload),
        hidden=itemsize * hidden,
        working=working + UNCOUNTED_BYTES,
        host=itemsize * _host_values(request, offload, hidden_states),
    )


def check_memory(request: PruningRequest, inplace: bool) -> None:
    """Raise `StructPruneError` if a pruning needs more memory than its devices have free.

    The hidden states of all samples move with the layers, so each device of a spread model must hold them. A copy of
    the model has its weights on the same devices. The check uses the lower end of the estimate, so that it accepts
    every pruning that may fit.
    """
    info = request.model_info
    if info.offloaded and not inplace:
        raise StructPruneError(
            f"{info.name} is offloaded, and a copy of it would need as much memory again. Pass `inplace=True`."
        )

    estimate = estimate_memory(request)
    pruning_bytes = int(estimate.above * (1 - RELATIVE_ERROR))
    # If the model itself is pruned, recovery learns from a copy of the dense model.
    has_copy = not inplace or request.config.recovery is not None

    for device, weight_bytes in _weights_by_device(request).items():
        required = pruning_bytes
        copy_bytes = 0
        if has_copy:
            copy_bytes = weight_bytes
            required += weight_bytes

        available = free_bytes(device)
        if available is None or required <= available:
            continue

        advice = " or ".join(_advice(request, estimate, device, can_prune_in_place=not inplace))
        raise StructPruneError(
            f"Pruning takes at least {readable_size(required)} on {device} on top of the model (hidden states "
            f"{readable_size(estimate.hidden)}, working memory {readable_size(estimate.working)}, a copy of the model "
            f"{readable_size(copy_bytes)}), and {readable_size(available)} are free. Use {advice}."
        )


def _weights_by_device(request: PruningRequest) -> dict[torch.device, int]:
    """Return the bytes of the weights on each device. Only a model in memory can be on several devices."""
    info = request.model_info
    if not info.offloaded:
        sizes = bytes_by_device(info.plain_model)
        if sizes:
            return sizes
    return {info.device: info.plain_model.dtype.itemsize * info.plain_model.num_parameters()}


def _advice(
    request: PruningRequest, estimate: MemoryEstimate, device: torch.device, can_prune_in_place: bool
) -> list[str]:
    """List settings that take less memory."""
    config = request.config
    options = request.options
    suggestions = []
    if can_prune_in_place:
        suggestions.append("inplace=True")

    if not request.model_info.offloaded:
        if device.type == "cpu":
            suggestions.append("--offload disk")
        else:
            suggestions.append("--offload cpu or disk")

    if estimate.hidden:
        suggestions.append(f"num_samples below {config.num_samples}")
    if options.batch_size > 1:
        suggestions.append(f"batch_size below {options.batch_size}")
    if config.refit == "least_squares":
        suggestions.append("criterion='wanda' with refit='none', which take no Gram matrix")
    return suggestions or ["a device with more memory"]


def _tries_divisions(request: PruningRequest) -> bool:
    """Return whether divisions of a budget between tokens and layers may be tried; see `steps.division`."""
    if request.config.budget is None or VOCAB not in request.widths:
        return False

    arch = request.model_info.arch
    spaces = [arch.of(name)[0] for name in request.widths if name != VOCAB]
    return bool(spaces) and all(space.inside and space.layer != MODEL for space in spaces)


def _trial_bytes(request: PruningRequest, size: CalibrationSize, batch_tokens: int) -> int:
    """Return the bytes of a trial on top of the dense model.

    They are the hidden states, the kept token rows, the dense values of masked consumers, and the larger of a refit
    and a forward pass over held-out text.
    """
    from ..steps.division import CALIBRATION_TOKENS  # most runs try no division

    per_domain = max(CALIBRATION_TOKENS // size.domains // size.seq_length, 1)
    trial_size = replace(size, samples=min(per_domain * size.domains, size.samples))
    values = _hidden_state_values(request, trial_size)

    tokens = request.model_info.arch.of(VOCAB)[0]
    number = tokens.size
    if request.tokens is not None and request.tokens.budget is not None:
        number = request.tokens.budget.candidates[-1]
    values += number * tokens.unit_params
    if request.config.rounds == 1:
        # With more rounds, their dense values count as weights already.
        values += _channels(request) * sum(inputs for inputs, _ in refitted_consumers(request))

    itemsize = request.model_info.plain_model.dtype.itemsize
    working = max(
        _refit_bytes(request, trial_size, batch_tokens),
        _activation_bytes(request, _measured_tokens(request, size)),
        _loss_bytes(request, trial_size, is_offloaded=False),
    )
    return itemsize * values + working


def _channels(request: PruningRequest) -> int:
    # A custom config may lack the field.
    return getattr(request.model_info.plain_model.config.get_text_config(), "hidden_size", 0)


def _vocabulary(request: PruningRequest) -> int:
    if not request.model_info.arch.causal:
        return 0
    return request.model_info.plain_model.config.get_text_config().vocab_size


def _weight_values(request: PruningRequest, offload: str | None) -> int:
    """Count the weights on the device. Only one offloaded layer is there at a time."""
    info = request.model_info
    layers = info.arch.layer_params

    count = info.plain_model.num_parameters()
    if offload is not None:
        count += max(layers) - sum(layers)
    if request.config.rounds > 1:
        # Masked consumers keep their dense values until the last round.
        count += _channels(request) * sum(size for size, _ in refitted_consumers(request))
    return count


def _hidden_state_values(request: PruningRequest, size: CalibrationSize) -> int:
    """Count the hidden states of one process's samples.

    They are the hidden states of the pruned model, the cached outputs of a layer's attention, and, with error
    feedback, the hidden states of the dense model.
    """
    copies = 2
    if request.config.feedback_share:
        copies += 1
    return _channels(request) * size.tokens * copies // process_count()


def _trial_logit_values(request: PruningRequest) -> int:
    """Count the dense logits of the trials that choose the widths of layers."""
    if request.config.allocation == "uniform":
        return 0
    return _vocabulary(request) * PROBE_TOKENS // STRIDE


def _host_values(request: PruningRequest, offload: str | None, hidden_states: int) -> int:
    """Count the values in CPU memory: hidden states, and all layers or, with offloading to disk, the largest layer."""
    if offload is None:
        return 0

    layers = request.model_info.arch.layer_params
    if offload == "cpu":
        return hidden_states + sum(layers)
    return hidden_states + max(layers)


def _loss_bytes(request: PruningRequest, size: CalibrationSize, is_offloaded: bool) -> int:
    """Return the bytes of logits: once in the model's dtype, and twice in fp32 for a part of the tokens.

    The head of an offloaded model runs on a whole sample.
    """
    device = request.model_info.device
    pass_tokens = size.seq_length
    if device.type == "cuda":
        pass_tokens = max(pass_tokens, _measured_tokens(request, size))
    loss_tokens = min(tokens_at_once(device, _vocabulary(request)), pass_tokens)

    head_tokens = loss_tokens
    if is_offloaded:
        head_tokens = size.seq_length

    itemsize = request.model_info.plain_model.dtype.itemsize
    per_entry = head_tokens * itemsize + 2 * loss_tokens * FP32_BYTES
    return _vocabulary(request) * per_entry


def _measured_tokens(request: PruningRequest, size: CalibrationSize) -> int:
    """Return the number of held-out tokens in a forward pass; see `tokens_per_pass`."""
    info = request.model_info
    pass_tokens = rows_at_once(info.device, info.plain_model.dtype.itemsize * _vocabulary(request), TOKENS_PER_PASS)
    if request.inputs is None:
        return min(pass_tokens, MEASURED_TOKENS)

    # With `inputs` there is no further text to hold out.
    return min(pass_tokens, ceil(request.config.holdout * size.tokens))


def _measuring_bytes(request: PruningRequest, size: CalibrationSize) -> int:
    """Return the bytes of the activations of held-out text on a GPU, where a pass has more tokens than on a CPU."""
    if request.model_info.device.type != "cuda" or not _vocabulary(request):
        return 0
    return _activation_bytes(request, _measured_tokens(request, size))


def _activation_bytes(request: PruningRequest, batch_tokens: int) -> int:
    """Return the bytes of the largest activations of a batch: both factors of a gated product, and the product."""
    channels = _channels(request)
    widest = channels
    for space in request.model_info.arch.spaces:
        for axis in space.consumers:
            widest = max(widest, space.size * axis.per_unit)

    itemsize = request.model_info.plain_model.dtype.itemsize
    return itemsize * batch_tokens * (3 * widest + 2 * channels)


def _removed_bytes(request: PruningRequest) -> list[int]:
    """Return the bytes of the removed weights, by layer."""
    arch = request.model_info.arch
    itemsize = request.model_info.plain_model.dtype.itemsize
    sizes = [0] * arch.num_layers
    for space in arch.spaces:
        units = (space.width - space.width_in(request.widths)) * space.scale
        sizes[space.layer] += itemsize * units * space.unit_params
    return sizes


def _shrink_bytes(request: PruningRequest) -> int:
    """Return the bytes of the largest pruned layer, or 0 on a GPU, because pruned layers are made in CPU memory."""
    info = request.model_info
    if info.device.type != "cpu":
        return 0

    itemsize = info.plain_model.dtype.itemsize
    pairs = zip(info.arch.layer_params, _removed_bytes(request), strict=True)
    return max((itemsize * params - removed_bytes for params, removed_bytes in pairs), default=0)


def _refit_bytes(request: PruningRequest, size: CalibrationSize, batch_tokens: int) -> int:
    """Return the bytes of the largest refit: two sets of moments and two fp32 copies of the consumer.

    The moments of one domain and of the mixture are in memory together. Later, the Gram matrix and its factor are.
    """
    largest = 0
    for inputs, is_expert in set(refitted_consumers(request)):
        largest = max(largest, _consumer_bytes(request, size, batch_tokens, inputs, is_expert))
    return largest


def _consumer_bytes(
    request: PruningRequest, size: CalibrationSize, batch_tokens: int, inputs: int, is_expert: bool
) -> int:
    """Return the bytes of the refit of one consumer with `inputs` input components."""
    config = request.config
    info = request.model_info
    channels = _channels(request)

    outputs = 0
    if config.feedback_share and not is_expert:
        outputs = channels
    moments = Moments.empty(inputs, reads_gram(config), "meta", outputs).tensors().values()
    moment_bytes = sum(tensor.nbytes for tensor in moments)
    total = 2 * (moment_bytes + FP32_BYTES * inputs * channels)

    if info.device.type == "cuda":
        # A GPU converts a part of a batch to fp64 at a time.
        fp64_tokens = min(rows_at_once(info.device, FP64_BYTES * inputs, TOKENS_AT_ONCE), batch_tokens)
        total += FP64_BYTES * inputs * fp64_tokens
    if size.domains > 1:
        # The moments of the mixture are in memory while the next domain runs.
        total += _activation_bytes(request, batch_tokens)
    if is_expert:
        # The inputs of a layer's experts are kept until all experts are refitted.
        total += info.plain_model.dtype.itemsize * size.tokens * channels
    if is_expert and EXPERT in request.widths:
        total += _expert_refit_bytes(request, inputs, size.tokens)
    return total


def _expert_refit_bytes(request: PruningRequest, inputs: int, tokens: int) -> int:
    """Return the bytes that the refit of kept experts adds: targets, residuals and inputs, after the layer shrank."""
    info = request.model_info
    removed_bytes = _removed_bytes(request)

    total = FP32_BYTES * tokens * (2 * _channels(request) + inputs)
    total -= min((size for size in removed_bytes if size), default=0)
    if info.device.type == "cpu":
        # On a CPU, the original weights in the ridge term are copies.
        layer_bytes = info.plain_model.dtype.itemsize * max(info.arch.layer_params)
        total += (layer_bytes - max(removed_bytes)) // 3
    return total


def _expert_bytes(request: PruningRequest, size: CalibrationSize, batch_tokens: int) -> int:
    """Return the bytes of the inputs and targets of a layer's experts before experts are removed."""
    if EXPERT not in request.widths:
        return 0

    per_value = request.model_info.plain_model.dtype.itemsize
    if request.config.refit == "least_squares":
        per_value += FP32_BYTES
    return per_value * size.tokens * _channels(request) + _activation_bytes(request, batch_tokens)


def refitted_consumers(request: PruningRequest) -> list[tuple[int, bool]]:
    """List the refitted consumers as pairs of the number of input components and whether an expert holds it."""
    widths = request.widths
    refits_layers = bool(request.config.feedback_share) and LAYER in widths
    refits_experts = request.config.refit == "least_squares" and EXPERT in widths

    consumers = []
    for space in request.model_info.arch.spaces:
        if not space.inside:
            continue

        # A refit of the remaining layers and experts compensates for removed layers and experts.
        is_refitted = space.width_in(widths) < space.width
        if space.experts:
            is_refitted = is_refitted or refits_experts
        else:
            is_refitted = is_refitted or refits_layers

        if is_refitted:
            is_expert = space.experts is not None  # `experts` may be empty
            consumers += [(space.size * axis.per_unit, is_expert) for axis in space.consumers]
    return consumers
