"""What a run, a training and a measurement say: the numbers, one table of them, and their text."""
