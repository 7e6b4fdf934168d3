"""One pruning run: its checks, its measurements, its steps. What stands at the root calls it."""
