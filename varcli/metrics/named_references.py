"""Reference files that papers share, by name: fetched once, checked, and pinned to what came the first time.

Source of the files: the evaluation suite of "Diffusion Models Beat GANs on Image Synthesis" (arXiv:2105.05233), whose
statistics of ImageNet's training images class-conditional results are measured against, VAR's too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from varcli.artifacts.fetch import cache_folder, fetch
from varcli.errors import ArtifactError, IntegrityError
from varcli.metrics.npz import IMAGES_KEY, SPATIAL_KEYS, STATISTICS_KEYS, open_npz
from varcli.progress import OnStep, ignore

REFERENCES_VARIABLE = "VARCLI_REFERENCES"
_SERVER = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
NUM_IMAGES, NUM_FEATURES, NUM_SPATIAL = 10_000, 2048, 2023  # in each file


@dataclass(frozen=True, kw_only=True)
class NamedReference:
    """One file."""

    folder: str  # on the server
    file: str
    side: int  # pixels
    images: str  # what its statistics are of, for people


NAMED = {
    "imagenet256": NamedReference(
        folder="256",
        file="VIRTUAL_imagenet256_labeled.npz",
        side=256,
        images="statistics of ImageNet's training images at 256 px, and 10,000 of them",
    ),
    "imagenet512": NamedReference(
        folder="512",
        file="VIRTUAL_imagenet512.npz",
        side=512,
        images="statistics of ImageNet's training images at 512 px, and 10,000 of them",
    ),
}
"""Every reference that has a name, beside emoji64, which comes with varcli."""


def named_reference(name: str, on_step: OnStep = ignore) -> Path:
    """Return the file of a named reference, fetched into the user's cache if it is not there.

    $VARCLI_REFERENCES is where else to find it: a folder that holds the files, or the http address of one. Raises
    ArtifactError if it cannot be had or is no such file, IntegrityError if it is not what was fetched first.
    """
    entry = NAMED[name]
    place = os.environ.get(REFERENCES_VARIABLE, "")
    if place and not place.startswith(("http://", "https://")):
        path = Path(place) / entry.file
        if not path.is_file():
            raise ArtifactError(f"{REFERENCES_VARIABLE} names `{place}`, which holds no {entry.file}")
    else:
        path = cache_folder() / "references" / entry.file
        address = f"{place.rstrip('/')}/{entry.file}" if place else f"{_SERVER}/{entry.folder}/{entry.file}"
        try:
            fetch(address, path, on_step=on_step)
        except IntegrityError:
            raise
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}",
                f"run again to go on, or fetch {entry.file} by hand and pass it with --ref, or its folder with "
                f"{REFERENCES_VARIABLE}",
            ) from None
    check_reference_file(path, entry)
    return path


def check_reference_file(path: Path, entry: NamedReference) -> None:
    """Raise ArtifactError if a file has not the arrays that the named reference has."""
    headers = open_npz(path).headers
    wanted = {
        IMAGES_KEY: (NUM_IMAGES, entry.side, entry.side, 3),
        STATISTICS_KEYS[0]: (NUM_FEATURES,),
        STATISTICS_KEYS[1]: (NUM_FEATURES, NUM_FEATURES),
        SPATIAL_KEYS[0]: (NUM_SPATIAL,),
        SPATIAL_KEYS[1]: (NUM_SPATIAL, NUM_SPATIAL),
    }
    for key, shape in wanted.items():
        found = headers[key][0] if key in headers else None
        if found != shape:
            what = "is missing" if found is None else f"has shape {found}"
            raise ArtifactError(
                f"`{path}` is not {entry.file}: `{key}` {what}, but should have shape {shape}",
                "delete it to fetch it again",
            )
