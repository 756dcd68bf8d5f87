"""What a user may set about training a transformer, and how the rest is filled in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from varcli import config as configs
from varcli.distributed.parallelize import MODES
from varcli.errors import ConfigError, unknown_name
from varcli.training.loop import LoopConfig
from varcli.training.muon import OPTIMIZERS
from varcli.training.recipes import choose_recipe
from varcli.training.run import keep_stored
from varcli.training.schedules import Schedule, find_shape
from varcli.transformer import TransformerConfig

_FEW_IMAGES = 100_000  # below it a model can overfit, so the best weights are kept

_RANGES = (
    ("label_dropout", 0, 1),
    ("label_smoothing", 0, 0.99),
    ("dropout", 0, 0.99),
    ("drop_path", 0, 0.99),
    ("ema_decay", 0, 0.999999),
    ("weight_decay", 0, 1e6),
    ("final_weight_decay", 0, 1e6),
    ("learning_rate", 0, 1e3),
    ("epochs", 0, 1e6),
    ("mlp_ratio", 0, 64),
    ("warmup_steps", 0, 1e9),
    ("seed", 0, 2**63 - 1),
)
"""What numbers may be, both ends included."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a transformer is trained. What is None is chosen: by the recipe of this depth, the data or the device."""

    depth: int = 16  # blocks; sets width, heads and recipe
    width: int | None = None  # channels of the residual stream; None is 64 * depth
    num_heads: int | None = None  # attention heads; None is one for 64 channels
    mlp_ratio: float = 4.0  # hidden channels of the feed-forward layers over width
    shared_adaln: bool | None = None  # one modulation layer for all blocks instead of one each
    steps: int | None = None  # optimizer steps of the whole run; wins over epochs
    epochs: float | None = None  # passes over the images
    batch_size: int | None = None  # images an optimizer step
    micro_batch_size: int | None = None  # images at once, gradients added up to a batch; None is what fits in memory
    optimizer: str = "adamw"  # or muon: of the blocks' matrices, with AdamW for the rest, at the same learning rate
    learning_rate: float | None = None  # peak
    warmup_steps: int | None = None  # optimizer steps of linear rise
    schedule: str | None = None  # lin0, lin, lin00, cos, exp, constant or lin<share>
    final_learning_rate: float | None = None  # share of the peak at the end
    weight_decay: float | None = None  # at the start
    final_weight_decay: float | None = None  # at the end, reached along a cosine
    grad_clip: float | None = 2.0  # largest global gradient norm; None turns clipping off
    label_dropout: float = 0.1  # chance that an image's class is hidden, which guidance needs
    label_smoothing: float = 0.0  # share of the target spread over all codes
    dropout: float | None = None  # on attention and feed-forward outputs
    drop_path: float | None = None  # chance to skip a branch of the last block; None is 0.1 * depth / 24
    ema_decay: float | None = None  # of the averaged weights that are sampled from; 0 turns the average off
    ema_decays: tuple[float, ...] = ()  # of further averages, which are kept and validated beside that one
    best_average: bool = False  # sample from the average with the lowest validation loss, not from ema_decay's
    frozen: tuple[str, ...] = ()  # parts that stay as --init-from gave them: classes, embeddings, blocks[:1-8], head
    keep_best: bool | None = None  # sample from the weights of the best validation; None is where images are few
    seed: int = 0  # of weights, order, dropouts
    precision: str = "auto"  # auto, fp32, bf16 or fp16; auto is bf16 on CUDA and fp32 elsewhere
    compile: bool | None = None  # torch.compile; None is on CUDA when the run is long enough to gain
    # auto, torch or triton (attention and passes of our own between products); auto is triton on CUDA, but for cuda_graphs
    kernels: str = "auto"
    fp8: bool = False  # the four large products of each block in FP8, beside bf16
    # of several processes: ddp, fsdp, hsdp; auto is ddp where the state fits one device, else fsdp
    parallel: str = "auto"
    cuda_graphs: bool = False  # replay each step's kernels in one launch: faster for small models, takes more memory
    log_every: int | None = None  # steps between log lines
    validate_every: int | None = None  # steps between validations; 0 is never
    validation_images: int | None = 10_000  # validation images looked at each time; None is all
    sample_every: int | None = None  # steps between sample grids; 0 is never
    eval_every: int = 0  # steps between evaluations of samples, as `varcli eval` measures them; 0 is never
    eval_samples: int = 500  # images drawn for each of them
    save_every: int | None = None  # steps between checkpoints
    save_minutes: float = 10.0  # minutes between checkpoints, if that is sooner
    keep_checkpoints: int = 2  # newest ones that stay
    tensorboard: bool = True  # write TensorBoard's files if it is installed

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "micro_batch_size",
            "log_every",
            "save_every",
            "width",
            "num_heads",
            "validation_images",
            "eval_samples",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, but is {value}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} must be from {low:g} to {high:g}, but is {value:g}")
        for decay in self.ema_decays:
            if not 0 < decay <= 0.999999:
                raise ConfigError(f"ema_decays must be above 0 and at most 0.999999, but one is {decay:g}")
        for name in ("learning_rate", "epochs", "mlp_ratio"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, but is {value:g}")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ConfigError(f"grad_clip must be above 0, but is {self.grad_clip}", "none turns clipping off")
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule is not None:
            find_shape(self.schedule)
        if self.parallel not in ("auto", *MODES):
            raise unknown_name("parallel mode", self.parallel, ("auto", *MODES))

    def transformer(self, **data: Any) -> TransformerConfig:
        """The architecture for data of these step_lengths, vocab_size, code_channels and num_classes."""
        width = self.width or 64 * self.depth
        changes = {
            "width": width,
            "num_heads": self.num_heads or max(1, width // 64),
            "mlp_ratio": self.mlp_ratio,
            "shared_adaln": bool(self.shared_adaln),
            "dropout": self.dropout or 0.0,
        }
        if self.drop_path is not None:
            changes["drop_path"] = self.drop_path
        return TransformerConfig.from_depth(self.depth, **changes, **data)

    @property
    def all_ema_decays(self) -> tuple[float, ...]:
        """Decays of all averages of a resolved config, the one that is sampled from first."""
        return (self.ema_decay, *self.ema_decays) if self.ema_decay else ()

    def optimizer_schedule(self) -> Schedule:
        """Learning rate and weight decay of a resolved config, step by step."""
        return Schedule(
            total_steps=self.steps,
            learning_rate=self.learning_rate,
            shape=self.schedule,
            warmup_steps=self.warmup_steps,
            final=self.final_learning_rate,
            weight_decay=self.weight_decay,
            final_weight_decay=self.final_weight_decay,
        )

    def loop(self) -> LoopConfig:
        """The loop's part of a resolved config."""
        names = {field.name for field in dataclasses.fields(LoopConfig)}
        return LoopConfig(**{name: getattr(self, name) for name in names})


FREE = LoopConfig.FREE | {
    "epochs",
    "micro_batch_size",
    "compile",
    "kernels",
    "fp8",
    "parallel",
    "cuda_graphs",
    "validation_images",
    "eval_samples",
    "best_average",
}
"""Settings that a resumed run may change: they decide when and how, not what."""


def resolve(
    config: TrainConfig,
    *,
    num_images: int,
    has_validation: bool,
    device_type: str,
    precision: str,
    stored: Mapping[str, Any] | None = None,
    given: Collection[str] | None = None,
) -> TrainConfig:
    """Fill in what `config` leaves open; only micro_batch_size and compile may stay None.

    stored: the config a resumed run was begun with: what is open now is what it was then. given: names of settings that
    are not open; None takes those that differ from the defaults. Raises ConfigError if the result does not fit together.
    """
    fixed = configs.changed(config) if given is None else set(given)
    config = keep_stored(config, stored, fixed | ({"steps"} if "epochs" in fixed else set()))
    recipe = choose_recipe(config.depth, device_type)
    batch_size = config.batch_size or (
        min(recipe.batch_size, num_images) if recipe.max_steps is not None else recipe.batch_size
    )
    steps = config.steps or recipe.steps(num_images, batch_size, config.epochs)
    filled = {
        "batch_size": batch_size,
        "steps": steps,
        "learning_rate": recipe.learning_rate(batch_size),
        "warmup_steps": math.ceil(steps * recipe.warmup) if steps > 1 else 0,
        "schedule": recipe.schedule,
        "final_learning_rate": recipe.final_learning_rate,
        "weight_decay": recipe.weight_decay,
        "final_weight_decay": recipe.final_weight_decay if config.weight_decay is None else config.weight_decay,
        "dropout": recipe.dropout,
        "ema_decay": recipe.ema_decay,
        "shared_adaln": recipe.shared_adaln,
        "keep_best": has_validation and num_images < _FEW_IMAGES,
        "log_every": 50 if device_type == "cuda" else 10,
        "validate_every": max(50, steps // 20) if has_validation else 0,
        "sample_every": max(100, steps // 10),
        "save_every": 1000,
    }
    changes = {name: value for name, value in filled.items() if getattr(config, name) is None}
    resolved = configs.replace(
        config, {**changes, "precision": precision if config.precision == "auto" else config.precision}
    )
    if "warmup_steps" not in changes and "warmup_steps" not in fixed and resolved.warmup_steps > resolved.steps:
        raise ConfigError(
            f"the run was begun with a warm-up of {resolved.warmup_steps:,} steps, but {resolved.steps:,} steps are asked for",
            "ask for more steps, or give another warm-up: --set warmup_steps=N",
        )
    if resolved.keep_best and not has_validation:
        raise ConfigError("keep_best needs a validation split, but the codes cache has none", "give the images a val/")
    _check_averages(resolved, has_validation)
    resolved.optimizer_schedule(), resolved.loop()
    return resolved


def _check_averages(config: TrainConfig, has_validation: bool) -> None:
    """Raise ConfigError for averages that make no sense together, or cannot be compared."""
    decays = config.all_ema_decays
    if config.ema_decays and not config.ema_decay:
        raise ConfigError("ema_decays are further ones, but ema_decay is 0", f"set ema_decay={config.ema_decays[0]:g}")
    if len(set(decays)) < len(decays):
        raise ConfigError(f"ema_decay and ema_decays name a decay twice: {', '.join(map(str, decays))}")
    if config.best_average and not (has_validation and config.validate_every and len(decays) > 1):
        raise ConfigError(
            "best_average compares averages by their validation loss, but there is one average or no validation",
            "set ema_decays, give the images a val/, or leave it out",
        )
