"""Running a model and watching it run: hooks, calls of single layers, perplexity. It knows nothing of pruning."""
