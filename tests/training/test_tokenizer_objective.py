"""The discriminator's part of a step: its regularisers and what it logs; and steps at the released shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from varcli.scales import NAMED_SCHEDULES
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.losses import r1_penalty
from varcli.training.tokenizer_objective import TokenizerObjective
from varcli.training.tokenizer_settings import REGULARIZERS, TokenizerTrainConfig

TINY = TokenizerConfig(
    patch_nums=(1, 2), vocab_size=8, code_channels=4, width=8, channel_multipliers=(1, 1), norm_groups=2
)
CPU = torch.device("cpu")


def objective(**changes) -> TokenizerObjective:
    torch.manual_seed(0)
    config = TokenizerTrainConfig(**{"tokenizer": TINY, "perceptual_weight": 0.0, **changes})
    return TokenizerObjective(config, CPU, torch.float32)


class Steep(torch.nn.Module):
    """A discriminator whose logits are those of another one times a factor."""

    def __init__(self, judge: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.judge, self.factor = judge, factor

    def forward(self, images):
        return self.factor * self.judge(images)


def judged_images() -> torch.Tensor:
    """Images and what stands for their reconstructions: (2, 4, 3, 16, 16)."""
    return torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def first_gradient(made: TokenizerObjective) -> torch.Tensor:
    """The gradient of the discriminator's first layer."""
    return next(p.grad for n, p in made.discriminator.named_parameters() if "weight" in n).clone()


def judge_step(step: int, **changes) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Numbers and the first layer's gradient of the discriminator after one step."""
    made = objective(**changes)
    real, fake = judged_images()
    numbers = made.backward_discriminator(step, real, fake, torch.Generator().manual_seed(2))
    return numbers, first_gradient(made)


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
    made = objective(discriminator_augment=())
    real, fake = judged_images()
    made.discriminator(torch.cat([real, fake]))  # spectral norm moves on with each call, as in the step
    r1_penalty(made.discriminator, real).backward()
    bare = {"discriminator_augment": ()}
    for weight in (1.0, 2.5):
        added = (
            judge_step(0, regularizer="r1", r1_weight=weight, **bare)[1] - judge_step(0, regularizer="none", **bare)[1]
        )
        torch.testing.assert_close(added, 8 * weight * first_gradient(made), rtol=1e-3, atol=1e-6)


def test_lecam_pulls_by_its_weight():
    plain, pulled, harder = (judge_step(3, regularizer="lecam", lecam_weight=weight)[1] for weight in (0.0, 1.0, 2.0))
    assert torch.equal(plain, judge_step(3, regularizer="none")[1])
    torch.testing.assert_close(harder - plain, 2 * (pulled - plain), rtol=1e-3, atol=1e-6)
    assert not torch.equal(plain, pulled)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_discriminators_push_is_a_share_of_the_content_gradient_however_steep_it_is(scale, monkeypatch):
    reached = []
    backward = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda t, g: reached.append(g[0].clone()) or backward(t, g))
    images, _ = judged_images()
    made = objective(discriminator_augment=(), tokenizer=replace(TINY, patch_nums=(1, 2, 8)))
    judge, kept = made.discriminator.eval(), torch.full((len(images),), 3)
    made.discriminator = Steep(judge, scale)
    for share in (0.0, 0.3):
        _, reconstructions, _ = made.backward_tokenizer(images, kept, share, torch.Generator().manual_seed(0))
    content, both = reached
    push = both - content
    assert push.norm().item() == pytest.approx(0.3 * content.norm().item(), rel=1e-3)
    leaf = reconstructions.requires_grad_()
    (away,) = torch.autograd.grad(judge(leaf).mean(), leaf)  # to where the discriminator thinks better of them
    assert torch.nn.functional.cosine_similarity(push.flatten(), -away.flatten(), dim=0) > 0.999


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
