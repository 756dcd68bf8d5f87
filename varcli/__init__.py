"""varcli: train, sample and evaluate visual autoregressive models (next-scale prediction)."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Import `Generator` when it is asked for, so that `import varcli` stays light."""
    if name == "Generator":
        from varcli.sampling import Generator

        return Generator
    raise AttributeError(f"module `varcli` has no attribute `{name}`")
