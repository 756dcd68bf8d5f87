"""The contract every generation order keeps, and the law that ties sampling to training."""

from __future__ import annotations

import pytest
import torch

from varcli.devices import autocast
from varcli.order import ORDERS
from varcli.transformer import Transformer, TransformerConfig

orders = pytest.mark.parametrize("name", ORDERS)


@pytest.fixture
def codes_BL(tiny_tokenizer):
    return torch.randint(0, 16, (3, 21), generator=torch.Generator().manual_seed(7))


def walk(order, codes_BL):
    """The features of every step, then f_hat, as sampling goes through an order with these codes."""
    state, features = order.start(len(codes_BL), codes_BL.device), []
    for step, codes_Bl in enumerate(codes_BL.split(order.step_lengths, dim=1)):
        state, x_BlZ = order.advance(state, step, order.lookup(codes_Bl))
        features.append(x_BlZ)
    return features, order.finish(state)


@orders
@torch.no_grad()
def test_steps_cover_every_token_once(name, tiny_tokenizer):
    order = ORDERS[name](tiny_tokenizer.quantizer)
    assert sum(order.step_lengths) == order.seq_len == tiny_tokenizer.config.scales.seq_len


@orders
@torch.no_grad()
def test_features_step_by_step_are_the_teacher_forcing_input(name, tiny_tokenizer, codes_BL):
    order = ORDERS[name](tiny_tokenizer.quantizer)
    features, _ = walk(order, codes_BL)
    assert features[-1] is None
    expected = order.teacher_forcing_input(codes_BL)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(torch.cat(features[:-1], dim=1), expected, atol=1e-6, rtol=1e-6)


@orders
@torch.no_grad()
def test_the_finished_state_is_what_the_codes_stand_for(name, tiny_tokenizer, codes_BL):
    order = ORDERS[name](tiny_tokenizer.quantizer)
    _, f_hat = walk(order, codes_BL)
    torch.testing.assert_close(f_hat, tiny_tokenizer.quantizer.embed(codes_BL), atol=1e-6, rtol=1e-6)


@orders
@torch.no_grad()
def test_no_feature_knows_its_own_code_or_a_later_one(name, tiny_tokenizer, codes_BL):
    order = ORDERS[name](tiny_tokenizer.quantizer)
    before = order.teacher_forcing_input(codes_BL)
    start = 0
    for length in order.step_lengths:
        changed = codes_BL.clone()
        changed[:, start:] = (changed[:, start:] + 1) % 16
        known = max(start + length - order.step_lengths[0], 0)  # features of this step and earlier ones
        after = order.teacher_forcing_input(changed)
        torch.testing.assert_close(after[:, :known], before[:, :known])
        start += length


# the largest difference of a logit, as a share of the largest logit. float32: sums in another order; half precision:
# products and the residual stream rounded to 8 or 11 bits at other places, a few units in the last place
LIMITS = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2.5e-3}


@orders
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_cached_logits_equal_teacher_forced_logits(name, precision, qk_norm, device, tiny_tokenizer, codes_BL):
    device, codes_BL = torch.device(device), codes_BL.to(device)
    order = ORDERS[name](tiny_tokenizer.to(device).quantizer)
    torch.manual_seed(1)
    config = TransformerConfig(
        step_lengths=order.step_lengths,
        vocab_size=16,
        code_channels=8,
        num_classes=3,
        depth=3,
        width=64,
        num_heads=2,
        qk_norm=qk_norm,
        init_adaln_gamma=1.0,
        init_head=1.0,
    )
    model = Transformer(config).to(device).eval()
    labels = torch.tensor([0, 1, 3], device=device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with autocast(device, dtype):
        forced = model(labels, order.teacher_forcing_input(codes_BL))
        cache = model.start_cache(labels)
        features, _ = walk(order, codes_BL)
        cached = torch.cat([model.step(x_BlZ, cache) for x_BlZ in [None, *features[:-1]]], dim=1)
    difference = ((cached - forced).abs().max() / forced.abs().max()).item()
    assert difference <= LIMITS[precision]
