"""Build varcli/embedded/emoji64.zip: emoji drawings of three artists as a class-per-folder image tree.

Run:       python examples/build_emoji64.py                      (fetches the packages with `npm pack`, needs Node)
           python examples/build_emoji64.py --packages DIR       (a folder that holds the four .tgz files already)
Expected:  5,297 images of 64x64 in 10 classes, about 10 % of them in val/, a zip below 14 MB; about a minute on one core.
The bytes are the same for the same Pillow (its bundled libwebp encodes); the pixels are the same for any.

Sources and licences are in varcli/embedded/NOTICE.md, which goes into the zip. What is done to the drawings:
pasted on white, resized to 64x64 with Lanczos where they are larger, colour values rounded to 7 bits, stored as
lossless WebP.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

SIZE = 64  # pixels
VAL_SHARE = 0.1
EMBEDDED = Path(__file__).resolve().parent.parent / "varcli" / "embedded"
ZIP_DATE = (2024, 9, 10, 0, 0, 0)  # release of Unicode 16, so that the zip does not depend on the day

# package -> (file, SHA-256): a changed upstream file stops the build instead of changing the data
PACKAGES = {
    "emoji-datasource-google@16.0.0": (
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "emoji-datasource-twitter@16.0.0": (
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "@iconify-json/fluent-emoji-high-contrast@1.2.6": (
        "iconify-json-fluent-emoji-high-contrast-1.2.6.tgz",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
}
# The MIT release leaves out trademarks (video game, paperclips, technologists), country flags and families, all of which
# the 3D package has. The icon set made from the release says which code points it holds; these are struck out by hand:
# the trademarks, and two whose drawing is not the release's (chequered flag, billed cap).
FLUENT_LEFT_OUT = {
    *("1f3ae", "1f4ce", "1f587", "1f9d1-200d-1f4bb", "1f468-200d-1f4bb", "1f469-200d-1f4bb"),
    *("1f3c1", "1f9e2"),
}
HAND_SUBCATEGORIES = {"body-parts"}  # and every one that starts with "hand"
COMPANY = r"KISS|COUPLE WITH HEART|.*HOLDING HANDS"  # variants of one drawing with other people in it
README = """# emoji64

Emoji drawn by three artists (Noto, Twemoji, Fluent), 64x64 pixels on white, in ten classes: `{train,val}/<class>/<image>`.
They are drawings, not photographs. About a tenth is in `val/`; an emoji stands there, or in `train/`, with all its artists,
genders and directions. `index.csv` names every image. Licences and attribution: `NOTICE.md`.
"""


@dataclass(frozen=True)
class Emoji:
    """One code point (or sequence) and the class it belongs to."""

    code: str  # lower-case hex joined by "-", without variation selectors
    name: str
    class_name: str
    files: dict[str, str]  # artist -> member of that artist's package
    group: str = ""  # smallest code of the emoji that must be on one side of the split


def plain_code(code: str) -> str:
    """Drop the variation selector, which packages write differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def class_of(category: str, subcategory: str, name: str) -> str | None:
    """Return the folder name, or None for what is left out: skin tones alone, and pictograms of people."""
    if category == "Component" or subcategory == "person-symbol" or name.startswith("FAMILY"):
        return None
    if category == "People & Body":
        is_part = subcategory in HAND_SUBCATEGORIES or subcategory.startswith("hand")
        return "Hands & Body" if is_part else "People"
    return category


def family_of(code: str, name: str) -> str:
    """Return what an emoji shares with its variants: its person without gender, direction or company."""
    company = re.match(COMPANY, name)
    if company:
        return company.group().split()[-1]
    parts = code.split("-")
    for tail in (["200d", "27a1"], ["200d", "2640"], ["200d", "2642"]):  # facing right, woman, man
        if parts[-2:] == tail:
            parts = parts[:-2]
    return "-".join("1f9d1" if part in ("1f468", "1f469") else part for part in parts)


def read_list(packages: dict[str, tarfile.TarFile]) -> list[Emoji]:
    """Join the three packages by code point."""
    google, twitter, fluent, released = packages.values()
    entries = json.load(google.extractfile("package/emoji.json"))
    in_release = {plain_code(code) for code in json.load(released.extractfile("package/chars.json"))} - FLUENT_LEFT_OUT
    fluent_files = {plain_code(Path(name).stem): name for name in fluent.getnames() if name.endswith(".webp")}
    members = {"noto": set(google.getnames()), "twemoji": set(twitter.getnames())}
    emoji = []
    for entry in entries:
        class_name = class_of(entry["category"], entry["subcategory"], entry["name"])
        if class_name is None:
            continue
        code = plain_code(entry["unified"])
        files = {
            "noto": f"package/img/google/64/{entry['image']}",
            "twemoji": f"package/img/twitter/64/{entry['image']}",
        }
        files = {artist: name for artist, name in files.items() if name in members[artist]}
        if code in in_release and code in fluent_files:
            files["fluent"] = fluent_files[code]
        emoji.append(Emoji(code, entry["name"], class_name, files))
    return sorted(emoji, key=lambda one: one.code)


def draw(data: bytes) -> Image.Image:
    """Return a drawing as 64x64 RGB on white."""
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    image = canvas.convert("RGB")
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def encode(image: Image.Image) -> bytes:
    """Return lossless WebP bytes of the image with values rounded to even ones (white stays), which saves 8 %."""
    buffer = io.BytesIO()
    # more effort (method 6, quality 100) saves 1 % more and takes twenty times as long
    rounded = image.point(lambda value: min(255, (value + 1) // 2 * 2))
    rounded.save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def join_groups(emoji: list[Emoji], pixels: dict[tuple[str, str], bytes]) -> list[Emoji]:
    """Give emoji that share a family, or a drawing by any artist (flags of territories), one group."""
    parent = {one.code: one.code for one in emoji}

    def find(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    first: dict[object, str] = {}
    for one in emoji:
        keys = [family_of(one.code, one.name), *(hashlib.sha256(pixels[one.code, a]).digest() for a in one.files)]
        for key in keys:
            ends = sorted((find(first.setdefault(key, one.code)), find(one.code)))
            parent[ends[1]] = ends[0]
    return [replace(one, group=find(one.code)) for one in emoji]


def split_of(group: str) -> str:
    """Return "val" for a tenth of all groups, by a hash, so that adding emoji moves none."""
    fraction = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "val" if fraction < VAL_SHARE else "train"


def fetch(folder: Path | None) -> dict[str, tarfile.TarFile]:
    """Open the four packages, fetched where no folder is given; stop if one is not the expected file."""
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="emoji64-"))
        subprocess.run(["npm", "pack", *PACKAGES], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    opened = {}
    for package, (name, expected) in PACKAGES.items():
        path = folder / name
        if not path.is_file():
            sys.exit(f"error: {path} is missing: fetch it with `npm pack {package}`")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            sys.exit(f"error: {path} is not the file this script was written for (SHA-256 differs)")
        opened[package] = tarfile.open(path)  # noqa: SIM115 - read until the script ends
    return opened


def build(folder: Path | None, out: Path) -> None:
    """Write the zip and print the counts."""
    packages = fetch(folder)
    google, twitter, fluent, _ = packages.values()
    archives = {"noto": google, "twemoji": twitter, "fluent": fluent}
    emoji = read_list(packages)
    images = {
        (one.code, artist): draw(archives[artist].extractfile(name).read())
        for one in emoji
        for artist, name in one.files.items()
    }
    emoji = join_groups(emoji, {key: image.tobytes() for key, image in images.items()})
    files = {name: (EMBEDDED / name).read_bytes() for name in ("NOTICE.md", "LICENSE-Apache-2.0.txt")}
    rows, counts = [], Counter()
    for one in emoji:
        split = split_of(one.group)
        for artist in one.files:
            path = f"{split}/{one.class_name}/{one.code}-{artist}.webp"
            files[path] = encode(images[one.code, artist])
            rows.append((path, one.name.lower(), one.class_name, artist, one.code, one.group))
            counts[split, one.class_name] += 1
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("path", "name", "class", "artist", "code", "group"))
    writer.writerows(sorted(rows))
    files["README.md"] = README.encode()
    files["index.csv"] = table.getvalue().encode()
    with zipfile.ZipFile(out, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, ZIP_DATE)
            # images are compressed already; the texts are not
            info.compress_type = zipfile.ZIP_STORED if name.endswith(".webp") else zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name])
    for class_name in sorted({name for _, name in counts}):
        print(f"{class_name:20} train {counts['train', class_name]:5} val {counts['val', class_name]:4}")
    print(
        f"{len(rows)} images, {out.stat().st_size / 1e6:.2f} MB, sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder with the four package files; fetched if not given")
    parser.add_argument("--out", type=Path, default=EMBEDDED / "emoji64.zip")
    arguments = parser.parse_args()
    build(arguments.packages, arguments.out)
