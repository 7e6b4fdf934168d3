"""Methods of others beside those of optimum-structprune, to compare with; importing this registers them all."""

from . import flap, gates, gradients, iterative_norm, slimllm


__all__ = ["flap", "gates", "gradients", "iterative_norm", "slimllm"]
