"""Arithmetic and laws of size: numbers about models, without the models."""
