"""Models that look quantized, with stand-ins for layers and quantizers of libraries that are not installed."""

import torch
from models import build
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Packed(nn.Linear):
    """Stand in for the layer of a quantization library."""


class Quantizer(HfQuantizer):
    """Stand in for a quantizer that cannot dequantize a model."""

    requires_calibration = False
    is_trainable = False

    def __init__(self):
        self.quantization_config = QuantizationConfigMixin("gptq")

    def is_serializable(self):
        return True


class Reversible(Quantizer):
    """Stand in for a quantizer that can dequantize a model."""

    def _dequantize(self, model, dtype=None):
        for module in model.modules():
            if isinstance(module, Packed):
                module.__class__ = nn.Linear
        return model.to(dtype)


def quantized(quantizer, model=None):
    """Return a model that looks quantized by a quantizer."""
    if model is None:
        model = build("llama-tied")
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Packed

    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.config.quantization_config = quantizer.quantization_config
    model.config.dtype = torch.float32
    return model
