"""Weights of other implementations, both directions."""
