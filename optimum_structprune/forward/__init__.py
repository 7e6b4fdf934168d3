"""Measure a model on text: losses, perplexity, generation and its cache. This folder does not depend on pruning."""
