"""Measurement of a model: perplexity by domain, divergence from the original model, answers, and speed."""
