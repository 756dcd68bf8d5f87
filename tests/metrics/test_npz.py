"""npz files: streamed where they are honest, refused where they are not."""

from __future__ import annotations

import io
import warnings
import zipfile

import numpy as np
import pytest
import torch

from varcli.errors import ArtifactError, DataError, ShapeError, UnsafeFileError, VarcliError
from varcli.metrics.npz import STATISTICS_KEYS, open_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_arrive_in_order_whatever_the_batch(path, save):
    save(path, arr_0=IMAGES)
    file = open_npz(path)
    assert file.image_shape == (7, 4, 6)
    for batch_size in (1, 3, 100):
        batches = list(file.read_images(batch_size))
        assert max(map(len, batches)) == min(batch_size, 7)
        assert torch.equal(torch.cat(batches), torch.from_numpy(IMAGES).permute(0, 3, 1, 2))


def test_statistics_are_read_and_checked(path):
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3, dtype=np.float32))
    file = open_npz(path)
    assert file.image_shape is None
    assert file.read_statistics(("mu_s", "sigma_s")) is None
    assert np.array_equal(file.read_statistics(STATISTICS_KEYS).mean, np.arange(3))
    np.savez(path, mu=np.arange(3.0), sigma=-np.eye(3))
    with pytest.raises(ShapeError, match="negative eigenvalue"):
        open_npz(path).read_statistics(STATISTICS_KEYS)


def test_python_objects_are_refused_unread(path):
    np.savez(path, arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UnsafeFileError, match="Python objects"):
        open_npz(path)


@pytest.mark.parametrize(
    "array", [IMAGES.astype(np.float32), IMAGES[0], IMAGES[..., :2], IMAGES[:0], np.asfortranarray(IMAGES)]
)
def test_arrays_that_are_no_images_are_refused(path, array):
    np.savez(path, arr_0=array)
    with pytest.raises(ShapeError, match=r"must be uint8 \(N, H, W, 3\)"):
        assert open_npz(path).image_shape


def test_other_arrays_are_named(path):
    np.savez(path, images=IMAGES)
    with pytest.raises(ArtifactError, match="neither images nor statistics, but images"):
        open_npz(path)


def _member(header: bytes | None = None, shape: tuple[int, ...] = IMAGES.shape) -> bytes:
    buffer = io.BytesIO()
    if header is None:
        np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return (header or buffer.getvalue()) + IMAGES.tobytes()


@pytest.mark.parametrize(
    "members",
    [
        [("arr_0.npy", _member(shape=(10**9, 4, 6, 3)))],
        [("arr_0.npy", _member(shape=(2, 4, 6, 3)))],
        [("arr_0.npy", _member()), ("arr_0.npy", _member())],
        [("arr_0.npy", b"")],
        [("arr_0.npy", b"not an array at all")],
        [("arr_0.npy", _member(b"\x93NUMPY\x01\x00\x20\x00{'descr': __import__('os')}      \n"))],
        [("arr_0.npy", _member(b"\x93NUMPY\x09\x00\x20\x00"))],
    ],
)
def test_files_that_lie_are_refused(path, members):
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile notices the name that stands twice
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    with pytest.raises(VarcliError):
        open_npz(path)


@pytest.mark.parametrize("data", [b"", b"<html>", b"PK\x03\x04 and no more"])
def test_what_is_no_archive_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not a whole npz file"):
        open_npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_statistics_are_one_error(path, save):
    save(path, mu=np.random.default_rng(0).random(500), sigma=np.eye(500))
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("mu.npy").header_offset
    data = bytearray(path.read_bytes())
    data[start + 1500] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        open_npz(path).read_statistics(STATISTICS_KEYS)


def test_a_damaged_archive_is_found_while_reading(path):
    np.savez(path, arr_0=np.zeros((100, 32, 32, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        list(open_npz(path).read_images(2))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([2, 0, 1]), [2, 0, 1]),
        (np.array([2, 0, 1], np.uint8), [2, 0, 1]),
        (np.array([2, 0]), None),
        (np.array([2.0, 0.0, 1.0]), None),
        (np.eye(3, dtype=int), None),
        (np.array([0, 1, 2**62]), None),
    ],
)
def test_labels_are_read_where_they_are_classes(tmp_path, labels, expected):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=labels)
    found = open_npz(tmp_path / "samples.npz").read_labels()
    assert found is None if expected is None else found.tolist() == expected


def test_damaged_labels_are_one_error(tmp_path):
    path = tmp_path / "samples.npz"
    labels = np.arange(20_000)  # more than is read along with the header
    np.savez(path, arr_0=np.zeros((20_000, 1, 1, 3), np.uint8), arr_1=labels)
    path.write_bytes(path.read_bytes().replace(labels[-3:].tobytes(), labels[-3:][::-1].tobytes()))
    with pytest.raises(DataError, match="its labels are damaged"):
        open_npz(path).read_labels()
