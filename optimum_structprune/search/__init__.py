"""Widths that follow from measurements: losses of single layers, and shapes."""
