"""Architectures as data: which dimensions of which model can shrink, and the smaller config.

Every folder but `config` may import it.
"""
