"""What a tokenizer is trained to keep: pixels, edges, perceived content, and realism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varcli.distributed import ALONE, World
from varcli.pretrained.lite0 import load_lite0
from varcli.pretrained.lpips import load_lpips


def pixel_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute plus mean squared difference over (B, 3, H, W) images in [-1, 1]."""
    difference = reconstructions - images
    return difference.abs().mean() + difference.square().mean()


class PerceptualLoss(nn.Module):
    """Distance between two sets of images in the stages of a fixed network (EfficientNet-lite0).

    As in LPIPS (arXiv:1801.03924), each stage's vectors are scaled to unit length before they are compared; there are
    no learned channel weights, since none exist for this network.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.network = load_lite0(device)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]; returns a scalar, with gradients for the reconstructions."""
        with torch.no_grad():
            wanted = self.network.stages(images)
        distance = reconstructions.new_zeros((), dtype=torch.float32)
        for want, have in zip(wanted, self.network.stages(reconstructions), strict=True):
            difference = F.normalize(want.float(), dim=1, eps=1e-6) - F.normalize(have.float(), dim=1, eps=1e-6)
            distance = distance + difference.square().sum(dim=1).mean()
        return distance


PERCEPTUAL: dict[str, Callable[[Path | None], nn.Module]] = {
    "lite0": lambda weights: PerceptualLoss(),
    "lpips": load_lpips,
}
"""Every perceptual distance by name, built from a folder of weights where it needs one."""


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator (arXiv:1705.02894): real above 1, fake below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Hinge loss of a generator: raise the discriminator's opinion of the fakes."""
    return -fake_logits.mean()


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Squared length of the logits' gradient at real images (R1, arXiv:1801.04406, Eq. 9, without its factor gamma / 2).

    images: (B, 3, H, W). Every patch's logit counts as a discriminator of its own: the mean over images, divided by the
    patches. In float32; differentiable with respect to the discriminator's weights.
    """
    with torch.autocast(images.device.type, enabled=False):
        leaf = images.detach().float().requires_grad_()
        logits = discriminator(leaf)
        (gradient,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
        return gradient.square().sum() / logits.numel()


class LeCamPenalty(nn.Module):
    """Keeps a discriminator near its own running averages, which steadies it on small sets (arXiv:2104.03310).

    The averages begin with the means of the first batch.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor, world: World = ALONE) -> Tensor:
        """Update the averages and return the squared hinge distance of each side from the other's average.

        world: processes that have a part of the batch each; the averages are of all of them.
        """
        with torch.no_grad():
            means = world.mean(torch.stack([real_logits.mean().float(), fake_logits.mean().float()]))
            for average, mean in zip((self.real_mean, self.fake_mean), means, strict=True):
                moved = torch.where(average == 0, mean, average.lerp(mean, 1 - self.decay))  # 0 is: none yet
                average.copy_(torch.where(mean.isfinite(), moved, average))  # one NaN would stay forever
        return (
            F.relu(real_logits - self.fake_mean).square().mean() + F.relu(self.real_mean - fake_logits).square().mean()
        )
