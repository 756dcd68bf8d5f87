"""Training: one loop for every trainer, recipes, checkpoints, and the two trainers."""

from varcli.training.settings import TrainConfig
from varcli.training.transformer import TrainResult, train_transformer

__all__ = ["TrainConfig", "TrainResult", "train_transformer"]
