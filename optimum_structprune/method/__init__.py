"""The method: calibrate, score, choose, refit and shrink, one layer after the other. `loop.py` is where it begins."""
