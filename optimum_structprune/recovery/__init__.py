"""Training after pruning: LoRA, with or without a teacher. The stage before it is any pruned model."""
