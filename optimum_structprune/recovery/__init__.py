"""Training after pruning: an adapter, all weights, or scales, with or without a teacher."""
