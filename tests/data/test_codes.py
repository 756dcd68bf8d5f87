"""The codes cache: bytes depend on plan, images and tokenizer alone; damage and wrong partners are named."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import varcli
from varcli.data.codes import CodesCache, CodesPlan, CodesWriter, require_tokenizer
from varcli.data.images import DecodeConfig, decode_images, open_images
from varcli.errors import ArtifactError, ConfigError, DataError, IntegrityError, LockedError, ShapeError, SkipLimitError

VIEWS = {"train": 3, "val": 1}


def make_plan(**changes) -> CodesPlan:
    decode = {"train": DecodeConfig(size=8, crop="random"), "val": DecodeConfig(size=8)}
    fields = {"tokenizer": "3fa1c2aa00000000", "patch_nums": (1, 2), "vocab_size": 100, "code_channels": 4}
    return CodesPlan(**{**fields, "downsampling": 4, "decode": decode, "views": VIEWS, "shard_images": 4, **changes})


def fake_codes(images: torch.Tensor) -> torch.Tensor:
    """Five codes an image that depend on its pixels."""
    return (images.flatten(1).long().sum(1, keepdim=True) * torch.arange(1, 6)) % 100


def write(out: Path, root: Path, stop_after: int | None = None, workers: int = 0, batch_size: int = 7, **changes):
    """Write a cache; with `stop_after`, leave after so many shards."""
    plan, tree = make_plan(**changes), open_images(root)
    shards = 0
    with CodesWriter(out, plan, tree) as writer:
        for split in tree.splits:
            images = writer.missing(split)
            stream = decode_images(tree, split, plan.decode[split], images, plan.views[split], workers, batch_size)
            for batch in stream:
                shards += writer.add(split, fake_codes(batch.images), batch)
                if stop_after is not None and shards >= stop_after:
                    return None
        return writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "manifest.json")}


def test_what_was_written_is_read(tiny_images, tmp_path):
    manifest = write(tmp_path / "codes", tiny_images)
    cache = CodesCache.open(tmp_path / "codes")
    assert cache.classes == ("apple", "boat", "cat")
    assert cache.patch_nums == (1, 2)
    assert cache.num_rows("train") == 45
    codes, labels, sources = cache.load("train")
    assert codes.dtype == torch.uint16
    assert sources.tolist() == [index for index in range(15) for _ in range(3)]
    assert labels.tolist() == [index // 5 for index in range(15) for _ in range(3)]
    config = make_plan().decode["train"]
    batch = next(decode_images(open_images(tiny_images), "train", config, views=3, workers=0))
    assert torch.equal(codes.long(), fake_codes(batch.images))
    assert cache.image_paths("val")[0] == "val/apple/0.png"
    assert manifest.info["splits"]["train"] == {
        "shards": [f"train-{number:05d}.safetensors" for number in range(4)],
        "rows": 45,
        "images": 15,
        "views": 3,
    }
    assert sorted(contents(tmp_path / "codes")) == sorted(manifest.files)


def test_bytes_do_not_depend_on_workers_or_batches(tiny_images, tmp_path):
    digests = {
        write(tmp_path / f"{workers}-{batch_size}", tiny_images, workers=workers, batch_size=batch_size).digest
        for workers, batch_size in ((0, 100), (0, 3), (2, 7))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_resuming_equals_never_stopping(tiny_images, tmp_path, stop_after):
    (tiny_images / "train" / "boat" / "2.png").write_text("no image")
    expected = write(tmp_path / "whole", tiny_images)
    assert write(tmp_path / "stopped", tiny_images, stop_after=stop_after, batch_size=5) is None
    with pytest.raises(ArtifactError, match="not a finished codes folder"):
        CodesCache.open(tmp_path / "stopped")
    done = {name: data for name, data in contents(tmp_path / "stopped").items() if name.endswith("safetensors")}
    changed = {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in done}
    assert write(tmp_path / "stopped", tiny_images).digest == expected.digest
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    # what was finished is not made again
    assert changed == {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in done}


def test_a_damaged_shard_of_an_unfinished_cache_is_made_again(tiny_images, tmp_path):
    expected = write(tmp_path / "whole", tiny_images)
    write(tmp_path / "stopped", tiny_images, stop_after=2)
    (tmp_path / "stopped" / "train-00000.safetensors").write_bytes(b"torn")
    (tmp_path / "stopped" / "train-00001.safetensors").unlink()
    with open(tmp_path / "stopped" / ".progress.jsonl", "a") as file:
        file.write('{"split": "train", "sha')
    assert write(tmp_path / "stopped", tiny_images).digest == expected.digest


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from test_codes import write
threading.Thread(target=lambda: (time.sleep(float(sys.argv[4])), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
import varcli.data.codes_shards as shards
slow = shards.write_tensors
shards.write_tensors = lambda *arguments: (time.sleep(0.02), slow(*arguments))
write(Path(sys.argv[1]), Path(sys.argv[2]), batch_size=1, shard_images=1)
"""


def test_a_cache_killed_at_any_moment_goes_on(tiny_images, tmp_path):
    expected = write(tmp_path / "whole", tiny_images, shard_images=1)
    environment = {**os.environ, "PYTHONPATH": str(Path(varcli.__file__).parents[1])}
    out = tmp_path / "killed"
    kills = 0
    for moment in (0.03, 0.11, 0.17):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), out, tiny_images, Path(__file__).parent, str(moment)]
        done = subprocess.run(command, env=environment, check=False)
        kills += done.returncode == -signal.SIGKILL
        if (out / "manifest.json").exists():
            break
        assert not any(path.name.startswith("train-") and path.stat().st_size == 0 for path in out.glob("*"))
    assert kills >= 2
    assert write(out, tiny_images, shard_images=1).digest == expected.digest
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tokenizer": "91be070000000000"}, "tokenizer"),
        ({"vocab_size": 200}, "vocab_size"),
        (
            {"decode": {"train": DecodeConfig(size=8, seed=1), "val": DecodeConfig(size=8)}},
            ": seed was 0, now 1; crop was",
        ),
        ({"views": {"train": 2, "val": 1}}, "views"),
        ({"shard_images": 5}, "shard_images"),
        ({"precision": "bf16"}, "precision"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_not_mixed_into_a_cache(tiny_images, tmp_path, changes, word, finished):
    write(tmp_path / "codes", tiny_images, stop_after=None if finished else 1)
    before = contents(tmp_path / "codes")
    with pytest.raises(ConfigError, match=word) as caught:
        write(tmp_path / "codes", tiny_images, **changes)
    assert "another --out" in caught.value.hint
    assert contents(tmp_path / "codes") == before


@pytest.mark.parametrize("finished", [False, True])
def test_float32_is_not_mixed_into_a_cache_of_another_precision(tiny_images, tmp_path, finished):
    write(tmp_path / "codes", tiny_images, None if finished else 1, precision="fp16")
    before = contents(tmp_path / "codes")
    with pytest.raises(ConfigError, match="precision was fp16, now fp32"):
        write(tmp_path / "codes", tiny_images)
    assert contents(tmp_path / "codes") == before


def test_a_cache_in_float32_does_not_name_its_precision_and_others_do(tiny_images, tmp_path):
    assert "precision" not in write(tmp_path / "plain", tiny_images).info
    assert write(tmp_path / "fast", tiny_images, precision="bf16").info["precision"] == "bf16"


def test_notes_outlive_a_stop_and_reach_the_manifest(tiny_images, tmp_path):
    plan, tree = make_plan(), open_images(tiny_images)
    with CodesWriter(tmp_path / "codes", plan, tree) as writer:
        writer.note("agreement", {"tokens": 0.5})
    assert write(tmp_path / "codes", tiny_images).info["agreement"] == {"tokens": 0.5}


def test_other_images_are_not_mixed_into_a_cache(tiny_images, tmp_path):
    write(tmp_path / "codes", tiny_images, stop_after=1)
    (tiny_images / "train" / "cat" / "0.png").unlink()
    with pytest.raises(ConfigError, match=": other images"):
        write(tmp_path / "codes", tiny_images)


def test_a_finished_cache_is_left_alone(tiny_images, tmp_path):
    digest = write(tmp_path / "codes", tiny_images).digest
    with CodesWriter(tmp_path / "codes", make_plan(), open_images(tiny_images)) as writer:
        assert writer.finished.digest == digest
        assert len(writer.missing("train")) == 0
        assert writer.finish().digest == digest


def test_a_folder_with_other_things_is_refused(tiny_images, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        write(tmp_path / "codes", tiny_images)


def test_a_run_in_place_of_codes_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is a run, but a codes cache is needed"):
        CodesCache.open(tmp_path)


def test_two_writers_are_refused(tiny_images, tmp_path):
    tree = open_images(tiny_images)
    with CodesWriter(tmp_path / "codes", make_plan(), tree), pytest.raises(LockedError):
        CodesWriter(tmp_path / "codes", make_plan(), tree).__enter__()


def test_skips_are_listed_and_limited(tiny_images, tmp_path):
    (tiny_images / "train" / "boat" / "2.png").write_text("no image")
    os.mkfifo(tiny_images / "val" / "cat" / "pipe.png")
    plan, tree = make_plan(), open_images(tiny_images)
    with CodesWriter(tmp_path / "codes", plan, tree) as writer:
        for split in tree.splits:
            for batch in decode_images(tree, split, plan.decode[split], views=plan.views[split], workers=0):
                writer.add(split, fake_codes(batch.images), batch)
        with pytest.raises(SkipLimitError, match="2 images were skipped, but at most 1") as caught:
            writer.finish(max_skip=1)
        assert "--max-skip 2" in caught.value.hint
        assert not (tmp_path / "codes" / "manifest.json").exists()
    manifest = write(tmp_path / "codes", tiny_images)
    assert {(skip["path"], skip["reason"].split(" (")[0]) for skip in manifest.info["skipped"]} == {
        ("val/cat/pipe.png", "not a regular file"),
        ("train/boat/2.png", "not an image of a known format"),
    }
    cache = CodesCache.open(tmp_path / "codes")
    assert cache.num_rows("train") == 42
    assert 7 not in cache.load("train").sources.tolist()


def test_codes_that_do_not_fit_are_refused(tiny_images, tmp_path):
    plan, tree = make_plan(), open_images(tiny_images)
    with CodesWriter(tmp_path / "codes", plan, tree) as writer:
        batch = next(decode_images(tree, "train", plan.decode["train"], workers=0))
        for codes in (torch.zeros(15, 4, dtype=torch.long), torch.full((15, 5), 100), torch.full((15, 5), -1)):
            with pytest.raises(ShapeError):
                writer.add("train", codes, batch)
        with pytest.raises(ArtifactError, match="not complete"):
            writer.finish()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap", "listing", "manifest rows"])
def test_damage_is_named_before_the_bytes_are_used(tiny_images, tmp_path, damage):
    write(tmp_path / "codes", tiny_images)
    shard, other = (tmp_path / "codes" / f"train-0000{number}.safetensors" for number in (1, 2))
    name = shard.name
    if damage == "flip":
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(bytes(data))
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "swap":
        shard.write_bytes(other.read_bytes())
    elif damage == "listing":
        name = "train-images.txt"
        (tmp_path / "codes" / name).write_text("other\n" * 15)
    else:
        name = "train"
        path = tmp_path / "codes" / "manifest.json"
        value = json.loads(path.read_text())
        value["info"]["splits"]["train"]["rows"] += 1
        path.write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match=name):
        cache = CodesCache.open(tmp_path / "codes")
        cache.load("train")
        cache.image_paths("train")


def test_values_outside_their_range_are_refused(tiny_images, tmp_path):
    write(tmp_path / "codes", tiny_images)
    path = tmp_path / "codes" / "manifest.json"
    value = json.loads(path.read_text())
    value["info"]["vocab_size"] = 3
    path.write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match="codes outside"):
        CodesCache.open(tmp_path / "codes").load("train")


def test_another_tokenizer_is_refused_with_both_names(tiny_images, tmp_path):
    write(tmp_path / "codes", tiny_images)
    cache = CodesCache.open(tmp_path / "codes")
    require_tokenizer(cache, "3fa1c2aa00000000")
    with pytest.raises(ArtifactError, match="written by tokenizer 3fa1c2, but `--tokenizer` is 91be07") as caught:
        require_tokenizer(cache, "91be070000000000")
    assert "varcli tokenize" in caught.value.hint


def test_unknown_splits_are_named(tiny_images, tmp_path):
    write(tmp_path / "codes", tiny_images)
    with pytest.raises(DataError, match="unknown split `test`"):
        CodesCache.open(tmp_path / "codes").load("test")


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 70000}, {"views": {"train": 1}}, {"shard_images": 0}, {"views": {"train": 0, "val": 1}}]
)
def test_plans_that_cannot_work_are_refused(changes):
    with pytest.raises(ConfigError):
        make_plan(**changes)
    assert dataclasses.replace(make_plan(), vocab_size=65536).vocab_size == 2**16


def test_a_large_vocabulary_fits_sixteen_bits(tiny_images, tmp_path):
    plan, tree = make_plan(vocab_size=65536), open_images(tiny_images)
    with CodesWriter(tmp_path / "codes", plan, tree) as writer:
        for split in tree.splits:
            for batch in decode_images(tree, split, plan.decode[split], views=1, workers=0):
                writer.add(split, torch.full((len(batch.images), 5), 65535), batch)
        writer.finish()
    assert np.unique(CodesCache.open(tmp_path / "codes").load("train").codes.numpy()).tolist() == [65535]


def test_a_folder_of_images_in_place_of_codes_is_told_with_the_command_to_run(tiny_images):
    with pytest.raises(ArtifactError, match="is a folder of images, but a codes cache is needed") as caught:
        CodesCache.open(tiny_images)
    assert caught.value.hint == f"make one with `varcli tokenize {tiny_images}`"
