"""Processes, folders on the disk, offloaded weights, and hashes."""
