"""The method: calibrate, score, choose, refit and shrink, one layer after the other. Start reading at `loop.py`."""
