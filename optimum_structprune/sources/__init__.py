"""Reads the text of a run, and gives the activations of a model on it, wherever its layers are."""
