"""Measure models on text: the loss, the divergence from another model, and vectors."""
