"""Read calibration text from its sources into samples of equal length, and record the documents."""
