"""The process that decodes or saves images for `varcli.data.pool`: tasks come on stdin, answers leave on stdout.

Started as `python -m varcli.data.worker` rather than through multiprocessing: it then neither inherits the parent's
threads and CUDA state nor imports the parent's main module, and nothing is pickled. Imports numpy and Pillow, not
torch. A message is two lengths, a JSON header and raw bytes.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from varcli.config import from_dict
from varcli.data.decode import UnusableImage, load_image
from varcli.data.png import save_png
from varcli.data.views import DecodeConfig, cut_views
from varcli.errors import VarcliError

_LENGTHS = struct.Struct("<IQ")


def run_task(task: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """Do what the task's "do" names, an entry of TASKS, and return its answer: a header and uint8 pixels."""
    return TASKS[task["do"]](task, raw)


def decode(task: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """Decode the images of one task.

    task: "config" (DecodeConfig as a dict), "root", "shape" of the grey images in `raw` or None for files, and
    "images", for each [path, views, flip]. Returns a header with "rows" ([image, view] of each row), "skipped"
    ([image, reason]) and "notes" ([image, what was converted]), and uint8 (rows, 3, size, size).
    """
    config = from_dict(DecodeConfig, task["config"])
    pixels = None if task["shape"] is None else np.frombuffer(raw, np.uint8).reshape(task["shape"])
    rows: list[tuple[int, int]] = []
    views: list[np.ndarray] = []
    skipped: list[tuple[int, str]] = []
    converted: list[tuple[int, list[str]]] = []
    for number, (path, wanted, flip) in enumerate(task["images"]):
        try:
            if pixels is None:
                image, notes, full_size = _load(Path(task["root"], path), config)
            else:
                image, notes = Image.fromarray(pixels[number]).convert("RGB"), ["grey"]
                full_size = image.size
            found = cut_views(image, config, path, wanted, flip, full_size)
        except UnusableImage as reason:
            skipped.append((number, str(reason)))
            continue
        if notes:
            converted.append((number, notes))
        views.extend(found)
        rows.extend((number, view) for view in wanted)
    header = {"rows": rows, "skipped": skipped, "notes": converted}
    stacked = np.stack(views) if views else np.empty((0, 3, config.size, config.size), np.uint8)
    return header, stacked


def _load(path: Path, config: DecodeConfig) -> tuple[Image.Image, list[str], tuple[int, int]]:
    """Read an image, reduced if the config says so. Returns it, the notes, and the size it has on disk."""
    sizes: list[tuple[int, int]] = []

    def enough(size: tuple[int, int]) -> tuple[int, int]:
        sizes.append(size)
        return config.enough(size)

    image, notes = load_image(path, config.max_pixels, enough if config.reduced else None)
    return image, notes, sizes[0] if sizes else image.size


def save(task: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """Write the images of one task as PNG files.

    task: "folder", "names", and the "shape" (n, 3, H, W) of the pixels in `raw`. Raises ArtifactError if one cannot be
    written.
    """
    pixels = np.frombuffer(raw, np.uint8).reshape(task["shape"])
    for name, image in zip(task["names"], pixels, strict=True):
        save_png(Path(task["folder"], name), image, durable=False, is_sample=True)
    return {}, np.empty(0, np.uint8)


TASKS = {"decode": decode, "save": save}


def send(stream: BinaryIO, header: dict[str, Any], raw: bytes | memoryview) -> None:
    """Write one message."""
    text = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(text), len(raw)) + text)
    stream.write(raw)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytearray] | None:
    """Read one message; None if the other side is gone, also in the middle of a message."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    text_length, raw_length = _LENGTHS.unpack(lengths)
    text = stream.read(text_length)
    raw = bytearray(raw_length)
    if len(text) < text_length or stream.readinto(raw) < raw_length:  # buffered: short only at the end
        return None
    return json.loads(text), raw


def main() -> None:
    """Serve tasks until stdin ends."""
    tasks = sys.stdin.buffer
    # what a library prints must not get between the messages
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while (message := receive(tasks)) is not None:
        try:
            header, images = run_task(message[0], bytes(message[1]))
        except VarcliError as error:
            header, images = {"refused": str(error), "hint": error.hint}, np.empty(0, np.uint8)
        except Exception:  # noqa: BLE001 - a bug: the parent raises it with this text
            header, images = {"error": traceback.format_exc()}, np.empty(0, np.uint8)
        try:
            send(results, header, memoryview(images).cast("B") if images.size else b"")
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
