"""An npz without single files: the bytes of the one written beside PNGs, whatever came in between."""

from __future__ import annotations

import pytest
import torch

from varcli.artifacts.verify import read_manifest, verify_folder
from varcli.data import parts as parts_module
from varcli.data.parts import NpzWriter, PartsSaver
from varcli.data.samples import SamplesWriter, sample_pairs
from varcli.errors import ArtifactError, ConfigError

WANTED = [(class_index, index) for class_index in (0, 7) for index in range(5)]


def images(pairs):
    drawn = [torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=_seeded(*pair)) for pair in pairs]
    return torch.stack(drawn)


def _seeded(class_index: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * class_index + index)


@pytest.fixture
def expected(tmp_path):
    with SamplesWriter(tmp_path / "pngs", {"seed": 0}) as writer:
        for pair in WANTED:
            writer.write(*pair, images([pair])[0])
        writer.finish(WANTED, npz=True)
    return {name: (tmp_path / "pngs" / name).read_bytes() for name in ("samples.npz", "grid.png")}


def check(folder, expected):
    manifest = read_manifest(folder, "samples")
    assert verify_folder(folder, manifest) == [] and set(manifest.files) == {"samples.npz", "grid.png"}
    assert sample_pairs(manifest) == WANTED
    assert not [path for path in folder.iterdir() if path.name.startswith((".part", ".plan", ".tmp"))]
    for name, data in expected.items():
        assert (folder / name).read_bytes() == data, name


def test_parts_of_several_processes_in_any_order_are_joined_into_the_same_bytes(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(parts_module, "_OPEN_PARTS", 1)
    with NpzWriter(tmp_path / "out", {"seed": 0}) as writer:
        assert writer.missing(WANTED) == WANTED
        for own in (WANTED[7:], WANTED[:2] + WANTED[4:6], WANTED[2:4] + WANTED[6:7]):
            with PartsSaver(tmp_path / "out") as saver:
                for start in range(0, len(own), 2):
                    saver.save(own[start : start + 2], images(own[start : start + 2]))
        writer.add(WANTED)
        writer.finish(WANTED)
        assert writer.num_images == 10
    check(tmp_path / "out", expected)


def test_a_stopped_job_goes_on_with_what_its_parts_lack(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(parts_module, "_PART_BYTES", 3 * 3 * 8 * 8)  # three images
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), NpzWriter(out, {"seed": 0}), PartsSaver(out) as saver:
        for pair in WANTED[:5]:
            saver.save([pair], images([pair]))
        raise KeyboardInterrupt
    assert len(list(out.glob(".part-*"))) == 2  # the second one was written on the way out
    with NpzWriter(out, {"seed": 0}) as writer:
        missing = writer.missing(WANTED)
        assert missing == WANTED[5:]
        with pytest.raises(ArtifactError, match="lacks 5 of 10"):
            writer.finish(WANTED)
        with PartsSaver(out) as saver:
            saver.save(missing, images(missing))
        writer.add(missing)
        writer.finish(WANTED)
    check(out, expected)


def test_a_whole_folder_is_left_as_it_is_and_takes_no_more(tmp_path):
    out = tmp_path / "out"
    with NpzWriter(out, {"seed": 0}) as writer:
        with PartsSaver(out) as saver:
            saver.save(WANTED, images(WANTED))
        writer.add(WANTED)
        digest = writer.finish(WANTED).digest
    with NpzWriter(out, {"seed": 0}) as writer:
        assert writer.missing(WANTED[:3]) == []
        writer.add([])
        assert writer.finish(WANTED).digest == digest
        with pytest.raises(ConfigError, match=r"finished samples\.npz, without 1 of"):
            writer.missing([*WANTED, (9, 0)])
    with open(out / "samples.npz", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match="differs from its manifest"), NpzWriter(out, {"seed": 0}):
        pass


def test_a_damaged_part_is_one_clear_error(tmp_path):
    out = tmp_path / "out"
    with NpzWriter(out, {}), PartsSaver(out) as saver:
        saver.save(WANTED, images(WANTED))
    (part,) = out.glob(".part-*")
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(ArtifactError, match="is damaged") as caught, NpzWriter(out, {}):
        pass
    assert "delete it" in caught.value.hint
