"""One pruning run: its checks, its evidence, its steps. The verbs at the root call it."""
