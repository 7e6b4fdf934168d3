"""Calibration: text from several domains, and the statistics of what it does inside the model."""
