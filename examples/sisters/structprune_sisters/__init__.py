"""Pruning methods of other papers, for comparisons. The import registers all of them in optimum-structprune."""

from . import flap, gates, gradients, iterative_norm, slimllm


__all__ = ["flap", "gates", "gradients", "iterative_norm", "slimllm"]
