"""Serves what lies below the models: processes, folders on the disk, weights that are held elsewhere, and hashes."""
