"""`varcli train-tokenizer` and `varcli curves`: the result, the picture of its curves, making that again, and bad input."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from varcli.cli.app import app
from varcli.errors import ArtifactError
from varcli.report.curves import CURVES_NAME

runner = CliRunner()
TINY = ["patch_nums=[1,2,4]", "vocab_size=16", "code_channels=8", "width=16", "channel_multipliers=[1,1,1,1]"]
TINY += ["num_res_blocks=1", "norm_groups=4"]
QUICK = ["--steps", "4", "--batch-size", "4", "--device", "cpu", "--json"]
SETTINGS = [f"tokenizer.{setting}" for setting in TINY] + ["perceptual_weight=0", "validate_every=2", "log_every=1"]


def train(images, out, *settings: str):
    given = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return runner.invoke(app, ["train-tokenizer", str(images), "--out", str(out), *QUICK, *given])


def test_a_run_ends_with_its_curves_which_the_log_alone_gives_again(tiny_images, tmp_path):
    run = tmp_path / "run"
    result = train(tiny_images, run)
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["curves"] == str(run / CURVES_NAME)
    drawn = (run / CURVES_NAME).read_bytes()
    finished = train(tiny_images, run)
    assert "has all its 4 steps already" in finished.stderr and "steps/s" not in finished.stderr
    again = json.loads(finished.stdout)
    assert again["psnr"] == value["psnr"] and again.keys() == value.keys()  # of the last validation
    again = runner.invoke(app, ["curves", str(run), "--out", str(tmp_path / "again.png"), "--json"])
    assert json.loads(again.stdout) == {"curves": str(tmp_path / "again.png")}
    assert (tmp_path / "again.png").read_bytes() == drawn


def test_curves_that_cannot_be_drawn_do_not_cost_the_run(tiny_images, tmp_path, monkeypatch):
    def fail(path, image):
        raise ArtifactError("the disk is full")

    monkeypatch.setattr("varcli.report.curves.save_png", fail)
    result = train(tiny_images, tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "no curves: the disk is full" in result.stderr
    assert json.loads(result.stdout)["steps"] == 4


@pytest.mark.parametrize("where, said", [("gone", "unknown run or folder"), (".", "metrics.jsonl")])
def test_curves_of_what_is_no_run_are_refused(where, said, tmp_path):
    result = runner.invoke(app, ["curves", str(tmp_path / where)])
    assert result.exit_code == 1 and said in result.stderr


def test_a_size_chooses_the_architecture_and_small_images_are_enlarged_with_a_word(tiny_images, tmp_path):
    given = [part for setting in SETTINGS[1:] for part in ("--set", setting)]
    result = runner.invoke(
        app, ["train-tokenizer", str(tiny_images), "--out", str(tmp_path / "run"), "--size", "48", *QUICK, *given]
    )
    assert result.exit_code == 0, result.stderr
    assert "a tokenizer for 48 px" in result.stderr and "are enlarged to 48 px" in result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["tokenizer"]["patch_nums"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "given, text",
    [
        (["--batch-size", "500"], "fewer than one batch of 500"),
        (["--size", "60"], "cannot be divided by the downsampling of 8"),
        (["--size", "64"], "patch_nums end at 4, but images of 64 px are a grid of 8x8"),
        (["--set", "tokenizer.patch_nums=[1,4,2]"], "coarse to fine"),
        (["--lr", "nan"], "learning_rate"),
        (["--set", "r1_weight=nan"], "takes a number that is finite, but got nan"),
        (["--set", "tokenizer.widht=8"], "width"),
    ],
)
def test_settings_that_cannot_work_are_one_error_and_leave_nothing(tiny_images, tmp_path, given, text):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    out = tmp_path / "run"
    result = runner.invoke(app, ["train-tokenizer", str(tiny_images), "--out", str(out), *QUICK, *settings, *given])
    assert result.exit_code == 1 and result.stderr.count("error:") == 1, result.stderr
    assert text in result.stderr and "Traceback" not in result.stderr
    assert not list(out.glob("*"))


@pytest.mark.parametrize("content", ["nothing", "broken"])
def test_folders_without_a_usable_image_are_one_error(tmp_path, content):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(8 if content == "broken" else 0):
        (tmp_path / "images" / "a" / f"{number}.png").write_bytes(b"no picture")
    result = train(tmp_path / "images", tmp_path / "run")
    says = {
        "nothing": "holds nothing",
        "broken": "none of the 8 images to train on can be used, e.g. `a/7.png`: not an image",
    }
    assert result.exit_code == 1 and result.stderr.count("error:") == 1, result.stderr
    assert says[content] in result.stderr
    assert not (tmp_path / "run").exists()


def test_grey_transparent_and_palette_images_are_learned_from(tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number, mode in enumerate(["L", "LA", "RGBA", "P", "RGB", "1", "I;16", "CMYK"]):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new("RGB", (32, 32), (9 * number, 80, 160)).convert("L" if mode == "I;16" else mode).save(
            folder / f"{number}.{suffix}"
        )
    result = train(tmp_path / "images", tmp_path / "run")
    assert result.exit_code == 0, result.stderr


def test_more_unusable_images_than_tolerated_are_an_error_that_a_larger_limit_mends(tiny_images, tmp_path):
    for number in range(3):
        (tiny_images / "train" / "boat" / f"{number}.png").write_bytes(b"")
    refused = train(tiny_images, tmp_path / "run", "max_skip=2")
    assert refused.exit_code == 6
    assert "3 images cannot be used, but at most 2 may be skipped" in refused.stderr
    assert "e.g. `train/boat/2.png`: empty file" in refused.stderr
    assert not (tmp_path / "run").exists()
    result = train(tiny_images, tmp_path / "run", "max_skip=3")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: 3 images cannot be used and others stand in for them") == 1


def test_images_smaller_than_the_tokenizers_are_enlarged_and_both_commands_say_so(tiny_images, tmp_path):
    for path in tiny_images.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((8, 12)).save(path)
    result = train(tiny_images, tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: the images are about 8 px and are enlarged to 32 px") == 1
    arguments = ["tokenize", str(tiny_images), "--tokenizer", str(tmp_path / "run"), "--out", str(tmp_path / "codes")]
    result = runner.invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: the images are about 8 px and are enlarged to 32 px") == 1


def test_a_loss_that_is_no_number_is_one_error_with_its_own_exit_code(tiny_images, tmp_path, monkeypatch):
    from varcli.training import tokenizer_objective

    right = tokenizer_objective.pixel_loss
    monkeypatch.setattr(tokenizer_objective, "pixel_loss", lambda *images: right(*images) * float("nan"))
    result = train(tiny_images, tmp_path / "run")
    assert result.exit_code == 7
    assert result.stderr.count("error: ") == 1 and "--lr" in result.stderr
