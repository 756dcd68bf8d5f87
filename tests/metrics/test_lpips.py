"""LPIPS is that of its authors' code, from a file that cannot run code."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from small_sets import draw

from varcli.errors import ArtifactError, UnsafeFileError
from varcli.metrics.lpips import load_lpips


@pytest.fixture(scope="module")
def theirs():
    """torch-fidelity's LPIPS, which is adapted from the authors' code, with random weights and nothing fetched."""
    import torchvision
    from torch_fidelity import sample_similarity_lpips as module

    torch.manual_seed(0)
    lins = {
        f"lin{number}.model.1.weight": torch.rand(1, channels, 1, 1)
        for number, channels in enumerate((64, 128, 256, 512, 512))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: lins)
        patch.setattr(module, "torchvision_load_pretrained_vgg16", lambda: torchvision.models.vgg16(weights=None))
        return module.SampleSimilarityLPIPS("random")


def batch(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(draw(count, seed)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_it_is_that_of_the_authors(theirs, tmp_path, kind):
    path = tmp_path / f"lpips.{kind}"
    if kind == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, path)
    lpips, sha256 = load_lpips(path)
    images, others = batch(3, seed=1), batch(3, seed=2)
    # the same convolutions on pixels that are normalised in another order of operations
    torch.testing.assert_close(lpips(images, others), theirs(images, others), rtol=1e-4, atol=1e-6)
    assert lpips(images, images).tolist() == [0, 0, 0]
    assert len(sha256) == 64


def test_a_file_without_vgg16_is_refused_with_the_way_to_make_one(theirs, tmp_path):
    save_file({name: t.clone() for name, t in theirs.state_dict().items() if "lin" in name}, tmp_path / "vgg.pth")
    with pytest.raises(ArtifactError, match=r"net\.slice1\.0\.weight.*missing") as caught:
        load_lpips(tmp_path / "vgg.pth")
    assert "state_dict" in caught.value.hint


def test_a_file_with_weights_of_another_shape_or_nan_is_refused(theirs, tmp_path):
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file({**state, "lin0.model.1.weight": torch.rand(1, 3, 1, 1)}, tmp_path / "shape.safetensors")
    with pytest.raises(ArtifactError, match="has shape"):
        load_lpips(tmp_path / "shape.safetensors")
    state["lin0.model.1.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ArtifactError, match="NaN"):
        load_lpips(tmp_path / "nan.safetensors")


def test_a_pickle_of_the_old_format_and_a_missing_file_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError):
        load_lpips(tmp_path / "old.pth")
    with pytest.raises(ArtifactError, match="cannot read"):
        load_lpips(tmp_path / "none.pth")
