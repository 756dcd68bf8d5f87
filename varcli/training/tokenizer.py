"""Training the multi-scale tokenizer on images: the one call behind `varcli train-tokenizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from varcli import config as configs
from varcli.data.images import open_images, typical_side
from varcli.devices import precision_name, resolve_device, resolve_precision
from varcli.distributed import ALONE, World
from varcli.errors import ConfigError, DataError
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.store import KIND, load_tokenizer
from varcli.training.loop import LoopConfig, OnValidation, run_training
from varcli.training.parallel import share_batch
from varcli.training.parent import Parent, find_parent
from varcli.training.pixels import Pixels, read_pixels
from varcli.training.run import keep_stored, open_run
from varcli.training.tokenizer_objective import TokenizerTrainConfig
from varcli.training.tokenizer_trainer import TokenizerTrainer

# weights of LPIPS are a known file, wherever it lies; checkpointing gives the same numbers
_FREE = LoopConfig.FREE - {"steps"} | {"lpips_weights", "checkpointing"}


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
    init_from: Path | str | None = None,
    architecture: Mapping[str, Any] | None = None,
    device: str = "auto",
    resume: str = "auto",
    given: Collection[str] | None = None,
    on_step: OnStep = ignore,
    on_validation: OnValidation | None = None,
    world: World = ALONE,
) -> TokenizerTrainResult:
    """Train a tokenizer on a folder of images, into a run folder; go on with a run begun there.

    images: an image tree; a "val" split, if there is one, is held out and measured on. The tokenizer is written to
    `out/tokenizer` with each checkpoint. init_from: a tokenizer, model or run folder whose architecture and weights a new
    run begins with; see `Parent.inherit` for what may differ. architecture: the settings of `config.tokenizer` that are
    asked for where not all of them are; the others are init_from's, or TokenizerConfig's defaults. given: names of
    settings that a resumed run must have been begun with, None means those that are not at their defaults; it keeps the
    others. on_validation: called with the run folder after each validation, e.g. to draw what its log holds. world:
    processes that share each batch and all call this, each with a device of its own; the first one alone writes, tells
    and measures, and any number of them may go on with a run.
    Raises DataError for images that cannot be used or fewer than a batch, ConfigError for settings that differ from the
    run's, and what `run_training` raises.
    """
    config = config or TokenizerTrainConfig()
    asked = architecture or (configs.to_dict(config.tokenizer) if config.tokenizer else {})
    fixed = configs.changed(config) if given is None else given
    where = resolve_device(device)
    tree = open_images(images, allow_single_class=True)
    names = list(tree.splits)
    on_step = on_step if world.is_first else ignore
    train = "train" if "train" in names else names[0]
    with open_run(out, resume, world) as run:
        config = keep_stored(config, run.config, fixed)
        share_batch(config.batch_size, world)  # raises before anything is read or written
        parent = find_parent(run, init_from)
        if parent is not None:
            config = replace(config, tokenizer=parent.inherit(asked))
        elif architecture:
            config = replace(config, tokenizer=configs.from_dict(TokenizerConfig, architecture))
        elif config.tokenizer is None:
            config = replace(config, tokenizer=TokenizerConfig.for_side(typical_side(tree.root, tree.splits[train])))
        _check_start(config, parent)
        config = replace(config, precision=precision_name(resolve_precision(config.precision, where)))
        listing = hashlib.sha256("\n".join(tree.splits[train].paths).encode("utf-8", "surrogateescape")).hexdigest()
        origin = {} if parent is None else {"init_from": parent.fingerprint}
        inputs = {"images": listing, **origin}
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
        weights = None if parent is None or parent.folder is None else load_tokenizer(parent.folder)
        trainer = TokenizerTrainer(config, Pixels(pixels, config.seed), held_out, where, world, weights)
        del weights
        on_step(Step(run.step, config.steps, message=_describe_plan(trainer, parent)))
        run.settle(KIND, configs.to_dict(config), inputs, _FREE)
        loop = LoopConfig(
            steps=config.steps,
            log_every=config.log_every,
            validate_every=config.validate_every,
            sample_every=config.validate_every,
            save_every=config.save_every,
        )
        info = {"images": len(pixels), "classes": list(tree.classes), **origin}
        result = run_training(trainer, run, loop, on_step, info, on_validation)
    return TokenizerTrainResult(
        folder=Path(out), step=result.step, seconds=result.seconds, validation=result.validation
    )


def _check_start(config: TokenizerTrainConfig, parent: Parent | None) -> None:
    """Raise ConfigError for settings that make no sense with a tokenizer to start from, or only with one."""
    if parent is None and config.frozen:
        raise ConfigError(
            f"{', '.join(config.frozen)} cannot be frozen before having learned anything",
            "name a tokenizer to start from with --init-from, or leave out `frozen`",
        )
    if parent is not None and config.codebook_init != "random":
        raise ConfigError(
            f"codebook_init is {config.codebook_init}, but the codebook comes with the tokenizer to start from",
            "leave it out: the codebook is kept",
        )


def _describe_plan(trainer: TokenizerTrainer, parent: Parent | None) -> str:
    """Say what is about to be trained on what."""
    config, tokenizer = trainer.config, trainer.model.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"a tokenizer for {tokenizer.image_size} px: {parameters:,} parameters, {tokenizer.scales.seq_len:,} tokens an image "
        f"of {tokenizer.vocab_size:,} codes; {config.steps:,} steps of {config.batch_size:,} of "
        f"{len(trainer.images):,} images, {len(trainer.held_out):,} held out"
        f"{'' if len(trainer.held_out) else ', so that validation measures images of training'}"
        f"{'' if parent is None else f'; begun with the tokenizer {parent.fingerprint}'}"
        f"{'' if not config.frozen else ', of which stay as they are: ' + ', '.join(config.frozen)}"
    )
