"""How good and how fast a model is: perplexity by domain, closeness to the dense model, answers, speed."""
