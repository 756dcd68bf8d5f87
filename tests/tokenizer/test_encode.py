"""A folder of images becomes the same codes however the work is cut up."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from varcli.artifacts.verify import read_json_lines, read_manifest
from varcli.data import codes_shards
from varcli.data.codes import CodesCache
from varcli.data.images import decode_images, open_images
from varcli.data.views import DecodeConfig
from varcli.errors import ArtifactError, ConfigError, SkipLimitError
from varcli.progress import Step
from varcli.tokenizer import encode
from varcli.tokenizer.encode import tokenize
from varcli.tokenizer.find import default_tokenizer, find_tokenizer, tokenizer_folder
from varcli.tokenizer.store import load_tokenizer, save_tokenizer
from varcli.training.run import copy_artifact


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    return tmp_path / "tokenizer"


def test_cache_holds_what_the_tokenizer_makes_of_each_image(folder, tiny_images, tmp_path):
    result = tokenize(tiny_images, tmp_path / "codes", folder, workers=0, device="cpu")
    assert (result.num_images, result.num_rows, result.num_skipped) == (21, 21, 0)
    cache, tokenizer = CodesCache.open(tmp_path / "codes"), load_tokenizer(folder)
    assert cache.tokenizer == tokenizer.fingerprint()
    tree = open_images(tiny_images)
    for split in ("train", "val"):
        codes, labels, _ = cache.load(split)
        (batch,) = decode_images(tree, split, DecodeConfig(size=32, crop="none"), workers=0)
        assert torch.equal(codes.long(), tokenizer.encode(batch.images.float() / 127.5 - 1))
        assert labels.tolist() == batch.labels.tolist()


def test_codes_do_not_depend_on_batch_or_workers(folder, tiny_images, tmp_path):
    settings = [{"batch_size": 1, "workers": 0}, {"batch_size": 7, "workers": 0}, {"batch_size": 64, "workers": 2}]
    digests = set()
    for number, values in enumerate(settings):
        tokenize(tiny_images, tmp_path / str(number), folder, views=3, device="cpu", **values)
        digests.add(read_manifest(tmp_path / str(number), "codes").digest)
    assert len(digests) == 1


def test_views_are_stored_for_training_images_only(folder, tiny_images, tmp_path):
    result = tokenize(tiny_images, tmp_path / "codes", folder, views=4, workers=0, device="cpu")
    cache = CodesCache.open(tmp_path / "codes")
    assert (cache.num_rows("train"), cache.num_rows("val")) == (60, 6)
    assert result.num_rows == 66


def test_a_rerun_changes_nothing_and_another_tokenizer_is_refused(folder, tiny_images, tiny_tokenizer, tmp_path):
    out = tmp_path / "codes"
    tokenize(tiny_images, out, folder, workers=0, device="cpu")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".safetensors"}
    tokenize(tiny_images, out, folder, workers=0, device="cpu")
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".safetensors"}
    with torch.no_grad():
        tiny_tokenizer.encoder.conv_in.bias += 1
    save_tokenizer(tmp_path / "other", tiny_tokenizer)
    with pytest.raises(ConfigError):
        tokenize(tiny_images, out, tmp_path / "other", workers=0, device="cpu")


def test_the_tokenizer_that_comes_with_varcli_is_found_by_name():
    assert load_tokenizer(tokenizer_folder("emoji64")).config.image_size == 64


def test_the_default_tokenizer_follows_from_the_size_of_the_images(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizers" / "tiny", tiny_tokenizer)  # for 32 px; varcli's own is for 64
    assert default_tokenizer(40).parts[-1] == "tiny"
    assert load_tokenizer(default_tokenizer(500)).config.image_size == 64
    assert default_tokenizer(8).parts[-1] == "tiny"
    save_tokenizer(tmp_path / "runs" / "half" / "tokenizer", tiny_tokenizer, {"step": 5, "steps": 10, "image_size": 48})
    assert default_tokenizer(50).parts[-1] == "tiny"  # not one that is still being trained


def test_a_runs_copy_of_a_tokenizer_is_not_chosen_before_the_original(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = default_tokenizer(64)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    copied = copy_artifact(own, tmp_path / "runs" / "first" / "tokenizer", "tokenizer")
    assert default_tokenizer(64) == find_tokenizer(copied.info["fingerprint"]) == own
    info = {"image_size": 64}
    save_tokenizer(tmp_path / "runs" / "second" / "tokenizer", tiny_tokenizer, info)
    assert default_tokenizer(64) == Path("runs/second/tokenizer")  # the user's own comes first, copies or not
    save_tokenizer(tmp_path / "tokenizers" / "mine", tiny_tokenizer, info)
    assert default_tokenizer(64) == Path("tokenizers/mine")


def test_a_rerun_takes_the_tokenizer_it_was_begun_with(tiny_tokenizer, tiny_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizers" / "tiny", tiny_tokenizer)
    messages: list[str] = []

    def listen(step: Step) -> None:
        messages.extend([step.message] if step.message else [])

    tokenize(tiny_images, tmp_path / "codes", "tiny", workers=0, device="cpu", on_step=listen)
    with torch.no_grad():
        tiny_tokenizer.encoder.conv_in.bias += 1
    save_tokenizer(tmp_path / "tokenizers" / "another", tiny_tokenizer)  # the default from now on, being first
    assert default_tokenizer(32).parts[-1] == "another"
    tokenize(tiny_images, tmp_path / "codes", workers=0, device="cpu", on_step=listen)
    assert len(messages) == 2 and "tiny, with which" in messages[1]


def test_only_images_that_gave_rows_are_counted_and_empty_classes_are_told(folder, tiny_images, tmp_path):
    messages: list[str] = []

    def listen(step: Step) -> None:
        messages.extend([step.message] if step.message else [])

    shutil.copy(next(tiny_images.rglob("*.png")), tiny_images / "train" / "loose.png")
    (tiny_images / "train" / "empty").mkdir()
    result = tokenize(tiny_images, tmp_path / "codes", folder, workers=0, device="cpu", on_step=listen)
    assert (result.num_images, result.num_rows, result.num_skipped) == (21, 21, 1)
    assert any("`empty` has no image" in message for message in messages)
    with pytest.raises(ConfigError, match="at least 1"):
        tokenize(tiny_images, tmp_path / "other", folder, batch_size=-3)


def test_links_that_are_too_many_are_refused_before_an_image_is_read(folder, tiny_images, tmp_path, monkeypatch):
    out = tmp_path / "codes"
    (tiny_images / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(encode, "load_tokenizer", None)
        with pytest.raises(SkipLimitError, match=r"gone\.png`: link to nothing"):
            tokenize(tiny_images, out, folder, max_skip=0, workers=0, device="cpu")
    assert not out.exists()
    tokenize(tiny_images, out, folder, workers=0, device="cpu")
    assert (
        tokenize(tiny_images, out, folder, max_skip=0, workers=0, device="cpu").num_skipped == 1
    )  # whole all the same


def test_a_folder_named_by_mistake_stays_as_it_is(folder, tiny_images):
    before = sorted(tiny_images.rglob("*"))
    with pytest.raises(ArtifactError, match="holds no codes cache"):
        tokenize(tiny_images, tiny_images, folder, workers=0, device="cpu")
    assert sorted(tiny_images.rglob("*")) == before


def test_a_faster_precision_is_measured_told_kept_and_not_mixed(folder, tiny_images, tmp_path):
    messages: list[str] = []

    def listen(step: Step) -> None:
        messages.extend([step.message] if step.message else [])

    out = tmp_path / "codes"
    result = tokenize(tiny_images, out, folder, workers=0, device="cpu", precision="bf16", batch_size=6, on_step=listen)
    info = read_manifest(out, "codes").info
    assert info["precision"] == "bf16" and info["agreement"] == result.agreement
    assert result.agreement["images"] == 15 and 0.5 < result.agreement["tokens"] <= 1
    told = [message for message in messages if "of tokens in bf16 are those of fp32" in message]
    assert len(told) == 1 and told[0].startswith("warning") == (result.agreement["tokens"] < 0.995)
    plain = tokenize(tiny_images, tmp_path / "plain", folder, workers=0, device="cpu")
    assert plain.agreement is None and "precision" not in read_manifest(tmp_path / "plain", "codes").info
    same = [CodesCache.open(place).load("train").codes.long() for place in (out, tmp_path / "plain")]
    assert float((same[0] == same[1]).float().mean()) == pytest.approx(result.agreement["tokens"], abs=1e-5)
    with pytest.raises(ConfigError, match=": precision was bf16, now fp32"):
        tokenize(tiny_images, out, folder, workers=0, device="cpu")
    again = tokenize(tiny_images, out, folder, workers=0, device="cpu", precision="bf16", on_step=listen)
    assert again.agreement == result.agreement and len(messages) == 3  # not measured a second time


def test_settings_that_cannot_be_are_refused_before_anything_is_made(folder, tiny_images, tmp_path):
    with pytest.raises(ConfigError, match="precision"):
        tokenize(tiny_images, tmp_path / "codes", folder, precision="tf32")
    with pytest.raises(ConfigError, match="fp32"):
        tokenize(tiny_images, tmp_path / "codes", folder, compile=True)
    assert not (tmp_path / "codes").exists()


def test_an_error_of_the_disk_leaves_what_was_finished(folder, tiny_images, tmp_path, monkeypatch):
    plain = codes_shards.write_tensors
    written = []

    def write(path, tensors):
        written.append(path.name)
        if len(written) >= 3:  # and stays so: batches under way are still written
            raise ArtifactError("the disk is full")
        plain(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(codes_shards, "write_tensors", write)
        patch.setattr(encode, "CodesPlan", partial(codes_shards.CodesPlan, shard_images=4))
        with pytest.raises(ArtifactError, match="full"):
            tokenize(tiny_images, tmp_path / "codes", folder, workers=0, device="cpu", batch_size=2)
    assert len(read_json_lines(tmp_path / "codes" / ".progress.jsonl")) == 2
