"""Images to a codes cache: the core of `varcli tokenize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from varcli.data.codes_writer import CodesPlan, CodesWriter
from varcli.data.defaults import default_decode
from varcli.data.images import decode_images, open_images
from varcli.devices import resolve_device
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer.store import load_tokenizer

_VALIDATION_VIEWS = 1


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What a finished cache holds."""

    folder: Path  # the codes cache
    num_images: int  # over all splits, those skipped left out
    num_rows: int  # images times views
    num_skipped: int  # listed with reasons in the manifest
    num_converted: int  # images that were not plain 8-bit RGB
    classes: tuple[str, ...]  # by number


def tokenize(
    images: Path,
    out: Path,
    tokenizer: Path,
    *,
    views: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    on_step: OnStep = ignore,
) -> TokenizeResult:
    """Encode an image tree with the tokenizer in folder `tokenizer` into a codes cache in `out`.

    views: stored views of a training image; the "val" split always has one. Codes are computed in float32, so that they
    do not depend on the batch. A rerun goes on at the first missing shard. Raises DataError for images that cannot be
    used, ConfigError if `out` was begun with other settings, ArtifactError if it cannot be written.
    """
    where = resolve_device(device)
    model = load_tokenizer(tokenizer, where)
    config = model.config
    tree = open_images(images)
    decode = default_decode(tree, config.image_size, views, seed)
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
    with CodesWriter(out, plan, tree) as writer:
        wanted = {split: writer.missing(split) for split in splits}
        total = sum(len(wanted[split]) * plan.views[split] for split in splits)
        done = 0
        for split in splits:
            stream = decode_images(tree, split, decode[split], wanted[split], plan.views[split], workers, size)
            for batch in stream:
                pixels = batch.images.to(where).float() / 127.5 - 1
                with torch.no_grad():
                    codes_BL = model.encode(pixels)
                writer.add(split, codes_BL, batch)
                done += len(batch.requested) * plan.views[split]
                on_step(Step(done, total, unit="images"))
        manifest = writer.finish()
    sizes = manifest.info["splits"].values()
    return TokenizeResult(
        folder=Path(out),
        num_images=sum(int(entry["images"]) for entry in sizes),
        num_rows=sum(int(entry["rows"]) for entry in sizes),
        num_skipped=len(manifest.info["skipped"]),
        num_converted=sum(manifest.info["converted"].values()),
        classes=tuple(manifest.info["classes"]),
    )
