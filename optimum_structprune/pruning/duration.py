"""Estimate the time of a pruning, from the work of its stages and the measured speed of the device."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from ..config.domains import written_by_model
from ..config.pruning import StructPruneConfig
from ..criteria import reads_gram
from ..domains.load import texts_of, with_written_text
from ..method.devices import default_device, measured_throughput
from ..sources.unseen import CALIBRATION_PER_TOKEN, MAX_UNSEEN_TOKENS, MIN_TOKENS_READ
from ..system.stages import readable_time
from .memory import CalibrationSize, refitted_consumers


if TYPE_CHECKING:
    from .request import PruningRequest


# A forward pass reaches this share of the measured throughput of one matrix product.
EFFICIENCY = 0.65
# Writing a token takes this many times as long as reading it, because few tokens run at once.
WRITING_COST = 4
# Measuring a token takes this many times as long as reading it. The logits of a large vocabulary are expensive.
EVALUATION_COST = 2
# The original and the pruned model are measured.
MODELS = 2
# The dense layers, the layers that are calibrated, and the pruned layers read the calibration text.
CALIBRATION_PASSES = 3
CALIBRATION_PASSES_WITHOUT_FEEDBACK = 2
# A refit factorises a Gram matrix of n columns and solves for its weights, in about this many times n³ products.
REFIT_PRODUCTS = 2


@dataclass(frozen=True)
class TimeEstimate:
    """The estimated seconds of each stage of a pruning.

    Attributes:
        writing: The model writes calibration text and unseen text.
        calibration: The calibration text runs through the layers, and statistics are collected.
        refit: The remaining weights are refitted.
        evaluation: The original and the pruned model are measured.
        device: The kind of device whose speed was measured.
    """

    writing: float
    calibration: float
    refit: float
    evaluation: float
    device: str

    @property
    def total(self) -> float:
        """Return the seconds of all stages."""
        return self.writing + self.calibration + self.refit + self.evaluation

    def __str__(self) -> str:
        """Return the times as a table."""
        from ..record.table import aligned

        stages = {
            f"time on this {self.device}": self.total,
            "  writing text": self.writing,
            "  calibration": self.calibration,
            "  refit": self.refit,
            "  evaluation": self.evaluation,
        }
        return aligned([(label, readable_time(seconds)) for label, seconds in stages.items()])


def estimate_time(request: PruningRequest, throughput: float | None = None) -> TimeEstimate:
    """Estimate the time of a pruning in one process.

    The estimate counts multiply-adds. It leaves out the trials that choose tokens and the widths of single layers, and
    loading and saving.

    Args:
        request: The resolved request.
        throughput: The multiply-adds per second of a matrix product. By default they are measured on the device.
    """
    info = request.model_info
    config = request.config
    model = info.plain_model
    text = model.config.get_text_config()
    channels = getattr(text, "hidden_size", 0)

    size = CalibrationSize.of(request)
    parameters = model.num_parameters()
    layer_parameters = sum(info.arch.layer_params)
    generated_tokens = written_share(config) * (1 + config.holdout) * size.tokens
    measured_tokens = ceil(config.holdout * size.tokens)
    if info.arch.causal and request.inputs is None:
        unseen_tokens = min(MAX_UNSEEN_TOKENS, size.tokens // CALIBRATION_PER_TOKEN)
        measured_tokens += unseen_tokens
        if size.tokens >= MIN_TOKENS_READ:
            generated_tokens += unseen_tokens

    passes = CALIBRATION_PASSES_WITHOUT_FEEDBACK
    if config.feedback_share:
        passes = CALIBRATION_PASSES
    products_per_token = passes * layer_parameters
    refit_products = 0
    for inputs, _ in refitted_consumers(request):
        if reads_gram(config):
            products_per_token += inputs * (inputs + channels)
        if config.refit != "none":
            refit_products += REFIT_PRODUCTS * inputs**3

    device = info.device
    if device.type == "meta":
        device = default_device()
    if throughput is None:
        throughput = measured_throughput(device, model.dtype, channels or 512, 4 * (channels or 512))

    speed = EFFICIENCY * throughput
    return TimeEstimate(
        writing=WRITING_COST * generated_tokens * parameters / speed,
        calibration=config.rounds * size.tokens * products_per_token / speed,
        refit=config.rounds * refit_products / speed,
        evaluation=EVALUATION_COST * MODELS * measured_tokens * parameters / speed,
        device={"cuda": "GPU"}.get(device.type, device.type.upper()),
    )


def written_share(config: StructPruneConfig) -> float:
    """Return the share of the calibration text that the model writes."""
    texts = texts_of(with_written_text(config))
    generated = sum(text.weight for text in texts if written_by_model(text))
    return generated / sum(text.weight for text in texts)
