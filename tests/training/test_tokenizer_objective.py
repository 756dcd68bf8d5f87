"""The discriminator's part of a step: its regularisers and what it logs; and steps at the released shapes."""

from __future__ import annotations

import pytest
import torch

from varcli.scales import NAMED_SCHEDULES
from varcli.tokenizer import TokenizerConfig
from varcli.training.tokenizer_objective import TokenizerObjective
from varcli.training.tokenizer_settings import REGULARIZERS, TokenizerTrainConfig

TINY = TokenizerConfig(
    patch_nums=(1, 2), vocab_size=8, code_channels=4, width=8, channel_multipliers=(1, 1), norm_groups=2
)
CPU = torch.device("cpu")


def objective(**changes) -> TokenizerObjective:
    torch.manual_seed(0)
    config = TokenizerTrainConfig(tokenizer=TINY, perceptual_weight=0.0, **changes)
    return TokenizerObjective(config, CPU, torch.float32)


def judge_step(step: int, **changes) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Numbers and the first layer's gradient of the discriminator after one step."""
    made = objective(**changes)
    real, fake = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    numbers = made.backward_discriminator(step, real, fake, torch.Generator().manual_seed(2))
    return numbers, next(p.grad for n, p in made.discriminator.named_parameters() if "weight" in n).clone()


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_every_regulariser_gives_finite_gradients_and_the_same_loss_in_the_log(regularizer):
    numbers, gradient = judge_step(0, regularizer=regularizer)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert numbers["discriminator_loss"] == judge_step(0, regularizer="none")[0]["discriminator_loss"]
    assert {"real_logit", "fake_logit"} <= numbers.keys()


def test_r1_comes_every_sixteenth_step_and_counts_sixteenfold():
    plain = judge_step(0, regularizer="none")[1]
    for step, is_due in ((0, True), (1, False), (15, False), (16, True)):
        numbers, gradient = judge_step(step, regularizer="r1")
        assert ("r1_penalty" in numbers) == is_due
        assert torch.equal(gradient, plain) != is_due
    (one, two) = (judge_step(0, regularizer="r1", r1_weight=weight)[1] - plain for weight in (1.0, 2.0))
    torch.testing.assert_close(2 * one, two, rtol=1e-3, atol=1e-6)


def test_lecam_pulls_only_once_it_has_averages_to_pull_to():
    plain, pulled = (judge_step(3, regularizer=name, lecam_weight=1.0)[1] for name in ("none", "lecam"))
    assert not torch.equal(plain, pulled)
    assert torch.equal(plain, judge_step(3, regularizer="lecam", lecam_weight=0.0)[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("levels", [4, 5])
def test_the_released_shapes_build_and_take_a_step_at_f8_and_f16(side, levels, checkpointing):
    grid = side // 2 ** (levels - 1)
    schedule = tuple(sorted({*NAMED_SCHEDULES["256"], *NAMED_SCHEDULES["512"]} & set(range(grid)) | {grid}))
    tokenizer = TokenizerConfig(
        patch_nums=schedule,
        vocab_size=64,
        code_channels=8,
        width=4,
        channel_multipliers=(1, 1, 2, 2, 4)[-levels:],
        num_res_blocks=1,
        norm_groups=2,
    )
    assert (tokenizer.downsampling, tokenizer.image_size) == (2 ** (levels - 1), side)
    torch.manual_seed(0)
    config = TokenizerTrainConfig(
        tokenizer=tokenizer, perceptual_weight=0.0, adversarial_weight=0.0, checkpointing=checkpointing
    )
    made = TokenizerObjective(config, CPU, torch.float32)
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    kept = torch.tensor([tokenizer.scales.num_scales])
    numbers, reconstructions, codes = made.backward_tokenizer(images, kept, 0.0, torch.Generator())
    assert reconstructions.shape == images.shape and codes.shape == (1, tokenizer.scales.seq_len)
    gradients = [parameter.grad for parameter in made.tokenizer.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(made.tokenizer.parameters(), lr=1e-3).step()
    after = made.backward_tokenizer(images, kept, 0.0, torch.Generator())[0]
    assert after["pixel_loss"].isfinite() and after["pixel_loss"] != numbers["pixel_loss"]
