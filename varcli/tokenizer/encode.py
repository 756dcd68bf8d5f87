"""Images to a codes cache: the core of `varcli tokenize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from varcli.data.codes_writer import CodesPlan, CodesWriter, begun_with
from varcli.data.defaults import default_decode
from varcli.data.images import decode_images, describe_enlarging, open_images, typical_side
from varcli.data.paths import escape_path
from varcli.devices import exact_convolutions, resolve_device
from varcli.errors import ConfigError
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer.find import default_tokenizer, find_tokenizer, tokenizer_folder
from varcli.tokenizer.store import load_tokenizer

_VALIDATION_VIEWS = 1


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What a finished cache holds."""

    folder: Path  # the codes cache
    num_images: int  # over all splits, those skipped left out
    num_rows: int  # images times views
    num_skipped: int  # listed with reasons in the manifest
    converted: dict[str, int]  # images by what was converted to plain 8-bit RGB
    classes: tuple[str, ...]  # by number


def tokenize(
    images: Path,
    out: Path,
    tokenizer: Path | str | None = None,
    *,
    views: int = 1,
    colour: float = 0.0,
    max_skip: int | None = None,
    follow_links: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    on_step: OnStep = ignore,
) -> TokenizeResult:
    """Encode an image tree into a codes cache in `out`.

    tokenizer: a folder or name, see `tokenizer_folder`; None takes the one that `out` was begun with, else the one that
    fits the images' size, and tells `on_step` which. views: stored views of a training image; the "val" split always has
    one. colour: strength, in [0, 1], of the colour changes of views after the first. max_skip: unusable images
    tolerated, None is 100 or 0.1 %. Codes are computed in float32 without TF32, in batches that never cross a shard, so
    that a rerun, which goes on at the first missing shard, meets the same batches.
    Raises DataError for images that cannot be used, ConfigError if `out` was begun with other settings, ArtifactError if
    it cannot be written.
    """
    if (batch_size is not None and batch_size < 1) or views < 1:
        raise ConfigError("batch_size and views must be at least 1")
    where = resolve_device(device)
    tree = open_images(images, follow_links)
    side = typical_side(tree.root, next(iter(tree.splits.values())))
    folder, reason = _choose_tokenizer(tokenizer, Path(out), side)
    on_step(Step(0, None, unit="views", message=f"tokenizer: {folder}{reason}"))
    for name in tree.empty_classes():
        on_step(Step(0, None, unit="views", message=f"warning: class `{escape_path(name)}` has no image to train on"))
    model = load_tokenizer(folder, where)
    config = model.config
    enlarged = describe_enlarging(side, config.image_size)
    if enlarged:
        on_step(Step(0, None, unit="views", message=f"warning: {enlarged}"))
    decode = default_decode(tree, config.image_size, views, seed, colour)
    splits = list(tree.splits)
    plan = CodesPlan(
        tokenizer=model.fingerprint(),
        patch_nums=config.patch_nums,
        vocab_size=config.vocab_size,
        code_channels=config.code_channels,
        downsampling=config.downsampling,
        decode=decode,
        views={name: _VALIDATION_VIEWS if name == "val" and len(splits) > 1 else views for name in splits},
    )
    size = batch_size or (256 if where.type == "cuda" else 64)
    with CodesWriter(out, plan, tree) as writer, exact_convolutions():
        wanted = {split: writer.missing(split) for split in splits}
        total = sum(len(wanted[split]) * plan.views[split] for split in splits)
        done = 0
        for split in splits:
            borders = np.flatnonzero(np.diff(wanted[split] // plan.shard_images)) + 1
            for shard in np.split(wanted[split], borders):
                for batch in decode_images(tree, split, decode[split], shard, plan.views[split], workers, size):
                    pixels = batch.images.to(where).float() / 127.5 - 1
                    with torch.no_grad():
                        codes_BL = model.encode(pixels)
                    writer.add(split, codes_BL, batch)
                    done += len(batch.requested) * plan.views[split]
                    on_step(Step(done, total, unit="views"))
        manifest = writer.finish(max_skip)
    num_skipped = len(manifest.info["skipped"])
    return TokenizeResult(
        folder=Path(out),
        num_images=tree.num_images - (num_skipped - len(tree.skipped)),  # which were not counted in the first place
        num_rows=sum(int(entry["rows"]) for entry in manifest.info["splits"].values()),
        num_skipped=num_skipped,
        converted={str(note): int(count) for note, count in manifest.info["converted"].items()},
        classes=tuple(manifest.info["classes"]),
    )


def _choose_tokenizer(given: Path | str | None, out: Path, side: int) -> tuple[Path, str]:
    """The folder of the tokenizer for images of about `side` px, and why it was chosen if it was not named."""
    if given is not None:
        return tokenizer_folder(given), ""
    begun = begun_with(out)
    if begun is not None:
        return find_tokenizer(begun), f", with which `{out}` was begun"
    folder = default_tokenizer(side)
    return folder, f", chosen for images of about {side} px"
