"""The figures of a pruning, a training and an evaluation, and their printed form."""
