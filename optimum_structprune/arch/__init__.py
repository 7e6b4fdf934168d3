"""Describe architectures as data: the removable dimensions of each model, and the smaller config.

Every folder but `config` may import it.
"""
