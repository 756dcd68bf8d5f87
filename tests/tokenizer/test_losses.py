"""Penalties of the discriminator against values worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from varcli.tokenizer.discriminator import PatchDiscriminator
from varcli.tokenizer.losses import discriminator_loss, r1_penalty


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
