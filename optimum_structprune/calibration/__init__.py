"""Moments of activations: how they are gathered, brought together over the domains, and stored."""
