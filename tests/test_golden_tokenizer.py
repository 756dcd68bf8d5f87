"""The tokenizer computes what the reference computes: features, codes, pictures, losses, gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from golden_files import (
    FEATURES,
    GRADIENT,
    GRADIENT_NORM,
    LONG_WAY,
    LOSS,
    Case,
    assert_codes,
    assert_near,
    assert_stored,
    cases,
    parametrize,
    whole_tokenizers,
)
from torch import Tensor

from varcli.interop.names import quantizer_names, tokenizer_names
from varcli.interop.official import load_quantizer, load_tokenizer
from varcli.order import ScaleOrder

quantizer_cases = pytest.mark.parametrize(**parametrize(cases("quantizer", "vqvae", having="io.safetensors")))
tokenizer_cases = pytest.mark.parametrize(**parametrize([c for c in whole_tokenizers() if c.tensors("io")]))


@functools.lru_cache(maxsize=1)
def tokenizer_of(case: Case):
    return load_tokenizer(case.weights(), **case.config)


def quantizer_of(case: Case):
    weights = {name: tensor for name, tensor in case.weights().items() if name.startswith("quantize.")}
    return load_quantizer(weights, **case.config)


def images_of(case: Case) -> Tensor:
    return case.tensors("io")["image_u8"].float() / 255 * 2 - 1


@quantizer_cases
@torch.no_grad()
def test_codes_and_f_hat_equal_the_reference(case):
    io, quantizer = case.tensors("io"), quantizer_of(case)
    assert_codes(quantizer.encode(io["f"]), io["idx"], io["idx_margin"])
    running = torch.stack([f_hat for f_hat, _ in quantizer.running_f_hat(io["idx"])])
    assert_stored(io, "f_hat_all", running, FEATURES)
    for name in ("f_hat_from_idx", "ar_f_hat"):
        if name in io:
            assert_near(quantizer.embed(io["idx"]), io[name], FEATURES, name)


@quantizer_cases
@torch.no_grad()
def test_teacher_forcing_input_equals_the_reference_at_once_and_step_by_step(case):
    io = case.tensors("io")
    order = ScaleOrder(quantizer_of(case))
    expected = io["var_input"]
    assert_near(order.teacher_forcing_input(io["idx"]), expected, FEATURES)
    state, pieces = order.start(len(expected), torch.device("cpu")), []
    for step, codes in enumerate(io["idx"].split(order.step_lengths, dim=1)):
        state, features = order.advance(state, step, order.lookup(codes))
        pieces += [features] if features is not None else []
    assert_near(torch.cat(pieces, dim=1), expected, FEATURES)
    if "ar_f_hat" in io:
        assert_near(order.finish(state), io["ar_f_hat"], FEATURES)


@pytest.mark.parametrize(**parametrize([c for c in cases("quantizer", "vqvae") if "phi_index_per_scale" in c.config]))
def test_each_scale_uses_the_phi_of_the_reference(case):
    assert quantizer_of(case).phi_of_scale == case.config["phi_index_per_scale"]


@pytest.mark.parametrize(**parametrize([c for c in cases("quantizer") if "train_vq_loss" in c.tensors("io")]))
def test_quantizer_loss_and_gradients_equal_the_reference(case):
    io, quantizer = case.tensors("io"), quantizer_of(case)
    f = io["f"].clone().requires_grad_()
    f_hat, loss, codes = quantizer(f)
    assert_codes(codes, io["idx"], io["idx_margin"])
    torch.testing.assert_close(loss, io["train_vq_loss"], rtol=LOSS, atol=0)
    if "train_f_hat" in io:
        assert_near(f_hat, io["train_f_hat"], FEATURES)
    weights = torch.linspace(-1, 1, f_hat.numel()).view_as(f_hat)
    (loss + (f_hat * weights).mean()).backward()
    assert_near(f.grad, io["train_grad_f"], GRADIENT, "train_grad_f")
    names = quantizer_names(quantizer.state_dict(), case.config["share_quant_resi"])
    parameters = {names[name].removeprefix("quantize."): p for name, p in quantizer.named_parameters()}
    for key, expected in io.items():
        if key.startswith("train_grad."):
            assert_near(parameters[key.removeprefix("train_grad.")].grad, expected, GRADIENT, key)
    if "train_grad_embedding" in io:
        assert_near(quantizer.codebook.weight.grad, io["train_grad_embedding"], GRADIENT, "train_grad_embedding")


@tokenizer_cases
@torch.no_grad()
def test_encoder_and_codes_equal_the_reference(case):
    io, tokenizer = case.tensors("io"), tokenizer_of(case)
    images = images_of(case)
    encoded = tokenizer.encoder(images)
    assert_stored(io, "encoder_out", encoded, FEATURES)
    features = tokenizer.pre_conv(encoded)
    assert_stored(io, "f", features, FEATURES)
    assert_codes(tokenizer.quantizer.encode(features), io["idx"], io["idx_margin"])


@tokenizer_cases
@torch.no_grad()
def test_pictures_equal_the_reference(case):
    io, tokenizer = case.tensors("io"), tokenizer_of(case)
    f_hat = tokenizer.quantizer.embed(io["idx"])
    raw = tokenizer.decode_raw(f_hat)
    assert_stored(io, "recon_last", raw.clamp(-1, 1), FEATURES)
    for name, picture in {"decoder_raw": raw, "recon_from_idx": tokenizer.decode(f_hat)}.items():
        if name in io:
            assert_near(picture, io[name], FEATURES, name)


@pytest.mark.parametrize(
    **parametrize([c for c in whole_tokenizers() if any(key.startswith("recon_all") for key in c.tensors("io"))])
)
@torch.no_grad()
def test_the_picture_after_every_scale_equals_the_reference(case):
    io, tokenizer = case.tensors("io"), tokenizer_of(case)
    pictures = [tokenizer.decode(f_hat) for f_hat, _ in tokenizer.quantizer.running_f_hat(io["idx"])]
    assert_stored(io, "recon_all", torch.stack(pictures), LONG_WAY)


@pytest.mark.parametrize(**parametrize([c for c in whole_tokenizers() if "train_vq_loss" in c.tensors("io")]))
def test_training_losses_and_gradients_equal_the_reference(case):
    io = case.tensors("io")
    tokenizer = load_tokenizer(case.weights(), **case.config).train()
    images = images_of(case)
    names = tokenizer_names(tokenizer.state_dict(), tokenizer.config.num_phis)
    parameters = {names[name]: parameter for name, parameter in tokenizer.named_parameters()}
    assert set(parameters) == set(case.config["grad_norm_names"])

    reconstruction, quantizer_loss, _ = tokenizer(images)
    pixel_loss = (reconstruction - images).square().mean()
    torch.testing.assert_close(pixel_loss, io["train_recon_loss"], rtol=LOSS, atol=0)
    torch.testing.assert_close(quantizer_loss, io["train_vq_loss"], rtol=LOSS, atol=0)

    quantizer_loss.backward(retain_graph=True)
    _assert_norms(parameters, case, io["train_vqonly_grad_norms"])
    for parameter in parameters.values():
        parameter.grad = None
    (pixel_loss + quantizer_loss).backward()
    _assert_norms(parameters, case, io["train_grad_norms"])
    for key, expected in io.items():
        if key.startswith("train_grad."):
            assert_near(parameters[key.removeprefix("train_grad.")].grad, expected, GRADIENT, key)


def _assert_norms(parameters: dict[str, torch.nn.Parameter], case: Case, expected: Tensor) -> None:
    noise = case.config.get("grad_norms_rounding_noise", [])
    for name, want in zip(case.config["grad_norm_names"], expected.tolist(), strict=True):
        gradient = parameters[name].grad
        have = 0.0 if gradient is None else gradient.norm().item()
        if name in noise:  # a group norm of one channel a group removes this bias: nothing but rounding is left
            assert have < 1e-4, f"{name}: {have}"
        else:
            assert abs(have - want) <= GRADIENT_NORM * want, f"{name}: {have}, golden {want}"
