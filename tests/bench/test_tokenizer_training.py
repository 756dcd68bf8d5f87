"""The measured step is the trainer's, and its operations are counted by a law that a real step obeys."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typer.testing import CliRunner

from varcli.bench import calibrate
from varcli.bench.config import BenchConfig
from varcli.bench.counting import count_forward
from varcli.bench.stages import STAGES, run_bench
from varcli.bench.tokenizer_training import (
    tokenizer_training_flops,
    tokenizer_training_stage,
    training_settings,
)
from varcli.cli.app import app
from varcli.errors import ConfigError
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.discriminator import PatchDiscriminator
from varcli.training.tokenizer_settings import TokenizerTrainConfig

CPU = torch.device("cpu")
TINY = TokenizerConfig(
    patch_nums=(1, 2, 4),
    vocab_size=32,
    code_channels=8,
    width=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    norm_groups=4,
)


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    ceiling = calibrate.Ceiling(device="test", dtype="float32", matmul_tflops=0.1, copy_gb_per_second=10.0)
    monkeypatch.setattr("varcli.bench.stages.measure_ceiling", lambda *_: ceiling)


class _Counter(TorchDispatchMode):
    """Counts operations; FlopCounterMode also hooks modules, which a gradient with respect to images does not stand."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _bench(**changes) -> BenchConfig:
    training = TokenizerTrainConfig(tokenizer=TINY, **changes)
    return BenchConfig(tokenizer_training=training, batch_sizes=(2,), repeats=1, device="cpu")


def test_work_of_a_convolution_is_what_a_hand_counts():
    images = torch.empty(4, 3, 16, 16, device="meta")
    counted = count_forward(nn.Conv2d(3, 8, 3, padding=1), lambda conv: conv(images))
    assert counted == 2 * 9 * 3 * 8 * 16 * 16 * 4


def test_work_of_the_discriminator_is_what_a_hand_counts():
    counted = count_forward(PatchDiscriminator(), lambda network: network(torch.empty(1, 3, 32, 32)))
    strided = 16 * (3 * 64 * 16**2 + 64 * 128 * 8**2 + 128 * 256 * 4**2)
    assert counted == 2 * (strided + 9 * (256 * 256 + 256) * 4**2)


@pytest.mark.parametrize("left_out", ["perceptual_weight", "adversarial_weight", "none"])
def test_double_the_batch_is_double_the_work(left_out):
    settings = TokenizerTrainConfig(tokenizer=TINY)
    settings = settings if left_out == "none" else replace(settings, **{left_out: 0.0})
    assert tokenizer_training_flops(settings, 6) == pytest.approx(2 * tokenizer_training_flops(settings, 3), rel=1e-12)


def test_each_loss_adds_work():
    settings = TokenizerTrainConfig(tokenizer=TINY)
    whole = tokenizer_training_flops(settings)
    assert tokenizer_training_flops(replace(settings, perceptual_weight=0.0)) < whole
    assert tokenizer_training_flops(replace(settings, adversarial_weight=0.0)) < whole


def test_the_law_agrees_with_counting_a_real_step():
    # the real step has no gradient of the images at the first convolutions, but resizes between scales: 0.1 % in all
    config = _bench()
    work, flops = tokenizer_training_stage(2, config, CPU, torch.float32)
    with _Counter() as counter:
        work()
    assert counter.flops == pytest.approx(2 * flops, rel=0.02)


def test_every_loss_is_at_work_in_the_measured_step():
    work, _ = tokenizer_training_stage(2, _bench(), CPU, torch.float32)
    numbers = work()
    assert {"pixel_loss", "perceptual_loss", "quantizer_loss", "adversarial_loss", "discriminator_loss"} <= set(numbers)
    assert numbers["skipped"] == 0


def test_a_training_step_is_measured_with_consistent_numbers():
    entry = run_bench("train-tokenizer", _bench()).measurements[0]
    assert entry.stage == "train-tokenizer"
    assert entry.images_per_second == pytest.approx(2 / entry.milliseconds * 1e3)
    flops = tokenizer_training_flops(TokenizerTrainConfig(tokenizer=TINY), 2)
    assert entry.tflops == pytest.approx(flops / entry.milliseconds * 1e3 / 1e12)


def test_all_measures_every_stage_but_the_training_of_a_tokenizer(monkeypatch):
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda *_, name=name: {name: (lambda: lambda: None, 1.0)})
    found = run_bench("all", BenchConfig(batch_sizes=(2,), repeats=1, device="cpu"))
    assert {entry.stage for entry in found.measurements} == STAGES.keys() - {"train-tokenizer"}


def test_schedule_and_width_name_the_small_architecture():
    config = BenchConfig(scales="1,2,3,4,5,6,8", tokenizer_width=40)
    assert config.tokenizer == TokenizerConfig.for_side(64)
    assert config.tokenizer.image_size == 64
    assert config.transformer.vocab_size == config.tokenizer.vocab_size
    assert BenchConfig().tokenizer == TokenizerConfig()


def test_what_the_benchmark_decides_wins_over_the_settings():
    config = BenchConfig(tokenizer_training=TokenizerTrainConfig(batch_size=7, compile=True, scale_dropout=0.3))
    settings = training_settings(2, config, torch.bfloat16)
    assert (settings.batch_size, settings.precision, settings.compile) == (2, "bf16", False)
    assert (settings.scale_dropout, settings.tokenizer) == (0.3, TokenizerConfig())


def test_fp16_is_refused():
    with pytest.raises(ConfigError, match="precision"):
        training_settings(2, _bench(), torch.float16)


def test_the_command_takes_settings_as_training_does():
    command = ["bench", "train-tokenizer", "--scales", "1,2", "--tokenizer-width", "8", "--batch-size", "2"]
    command += ["--set", "tokenizer.norm_groups=4", "--set", "tokenizer.channel_multipliers=[1,2,2]"]
    command += ["--set", "perceptual_weight=0", "--repeats", "1", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images_per_second"] > 0
