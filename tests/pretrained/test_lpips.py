"""LPIPS gives torch-fidelity's numbers, with gradients, and reads its two published files only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from varcli.artifacts.manifest import hash_file
from varcli.errors import ArtifactError, ShapeError, UnsafeFileError
from varcli.pretrained import lpips
from varcli.pretrained.lpips import LPIPS_NAMES, VGG_NAMES, Lpips, load_lpips


@pytest.fixture(scope="module")
def layers():
    """VGG16's convolutions with random weights, under torchvision's names."""
    from torchvision.models import vgg

    torch.manual_seed(0)
    return vgg.make_layers(vgg.cfgs["D"], batch_norm=False)


@pytest.fixture(scope="module")
def channel_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (64, 128, 256, 512, 512)
    return {f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for n, c in enumerate(sizes)}


@pytest.fixture
def folder(layers, channel_weights, tmp_path, monkeypatch):
    """Both files with random weights, taken for the published ones."""
    state = {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(2, 2)  # the published file has more than is needed
    # as the published VGG16 is stored
    torch.save(state, tmp_path / VGG_NAMES[0], _use_new_zipfile_serialization=False)
    torch.save(channel_weights, tmp_path / LPIPS_NAMES[0])
    monkeypatch.setattr(lpips, "VGG_SHA256", hash_file(tmp_path / VGG_NAMES[0]).sha256)
    monkeypatch.setattr(lpips, "LPIPS_SHA256", hash_file(tmp_path / LPIPS_NAMES[0]).sha256)
    return tmp_path


def images(count: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(count)).float()


def test_distances_equal_those_of_torch_fidelity(folder, layers, channel_weights, monkeypatch):
    from torch_fidelity import sample_similarity_lpips as reference

    monkeypatch.setattr(reference, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=layers))
    monkeypatch.setattr(reference, "load_state_dict_from_url", lambda *arguments, **options: channel_weights)
    first, second = images(3), images(4)[:3]
    expected = reference.SampleSimilarityLPIPS("lpips")(first, second).mean()
    found = load_lpips(folder)(first / 127.5 - 1, second / 127.5 - 1)
    torch.testing.assert_close(found, expected.squeeze(), rtol=1e-4, atol=1e-6)


def test_equal_images_are_at_distance_zero_and_gradients_are_numbers_even_where_nothing_answers():
    network = Lpips().requires_grad_(False)
    for stage in network.stages:
        for conv in stage:
            conv.bias.fill_(-1e3)  # every channel is 0 after the activation
    picture = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance = network(torch.ones(1, 3, 16, 16), picture)
    distance.backward()
    assert distance == 0 and picture.grad.isfinite().all()
    same = images(2) / 127.5 - 1
    assert Lpips()(same, same) == 0
    with pytest.raises(ShapeError, match="16 px"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_the_authors_name_for_the_channel_weights_is_known_too(folder):
    (folder / LPIPS_NAMES[0]).rename(folder / LPIPS_NAMES[1])
    assert not any(parameter.requires_grad for parameter in load_lpips(folder).parameters())


def test_missing_and_other_files_are_refused_by_name(folder, tmp_path_factory):
    with pytest.raises(ArtifactError, match=VGG_NAMES[0]) as caught:
        load_lpips(tmp_path_factory.mktemp("empty"))
    assert "lpips_weights" in caught.value.hint and "lite0" in caught.value.hint
    (folder / LPIPS_NAMES[0]).write_bytes(b"something else")
    with pytest.raises(UnsafeFileError, match="SHA-256"):
        load_lpips(folder)
