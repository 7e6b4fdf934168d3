"""Training after pruning: an adapter or all weights, with or without a teacher."""
