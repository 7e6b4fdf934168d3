"""Calibration text: from sources to samples of equal length, and the record of what was read."""
