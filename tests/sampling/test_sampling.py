"""Laws of sampling: truncation and draw as defined, noise that belongs to its image, pictures that repeat."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from varcli.errors import ArtifactError, ConfigError, DataError
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.logits import draw, guide, truncate
from varcli.sampling.noise import KeyedNoise, exponential, image_keys

CPU = torch.device("cpu")


@pytest.fixture
def generator(tiny_tokenizer, tiny_transformer):
    return Generator(tiny_tokenizer, tiny_transformer, ("apple", "boat", "cat"))


def test_guidance_of_zero_is_none():
    wanted, unwanted = torch.randn(2, 1, 3, 5)
    assert torch.equal(guide(wanted, unwanted, 0.0), wanted)


def test_top_k_keeps_ties_and_top_p_keeps_the_likeliest():
    logits = torch.tensor([[[3.0, 1.0, 1.0, 0.0]]])
    assert truncate(logits, top_k=2).isinf().tolist() == [[[False, False, False, True]]]
    assert truncate(logits, top_p=1e-9).isinf().tolist() == [[[False, True, True, True]]]
    probabilities = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    assert truncate(probabilities.log(), top_p=0.78).isinf().tolist() == [[[False, False, True, True]]]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.7), (5, 0.7), (7, 0.2), (1, 0.9), (100, 0.999)])
def test_truncation_is_what_its_definition_says_ties_included(top_k, top_p):
    logits = torch.randn(40, 3, 12, generator=torch.Generator().manual_seed(0)).mul(2).round() / 2  # many ties
    for row, found in zip(logits.flatten(0, 1).tolist(), truncate(logits, top_k, top_p).flatten(0, 1).tolist()):
        kept = [x for x in row if top_k is None or sum(other > x for other in row) < top_k]
        total = math.fsum(map(math.exp, kept))
        if top_p is not None:
            kept = [x for x in kept if math.fsum(math.exp(other) for other in kept if other > x) / total < top_p]
        assert found == [x if x >= min(kept) else -math.inf for x in row]


def test_keys_are_splitmix64_of_seed_class_and_index_whatever_the_batch():
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    for seed in (0, 2**63 + 5, -1, 2**200 + 7):
        expected = []
        for parts in ((seed, 207, 0), (seed, 3, 9), (seed, 999, 2**40)):
            key = 0
            for part in parts:
                key = mix((key + 0x9E3779B97F4A7C15 + part) % 2**64)
            expected.append(key - 2**64 if key >= 2**63 else key)
        assert image_keys(seed, [207, 3, 999], [0, 9, 2**40]).tolist() == expected
        assert image_keys(seed, [3], [9]).tolist() == expected[1:2]
    assert image_keys(0, [], []).tolist() == []


def test_noise_is_exponential_and_differs_by_every_key():
    noise = KeyedNoise(0, [1, 1, 2], [0, 1, 0], CPU)(3, 0, 50, 400)
    assert noise.min() > 0
    assert noise.mean().item() == pytest.approx(1, abs=0.02)
    assert noise.var().item() == pytest.approx(1, abs=0.05)
    below = [(noise < -math.log(1 - share)).float().mean().item() for share in (0.1, 0.5, 0.9)]
    assert below == pytest.approx([0.1, 0.5, 0.9], abs=0.01)
    flat = [*noise.flatten(1), *KeyedNoise(0, [1], [0], CPU)(2, 0, 50, 400).flatten(1)]
    flat += [
        *KeyedNoise(1, [1], [0], CPU)(3, 0, 50, 400).flatten(1),
        *KeyedNoise(0, [1], [0], CPU)(3, 1, 50, 400).flatten(1),
    ]
    correlations = torch.corrcoef(torch.stack(flat)) - torch.eye(len(flat))
    assert correlations.abs().max() < 0.04  # 5 standard errors of 20,000 pairs


def test_noise_of_the_most_extreme_bits_is_finite_and_above_zero():
    # 24 bits and a half round up to u = 1: one number in 2^24 was 0, which made 1 % of smooth pictures black
    noise = exponential(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert noise.isfinite().all()
    assert (noise > 0).all()
    assert noise.log().isfinite().all()


def test_draws_follow_the_truncated_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -8.0]).expand(1, 1, -1)
    kept = truncate(logits, top_k=4, top_p=0.9)
    count = 20_000
    noise = KeyedNoise(5, range(count), [0] * count, CPU)(0, 0, 1, 6)
    picks = draw(kept.expand(count, -1, -1), noise).flatten().bincount(minlength=6)
    expected = kept.flatten().softmax(0) * count
    assert picks[expected == 0].sum() == 0
    chi_square = ((picks - expected)[expected > 0].square() / expected[expected > 0]).sum()
    assert chi_square < 20  # 3 degrees of freedom: exceeded once in 6,000


def test_an_image_does_not_depend_on_its_batch(generator):
    # 24 pictures: enough pixels that float sums in another order would cross a rounding border somewhere
    classes = [0, 1, 2] * 8
    together = generator.sample(classes, batch_size=7)
    for size in (1, 3, 64):
        assert torch.equal(generator.sample(classes, batch_size=size), together)
    alone = generator.sample(["apple"], indices=[2])
    assert torch.equal(alone[0], together[6])
    assert not torch.equal(together[0], together[3])


@pytest.mark.parametrize(
    "settings", [{"cfg": 0.0}, {"smooth": True}, {"cfg_schedule": "constant"}, {"top_k": None, "top_p": None}]
)
def test_every_setting_draws_pictures_that_repeat(generator, settings):
    config = SampleConfig(**settings)
    images = generator.sample([0, 3], config=config)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images, generator.sample([0, 3], config=config))


@pytest.mark.parametrize("settings", [{}, {"smooth": True}])
def test_a_stream_shows_every_step_and_ends_with_the_sample(generator, settings):
    pictures = list(generator.stream([0, 3, 0], **settings))
    assert len(pictures) == len(generator.order.step_lengths)
    assert all(images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 for images in pictures)
    assert torch.equal(pictures[-1], generator.sample([0, 3, 0], **settings))
    assert not torch.equal(pictures[0], pictures[-1])


def test_a_stream_left_early_changes_nothing_around_it(generator):
    stream = generator.stream([0], precision="bf16")
    next(stream)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "settings", [{"cfg": -1}, {"cfg": math.nan}, {"top_p": 1.5}, {"top_p": 0}, {"top_k": 0}, {"cfg_schedule": "x"}]
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError):
        SampleConfig(**settings)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_image_is_refused(generator, size):
    with pytest.raises(ConfigError, match=f"batch_size must be 1 or more, but is {size}"):
        generator.sample([0], batch_size=size)


@pytest.mark.parametrize("index", [0.5, "a", -1, True, torch.tensor(0.5), None])
def test_an_index_is_a_whole_number_from_0_on(generator, index):
    with pytest.raises(ConfigError, match="an index is"):
        generator.sample([0], indices=[index])


def test_indices_may_be_tensors_and_batches_takes_settings_by_name(generator):
    expected = generator.sample([0, 1], indices=[3, 4], cfg=2.0)
    assert torch.equal(generator.sample(torch.tensor([0, 1]), indices=torch.tensor([3, 4]), cfg=2.0), expected)
    assert torch.equal(torch.cat(list(generator.batches([0, 1], [3, 4], cfg=2.0))), expected)
    with pytest.raises(ConfigError, match="seed must be 0 or more"):
        generator.sample([0], seed=-1)


def test_unknown_classes_and_foreign_tokenizers_are_refused(generator, tiny_transformer):
    with pytest.raises(DataError, match="207"):
        generator.sample([207])
    with pytest.raises(ConfigError, match="nothing to sample"):
        generator.sample([])
    for classes in (3, None, "boat"):
        with pytest.raises(ConfigError, match="classes must be a list"):
            generator.sample(classes)
    from varcli.tokenizer import VQVAE, TokenizerConfig

    other = TokenizerConfig(patch_nums=(1, 4), vocab_size=16, code_channels=8, width=32, channel_multipliers=(1,))
    with pytest.raises(ArtifactError, match="predicts steps"):
        Generator(VQVAE(other), tiny_transformer)


def test_classes_may_be_whole_numbers_of_any_kind_and_nothing_else(generator):
    images = [generator.sample([number], cfg=1.0) for number in (1, np.int64(1), torch.tensor(1))]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    for wrong in ("apple", [1.5], [True], [None]):
        with pytest.raises(ConfigError, match="class"):
            generator.sample(wrong)
