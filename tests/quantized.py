"""Models that look quantized: stand-ins for the layers and the quantizers of libraries that are not installed."""

import torch
from models import build
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Packed(nn.Linear):
    """Stands in for the layer of a quantization library."""


class Quantizer(HfQuantizer):
    """Stands in for a quantizer that cannot go back."""

    requires_calibration = False
    is_trainable = False

    def __init__(self):
        self.quantization_config = QuantizationConfigMixin("gptq")

    def is_serializable(self):
        return True


class Reversible(Quantizer):
    """One that can."""

    def _dequantize(self, model, dtype=None):
        for module in model.modules():
            if isinstance(module, Packed):
                module.__class__ = nn.Linear
        return model.to(dtype)


def quantized(quantizer, model=None):
    model = build("llama-tied") if model is None else model
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Packed
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.config.quantization_config = quantizer.quantization_config
    model.config.dtype = torch.float32
    return model
