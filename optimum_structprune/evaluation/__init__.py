"""Measurement of a model: perplexity by domain, divergence from the dense model, answers, and speed."""
