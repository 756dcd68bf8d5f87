"""Training the multi-scale tokenizer on images: the one call behind `varcli train-tokenizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from varcli import config as configs
from varcli.artifacts.write import prepare_folder
from varcli.data.images import describe_enlarging, open_images, typical_side
from varcli.data.runs import is_number, read_log
from varcli.data.skips import Skips
from varcli.devices import precision_name, resolve_device, resolve_precision
from varcli.distributed import ALONE, World
from varcli.errors import ConfigError
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.store import KIND, load_tokenizer
from varcli.training.frozen import refuse_frozen_start
from varcli.training.loop import LoopConfig, OnValidation, run_training
from varcli.training.memory import memory_limits
from varcli.training.parallel import share_batch
from varcli.training.parent import find_parent
from varcli.training.pixels import open_pixels, read_held_out
from varcli.training.run import keep_stored, open_run
from varcli.training.tokenizer_parent import TokenizerParent, read_parent, remember_parent
from varcli.training.tokenizer_settings import TokenizerTrainConfig
from varcli.training.tokenizer_trainer import TokenizerTrainer

_FREE = LoopConfig.FREE - {"steps"} | {"lpips_weights", "checkpointing", "workers", "max_skip"}  # change no number


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainResult:
    """What a finished run came to."""

    folder: Path  # the run folder; the tokenizer itself is in its `tokenizer/`
    step: int  # optimizer steps done
    seconds: float  # spent training, over all resumptions
    validation: dict[str, Any] = field(default_factory=dict)  # the run's last one


def train_tokenizer(
    images: Path,
    out: Path,
    config: TokenizerTrainConfig | None = None,
    *,
    init_from: Path | str | None = None,
    architecture: Mapping[str, Any] | None = None,
    size: int | None = None,
    device: str = "auto",
    resume: str = "auto",
    given: Collection[str] | None = None,
    on_step: OnStep = ignore,
    on_validation: OnValidation | None = None,
    world: World = ALONE,
) -> TokenizerTrainResult:
    """Train a tokenizer on a folder of images, into a run folder; go on with a run begun there.

    images: an image tree; a "val" split, if there is one, is held out and measured on. The tokenizer is written to
    `out/tokenizer` with each checkpoint. Images smaller than the tokenizer's are enlarged, which is told; how they are cut
    and read: `open_pixels`. init_from: a tokenizer, model or run folder whose architecture and weights a new run begins
    with; see `TokenizerParent.inherit` for what may differ. architecture: the settings of `config.tokenizer` that are asked for
    where not all of them are; the others are init_from's or those of the run that goes on, else they suit the images' size
    (`TokenizerConfig.for_side`). size: pixels, side of the images to learn; chooses patch_nums as well.
    given: names of settings that a resumed run must have been begun with, None means those that are not at their
    defaults; it keeps the others. on_validation: called with the run folder after each validation, e.g. to draw what its
    log holds. world: processes that share each batch and all call this, each with a device of its own; the first one
    alone writes, tells and measures, and any number of them may go on with a run.
    Raises DataError for images that cannot be used or fewer than a batch, SkipLimitError if too many cannot, ConfigError
    for settings that differ from the run's, and what `run_training` raises.
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
        parent = find_parent(run, init_from, KIND, read_parent, remember_parent)
        typical = typical_side(tree.root, tree.splits[train])
        if parent is not None or asked or size is not None or config.tokenizer is None:
            stored = (run.config or {}).get("tokenizer") if run.checkpoint is not None else None
            own = configs.from_dict(TokenizerConfig, stored) if stored else None
            config = replace(config, tokenizer=_choose_architecture(asked, size, typical, parent, own))
        config = config.at_side(config.tokenizer.image_size)
        share_batch(config.batch_size, world)  # raises before anything is read or written
        _check_start(config, parent)
        config = replace(config, precision=precision_name(resolve_precision(config.precision, where)))
        listing = hashlib.sha256("\n".join(tree.splits[train].paths).encode("utf-8", "surrogateescape")).hexdigest()
        origin = {} if parent is None else {"init_from": parent.fingerprint}
        inputs = {"images": listing, **origin}
        run.require_same(KIND, inputs, configs.to_dict(config), _FREE)  # before images are read
        side = config.tokenizer.image_size

        def tell(text: str) -> None:
            on_step(Step(run.step, config.steps, message=text))

        skips = Skips(tree, config.max_skip, tell)
        source = open_pixels(
            tree,
            train,
            side,
            batch_size=config.batch_size,
            seed=config.seed,
            device=where,
            workers=config.workers,
            skips=skips,
            on_step=on_step,
            sharers=world.local_size,
        )
        with source as pixels:
            held_out = torch.zeros(0, 3, side, side, dtype=torch.uint8, device=where)
            if "val" in names and train != "val" and world.is_first:  # which measures alone
                found = read_held_out(tree, "val", side, workers=config.workers, skips=skips, on_step=on_step)
                held_out = found.to(where)
            weights = None if parent is None or parent.folder is None else load_tokenizer(parent.folder)
            trainer = TokenizerTrainer(config, pixels, held_out, where, world, weights)
            del weights
            num_val = len(tree.splits.get("val", ()))
            for line in _describe_plan(trainer, parent, typical, num_val):
                tell(line)
            loop = LoopConfig(
                steps=config.steps,
                log_every=config.log_every,
                validate_every=config.validate_every,
                sample_every=config.validate_every,
                save_every=config.save_every,
            )
            if world.is_first and run.step < config.steps:
                num_saves = loop.keep_checkpoints + 1 if run.checkpoint is None else 1
                prepare_folder(run.path, need_bytes=num_saves * trainer.checkpoint_bytes())
            if run.step < config.steps:
                with memory_limits(trainer, world):
                    trainer.prepare(tell)
            run.settle(KIND, configs.to_dict(config), inputs, _FREE)
            info = {"images": len(pixels), "classes": list(tree.classes), **origin}
            result = run_training(trainer, run, loop, on_step, info, on_validation)
        validation = result.validation
        if not validation and world.is_first:  # nothing was left to do: what an earlier call measured
            lines = read_log(run.path, "validation")
            last = lines[-1] if lines else {}
            validation = {name: value for name, value in last.items() if name != "step" and is_number(value)}
    return TokenizerTrainResult(folder=Path(out), step=result.step, seconds=result.seconds, validation=validation)


def _choose_architecture(
    asked: Mapping[str, Any],
    size: int | None,
    typical: int,
    parent: TokenizerParent | None = None,
    own: TokenizerConfig | None = None,
) -> TokenizerConfig:
    """The architecture of settings `asked`, for images of `size` px or else of `typical` ones.

    What is not asked for is as in `own`, of the run that goes on, or in the parent, or else as the images' size has it.
    """
    base = own or (TokenizerConfig.for_side(size or typical) if parent is None else parent.config)
    side = size
    if side is None and "channel_multipliers" in asked and "patch_nums" not in asked:
        side = base.image_size  # another downsampling is no other resolution
    wanted = configs.replace(base, asked)
    if side is not None and wanted.image_size != side:
        wanted = wanted.at_size(side, asked.get("patch_nums"))
    return wanted if parent is None else parent.inherit({**asked, "patch_nums": wanted.patch_nums})


def _check_start(config: TokenizerTrainConfig, parent: TokenizerParent | None) -> None:
    """Raise ConfigError for settings that make no sense with a tokenizer to start from, or only with one."""
    refuse_frozen_start(config.frozen, KIND, parent is not None)
    if parent is not None and config.codebook_init != "random":
        raise ConfigError(
            f"codebook_init is {config.codebook_init}, but the codebook comes with the tokenizer to start from",
            "leave it out: the codebook is kept",
        )


def _describe_plan(
    trainer: TokenizerTrainer, parent: TokenizerParent | None, typical: int, num_val: int
) -> Iterator[str]:
    """Say what is about to be trained on what: images of about `typical` px, `num_val` of them for validation."""
    config, tokenizer = trainer.config, trainer.model.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    part = f" of {num_val:,}" if 0 < len(trainer.held_out) < num_val else ""
    yield (
        f"a tokenizer for {tokenizer.image_size} px: {parameters:,} parameters, {tokenizer.scales.seq_len:,} tokens an image "
        f"of {tokenizer.vocab_size:,} codes; {config.steps:,} steps of {config.batch_size:,} of "
        f"{len(trainer.images):,} images, {len(trainer.held_out):,}{part} held out"
        f"{'' if len(trainer.held_out) else ', so that validation measures images of training'}"
        f"{'' if parent is None else f'; begun with the tokenizer {parent.fingerprint}'}"
        f"{'' if not config.frozen else ', of which stay as they are: ' + ', '.join(config.frozen)}"
    )
    enlarged = describe_enlarging(typical, tokenizer.image_size)
    if enlarged:
        yield f"warning: {enlarged}: a smaller --size learns them as they are"
