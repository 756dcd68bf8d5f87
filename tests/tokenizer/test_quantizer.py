"""Laws of the multi-scale residual quantizer."""

from __future__ import annotations

import pytest
import torch

from varcli.devices import exact_convolutions
from varcli.errors import ShapeError
from varcli.tokenizer import VQVAE, TokenizerConfig
from varcli.tokenizer.quantizer import MultiScaleQuantizer, assign_phis, resize, resize_weights


@pytest.fixture
def features():
    return torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(3))


def test_embedding_the_codes_gives_the_last_running_f_hat(tiny_tokenizer, features):
    quantizer = tiny_tokenizer.quantizer
    codes = quantizer.encode(features)
    running = [f_hat for f_hat, _ in quantizer.running_f_hat(codes)]
    assert len(running) == 3
    assert torch.equal(quantizer.embed(codes), running[-1])


def test_each_code_is_the_nearest_to_what_earlier_scales_left_over(tiny_tokenizer, features):
    quantizer = tiny_tokenizer.quantizer
    codes = quantizer.split(quantizer.encode(features))
    for vectors, codes_Bl in zip(quantizer.leftovers(features), codes, strict=True):
        distances = torch.cdist(vectors.double(), quantizer.codebook.weight.double())
        chosen = distances.gather(1, codes_Bl.reshape(-1, 1)).squeeze(1)
        torch.testing.assert_close(chosen, distances.min(dim=1).values, atol=1e-5, rtol=1e-5)


def test_training_pass_chooses_the_codes_that_encode_chooses(tiny_tokenizer, features):
    quantizer = tiny_tokenizer.quantizer
    straight_through, loss, codes = quantizer(features)
    assert torch.equal(codes, quantizer.encode(features))
    torch.testing.assert_close(straight_through, quantizer.embed(codes), atol=1e-5, rtol=1e-5)
    assert loss > 0


def test_gradient_of_f_hat_reaches_the_features_unchanged(tiny_tokenizer, features):
    features.requires_grad_()
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    straight_through, _, _ = tiny_tokenizer.quantizer(features)
    (straight_through * weights).sum().backward()
    assert torch.equal(features.grad, weights)


def test_dropping_fine_scales_leaves_the_coarse_f_hat(tiny_tokenizer, features):
    quantizer = tiny_tokenizer.quantizer
    kept = torch.tensor([1, 2, 3])
    straight_through, _, codes = quantizer(features, kept)
    running = torch.stack([f_hat for f_hat, _ in quantizer.running_f_hat(codes)])
    for image in range(3):
        torch.testing.assert_close(straight_through[image], running[image, image], atol=1e-5, rtol=1e-5)


def test_teacher_forcing_input_ignores_the_last_scale(tiny_tokenizer, features):
    quantizer = tiny_tokenizer.quantizer
    codes = quantizer.encode(features)
    changed = codes.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 16
    expected = quantizer.teacher_forcing_input(codes)
    assert expected.shape == (3, 20, 8)
    assert torch.equal(expected, quantizer.teacher_forcing_input(changed))


def test_quantizing_a_codebook_made_of_the_features_is_exact():
    config = TokenizerConfig(
        patch_nums=(4,), vocab_size=16, code_channels=8, width=32, channel_multipliers=(1,), phi_residual=0.0
    )
    quantizer = VQVAE(config).quantizer
    with torch.no_grad():
        features = quantizer.codebook.weight.T.reshape(1, 8, 4, 4).clone()
    assert torch.equal(quantizer.embed(quantizer.encode(features)), features)


def test_phi_assignment_of_the_released_schedule():
    # ties at scales 2 and 7 are broken by float64 rounding; the released weights fix the answer
    assert assign_phis(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert assign_phis(10, 1) == [0] * 10
    assert assign_phis(5, 0) == [0, 1, 2, 3, 4]


def test_cosine_codes_ignore_the_length_of_vectors():
    config = TokenizerConfig(
        patch_nums=(1, 2), vocab_size=16, code_channels=8, width=32, channel_multipliers=(1, 1), cosine_codes=True
    )
    quantizer = VQVAE(config).quantizer
    vectors = torch.randn(50, 8)
    assert torch.equal(quantizer.nearest(vectors), quantizer.nearest(vectors * 7))


def test_codes_of_a_wrong_length_or_type_are_refused(tiny_tokenizer):
    quantizer = tiny_tokenizer.quantizer
    with pytest.raises(ShapeError, match="codes must have shape"):
        quantizer.embed(torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(ShapeError, match="int64"):
        quantizer.embed(torch.zeros(1, 21))


@pytest.mark.parametrize(
    ("side", "target", "mode"),
    [(1, 8, "bicubic"), (5, 16, "bicubic"), (13, 16, "bicubic")]
    + [(8, 3, "area"), (16, 13, "area"), (16, 1, "area"), (8, 8, "area")],
)
def test_resizing_by_weights_is_torchs_interpolation(side, target, mode):
    maps = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(maps, size=(target, target), mode=mode)
    torch.testing.assert_close(resize(maps, resize_weights(side, target, mode).double()), expected, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_phis", [2, 1])
def test_a_gpus_own_passes_advance_as_torch_does(num_phis):
    config = TokenizerConfig(patch_nums=(1, 2, 3, 6), vocab_size=16, code_channels=8, width=32, num_phis=num_phis)
    quantizer = MultiScaleQuantizer(config).cuda()
    codes_BL = torch.randint(16, (3, config.scales.seq_len), device="cuda")
    with exact_convolutions():
        expected = [
            [part.detach() for part in parts if part is not None] for parts in quantizer.running_f_hat(codes_BL)
        ]
    quantizer.kernels = "triton"
    with torch.no_grad():
        found = [[part for part in parts if part is not None] for parts in quantizer.running_f_hat(codes_BL)]
    assert [len(parts) for parts in found] == [2, 2, 2, 1]
    for parts, others in zip(found, expected, strict=True):
        for part, other in zip(parts, others, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-5)
