"""Training a tokenizer: it learns, it resumes exactly, it writes what other commands read."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_tokenizer import SMALL

from varcli.artifacts.verify import (
    read_checked_tensors,
    read_json,
    read_json_lines,
    read_manifest,
    require_finite,
    verify_folder,
)
from varcli.errors import ArtifactError, ConfigError, DataError, NumericError
from varcli.pretrained.lpips import Lpips
from varcli.progress import Step
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.losses import PERCEPTUAL
from varcli.tokenizer.store import load_tokenizer
from varcli.training import tokenizer, tokenizer_objective
from varcli.training.checkpoint import list_checkpoints
from varcli.training.tokenizer import _choose_architecture, train_tokenizer
from varcli.training.tokenizer_objective import adversarial_share
from varcli.training.tokenizer_settings import TokenizerTrainConfig
from varcli.training.tokenizer_trainer import TokenizerTrainer

CPU = torch.device("cpu")


def config(**changes) -> TokenizerTrainConfig:
    small = replace(SMALL, width=16, norm_groups=4)
    values = {
        "tokenizer": small,
        "steps": 8,
        "batch_size": 4,
        "warmup_steps": 2,
        "learning_rate": 2e-3,
        "perceptual_weight": 0.0,
        "adversarial_start": 0.5,
        "restart_every": 3,
        "log_every": 1,
        "validate_every": 8,
        "save_every": 4,
    }
    return TokenizerTrainConfig(**{**values, **changes})


class Stop(Exception):
    pass


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_json_lines(folder / "metrics.jsonl") if record["kind"] == "train"]


def test_a_stopped_run_goes_on_bit_for_bit(tiny_images, tmp_path):
    train_tokenizer(tiny_images, tmp_path / "whole", config(), device="cpu")

    def stop(step: Step) -> None:
        if step.unit == "steps" and step.done >= 6:
            raise Stop

    with pytest.raises(Stop):
        train_tokenizer(tiny_images, tmp_path / "cut", config(), device="cpu", on_step=stop)
    train_tokenizer(tiny_images, tmp_path / "cut", config(), device="cpu")
    whole, cut = (load_tokenizer(tmp_path / name / "tokenizer") for name in ("whole", "cut"))
    assert whole.fingerprint() == cut.fingerprint()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_stopped_run_on_larger_images_goes_on_bit_for_bit_with_other_workers(tiny_images, tmp_path):
    for path in tiny_images.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((48, 40)).save(path)
    train_tokenizer(tiny_images, tmp_path / "whole", config(workers=0), device="cpu")
    threads = threading.active_count()

    def stop(step: Step) -> None:
        if step.unit == "steps" and step.done >= 6:
            raise Stop

    with pytest.raises(Stop):
        train_tokenizer(tiny_images, tmp_path / "cut", config(workers=2), device="cpu", on_step=stop)
    assert threading.active_count() == threads
    train_tokenizer(tiny_images, tmp_path / "cut", config(workers=1), device="cpu")
    whole, cut = (load_tokenizer(tmp_path / name / "tokenizer") for name in ("whole", "cut"))
    assert whole.fingerprint() == cut.fingerprint()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_bare_rerun_goes_on_with_the_settings_the_run_was_begun_with(tiny_images, tmp_path, monkeypatch):
    begun = train_tokenizer(tiny_images, tmp_path / "run", config(), device="cpu")
    again = train_tokenizer(tiny_images, tmp_path / "run", TokenizerTrainConfig(), device="cpu")
    assert again.step == begun.step == 8
    monkeypatch.setattr(tokenizer, "open_pixels", None)  # what differs is told before an image is read
    with pytest.raises(ConfigError, match="learning_rate was"):
        train_tokenizer(tiny_images, tmp_path / "run", TokenizerTrainConfig(learning_rate=1e-3), device="cpu")
    with pytest.raises(ConfigError, match=r"steps was 8, now 9$") as caught:
        train_tokenizer(tiny_images, tmp_path / "run", TokenizerTrainConfig(steps=9), device="cpu")
    assert f"--init-from {tmp_path / 'run'} --out NEW" in caught.value.hint
    (tiny_images / "train" / "cat" / "0.png").rename(tiny_images / "train" / "cat" / "9.png")
    with pytest.raises(ConfigError, match=r"begun with other images$"):
        train_tokenizer(tiny_images, tmp_path / "run", TokenizerTrainConfig(), device="cpu")


@pytest.mark.parametrize("wrong", [{"log_every": 0}, {"save_every": -1}])
def test_a_wrong_setting_of_the_loop_is_named_and_leaves_no_folder(wrong, tiny_images, tmp_path):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} must be") as caught:
        train_tokenizer(tiny_images, tmp_path / "run", config(**wrong), device="cpu")
    assert "keep_checkpoints" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_the_checkpoints_is_said_before_training(tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenizerTrainer, "train_step", None)
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ArtifactError, match="MB are needed"):
        train_tokenizer(tiny_images, tmp_path / "run", config(), device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_size_of_a_checkpoint_is_known_before_the_first(tiny_images, tmp_path, monkeypatch):
    asked, plain = [], tokenizer.prepare_folder
    monkeypatch.setattr(
        tokenizer, "prepare_folder", lambda folder, need_bytes: asked.append(need_bytes) or plain(folder, need_bytes)
    )
    train_tokenizer(tiny_images, tmp_path / "run", config(validate_every=0), device="cpu")
    newest = list_checkpoints(tmp_path / "run")[0]
    size = sum(path.stat().st_size for path in newest.glob("*.safetensors") if path.stem != "random")
    assert asked == [pytest.approx(3 * size, rel=0.03)]  # two stay while the third is written; files have headers


def test_the_architecture_follows_from_the_images_size(tiny_images, tmp_path):
    told = []
    small = config(tokenizer=None, steps=1, validate_every=0)
    train_tokenizer(tiny_images, tmp_path / "run", small, device="cpu", on_step=told.append)
    assert load_tokenizer(tmp_path / "run" / "tokenizer").config == TokenizerConfig.for_side(32)
    assert TokenizerConfig.for_side(256) == TokenizerConfig()
    assert any("a tokenizer for 64 px" in (step.message or "") for step in told)


SMALL_NET = TokenizerConfig.for_side(64)


@pytest.mark.parametrize(
    "asked, size, expected",
    [
        ({}, None, SMALL_NET),
        ({"vocab_size": 512}, None, replace(SMALL_NET, vocab_size=512)),
        ({"patch_nums": (1, 2, 4)}, None, replace(SMALL_NET, patch_nums=(1, 2, 4))),
        ({"channel_multipliers": (1, 2)}, None, replace(SMALL_NET, channel_multipliers=(1, 2)).at_size(64)),
        ({"vocab_size": 512}, 256, TokenizerConfig(vocab_size=512)),
        ({"width": 48}, 96, replace(SMALL_NET, width=48).at_size(96)),
    ],
)
def test_settings_asked_for_change_nothing_else_of_what_the_images_size_chooses(asked, size, expected):
    assert _choose_architecture(asked, size, 64) == expected


def test_a_run_that_goes_on_keeps_what_is_not_asked_for_again(tiny_images, tmp_path):
    def run(asked, size=None):
        settings = config(tokenizer=None, steps=1, validate_every=0)
        given = {"steps", "batch_size", "perceptual_weight"}
        train_tokenizer(
            tiny_images, tmp_path / "run", settings, architecture=asked, size=size, device="cpu", given=given
        )
        return load_tokenizer(tmp_path / "run" / "tokenizer").config

    begun = run({"patch_nums": (1, 2, 4), "width": 16, "vocab_size": 32})
    assert (begun.image_size, begun.width) == (32, 16)
    assert run({"vocab_size": 32}) == run({}, size=32) == begun
    with pytest.raises(ConfigError, match=r"other settings: tokenizer\.vocab_size was 32, now 64$"):
        run({"vocab_size": 64})


def test_how_many_codes_were_restarted_does_not_depend_on_how_often_it_is_logged(tiny_images, tmp_path):
    restarted = {}
    for every in (1, 4):
        settings = config(steps=8, log_every=every, restart_until=1.0, validate_every=0, save_every=0)
        train_tokenizer(tiny_images, tmp_path / str(every), settings, device="cpu")
        lines = [line for line in read_json_lines(tmp_path / str(every) / "metrics.jsonl") if line["kind"] == "train"]
        restarted[every] = [line["codes_restarted"] for line in lines]
    assert (len(restarted[1]), len(restarted[4])) == (8, 2)
    assert sum(restarted[1]) == sum(restarted[4]) > 0
    assert [sum(restarted[1][:4]), sum(restarted[1][4:])] == restarted[4]


def test_what_the_images_size_chooses_is_in_the_runs_config(tiny_images, tmp_path):
    for path in tiny_images.rglob("*.png"):
        for copy in range(12):
            (path.parent / f"{path.stem}-{copy}.png").write_bytes(path.read_bytes())
    settings = config(steps=1, batch_size=None, learning_rate=None, validate_every=0)
    train_tokenizer(tiny_images, tmp_path / "run", settings, device="cpu")
    stored = read_json(tmp_path / "run" / "config.json")["config"]
    assert (stored["batch_size"], stored["learning_rate"]) == (192, 5e-4)


def test_the_loss_falls_and_the_result_says_how_good_it_is(tiny_images, tmp_path):
    result = train_tokenizer(
        tiny_images, tmp_path / "run", config(steps=60, validate_every=60, save_every=0), device="cpu"
    )
    found = losses(tmp_path / "run")
    assert sum(found[-10:-5]) < 0.8 * sum(found[:5])
    assert result.validation["psnr"] > 0
    assert 0 < result.validation["codebook_used"] <= 1
    assert (tmp_path / "run" / "samples" / "step-0000060.png").exists()


def test_a_perceptual_loss_is_part_of_the_gradient(tiny_images, tmp_path):
    train_tokenizer(
        tiny_images, tmp_path / "run", config(steps=2, perceptual_weight=0.5, validate_every=0), device="cpu"
    )
    (first, *_) = [r for r in read_json_lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert first["perceptual_loss"] > 0


def test_fewer_images_than_a_batch_and_other_settings_are_refused(tiny_images, tmp_path):
    with pytest.raises(DataError, match="fewer than one batch"):
        train_tokenizer(tiny_images, tmp_path / "a", config(batch_size=100), device="cpu")
    train_tokenizer(tiny_images, tmp_path / "b", config(steps=2, validate_every=0), device="cpu")
    with pytest.raises(ConfigError, match="learning_rate"):
        train_tokenizer(
            tiny_images, tmp_path / "b", config(steps=2, validate_every=0, learning_rate=1e-5), device="cpu"
        )


def test_the_discriminator_is_heard_late_and_softly():
    settings = config(steps=100, adversarial_weight=0.2, adversarial_start=0.5)
    assert adversarial_share(49, settings) == 0
    assert adversarial_share(52, settings) == pytest.approx(0.2 * 2 / 5)
    assert adversarial_share(60, settings) == 0.2


def test_with_nothing_held_out_images_of_training_are_measured(tiny_images, tmp_path):
    told = []
    settings = config(steps=2, validate_every=2)
    result = train_tokenizer(tiny_images / "train", tmp_path / "run", settings, device="cpu", on_step=told.append)
    assert result.validation["images"] == 15
    assert 0 < result.validation["codebook_used"] <= 1
    assert any("validation measures images of training" in (step.message or "") for step in told)


def test_a_codebook_of_the_data_begins_near_the_features_and_resumes_exactly(tiny_images, tmp_path):
    settings = config(codebook_init="data", steps=6, save_every=3, restart_every=0)
    train_tokenizer(tiny_images, tmp_path / "data", settings, device="cpu")
    train_tokenizer(tiny_images, tmp_path / "random", config(steps=6, restart_every=0), device="cpu")
    of_data, random = (read_json_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("data", "random"))
    assert of_data["quantizer_loss"] < random["quantizer_loss"]

    def stop(step: Step) -> None:
        if step.unit == "steps" and step.done >= 4:
            raise Stop

    with pytest.raises(Stop):
        train_tokenizer(tiny_images, tmp_path / "cut", settings, device="cpu", on_step=stop)
    train_tokenizer(tiny_images, tmp_path / "cut", settings, device="cpu")
    assert losses(tmp_path / "cut") == losses(tmp_path / "data")


@pytest.mark.parametrize("init", ["random", "data"])
def test_cosine_codes_can_be_trained(tiny_images, tmp_path, init):
    settings = config(steps=4, validate_every=4, codebook_init=init)
    tokenizer = replace(settings.tokenizer, cosine_codes=True)
    result = train_tokenizer(tiny_images, tmp_path / "run", replace(settings, tokenizer=tokenizer), device="cpu")
    assert result.validation["psnr"] > 0
    assert load_tokenizer(tmp_path / "run" / "tokenizer").quantizer.cosine_codes


@pytest.mark.parametrize("part", ["pixel_loss", "generator_loss", "discriminator_loss"])
def test_a_loss_that_is_no_number_ends_the_run_with_one_error_and_the_last_checkpoint_is_whole(
    part, tiny_images, tmp_path, monkeypatch
):
    calls, right = [], getattr(tokenizer_objective, part)
    first_bad = 5 if part == "pixel_loss" else 1  # the others are called from the discriminator's start on

    def spoil(*arguments):
        calls.append(part)
        return right(*arguments) * (float("nan") if len(calls) > first_bad else 1.0)

    monkeypatch.setattr(tokenizer_objective, part, spoil)
    settings = config(steps=12, save_every=4, validate_every=0, adversarial_start=0.3, restart_every=1)
    with pytest.raises(NumericError) as caught:
        train_tokenizer(tiny_images, tmp_path / "run", settings, device="cpu")
    bad = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "event"]
    steps = [line["step"] for line in bad]
    assert steps == list(range(steps[0], steps[0] + 3)) and len(bad[0]["rows"]) == 4
    assert f"at steps {', '.join(map(str, steps))}" in str(caught.value)
    assert "--lr" in caught.value.hint and "last checkpoint" in caught.value.hint
    newest = list_checkpoints(tmp_path / "run")[0]
    manifest = read_manifest(newest, "checkpoint")
    assert not verify_folder(newest, manifest)
    for name in manifest.files:
        if name != "random.safetensors":
            require_finite(read_checked_tensors(newest, name, manifest), name)
    assert load_tokenizer(tmp_path / "run" / "tokenizer")  # refuses what is no number


def test_lpips_stands_in_for_lite0_and_its_folder_may_move(tiny_images, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(PERCEPTUAL, "lpips", lambda folder: asked.append(folder) or Lpips().requires_grad_(False))
    settings = config(steps=2, validate_every=2, perceptual="lpips", perceptual_weight=0.5, lpips_weights=tmp_path)
    result = train_tokenizer(tiny_images, tmp_path / "run", settings, device="cpu")
    assert result.validation["perceptual"] > 0
    moved = replace(settings, lpips_weights=tmp_path / "elsewhere")
    train_tokenizer(tiny_images, tmp_path / "run", moved, device="cpu")
    assert asked == [tmp_path, tmp_path / "elsewhere"]
    with pytest.raises(ConfigError, match="perceptual was lpips"):
        train_tokenizer(
            tiny_images, tmp_path / "run", replace(moved, perceptual="lite0"), device="cpu", given={"perceptual"}
        )
