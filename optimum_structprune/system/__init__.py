"""Serves what lies below the models: processes, folders on the disk, offloaded weights, and hashes."""
