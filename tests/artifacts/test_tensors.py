"""The safetensors format: what the library writes is read as it reads it, and what it refuses is refused."""

from __future__ import annotations

import gc
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

DTYPES = ["bool", "uint8", "int8", "float8_e5m2", "float8_e4m3fn", "uint16", "int16", "float16", "bfloat16"]
DTYPES += ["uint32", "int32", "float32", "uint64", "int64", "float64"]
TENSORS = {name: torch.arange(6).remainder(2 if name == "bool" else 7).to(getattr(torch, name)) for name in DTYPES}
TENSORS |= {"count": torch.tensor(7), "nothing": torch.zeros(0, 4), "table": torch.arange(6.0).view(2, 3).half()}


def test_everything_the_library_writes_is_read_as_it_reads_it(tmp_path):
    data = safetensors.torch.save(TENSORS, {"format": "pt"})
    found = parse_tensors(memoryview(bytearray(data)), tmp_path)
    expected = safetensors.torch.load(data)
    assert found.keys() == TENSORS.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].float(), tensor.float()), name
    (tmp_path / "t.safetensors").write_bytes(data)
    header = read_tensor_header(tmp_path / "t.safetensors")
    assert header["table"] == ("F16", (2, 3)) and header["count"] == ("I64", ())
    assert header.keys() == TENSORS.keys()


def test_tensors_are_views_of_what_was_read_also_where_it_is_not_aligned(tmp_path):
    data = bytearray(safetensors.torch.save({"a": torch.arange(6.0)}))
    tensor = parse_tensors(memoryview(data), tmp_path)["a"]
    data[-4:] = struct.pack("<f", 9.0)
    assert tensor.tolist() == [0, 1, 2, 3, 4, 9]
    text = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    odd = header(text + " " * (3 - len(text) % 4), struct.pack("<f", 5.0))
    assert (len(odd) - 4) % 4
    assert parse_tensors(memoryview(bytearray(odd)), tmp_path)["a"].item() == 5


def test_tensors_keep_what_was_read(tmp_path):
    data = safetensors.torch.save({"a": torch.arange(1000.0), "b": torch.ones(3)})
    tensors = parse_tensors(memoryview(bytearray(data)), tmp_path)
    del tensors["b"]
    gc.collect()
    spoil = [bytearray(len(data)) for _ in range(9)]
    assert torch.equal(tensors["a"], torch.arange(1000.0)) and len(spoil) == 9


def test_headers_with_a_digit_changed_are_read_as_the_library_reads_them(tmp_path):
    """Never a tensor where the library finds none, and never another error."""
    data = safetensors.torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0).half()})
    (length,) = struct.unpack("<Q", data[:8])
    text, payload = data[8 : 8 + length].decode().rstrip(), data[8 + length :]
    values = ["0", "-1", "24", "2.0", "null", "[]", "true", str(2**62), str(2**64), '"F32"', '"F99"', "1e3"]
    rng, numbers, refused, read = random.Random(0), [i for i, c in enumerate(text) if c.isdigit()], 0, 0
    for _ in range(400):
        at = rng.choice(numbers)
        changed = header(text[:at] + rng.choice(values) + text[at + 1 :], payload)
        try:
            expected = safetensors.torch.load(changed)
        except Exception:
            expected = None
        try:
            found = parse_tensors(memoryview(bytearray(changed)), tmp_path)
        except ArtifactError:
            refused += 1
            continue
        read += 1
        assert expected is not None, changed[:200]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert refused > 300 and read > 0


@pytest.mark.parametrize("shape", [[2**62, 2**62, 0], [2**62, 2**62, 2**62, 0]])
def test_a_shape_that_torch_does_not_take_is_one_error(shape, tmp_path):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    with pytest.raises(ArtifactError, match="shape that torch"):
        parse_tensors(memoryview(bytearray(header(text))), tmp_path)


def header(text: str, payload: bytes = b"", encoding: str = "utf-8") -> bytes:
    return struct.pack("<Q", len(text.encode(encoding))) + text.encode(encoding) + payload


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
        header('{"__metadata__":5}'),
        header('{"__metadata__":{"a":1}}'),
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', bytes(4)),
        header('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), "utf-16-le"),
        header(f'{{"a":{{"dtype":"F32","shape":[{"1," * 100_000}1],"data_offsets":[0,4]}}}}', bytes(4)),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_files_that_are_not_honest_safetensors_are_one_clear_error(data, tmp_path):
    with pytest.raises(ArtifactError):
        parse_tensors(memoryview(bytearray(data)), tmp_path / "weights.safetensors")
