"""Estimate the memory of a pruning from shapes alone, and refuse a pruning that cannot fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arch.devices import rows_at_once
from ..arch.spec import EXPERT, LAYER, VOCAB
from ..config.pruning import StructPruneConfig
from ..criteria import reads_gram
from ..record.cost import Cost, check_fits
from ..system.errors import StructPruneError
from ..system.placement import bytes_by_device
from ..system.processes import process_count


if TYPE_CHECKING:
    from .request import PruningRequest


# Memory that no term counts, such as the buffers of kernels. It hardly depends on the model.
UNCOUNTED_BYTES = 60 * 10**6
# The number of tokens whose logits a CPU holds at a time.
LOGIT_TOKENS = 128


def pruning_cost(request: PruningRequest, offload: str | None = None) -> Cost:
    """Estimate the memory of a pruning without its recovery.

    Args:
        request: The resolved request.
        offload: The place of layers between their calls, "cpu" or "disk", or None for the device.
    """
    config = request.config
    info = request.model_info
    layers = info.arch.layer_params
    itemsize = info.plain_model.dtype.itemsize
    text = info.plain_model.config.get_text_config()
    if offload is None and info.offloaded:
        offload = "disk"

    # A custom config may lack the field.
    channels = getattr(text, "hidden_size", 0)
    vocabulary = 0
    if info.arch.causal:
        vocabulary = text.vocab_size
    tokens = config.num_samples * config.seq_length
    if request.inputs is not None:
        tokens = sum(rows.shape[:2].numel() for rows in request.inputs.values())

    weights = info.plain_model.num_parameters()
    largest_layer = max(layers, default=0)
    hidden = 0
    if set(request.widths) != {VOCAB}:
        hidden = _passes(config) * channels * tokens // process_count()
    host = 0
    if offload is not None:
        # The device holds one layer at a time.
        weights += largest_layer - sum(layers)
        host = hidden + largest_layer
        hidden = 0
    if offload == "cpu":
        host += sum(layers) - largest_layer

    batch_tokens = min(request.options.batch_size * config.seq_length, tokens)
    widest = max(_inputs(request, pruned=False), default=0)
    inputs = max(_inputs(request), default=0)
    activations = itemsize * batch_tokens * (3 * widest + 2 * channels)
    # Two copies of the weight of a consumer, of its targets and of its Gram matrix, in fp32.
    refit = activations + 16 * inputs * channels
    if reads_gram(config):
        refit += 8 * inputs**2
    if any(space.experts is not None for space in info.arch.spaces):
        # The inputs and the targets of the experts of a layer.
        refit += (itemsize + 4) * tokens * channels
    logits = vocabulary * rows_at_once(info.device, 4 * vocabulary, LOGIT_TOKENS) * (itemsize + 8)
    layer = 0
    if info.device.type == "cpu":
        # The original and the pruned layer are in memory together. A GPU cuts layers in CPU memory.
        layer = itemsize * largest_layer

    memory = {
        "weights": itemsize * weights,
        "hidden states": itemsize * hidden,
        "working memory": UNCOUNTED_BYTES + max(activations, refit, logits, layer),
    }
    return Cost(memory, itemsize * host)


def _inputs(request: PruningRequest, pruned: bool = True) -> list[int]:
    """Return the number of inputs of each consumer inside the layers, or only of those that a refit may change."""
    widths = request.widths
    # A refit of the remaining layers and experts compensates for the removed ones.
    changes_all = not pruned or LAYER in widths or EXPERT in widths
    inputs = []
    for space in request.model_info.arch.spaces:
        if space.inside and (changes_all or space.width_in(widths) < space.width):
            inputs += [space.size * axis.per_unit for axis in space.consumers]
    return inputs


def _passes(config: StructPruneConfig) -> int:
    """Return how often the layers read the calibration text: calibrated, pruned and, for error feedback, original.

    The hidden states of each are in memory: those of the pruned and the original layers, and the outputs of attention.
    """
    if config.feedback_share:
        return 3
    return 2


def check_memory(request: PruningRequest, inplace: bool) -> None:
    """Raise `StructPruneError` if a pruning needs more memory than a device has free.

    Each device of a spread model holds the hidden states in turn, and its part of a copy.
    """
    info = request.model_info
    if info.offloaded and not inplace:
        raise StructPruneError(
            f"{info.name} is offloaded, and a copy of it would need as much memory again. Pass `inplace=True`."
        )

    memory = dict(pruning_cost(request).memory)
    by_device = {info.device: memory.pop("weights")}
    if not info.offloaded:
        by_device = bytes_by_device(info.plain_model) or by_device

    advice = "a smaller `num_samples` or `batch_size`, `--offload disk`, or criterion='wanda' with refit='none'"
    if not inplace:
        advice = f"`inplace=True`, {advice}"
    for device, size in by_device.items():
        # If the model itself is pruned, a recovery learns from a copy of it.
        if not inplace or request.config.recovery is not None:
            memory["a copy of the model"] = size
        check_fits("Pruning", memory, device, f"Use {advice}.")
