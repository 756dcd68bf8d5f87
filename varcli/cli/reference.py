"""`varcli reference`: files that samples are measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from varcli.cli import console
from varcli.cli.options import (
    AllowUnknownWeightsOption,
    BatchSizeOption,
    CacheOption,
    DeviceOption,
    FeaturesOption,
    InceptionWeightsOption,
    JsonOption,
    KeepOption,
    SeedOption,
    WorkersOption,
)


def build(
    images: Annotated[Path, Argument(help="Folder of real images: one folder a class, or images alone.")],
    out: Annotated[Path, Option("--out", "-o", help="npz file to write.")] = Path("ref.npz"),
    size: Annotated[
        int | None,
        Option("--size", min=1, help="Pixels; larger images are cut in the centre. Default: their own size."),
    ] = None,
    split: Annotated[
        str | None, Option("--split", help="train, val or all; default: train.", show_default=False)
    ] = None,
    stored: Annotated[int, Option("--images", min=1, help="Images to store, for precision and recall.")] = 10_000,
    features: FeaturesOption = "auto",
    inception_weights: InceptionWeightsOption = None,
    allow_unknown_weights: AllowUnknownWeightsOption = False,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    keep: KeepOption = True,
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Make a reference file of a folder of images: statistics of all of them, and some of them.

    It has the form of the ADM files of ImageNet, and varcli eval reads it with
    --ref. Run again after a stop, it goes on with the features it has.
    """
    from varcli.metrics.build_reference import ReferenceConfig, build_reference
    from varcli.metrics.feature_cache import default_cache

    config = ReferenceConfig(
        size=size,
        split=split,
        images=stored,
        features=features,
        inception_weights=inception_weights,
        allow_unknown_weights=allow_unknown_weights,
        seed=seed,
        device=device,
        batch_size=batch_size,
        workers=workers,
        cache=(cache or default_cache()) if keep else None,
    )
    result = build_reference(images, out, config, on_step=console.progress("reading images"))
    value = {
        "file": str(result.file),
        "images": result.num_images,
        "stored": result.num_stored,
        "size": result.size,
        "features": result.network,
    }
    text = (
        f"{result.file}: statistics of {result.num_images:,} images of {result.size} px in {result.network} features, and "
        f"{result.num_stored:,} of the images"
    )
    console.report(value, json, text)
    if not json:
        console.next_command("eval", "SAMPLES", "--ref", result.file)
