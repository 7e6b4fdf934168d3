"""How good a model is: perplexity by domain, closeness to the dense model, tasks."""
