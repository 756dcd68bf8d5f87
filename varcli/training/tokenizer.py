"""Training the multi-scale tokenizer on images: the one call behind `varcli train-tokenizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from varcli import config as configs
from varcli.data.images import open_images, typical_side
from varcli.devices import precision_name, resolve_device, resolve_precision
from varcli.distributed import ALONE, World
from varcli.errors import DataError
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.store import KIND
from varcli.training.loop import LoopConfig, OnValidation, run_training
from varcli.training.parallel import share_batch
from varcli.training.pixels import Pixels, read_pixels
from varcli.training.run import keep_stored, open_run
from varcli.training.tokenizer_objective import TokenizerTrainConfig
from varcli.training.tokenizer_trainer import TokenizerTrainer

_FREE = LoopConfig.FREE - {"steps"} | {"lpips_weights"}  # a known file, wherever it lies


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainResult:
    """What a finished run came to."""

    folder: Path  # the run folder; the tokenizer itself is in its `tokenizer/`
    step: int  # optimizer steps done
    seconds: float  # spent training, over all resumptions
    validation: dict[str, Any] = field(default_factory=dict)  # the last one of this call


def train_tokenizer(
    images: Path,
    out: Path,
    config: TokenizerTrainConfig | None = None,
    *,
    device: str = "auto",
    resume: str = "auto",
    given: Collection[str] | None = None,
    on_step: OnStep = ignore,
    on_validation: OnValidation | None = None,
    world: World = ALONE,
) -> TokenizerTrainResult:
    """Train a tokenizer on a folder of images, into a run folder; go on with a run begun there.

    images: an image tree; a "val" split, if there is one, is held out and measured on. The tokenizer is written to
    `out/tokenizer` with each checkpoint. given: names of settings that a resumed run must have been begun with, None means
    those that are not at their defaults; it keeps the others. on_validation: called with the run folder after each
    validation, e.g. to draw what its log holds. world: processes that share each batch and all call this, each with a
    device of its own; the first one alone writes, tells and measures, and any number of them may go on with a run.
    Raises DataError for images that cannot be used or fewer than a batch, ConfigError for settings that differ from the
    run's, and what `run_training` raises.
    """
    config = config or TokenizerTrainConfig()
    fixed = configs.changed(config) if given is None else given
    where = resolve_device(device)
    tree = open_images(images, allow_single_class=True)
    names = list(tree.splits)
    on_step = on_step if world.is_first else ignore
    train = "train" if "train" in names else names[0]
    with open_run(out, resume, world) as run:
        config = keep_stored(config, run.config, fixed)
        share_batch(config.batch_size, world)  # raises before anything is read or written
        architecture = config.tokenizer or TokenizerConfig.for_side(typical_side(tree.root, tree.splits[train]))
        precision = precision_name(resolve_precision(config.precision, where))
        config = replace(config, tokenizer=architecture, precision=precision)
        listing = hashlib.sha256("\n".join(tree.splits[train].paths).encode("utf-8", "surrogateescape")).hexdigest()
        inputs = {"images": listing}
        run.require_inputs(KIND, inputs)
        pixels = read_pixels(tree, train, config.tokenizer.image_size, on_step).to(where)
        if len(pixels) < config.batch_size:
            raise DataError(
                f"`{images}` has {len(pixels)} images to train on, fewer than one batch of {config.batch_size}",
                "use a smaller --batch-size or more images",
            )
        held_out = pixels[:0]
        if "val" in names and train != "val" and world.is_first:  # which measures alone
            held_out = read_pixels(tree, "val", config.tokenizer.image_size, on_step).to(where)
        trainer = TokenizerTrainer(config, Pixels(pixels, config.seed), held_out, where, world)
        on_step(Step(run.step, config.steps, message=_describe_plan(trainer)))
        run.settle(KIND, configs.to_dict(config), inputs, _FREE)
        loop = LoopConfig(
            steps=config.steps,
            log_every=config.log_every,
            validate_every=config.validate_every,
            sample_every=config.validate_every,
            save_every=config.save_every,
        )
        info = {"images": len(pixels), "classes": list(tree.classes)}
        result = run_training(trainer, run, loop, on_step, info, on_validation)
    return TokenizerTrainResult(
        folder=Path(out), step=result.step, seconds=result.seconds, validation=result.validation
    )


def _describe_plan(trainer: TokenizerTrainer) -> str:
    """Say what is about to be trained on what."""
    config, tokenizer = trainer.config, trainer.model.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"a tokenizer for {tokenizer.image_size} px: {parameters:,} parameters, {tokenizer.scales.seq_len:,} tokens an image "
        f"of {tokenizer.vocab_size:,} codes; {config.steps:,} steps of {config.batch_size:,} of "
        f"{len(trainer.images):,} images, {len(trainer.held_out):,} held out"
        f"{'' if len(trainer.held_out) else ', so that validation measures images of training'}"
    )
