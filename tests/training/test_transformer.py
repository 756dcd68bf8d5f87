"""Laws of transformer training: exact resume, accumulation, averages, and refusal of what does not belong together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_codes import write_codes
from toy_runs import TINY, StopAfter, losses, make_trainer, train

from varcli.artifacts.manifest import write_manifest
from varcli.artifacts.verify import read_manifest, read_tensors
from varcli.artifacts.write import write_bytes, write_tensors
from varcli.errors import ArtifactError, ConfigError, IntegrityError, InterruptedRun, MemoryLimitError
from varcli.tokenizer import VQVAE
from varcli.tokenizer.find import find_tokenizer
from varcli.tokenizer.find import tokenizer_folder as resolve_tokenizer
from varcli.tokenizer.store import load_tokenizer, save_tokenizer
from varcli.training import train_transformer
from varcli.training.objective import Objective
from varcli.training.runlog import read_log
from varcli.training.transformer_trainer import TransformerTrainer
from varcli.transformer.store import load_transformer


def test_resuming_equals_never_stopping(tmp_path, codes, tokenizer_folder):
    train(codes, tmp_path / "whole", tokenizer_folder)
    for stop in (3, 7):
        with pytest.raises(InterruptedRun):
            train(codes, tmp_path / "broken", tokenizer_folder, on_step=StopAfter(stop))
    train(codes, tmp_path / "broken", tokenizer_folder)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert read_log(tmp_path / "whole", "validation") == read_log(tmp_path / "broken", "validation")
    for name in ("checkpoints/step-0000012/transformer", "checkpoints/step-0000012/ema", "transformer/weights"):
        path = f"{name}.safetensors"
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "broken" / path).read_bytes(), name


def test_sampling_and_planning_do_not_change_training(tmp_path, codes, tokenizer_folder):
    drawn, plans = [], []

    def draw(request):
        torch.rand(7)
        drawn.append((request.step, request.transformer.training, request.classes))

    train(codes, tmp_path / "plain", tokenizer_folder)
    config = replace(TINY, sample_every=5, validate_every=3)
    train(codes, tmp_path / "watched", tokenizer_folder, config, on_samples=draw, on_plan=plans.append)
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
    assert drawn == [(step, False, ("apple", "boat", "cat")) for step in (5, 10, 12)]
    (plan,) = plans
    assert (plan.steps, plan.start_step, plan.num_images, plan.num_views, plan.num_validation) == (12, 0, 40, 2, 12)
    assert plan.num_parameters > 0 < plan.memory_bytes
    assert plan.seconds > 0
    assert plan.epochs == pytest.approx(12 * 8 / 40)


def test_accumulation_equals_the_large_batch(codes, tokenizer_folder, monkeypatch):
    # the blocks of a new model hardly act, and what they drop would not be seen
    monkeypatch.setattr("varcli.transformer.base._GAMMA_BY_DEPTH", ((99, 1.0),))
    plain = replace(TINY, dropout=0.0, drop_path=0.5)  # drawn for the whole batch
    whole, cut, uneven = (
        make_trainer(codes, tokenizer_folder, replace(plain, micro_batch_size=size)) for size in (8, 2, 3)
    )
    for step in range(4):
        first = whole.train_step(step)
        for other in (cut, uneven):
            numbers = other.train_step(step)
            for name, value in first.items():
                assert float(numbers[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    for (name, one), other in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("averages", "fitting"), [({"ema_decay": 0.0}, 3), ({"ema_decay": 0.9, "ema_decays": (0.5,)}, 5)]
)
def test_the_micro_batch_fits_what_is_still_to_come(codes, tokenizer_folder, monkeypatch, averages, fitting):
    config = replace(TINY, micro_batch_size=None, batch_size=fitting * 4, **averages)
    trainer = make_trainer(codes, tokenizer_folder, replace(config, micro_batch_size=1))
    to_come = trainer.model.num_parameters * (4 + 8 + 2)  # gradients, moments, half-precision copy
    free = (to_come + (fitting + 0.5) * trainer.image_bytes()) / 0.85
    monkeypatch.setattr("varcli.training.plan.free_bytes", lambda device: free)
    assert make_trainer(codes, tokenizer_folder, config).micro_batch_size == fitting


@pytest.mark.parametrize(("size", "found"), [(8, [False, False]), (2, [False, True])])
def test_the_timed_try_finds_gradients_as_a_step_does(codes, tokenizer_folder, monkeypatch, size, found):
    trainer = make_trainer(codes, tokenizer_folder, replace(TINY, micro_batch_size=size))
    seen, loss = [], trainer.objective.loss
    has_gradients = lambda: any(parameter.grad is not None for parameter in trainer.model.parameters())  # noqa: E731
    monkeypatch.setattr(trainer.objective, "loss", lambda *inputs: seen.append(has_gradients()) or loss(*inputs))
    trainer.prepare(0)
    assert seen == found
    assert not has_gradients()


def test_the_loss_is_the_mean_over_tokens_and_labels_are_dropped_in_training_only(codes, tokenizer_folder):
    trainer = make_trainer(codes, tokenizer_folder, replace(TINY, label_dropout=1.0, dropout=0.0, drop_path=0.0))
    seen = []
    trainer.model.class_embedding.register_forward_pre_hook(lambda embedding, inputs: seen.append(inputs[0]))
    loss = trainer.train_step(0)["loss"]
    assert (torch.cat(seen) == 3).all()
    seen.clear()
    assert loss.item() == pytest.approx(torch.tensor(16.0).log().item(), rel=0.01)  # an untrained model knows nothing
    validation = trainer.validate()
    assert all((labels < 3).all() for labels in seen)
    lengths = torch.tensor([1.0, 4.0, 16.0])
    mean = (torch.tensor(validation["loss_by_scale"]) * lengths).sum() / 21
    assert validation["loss"] == pytest.approx(mean.item(), rel=1e-6)
    assert validation["loss_last"] == validation["loss_by_scale"][-1]
    assert validation["images"] == 12


def test_a_model_learns_what_there_is_to_learn(tmp_path, codes, tokenizer_folder):
    config = replace(TINY, steps=150, learning_rate=1e-2, dropout=0.0, drop_path=0.0, log_every=50, validate_every=50)
    result = train(codes, tmp_path / "run", tokenizer_folder, config)
    assert result.validation["loss"] < 1.7  # log 4 = 1.39 is the codes' entropy given the class, log 16 = 2.77 without
    assert result.best["loss"] <= result.validation["loss"]


def test_the_run_folder_is_a_model_folder_with_the_averaged_weights(tmp_path, codes, tokenizer_folder):
    result = train(codes, tmp_path / "run", tokenizer_folder)
    model, manifest = load_transformer(tmp_path / "run" / "transformer")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert manifest.info["tokenizer"] == tokenizer.fingerprint()
    assert manifest.info["classes"] == ["apple", "boat", "cat"]
    assert (manifest.info["order"], manifest.info["patch_nums"]) == ("scale", [1, 2, 4])
    trainer = make_trainer(codes, tokenizer_folder, replace(TINY, ema_decay=0.0))
    trainer.model.load_state_dict(model.state_dict())
    assert trainer.validate()["loss"] == pytest.approx(result.validation["loss"], rel=1e-6)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (stored["depth"], stored["steps"], stored["ema_decay"]) == (2, 12, 0.9)


def test_a_finished_run_says_so_and_can_be_made_longer(tmp_path, codes, tokenizer_folder):
    train(codes, tmp_path / "run", tokenizer_folder)
    reports = []
    assert train(codes, tmp_path / "run", tokenizer_folder, on_step=reports.append).step == 12
    assert "all its 12 steps" in reports[0].message
    assert train(codes, tmp_path / "run", tokenizer_folder, replace(TINY, steps=14)).step == 14
    with pytest.raises(ConfigError, match="has trained 14 steps already"):
        train(codes, tmp_path / "run", tokenizer_folder, replace(TINY, steps=1))


def test_the_tokenizer_is_found_by_its_fingerprint(tmp_path, codes, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fingerprint = read_manifest(tokenizer_folder, "tokenizer").info["fingerprint"]
    with pytest.raises(ArtifactError) as caught:
        find_tokenizer(fingerprint)
    assert "--tokenizer" in caught.value.hint
    (tmp_path / "models").mkdir()
    tokenizer_folder.rename(tmp_path / "models" / "mine")
    assert find_tokenizer(fingerprint) == Path("models/mine")
    assert resolve_tokenizer("mine") == Path("models/mine")
    train_transformer(codes, tmp_path / "run", replace(TINY, steps=2), device="cpu")
    (tmp_path / "models" / "mine").rename(tmp_path / "hidden")
    train_transformer(codes, tmp_path / "run", replace(TINY, steps=3), device="cpu")  # from the run's own copy


def test_codes_of_another_tokenizer_are_refused(tmp_path, codes, tiny_tokenizer):
    other = VQVAE(tiny_tokenizer.config)
    save_tokenizer(tmp_path / "other", other)
    with pytest.raises(ArtifactError, match="written by tokenizer"):
        train(codes, tmp_path / "run", tmp_path / "other")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_known_by_its_weights_whatever_its_manifest_says(tmp_path, codes, tokenizer_folder):
    weights = dict(read_tensors(tokenizer_folder / "weights.safetensors"))
    weights["decoder.conv_out.bias"][0] += 1
    write_tensors(tokenizer_folder / "weights.safetensors", weights)
    info = read_manifest(tokenizer_folder).info
    write_manifest(tokenizer_folder, "tokenizer", info, files=["weights.safetensors"])
    with pytest.raises(ArtifactError, match="written by tokenizer"):
        train(codes, tmp_path / "run", tokenizer_folder)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("name", ["nothing", "codes"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, codes, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="tokenizer"):
        train(codes, tmp_path / "run", name)


def test_another_depth_or_other_codes_are_refused_by_name(tmp_path, codes, tokenizer_folder, tiny_tokenizer):
    train(codes, tmp_path / "run", tokenizer_folder, replace(TINY, steps=2))
    with pytest.raises(ConfigError, match="depth was 2, now 3"):
        train(codes, tmp_path / "run", tokenizer_folder, replace(TINY, depth=3))
    others = write_codes(tmp_path / "others", tiny_tokenizer, torch.Generator().manual_seed(1))
    with pytest.raises(ConfigError, match=r"begun with other codes$"):
        train(others, tmp_path / "run", tokenizer_folder)


def test_a_damaged_shard_is_named(tmp_path, codes, tokenizer_folder):
    shard = codes / "train-00000.safetensors"
    write_bytes(shard, shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(IntegrityError, match=r"train-00000\.safetensors"):
        train(codes, tmp_path / "run", tokenizer_folder)


def test_without_a_val_split_nothing_is_held_out_and_that_is_said(tmp_path, tiny_tokenizer, tokenizer_folder):
    only = write_codes(tmp_path / "only", tiny_tokenizer, torch.Generator().manual_seed(0), {"train": 20})
    plans = []
    config = replace(TINY, validate_every=None, keep_best=None)
    result = train(only, tmp_path / "run", tokenizer_folder, config, on_plan=plans.append)
    assert result.validation == {}
    assert "no val split" in plans[0].notes[0]


def test_running_out_of_memory_says_what_to_change(tmp_path, codes, tokenizer_folder, monkeypatch):
    def explode(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformerTrainer, "train_step", explode)
    with pytest.raises(MemoryLimitError) as caught:
        train(codes, tmp_path / "run", tokenizer_folder)
    assert caught.value.exit_code == 8
    assert "micro_batch_size=2" in caught.value.hint


def test_a_disk_too_small_for_the_checkpoints_is_said_before_training(tmp_path, codes, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(TransformerTrainer, "checkpoint_bytes", lambda self: 10**15)
    monkeypatch.setattr(TransformerTrainer, "train_step", None)
    with pytest.raises(ArtifactError, match="GB are needed"):
        train(codes, tmp_path / "run", tokenizer_folder)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(tmp_path, codes, tokenizer_folder, precision):
    config = replace(TINY, precision=precision, steps=6, dropout=0.0, drop_path=0.0)
    train(codes, tmp_path / "whole", tokenizer_folder, config)
    with pytest.raises(InterruptedRun):
        train(codes, tmp_path / "broken", tokenizer_folder, config, on_step=StopAfter(3))
    train(codes, tmp_path / "broken", tokenizer_folder, config)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    train(codes, tmp_path / "plain", tokenizer_folder, replace(config, precision="fp32"))
    first, plain = read_log(tmp_path / "whole", "train")[-1], read_log(tmp_path / "plain", "train")[-1]
    assert first["loss"] == pytest.approx(plain["loss"], rel=0.02)


def fill_memory_above(size: int):
    """A replacement of Objective.loss for a device that holds so many images."""
    plain = Objective.loss

    def loss(self, codes_BL, labels_B, branches=None):
        if len(codes_BL) > size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, codes_BL, labels_B, branches)

    return loss


def test_a_micro_batch_that_does_not_fit_is_made_smaller_before_the_start(
    tmp_path, codes, tokenizer_folder, monkeypatch
):
    config, plans, reports = replace(TINY, micro_batch_size=None, steps=2, dropout=0.0), [], []
    train(codes, tmp_path / "whole", tokenizer_folder, config)
    monkeypatch.setattr(Objective, "loss", fill_memory_above(3))
    options = {"on_plan": plans.append, "on_step": reports.append}
    train(codes, tmp_path / "cut", tokenizer_folder, config, **options)
    assert plans[0].micro_batch_size == 2
    messages = [report.message for report in reports if report.message and "do not fit" in report.message]
    assert messages == [
        "8 images at a time do not fit the memory: going on with 4",
        "4 images at a time do not fit the memory: going on with 2",
    ]
    whole, cut = (read_log(tmp_path / name, "train")[-1]["loss"] for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, rel=1e-5)
    with pytest.raises(MemoryLimitError) as caught:  # what was asked for is left alone
        train(codes, tmp_path / "asked", tokenizer_folder, replace(config, micro_batch_size=4))
    assert "micro_batch_size=2" in caught.value.hint
    monkeypatch.setattr(Objective, "loss", fill_memory_above(0))
    with pytest.raises(MemoryLimitError):
        train(codes, tmp_path / "none", tokenizer_folder, config)
    assert not (tmp_path / "none" / "config.json").exists()
