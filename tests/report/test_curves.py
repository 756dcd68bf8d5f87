"""Curves of a run hold what its log says, whichever kind of run it is, and odd logs are drawn or refused with a word."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from varcli.artifacts.manifest import write_manifest
from varcli.errors import ArtifactError
from varcli.report import plots
from varcli.report.curves import CURVES_NAME, discriminator_start, draw_curves, plot_records
from varcli.report.plots import log_ticks, ticks_of


def tokenizer_log(scales: int = 3) -> list[dict]:
    """A log as a tokenizer's training writes it: the discriminator learns from step 40 and is heard from 50 on."""
    records = []
    for step in range(10, 101, 10):
        train = {"kind": "train", "step": step, "loss": 1 / step, "pixel_loss": 0.5 / step, "quantizer_loss": 0.1}
        train |= {"discriminator_loss": 1.0, "real_logit": 0.1, "fake_logit": -0.1} if step > 40 else {}
        train |= {"adversarial_loss": 0.3} if step > 50 else {}
        records.append(train)
        if step % 50 == 0:
            health = {f"perplexity_scale_{scale}": 2.0 + scale for scale in range(scales)}
            health |= {f"codebook_used_scale_{scale}": 0.1 for scale in range(scales)}
            quality = {"loss": 0.2, "psnr": step / 4, "codebook_used": 0.9, "perplexity": 12.0}
            records.append({"kind": "validation", "step": step, **quality, **health})
    return records


def write_log(run, records) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_are_drawn_into_the_run_or_where_asked(tmp_path):
    write_log(tmp_path / "run", tokenizer_log())
    path = draw_curves(tmp_path / "run")
    assert path == tmp_path / "run" / CURVES_NAME
    drawn = Image.open(path)
    assert drawn.format == "PNG" and len(drawn.getcolors(1 << 20)) > 20
    other = draw_curves(tmp_path / "run", tmp_path / "other.png")
    assert other.read_bytes() == path.read_bytes()  # the same log gives the same picture


def test_every_panel_that_has_numbers_is_there_and_no_other():
    one_row, all_rows = 320, 3 * 320
    records = tokenizer_log()
    assert plot_records(records).height == all_rows  # losses, discriminator, PSNR, usage, perplexity: five
    assert plot_records([record for record in records if record["kind"] == "train"]).height == one_row
    assert plot_records([{"kind": "validation", "step": 1, "psnr": 20.0}]).height == one_row


def test_a_transformers_run_has_curves_too():
    records = [{"kind": "train", "step": step, "loss": 7.0, "accuracy": 0.04} for step in (1, 2)]
    records.append({"kind": "validation", "step": 2, "loss": 6.0, "accuracy": 0.05, "loss_by_scale": [5.0, 6.0, 7.0]})
    assert plot_records(records).height == 2 * 320  # losses, accuracy, loss of each scale


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The texts of all charts drawn."""
    texts, plain = [], plots._Drawing._write

    def write(self, x, y, text, *arguments, **options):
        texts.append(text)
        plain(self, x, y, text, *arguments, **options)

    monkeypatch.setattr(plots._Drawing, "_write", write)
    return texts


@pytest.mark.parametrize("where", ["config", "tokenizer", "nowhere"])
def test_scales_are_named_by_their_sides_where_the_run_tells_them(written, where, tmp_path):
    write_log(tmp_path / "run", tokenizer_log())
    config = {"tokenizer": {"patch_nums": [1, 2, 4]} if where == "config" else None}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"kind": "tokenizer", "config": config}))
    if where == "tokenizer":
        (tmp_path / "run" / "tokenizer").mkdir()
        write_manifest(tmp_path / "run" / "tokenizer", "tokenizer", {"config": {"patch_nums": [1, 2, 4]}}, files=[])
    draw_curves(tmp_path / "run")
    expected = ["scale 0", "scale 1", "scale 2"] if where == "nowhere" else ["1 x 1", "2 x 2", "4 x 4"]
    assert set(expected) <= set(written)


def test_the_axis_of_steps_is_named_and_has_a_number_even_for_one_point(written):
    plot_records([{"kind": "validation", "step": 37, "psnr": 20.0}])
    assert "steps" in written and "37" in written


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    write_log(tmp_path / "run", tokenizer_log())
    with pytest.raises(ArtifactError, match="there is no folder") as caught:
        draw_curves(tmp_path / "run", tmp_path / "none" / "curves.png")
    assert "make that folder" in caught.value.hint


def test_the_line_stands_where_the_discriminator_is_first_heard():
    assert discriminator_start(tokenizer_log()) == 50
    assert discriminator_start([{"kind": "train", "step": 10, "adversarial_loss": 1.0}]) == 0
    assert discriminator_start([{"kind": "train", "step": 10, "loss": 1.0}]) is None
    with_line, without = tokenizer_log(), tokenizer_log()
    for record in without:
        record.pop("adversarial_loss", None)
    assert plot_records(with_line).tobytes() != plot_records(without).tobytes()


@pytest.mark.parametrize(
    "records",
    [
        [{"kind": "train", "step": 5, "loss": "nan"}, {"kind": "train", "step": 6, "loss": 1.0}],
        [{"kind": "train", "step": 5, "loss": 0.0, "accuracy": 0.0}],  # zero has no logarithm
        [{"kind": "validation", "step": 1, "psnr": 1e-9}, {"kind": "validation", "step": 10**7, "psnr": 1e9}],
        [{"kind": "validation", "step": 3, "psnr": -4.0}],
        tokenizer_log(scales=40),
    ],
    ids=["no number", "zero", "far apart", "one point", "many scales"],
)
def test_odd_numbers_still_are_a_picture(records):
    assert plot_records(records) is not None


def test_a_folder_without_numbers_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no metrics\.jsonl"):
        draw_curves(tmp_path)
    write_log(tmp_path, [{"kind": "event", "step": 1, "event": "not a number"}, {"kind": "train", "step": 1}])
    with pytest.raises(ArtifactError, match="no numbers"):
        draw_curves(tmp_path)
    assert not (tmp_path / CURVES_NAME).exists()


@pytest.mark.parametrize("low, high", [(0, 1), (0.12, 0.13), (-3, 40), (5, 5), (0, 0), (1e-7, 1e7)])
def test_ticks_are_few_and_reach_around_the_values(low, high):
    ticks = ticks_of(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize("low, high", [(0.01, 4), (1, 1), (1, 900), (0.3, 0.4), (1e-9, 1e9)])
def test_ticks_of_a_logarithm_are_few_and_positive(low, high):
    ticks = log_ticks(low, high)
    assert 0 < ticks[0] <= low
    assert 1 <= len(ticks) <= 10
