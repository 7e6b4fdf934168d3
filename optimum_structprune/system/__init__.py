"""What lies below the models: processes, weights that are held elsewhere, and hashes."""
