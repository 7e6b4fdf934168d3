"""Methods of others beside those of optimum-structprune, to compare with; importing this registers them all."""

from . import gates, gradients, iterative_norm, slimllm


__all__ = ["gates", "gradients", "iterative_norm", "slimllm"]
