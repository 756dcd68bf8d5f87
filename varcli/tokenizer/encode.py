"""Images to a codes cache: the core of `varcli tokenize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from varcli.artifacts.verify import is_artifact
from varcli.data.codes_shards import PLAIN_PRECISION, CodesPlan
from varcli.data.codes_writer import begun_with
from varcli.data.defaults import default_decode
from varcli.data.images import decode_images, describe_enlarging, open_images, typical_side
from varcli.data.paths import escape_path
from varcli.data.skips import Skips
from varcli.devices import PRECISIONS, resolve_device
from varcli.distributed import ALONE, World
from varcli.errors import ConfigError, unknown_name
from varcli.progress import OnStep, Step, ignore
from varcli.tokenizer.agreement import ENOUGH, measure_agreement
from varcli.tokenizer.batch_encoder import BatchEncoder, default_batch_size
from varcli.tokenizer.encode_shards import SharedCache, encode_shards
from varcli.tokenizer.find import default_tokenizer, find_tokenizer, tokenizer_folder
from varcli.tokenizer.store import load_tokenizer

_VALIDATION_VIEWS = 1
_NUM_COMPARED = 256  # images on which a faster precision is compared with float32
_AGREEMENT = "agreement"  # entry of the manifest
# views from which torch.compile, some 40 s, is made up for: it saves 1.6 ms an image of 256 px on an H100 (1,137
# against 407 images/s of the encoder in a first sketch)
_COMPILE_FROM = 25_000


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What a finished cache holds."""

    folder: Path  # the codes cache
    num_images: int  # over all splits, those skipped left out
    num_rows: int  # images times views
    num_skipped: int  # listed with reasons in the manifest
    converted: dict[str, int]  # images by what was converted to plain 8-bit RGB
    classes: tuple[str, ...]  # by number
    agreement: dict[str, Any] | None = None  # of a faster precision's codes with float32's, as `Agreement`


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
    precision: str = PLAIN_PRECISION,
    compile: bool | None = None,
    reduced_decode: bool = False,
    on_step: OnStep = ignore,
    world: World = ALONE,
) -> TokenizeResult | None:
    """Encode an image tree into a codes cache in `out`.

    tokenizer: a folder or name, see `tokenizer_folder`; None takes the one that `out` was begun with, else the one that
    fits the images' size, and tells `on_step` which. views: stored views of a training image; the "val" split always has
    one. colour: strength, in [0, 1], of the colour changes of views after the first. max_skip: unusable images
    tolerated, None is 100 or 0.1 %. precision: "fp32", without TF32, or "bf16" or "fp16", which are faster and choose
    other codes here and there: how many is measured first, told and kept in the manifest. compile: torch.compile for
    these; None does so on CUDA for many images. reduced_decode: see `DecodeConfig.reduced`. world: processes that share the
    shards and all call this, each with a device of its own; the cache is that of one process. Batches never cross a shard,
    so that a rerun, which goes on at the first missing shard, meets the same ones. Returns what was written, None on
    processes but the first.
    Raises DataError for images that cannot be used, SkipLimitError if too many cannot, ConfigError if `out` was begun with
    other settings, ArtifactError if it cannot be written.
    """
    if (batch_size is not None and batch_size < 1) or views < 1:
        raise ConfigError("batch_size and views must be at least 1")
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if compile and precision == PLAIN_PRECISION:
        raise ConfigError("codes in fp32 are computed as they are, without torch.compile", "add --precision fp16")
    where = resolve_device(device)
    tree = open_images(images, follow_links)
    if not is_artifact(Path(out)):  # a finished cache stays one
        Skips(tree, max_skip)  # raises, before images are read, if too many links and the like are out already
    side = typical_side(tree.root, next(iter(tree.splits.values())))
    folder, reason = _choose_tokenizer(tokenizer, Path(out), side)
    tell = partial(_tell, on_step)
    tell(f"tokenizer: {folder}{reason}")
    for name in tree.empty_classes():
        tell(f"warning: class `{escape_path(name)}` has no image to train on")
    model = load_tokenizer(folder, where)
    config = model.config
    enlarged = describe_enlarging(side, config.image_size)
    if enlarged:
        tell(f"warning: {enlarged}")
    splits = list(tree.splits)
    plan = CodesPlan(
        tokenizer=model.fingerprint(),
        patch_nums=config.patch_nums,
        vocab_size=config.vocab_size,
        code_channels=config.code_channels,
        downsampling=config.downsampling,
        decode=default_decode(tree, config.image_size, views, seed, colour, reduced_decode),
        views={name: _VALIDATION_VIEWS if name == "val" and len(splits) > 1 else views for name in splits},
        precision=precision,
    )
    size = batch_size or default_batch_size(config, where)
    on_failure = None if compile else tell
    if compile is None:  # by all images, also where few are missing: a rerun meets the same kernels
        compile = (
            where.type == "cuda" and sum(len(tree.splits[name]) * plan.views[name] for name in splits) >= _COMPILE_FROM
        )
    encoder = BatchEncoder(model, PRECISIONS[precision], size, compile, on_failure)
    cache = SharedCache(out, plan, tree, world)
    with cache:
        if cache.has_work:
            _compare_with_fp32(encoder, cache, workers, tell)
            encode_shards(encoder, cache, workers, on_step)
        manifest = cache.finish(max_skip)
    if manifest is None:
        return None
    num_skipped = len(manifest.info["skipped"])
    return TokenizeResult(
        folder=Path(out),
        num_images=tree.num_images - (num_skipped - len(tree.skipped)),  # which were not counted in the first place
        num_rows=sum(int(entry["rows"]) for entry in manifest.info["splits"].values()),
        num_skipped=num_skipped,
        converted={str(note): int(count) for note, count in manifest.info["converted"].items()},
        classes=tuple(manifest.info["classes"]),
        agreement=manifest.info.get(_AGREEMENT),
    )


def _compare_with_fp32(
    encoder: BatchEncoder, cache: SharedCache, workers: int | None, tell: Callable[[str], None]
) -> None:
    """Measure, tell and keep how far the codes are those of float32, unless an earlier run has; the first process does so."""
    if encoder.is_exact or cache.writer is None or _AGREEMENT in cache.writer.notes:
        return
    split = next(iter(cache.tree.splits))
    chosen = np.unique(np.linspace(0, len(cache.tree.splits[split]) - 1, _NUM_COMPARED).astype(int))
    decode = cache.plan.decode[split]
    workers = 0 if len(chosen) < _NUM_COMPARED else workers  # starting processes takes longer than that
    stream = decode_images(cache.tree, split, decode, chosen, workers=workers, batch_size=encoder.batch_size)
    agreement = measure_agreement(encoder, (batch.images for batch in stream))
    if agreement is None:
        return
    cache.writer.note(_AGREEMENT, agreement.to_json())
    precision = cache.plan.precision
    tell(
        f"{'' if agreement.is_enough else 'warning: '}{agreement.tokens:.2%} of tokens in {precision} are those of fp32"
        f"{'' if agreement.is_enough else f', fewer than {ENOUGH:.1%}'}; reconstructions of {agreement.images} images "
        f"have {agreement.psnr:.2f} dB instead of {agreement.psnr_fp32:.2f}; by scale: "
        + " ".join(f"{share:.1%}" for share in agreement.by_scale)
    )


def _tell(on_step: OnStep, message: str) -> None:
    on_step(Step(0, None, unit="views", message=message))


def _choose_tokenizer(given: Path | str | None, out: Path, side: int) -> tuple[Path, str]:
    """The folder of the tokenizer for images of about `side` px, and why it was chosen if it was not named."""
    if given is not None:
        return tokenizer_folder(given), ""
    begun = begun_with(out)
    if begun is not None:
        return find_tokenizer(begun), f", with which `{out}` was begun"
    folder = default_tokenizer(side)
    return folder, f", chosen for images of about {side} px"
