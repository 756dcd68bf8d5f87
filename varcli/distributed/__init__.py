"""Several processes on one job: who is there, what they exchange, and how a model is spread over them."""

from varcli.distributed.context import ALONE, World, join_world

__all__ = ["ALONE", "World", "join_world"]
