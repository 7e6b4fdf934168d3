"""Read the text of a run, and compute the activations of a model on it, also for offloaded layers."""
