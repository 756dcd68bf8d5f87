"""Attention: temperatures, cache, and an independent formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from varcli.transformer import TransformerConfig
from varcli.transformer.attention import SelfAttention, attend_by_step, unit_length


def make_attention(**changes) -> SelfAttention:
    torch.manual_seed(0)
    config = TransformerConfig(**{"width": 12, "num_heads": 3, "step_lengths": (1, 4), **changes})
    attention = SelfAttention(config)
    for bias in (attention.q_bias, attention.v_bias):
        torch.nn.init.normal_(bias)
    return attention


def attend(attention: SelfAttention, x: torch.Tensor, step_lengths: tuple[int, ...] | None = None) -> torch.Tensor:
    """Attention of all tokens, those of one step if no lengths are given."""
    q, k, v = attention.project(x)
    return attention.join(attend_by_step(q, k, v, step_lengths or (x.shape[1],), attention.softmax_scale))


def by_hand(attention: SelfAttention, x: torch.Tensor, scales: list[float] | None) -> torch.Tensor:
    """Softmax attention written out head by head."""
    width, heads = x.shape[-1], attention.num_heads
    q, k, v = (x @ attention.qkv.weight.T).split(width, dim=-1)
    q, v = q + attention.q_bias, v + attention.v_bias
    outputs = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        queries, keys = q[..., part], k[..., part]
        if scales is None:
            factor = 0.25 / math.sqrt(width // heads)
        else:
            queries = queries / queries.norm(dim=-1, keepdim=True)
            keys = keys / keys.norm(dim=-1, keepdim=True)
            factor = scales[head]
        weights = (queries @ keys.transpose(-1, -2) * factor).softmax(dim=-1)
        outputs.append(weights @ v[..., part])
    return torch.cat(outputs, dim=-1) @ attention.proj.weight.T + attention.proj.bias


def test_attention_with_unit_vectors_equals_the_formula():
    attention = make_attention()
    with torch.no_grad():
        attention.log_scale.copy_(torch.tensor([0.0, 1.0, 9.0]).view(1, 3, 1, 1))
    x = torch.randn(2, 5, 12)
    expected = by_hand(attention, x, [1.0, math.e, 100.0])  # the last is capped at 100
    torch.testing.assert_close(attend(attention, x), expected, atol=1e-5, rtol=1e-4)


def test_attention_without_unit_vectors_is_four_times_flatter_than_usual():
    attention = make_attention(qk_norm=False)
    assert attention.log_scale is None
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(attend(attention, x), by_hand(attention, x, None), atol=1e-5, rtol=1e-4)


def test_temperatures_start_at_four():
    torch.testing.assert_close(make_attention().log_scale.exp(), torch.full((1, 3, 1, 1), 4.0))


def test_attention_by_step_is_attention_under_a_block_causal_mask_with_the_same_gradients():
    lengths = (1, 4, 2)
    steps = torch.tensor([step for step, length in enumerate(lengths) for _ in range(length)])
    mask = torch.zeros(7, 7).masked_fill(steps.unsqueeze(1) < steps.unsqueeze(0), -math.inf)
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3).transpose(1, 2).flatten(2)
    found = attend_by_step(q, k, v, lengths, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    cotangent = torch.randn_like(expected)
    for have, want in zip(
        torch.autograd.grad(found, (q, k, v), cotangent),
        torch.autograd.grad(expected, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(have, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unit_vectors_have_length_one_and_zero_stays_zero(dtype):
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], dtype=dtype)
    lengths = unit_length(vectors).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 0.0, 1.0]), atol=1e-6, rtol=1e-6)
