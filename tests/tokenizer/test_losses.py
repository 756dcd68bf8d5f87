"""Penalties of the discriminator against values worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from varcli.tokenizer.discriminator import PatchDiscriminator
from varcli.tokenizer.losses import LeCamPenalty, discriminator_loss, r1_penalty


def test_hinge_loss_is_zero_beyond_the_margin():
    assert discriminator_loss(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -3.0])) == 0
    assert discriminator_loss(torch.tensor([0.5]), torch.tensor([0.0])) == pytest.approx(0.5 * (0.5 + 1))


def test_r1_of_a_linear_discriminator_is_the_squared_length_of_its_weights():
    judge = nn.Conv2d(3, 1, 4)  # one logit an image
    assert r1_penalty(judge, torch.randn(5, 3, 4, 4)).item() == pytest.approx(
        judge.weight.square().sum().item(), rel=1e-5
    )


def test_r1_does_not_depend_on_the_number_of_patches_or_images():
    judge = nn.Conv2d(3, 1, 4, stride=4)
    one = r1_penalty(judge, torch.randn(2, 3, 4, 4)).item()
    assert r1_penalty(judge, torch.randn(7, 3, 16, 16)).item() == pytest.approx(one, rel=1e-5)


def test_lecam_is_the_squared_distance_of_each_side_beyond_the_others_average():
    penalty = LeCamPenalty(decay=0.5)
    real, fake = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -2.0])
    # the averages are the means 3 and -1.5: (2 + 1.5)^2, (4 + 1.5)^2 and (3 + 1)^2, (3 + 2)^2
    assert penalty(real, fake).item() == pytest.approx((12.25 + 30.25) / 2 + (16 + 25) / 2)
    # then half way to 1 and 2.5: 2 and 0.5; a real logit below the fakes' average and a fake one above the reals' are free
    assert penalty(torch.tensor([0.0, 2.0]), torch.tensor([2.5, 2.5])).item() == pytest.approx(1.5**2 / 2 + 0)
    assert (penalty.real_mean.item(), penalty.fake_mean.item()) == (2.0, 0.5)


def test_lecam_at_constant_logits_is_settled_from_the_first_step_on():
    penalty = LeCamPenalty()
    first, *_, last = (penalty(torch.ones(4), -torch.ones(4)).item() for _ in range(200))
    assert first == pytest.approx(last) == pytest.approx(8.0)


def test_lecam_takes_no_average_of_what_is_no_number():
    penalty = LeCamPenalty(decay=0.5)
    penalty(torch.tensor([float("nan")]), torch.tensor([-1.0]))
    assert penalty(torch.tensor([1.0]), torch.tensor([-1.0])).item() == pytest.approx(8.0)
    penalty(torch.tensor([float("inf")]), torch.tensor([-1.0]))
    assert (penalty.real_mean.item(), penalty.fake_mean.item()) == (1.0, -1.0)


def test_r1_flattens_a_discriminator_when_it_is_minimised():
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3))
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.1)
    images = torch.randn(4, 3, 8, 8)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        penalty = r1_penalty(judge, images)
        penalty.backward()
        optimizer.step()
        values.append(penalty.item())
    assert values[-1] < 0.5 * values[0]


def test_r1_gives_every_weight_of_the_patch_discriminator_a_finite_gradient():
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8)
    r1_penalty(judge, torch.randn(2, 3, 32, 32)).backward()
    weights = [value for name, value in judge.named_parameters() if "weight" in name]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)
