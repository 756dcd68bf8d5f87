"""How much, how fast and how long to train, by depth: the paper's recipes, and two presets for small models."""

from __future__ import annotations

from dataclasses import dataclass

from varcli.errors import ConfigError

_SMALLEST_PAPER_DEPTH = 12  # below it a preset decides


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of what a TrainConfig leaves open."""

    name: str  # for people
    batch_size: int  # images a step
    epochs: float  # passes over the images
    min_steps: int = 1  # optimizer steps, however few images there are
    max_steps: int | None = None  # optimizer steps, however many images there are
    base_learning_rate: float  # peak at 256 images a step
    batch_power: float = 1.0  # peak grows with (batch / 256) to this power
    warmup: float = 0.02  # share of the steps
    schedule: str = "lin0"  # a name of varcli.training.schedules
    final_learning_rate: float = 0.01  # share of the peak at the end
    weight_decay: float = 0.05  # at the start
    final_weight_decay: float = 0.05  # at the end
    dropout: float = 0.0  # on attention and feed-forward outputs
    ema_decay: float = 0.0  # of the averaged weights; 0 is none
    shared_adaln: bool = False  # one modulation layer for all blocks

    def learning_rate(self, batch_size: int) -> float:
        """Peak learning rate at `batch_size` images a step."""
        return self.base_learning_rate * (batch_size / 256) ** self.batch_power

    def steps(self, num_images: int, batch_size: int, epochs: float | None = None) -> int:
        """Optimizer steps for `num_images`; an epoch is the least number of batches that holds them all."""
        per_epoch = -(-num_images // batch_size)
        if epochs is not None:
            return max(1, round(epochs * per_epoch))
        steps = max(round(self.epochs * per_epoch), self.min_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)


PAPER_RECIPES: dict[int, Recipe] = {
    16: Recipe(name="d16", batch_size=768, epochs=200, base_learning_rate=1e-4, final_learning_rate=0.1),
    20: Recipe(name="d20", batch_size=768, epochs=250, base_learning_rate=1e-4, final_learning_rate=0.1),
    24: Recipe(name="d24", batch_size=768, epochs=350, base_learning_rate=8e-5),
    30: Recipe(name="d30", batch_size=1024, epochs=350, base_learning_rate=8e-5, final_weight_decay=0.08),
    36: Recipe(
        name="d36-s", batch_size=768, epochs=350, base_learning_rate=8e-5, final_weight_decay=0.08, shared_adaln=True
    ),
}
"""By depth. Source: VAR, arXiv:2404.02905, and its released training options; the gates' start is TransformerConfig's."""

PRESETS: dict[str, Recipe] = {
    "one GPU": Recipe(
        name="one GPU",
        batch_size=256,
        epochs=300,
        min_steps=2000,
        max_steps=20_000,
        base_learning_rate=1e-3,
        batch_power=0.5,
        warmup=0.05,
        dropout=0.1,
        ema_decay=0.999,
    ),
    "laptop": Recipe(
        name="laptop",
        batch_size=32,
        epochs=10,
        min_steps=200,
        max_steps=2000,
        base_learning_rate=6e-3,  # 1.5e-3 at 16 images: of 0.5, 1, 2 and 4e-3, 2e-3 was best after 150 steps at depth 4
        batch_power=0.5,
        warmup=0.05,
        dropout=0.05,
        ema_decay=0.99,
    ),
}
"""For models below the paper's sizes: our own; the laptop's learning rate was tried on emoji64, the rest was not."""


def choose_recipe(depth: int, device_type: str) -> Recipe:
    """Return the paper's recipe for the nearest smaller depth it has, or a preset for depths below 12."""
    if depth < 1:
        raise ConfigError(f"depth must be at least 1, but is {depth}")
    if depth < _SMALLEST_PAPER_DEPTH:
        return PRESETS["laptop" if device_type == "cpu" else "one GPU"]
    known = [entry for entry in PAPER_RECIPES if entry <= depth]
    return PAPER_RECIPES[max(known, default=min(PAPER_RECIPES))]
