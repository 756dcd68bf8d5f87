"""Codes and pictures drawn from a trained transformer, step by step."""

from varcli.sampling.generator import Generator
from varcli.sampling.settings import SampleConfig

__all__ = ["Generator", "SampleConfig"]
