"""varcli: train, sample and evaluate visual autoregressive models (next-scale prediction)."""

__version__ = "0.1.0"
