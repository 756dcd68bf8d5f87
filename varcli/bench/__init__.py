"""Rates of each stage beside the device's own ceiling."""
