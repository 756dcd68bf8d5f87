"""The table of hostile and odd images: used, converted and counted, or skipped with a reason. Never a traceback."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varcli.data.decode import UnusableImage, load_image


def save(path: Path, image: Image.Image, kind: str, **options) -> Path:
    image.save(path, kind, **options)
    return path


def gradient(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_are_told_by_content_not_by_name(tmp_path, kind):
    image, _ = load_image(save(tmp_path / "picture.JPEG", gradient(), kind))
    assert image.mode == "RGB"
    assert image.size == (40, 30)


def test_plain_rgb_has_no_notes(tmp_path):
    image, notes = load_image(save(tmp_path / "a.png", gradient(), "PNG"))
    assert notes == []
    assert np.array_equal(np.asarray(image), np.asarray(gradient()))


@pytest.mark.parametrize(
    ("mode", "kind", "note"),
    [
        ("L", "PNG", "grey"),
        ("L", "JPEG", "grey"),
        ("1", "PNG", "1-bit"),
        ("P", "PNG", "palette"),
        ("CMYK", "JPEG", "CMYK"),
    ],
)
def test_other_modes_become_rgb_and_are_counted(tmp_path, mode, kind, note):
    image, notes = load_image(save(tmp_path / "a", gradient(mode), kind))
    assert image.mode == "RGB"
    assert note in notes


def test_cmyk_jpegs_are_not_inverted(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    path = save(tmp_path / "a.jpg", cyan, "JPEG", quality=95)
    assert b"Adobe" in path.read_bytes()  # the kind that stores inverted values, as Photoshop does
    image, notes = load_image(path)
    assert notes == ["CMYK"]
    assert np.allclose(np.asarray(image, float).mean((0, 1)), (0, 255, 255), atol=4)


def test_transparency_is_laid_over_white(tmp_path):
    half = Image.new("RGBA", (8, 8), (0, 0, 255, 128))
    image, notes = load_image(save(tmp_path / "a.png", half, "PNG"))
    assert notes == ["alpha over white"]
    assert image.getpixel((0, 0)) == (127, 127, 255)
    clear = Image.new("LA", (8, 8), (0, 0))
    assert load_image(save(tmp_path / "b.png", clear, "PNG"))[0].getpixel((3, 3)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    image, notes = load_image(save(tmp_path / "c.png", palette, "PNG", transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert set(notes) == {"palette", "alpha over white"}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, kind):
    values = np.array([[0, 256, 32768, 65535]], np.uint16).repeat(4, 0)
    image, notes = load_image(save(tmp_path / "a", Image.fromarray(values), kind))
    assert notes == ["16-bit"]
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_colour_is_scaled_not_clipped(tmp_path):
    values = np.array([[[65535, 32768, 0], [257, 256, 511]]], ">u2")
    rows = b"".join(b"\x00" + row.tobytes() for row in values)
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(2, 1, bits=16, colour=2, data=zlib.compress(rows)))
    image, notes = load_image(path)
    assert notes == ["16-bit"]
    assert np.asarray(image)[0].tolist() == [[255, 128, 0], [1, 1, 1]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_used(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = save(tmp_path / "a", frames[0], kind, save_all=True, append_images=frames[1:], **options)
    image, notes = load_image(path)
    assert "first of several frames" in notes
    assert image.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "expected"), [(1, []), (3, ["orientation ignored"]), (6, ["orientation ignored"])]
)
def test_orientation_in_exif_is_ignored_and_noted(tmp_path, kind, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, notes = load_image(save(tmp_path / "a", gradient(), kind, exif=exif))
    assert image.size == (40, 30) and notes == expected


def test_broken_exif_is_passed_over(tmp_path):
    path = save(tmp_path / "b.jpg", gradient(), "JPEG", exif=b"Exif\x00\x00garbage" * 3, icc_profile=b"not a profile")
    assert load_image(path)[0].size == (40, 30)


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def png_bytes(width: int, height: int, bits: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    text = chunk(b"zTXt", extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "empty"),
    "random": (bytes(np.random.default_rng(1).integers(0, 256, 500, dtype=np.uint8)), "not an image"),
    "text": (b"just some text", "not an image"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "pickle": (pickle.dumps({"a": 1}), "not an image"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    "short jpeg": (jpeg_bytes()[:-200], "truncated"),
    "torn jpeg": (jpeg_bytes()[:-800] + bytes(800), "truncated"),
    "jpeg header": (jpeg_bytes()[:100], "truncated|damaged|not an image"),
    "short png": (png_bytes(64, 64, data=zlib.compress(bytes(64 * 193)))[:-40], "damaged|truncated"),
    "png without pixels": (png_bytes(64, 64, data=zlib.compress(b"")), "damaged"),
    "damaged png": (png_bytes(64, 64, data=b"\x78\x9c" + b"\xaa" * 50), "damaged"),
    "declared too large": (png_bytes(60000, 60000, data=zlib.compress(bytes(100))), "pixels"),
    "a little too large": (png_bytes(9000, 9000, data=zlib.compress(bytes(100))), "pixels"),
    "text bomb": (
        png_bytes(1, 1, data=zlib.compress(bytes(4)), extra=b"k\0\0" + zlib.compress(bytes(2**24))),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_image_is_refused_with_a_reason(tmp_path, name):
    data, reason = BAD[name]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with pytest.raises(UnusableImage, match=reason) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    assert str(path) not in str(caught.value)


def test_every_cut_of_every_format_is_an_image_or_a_reason(tmp_path):
    path = tmp_path / "a"
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        gradient(size=(16, 16)).save(buffer, kind)
        data = buffer.getvalue()
        for end in range(0, len(data), max(1, len(data) // 40)):
            path.write_bytes(data[:end])
            try:
                load_image(path)
            except UnusableImage:
                continue


def test_every_flipped_byte_is_an_image_or_a_reason(tmp_path):
    path = tmp_path / "a"
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        gradient(size=(16, 16)).save(buffer, kind)
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            for place in random.integers(0, len(data), 3):
                data[place] ^= int(random.integers(1, 256))
            path.write_bytes(data)
            try:
                load_image(path)
            except UnusableImage:
                continue


def test_folders_pipes_and_missing_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "nothing.png", "."):
        with pytest.raises(UnusableImage):
            load_image(tmp_path / name)


def test_a_float_image_has_no_set_range(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(UnusableImage, match="range"):
        load_image(path)
