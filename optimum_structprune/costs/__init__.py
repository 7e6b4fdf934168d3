"""What a pruning needs before it begins: memory, arithmetic, bytes, time, and on which machine."""
