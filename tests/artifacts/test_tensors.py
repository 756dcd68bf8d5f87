"""The safetensors format: what the library writes is read as it reads it, and nothing is accepted that it refuses."""

from __future__ import annotations

import json
import random
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from varcli.artifacts.tensors import parse_tensors
from varcli.artifacts.verify import read_tensor_header
from varcli.errors import ArtifactError

TENSORS = {
    "half": torch.randn(2, 3).half(),
    "single": torch.randn(5),
    "double": torch.randn(3).double(),
    "brain": torch.randn(1, 7).bfloat16(),
    "eight": torch.randn(9).to(torch.float8_e4m3fn),
    "other eight": torch.randn(3).to(torch.float8_e5m2),
    "codes": torch.arange(4).to(torch.uint16),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(3).to(torch.uint8),
    "nothing": torch.zeros(0, 4),
}


def test_everything_the_library_writes_is_read_as_it_reads_it(tmp_path):
    data = safetensors.torch.save(TENSORS, {"format": "pt"})
    found = parse_tensors(bytearray(data), tmp_path)
    expected = safetensors.torch.load(data)
    assert found.keys() == TENSORS.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].float(), tensor.float()), name
    (tmp_path / "t.safetensors").write_bytes(data)
    header = read_tensor_header(tmp_path / "t.safetensors")
    assert header["half"] == ("F16", (2, 3)) and header["count"] == ("I64", ())
    assert header.keys() == TENSORS.keys()


def test_tensors_are_views_of_what_was_read_also_where_it_is_not_aligned(tmp_path):
    data = bytearray(safetensors.torch.save({"a": torch.arange(6.0)}))
    tensor = parse_tensors(data, tmp_path)["a"]
    data[-4:] = struct.pack("<f", 9.0)
    assert tensor.tolist() == [0, 1, 2, 3, 4, 9]
    text = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    odd = header(text + " " * (3 - len(text) % 4), struct.pack("<f", 5.0))
    assert (len(odd) - 4) % 4
    assert parse_tensors(bytearray(odd), tmp_path)["a"].item() == 5


def test_what_the_library_refuses_is_refused(tmp_path):
    """Headers with one thing changed: never a tensor where the library finds none, and never another error."""
    data = safetensors.torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0).half()})
    (length,) = struct.unpack("<Q", data[:8])
    text, payload = data[8 : 8 + length].decode().rstrip(), data[8 + length :]
    values = ["0", "-1", "24", "2.0", "null", "[]", "true", str(2**62), str(2**64), '"F32"', '"F99"', "1e3"]
    rng, numbers, refused = random.Random(0), [i for i, c in enumerate(text) if c.isdigit()], 0
    for _ in range(400):
        at = rng.choice(numbers)
        changed = header(text[:at] + rng.choice(values) + text[at + 1 :], payload)
        try:
            expected = safetensors.torch.load(changed)
        except Exception:
            expected = None
        try:
            found = parse_tensors(bytearray(changed), tmp_path)
        except ArtifactError:
            refused += 1
            continue
        assert expected is not None, changed[:200]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert refused > 300


@pytest.mark.parametrize("shape", [[2**62, 2**62, 0], [0, *[2] * 100]])
def test_a_shape_that_torch_does_not_take_is_one_error(shape, tmp_path):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    with pytest.raises(ArtifactError, match="shape that torch"):
        parse_tensors(bytearray(header(text)), tmp_path)


def header(text: str, payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + payload


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"PK\x03\x04" + bytes(100),
        header(' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        header(
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', bytes(4)),
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(9)),
        header("{not json}"),
        struct.pack("<Q", 2**40) + b"{" + bytes(20),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_files_that_are_not_honest_safetensors_are_one_clear_error(data, tmp_path):
    with pytest.raises(ArtifactError):
        parse_tensors(bytearray(data), tmp_path / "weights.safetensors")
