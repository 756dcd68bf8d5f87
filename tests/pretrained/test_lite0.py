"""Laws of the fixed feature network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from varcli.errors import ConfigError, ShapeError
from varcli.pretrained.lite0 import STAGE_CHANNELS, load_lite0


@pytest.fixture(scope="module")
def network():
    return load_lite0()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth colour fields, nearer to pictures than noise is."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, (64, 64), mode="bicubic").clamp(-1, 1)


def test_features_and_logits_have_their_shapes_and_range(network, images):
    features, logits = network(images)
    assert features.shape == (3, 1280) and logits.shape == (3, 1000)
    assert features.dtype == logits.dtype == torch.float32
    assert features.min() >= 0 and features.max() <= 6


def test_outputs_are_those_of_the_network_the_weights_came_from(network):
    # waves through the package's own code with its float32 weights; ours are rounded to half precision
    side = torch.arange(128.0)
    waves = [torch.sin(side[:, None] / (5 + 3 * c)) * torch.cos(side[None] / (9 - 2 * c)) for c in range(3)]
    features, logits = network(torch.stack(waves)[None])
    largest = features[0].topk(8)
    wanted = [5.6909, 5.0839, 4.6196, 3.7483, 3.7390, 3.5839, 3.4767, 3.4329]
    at = [439, 31, 957, 1116, 600, 1259, 343, 515]
    assert torch.allclose(features[0, at], torch.tensor(wanted), atol=0.06)  # 1 % of the largest
    assert largest.indices[:3].tolist() == at[:3]
    assert features.sum().item() == pytest.approx(230.75, rel=5e-3)
    assert torch.allclose(logits[0, [906, 772, 398]], torch.tensor([7.6306, 6.0928, 5.9188]), atol=0.06)


def test_rows_do_not_depend_on_the_batch(network, images):
    together, _ = network(images)
    alone = torch.cat([network(image[None])[0] for image in images])
    assert torch.allclose(together, alone, atol=1e-4)


def test_stages_halve_the_side_and_reach_the_images(network, images):
    images = images.clone().requires_grad_()
    maps = network.stages(images)
    assert [tuple(entry.shape) for entry in maps] == [
        (3, channels, side, side) for channels, side in zip(STAGE_CHANNELS, (64, 32, 16, 8, 4))
    ]
    sum(entry.square().mean() for entry in maps).backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_larger_images_enter_at_the_training_side(network):
    assert network.stages(torch.zeros(1, 3, 256, 256))[0].shape[-1] == 112
    assert network.stages(torch.zeros(1, 3, 64, 64), size=64)[0].shape[-1] == 32


def test_images_that_do_not_fit_are_refused(network):
    with pytest.raises(ShapeError):
        network(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ConfigError):
        network(torch.zeros(1, 3, 64, 64), size=100)
