"""Widths that follow from measurements: losses of single layers, shapes, rounds with masks."""
