"""Moments of activations: how they are gathered, summed up and stored."""
