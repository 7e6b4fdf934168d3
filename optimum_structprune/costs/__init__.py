"""The memory that a pruning needs, the memory that there is, and the batch that fits."""
