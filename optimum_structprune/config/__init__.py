"""Configs: strict dataclasses of plain values. The folder imports only errors and the registry."""
