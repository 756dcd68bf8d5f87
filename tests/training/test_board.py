"""TensorBoard's files hold what the log holds, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from PIL import Image
from toy_runs import TINY, train
from toy_trainer import train_toy

from varcli.training.board import TENSORBOARD_NAME, Board, open_board
from varcli.training.runlog import read_log

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(run):
    """All events of a run's files."""
    found = accumulators.EventAccumulator(
        str(run / TENSORBOARD_NAME), size_guidance={"images": 0, "scalars": 0, "tensors": 0}
    )
    return found.Reload()


def scalars(events, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_a_run_arrives_whole(tmp_path, codes, tokenizer_folder):
    config = replace(TINY, steps=6, validate_every=3, sample_every=3, tensorboard=True)
    pictures = {}

    def draw(request):
        pictures[request.step] = Image.new("RGB", (40, 20), (10 * request.step, 20, 30))
        return pictures[request.step]

    train(codes, tmp_path / "run", tokenizer_folder, config, on_samples=draw)
    events = read(tmp_path / "run")
    for kind, names in {
        "train": ("loss", "gradient_norm", "images_per_second"),
        "validation": ("loss", "accuracy"),
    }.items():
        lines = read_log(tmp_path / "run", kind)
        for name in names:
            assert scalars(events, f"{kind}/{name}") == [(line["step"], line[name]) for line in lines]
    for number in ("loss", "accuracy"):
        for scale in range(3):
            logged = [
                (line["step"], line[f"{number}_by_scale"][scale]) for line in read_log(tmp_path / "run", "validation")
            ]
            assert scalars(events, f"validation_{number}_by_scale/scale_{scale}") == logged
    shown = {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images("samples")}
    assert sorted(shown) == sorted(pictures) == [3, 6]
    for step, picture in pictures.items():
        assert shown[step].convert("RGB").tobytes() == picture.tobytes()


def test_settings_are_a_table_and_hyperparameters(tmp_path, codes, tokenizer_folder):
    train(codes, tmp_path / "run", tokenizer_folder, replace(TINY, steps=2, tensorboard=True))
    events = read(tmp_path / "run")
    (text,) = events.Tensors("config/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| learning_rate | `0.003` |" in table and "| kind | `transformer` |" in table
    plugins = events.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(plugins)
    assert len(list((tmp_path / "run" / TENSORBOARD_NAME).iterdir())) == 1  # no run of its own for the hyperparameters


def test_a_tokenizers_scales_have_groups_of_their_own(tmp_path):
    board = open_board(tmp_path, 0, pytest.fail)
    board.write(
        "validation", 5, {"psnr": 20.0, "perplexity": 9.0, "perplexity_scale_0": 2.0, "perplexity_scale_11": 3.0}
    )
    board.write("validation", 6, {"loss": float("nan"), "note": "text", "images": 7})
    board.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        "validation/psnr",
        "validation/perplexity",
        "validation_perplexity_by_scale/scale_0",
        "validation_perplexity_by_scale/scale_11",
        "validation/loss",
        "validation/images",
    }


def test_resuming_hides_what_was_written_after_the_checkpoint(tmp_path):
    train_toy(tmp_path / "run", steps=20, tensorboard=True, save_every=6)
    (tmp_path / "run" / "latest.json").unlink()
    for folder in ("step-0000020",):
        (tmp_path / "run" / "checkpoints" / folder / "manifest.json").write_text("{}")
    train_toy(tmp_path / "run", steps=20, tensorboard=True, resume="last-good")
    lines = read_log(tmp_path / "run", "train")
    assert scalars(read(tmp_path / "run"), "train/loss") == [(line["step"], line["loss"]) for line in lines]


def test_a_full_disk_is_told_once_and_stops_nothing():
    class Full:
        def add_scalar(self, *arguments):
            raise OSError(28, "No space left on device")

    told: list[str] = []
    board = Board(Full(), told.append)
    for step in range(3):
        board.write("train", step, {"loss": 1.0})
    board.close()
    assert len(told) == 1 and "No space left" in told[0]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / TENSORBOARD_NAME).write_text("a file")
    told: list[str] = []
    assert open_board(tmp_path, 0, told.append) is None
    assert len(told) == 1


def test_a_config_that_is_none_is_passed_over(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"kind": "toy", "config": {}}))
    board = open_board(tmp_path, 3, pytest.fail)
    board.write("train", 4, {"loss": 1.0})
    board.close()
    assert scalars(read(tmp_path), "train/loss") == [(4, 1.0)]
