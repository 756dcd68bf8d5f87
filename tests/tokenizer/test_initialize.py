"""A codebook made of features: centres where vectors are, a share for each scale, less left over than by chance."""

from __future__ import annotations

import pytest
import torch

from varcli.errors import DataError
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.health import codebook_report, count_codes
from varcli.tokenizer.initialize import init_codebook, k_means


def dice() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def quantizer_of(**changes):
    torch.manual_seed(0)
    values = {"patch_nums": (1, 2, 4), "vocab_size": 48, "code_channels": 8, "width": 32, "channel_multipliers": (1, 1)}
    return VQVAE(TokenizerConfig(**{**values, **changes})).quantizer.requires_grad_(False)


def features(images: int = 40) -> torch.Tensor:
    return 5 * torch.randn(images, 8, 4, 4, generator=dice()) + 20 * torch.randn(images, 8, 1, 1, generator=dice())


def test_k_means_finds_groups_that_lie_apart():
    middles = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    vectors = middles.repeat(50, 1) + torch.randn(150, 2, generator=dice())
    centres = k_means(vectors, 12, False, dice())
    for middle in middles:
        assert (centres - middle).norm(dim=1).min() < 2
    assert k_means(vectors, 0, False, dice()).shape == (0, 2)
    assert k_means(vectors[:2], 5, False, dice()).unique(dim=0).shape == (2, 2)


def test_k_means_by_angle_goes_by_direction_alone():
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    vectors = directions.repeat(50, 1) * torch.linspace(1, 100, 100).view(-1, 1)
    centres = torch.nn.functional.normalize(k_means(vectors, 20, True, dice()), dim=1)
    assert set(map(tuple, centres.round().tolist())) == {(1.0, 0.0), (0.0, 1.0)}


@pytest.mark.parametrize("cosine", [False, True])
def test_a_codebook_of_the_features_leaves_less_over_and_lets_every_scale_use_more_codes(cosine):
    quantizer, f = quantizer_of(cosine_codes=cosine), features()

    def measure() -> tuple[float, dict[str, float]]:
        codes = quantizer.encode(f)
        counts = count_codes(codes, quantizer.scales, quantizer.vocab_size)
        return (f - quantizer.embed(codes)).square().mean().item(), codebook_report(counts)

    error_before, _ = measure()
    init_codebook(quantizer, f, dice())
    error_after, after = measure()
    assert error_after < 0.7 * error_before
    assert after["codebook_used"] > 0.9
    assert after["perplexity_scale_0"] > 5


def test_the_same_seed_gives_the_same_codebook_and_every_code_a_place():
    tables = []
    for _ in range(2):
        quantizer = quantizer_of()
        init_codebook(quantizer, features(), dice())
        tables.append(quantizer.codebook.weight.clone())
    assert torch.equal(*tables)
    assert len(tables[0].unique(dim=0)) == 48


def test_more_codes_than_vectors_and_features_that_are_no_numbers():
    quantizer = quantizer_of(vocab_size=500)
    init_codebook(quantizer, features(2), dice())  # 2 + 8 + 32 vectors
    assert quantizer.codebook.weight.isfinite().all()
    broken = features(2)
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="no numbers"):
        init_codebook(quantizer, broken, dice())
