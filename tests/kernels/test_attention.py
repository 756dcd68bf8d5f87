"""Fused block-causal attention: its formulas are an attention a step, with gradients back to the product of q, k and v."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from varcli.kernels.attention import attend, attend_step, is_served
from varcli.kernels.qk import normalized_steps, normalized_steps_reference

CAP = math.log(100)
LENGTHS = (1, 3, 5)
SCALE = 0.7


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """qkv, both biases and log_scale of two heads with 4 channels, one of them above the cap."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, sum(LENGTHS), 24, generator=generator).to(dtype)
    biases = torch.randn(2, 8, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    log_scale = torch.tensor([0.5, CAP + 0.1], dtype=biases.dtype).view(1, 2, 1, 1)
    return [tensor.requires_grad_() for tensor in (qkv, *biases, log_scale)]


def attend_by_step(normalize, lengths, *given):
    steps = normalize(*given, CAP, lengths)
    return torch.cat([F.scaled_dot_product_attention(*s, scale=SCALE).transpose(1, 2) for s in steps], dim=1).flatten(2)


def test_what_is_seen_and_its_gradients_equal_the_reference():
    given = inputs()
    expected, actual = attend_by_step(normalized_steps_reference, LENGTHS, *given), attend(*given, CAP, LENGTHS, SCALE)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(actual.shape, dtype=actual.dtype, generator=torch.Generator().manual_seed(1))
    for found, wanted in zip(torch.autograd.grad(actual, given, grad), torch.autograd.grad(expected, given, grad)):
        torch.testing.assert_close(found, wanted)


def test_vectors_of_no_length_have_finite_gradients():
    given = [tensor.detach().zero_().requires_grad_() for tensor in inputs()]
    attend(*given, CAP, LENGTHS, SCALE).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_equal_eager_ones(dtype):
    def run(*given):
        return attend(*given, CAP, LENGTHS, SCALE).float().sin().sum()

    given = inputs(dtype)
    eager = torch.autograd.grad(run(*given), given)
    compiled = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(*given), given)
    for actual, expected in zip(compiled, eager):
        torch.testing.assert_close(actual, expected)


def test_the_operators_keep_torchs_rules():
    qkv, q_bias, v_bias, log_scale = (tensor.detach() for tensor in inputs(torch.float32))
    q, k, v, *inverses = torch.ops.varcli.normalize_qkv(qkv, q_bias, v_bias, log_scale, CAP)
    torch.library.opcheck(torch.ops.varcli.attend, (q, k, v, LENGTHS, SCALE))
    seen = torch.ops.varcli.attend(q, k, v, LENGTHS, SCALE)
    given = (torch.ones_like(q), q, k, v, *seen, *inverses, log_scale, CAP, LENGTHS, SCALE)
    torch.library.opcheck(torch.ops.varcli.attend_backward, given)


def test_tiles_begin_where_long_steps_do_and_hold_all_tokens():
    tiles = pytest.importorskip("varcli.kernels.attention_triton", reason="Triton is not installed").cut_tiles
    assert tiles((1, 4, 9, 16, 25, 36, 64, 100, 169, 256), 128) == (0, 128, 255, 383, 424, 552, 680)
    for lengths in ((1,), (300,), (1, 4, 9), (64, 64), (1, 130, 2, 70)):
        firsts = tiles(lengths, 64)
        assert firsts[0] == 0 and firsts[-1] == sum(lengths)
        assert all(0 < after - before <= 64 for before, after in zip(firsts, firsts[1:]))


def test_what_matrix_units_do_not_take_is_left_to_libraries():
    assert is_served(torch.bfloat16, 64) and is_served(torch.float16, 128)
    assert not is_served(torch.float32, 64) and not is_served(torch.bfloat16, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, (1, 4, 9), 3, 32),
        (2, (1, 4, 9, 16, 25, 36, 64, 100, 169, 256), 16, 64),
        (1, (1, 4, 9, 16, 36, 81, 169, 324, 576, 1024), 4, 64),
        (1, (7, 300, 1), 2, 128),
    ],
)
def test_a_gpu_computes_what_float64_does(shape, dtype, compiled):
    """Law: as near to float64 as an attention a step by torch's own kernels."""
    torch.manual_seed(0)
    batch, lengths, heads, width = shape
    qkv = torch.randn(batch, sum(lengths), 3 * heads * width, device="cuda").to(dtype)
    biases = torch.randn(2, heads * width, device="cuda")
    log_scale = torch.linspace(4.7, 1, heads, device="cuda").view(1, heads, 1, 1)
    given = [tensor.detach().requires_grad_() for tensor in (qkv, *biases, log_scale)]
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = attend_by_step(normalized_steps_reference, lengths, *wide)
    grad = torch.randn_like(expected).to(dtype)
    exact = [expected, *torch.autograd.grad(expected, wide, grad.double())]

    def distances(run) -> list[float]:
        out = run(*given)
        found = [out, *torch.autograd.grad(out, given, grad)]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]

    def fused(*tensors):
        return attend(*tensors, CAP, lengths, SCALE)

    ours = distances(torch.compile(fused, fullgraph=True) if compiled else fused)
    torchs = distances(lambda *tensors: attend_by_step(normalized_steps, lengths, *tensors))
    assert all(mine < 1.2 * theirs + 1e-4 for mine, theirs in zip(ours, torchs)), (ours, torchs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1, 3, 1, 64), (3, 25, 16, 55, 64), (2, 256, 30, 680, 64), (1, 100, 2, 255, 128)])
def test_a_gpu_lets_the_queries_of_a_step_see_what_is_in_the_cache(shape):
    torch.manual_seed(0)
    batch, length, heads, num_keys, width = shape
    q = torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    cache = torch.randn(2, batch, heads, num_keys + 9, width, device="cuda", dtype=torch.bfloat16)
    k, v = cache[:, :, :, :num_keys]
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=SCALE).transpose(1, 2).flatten(2)
    assert (attend_step(q, k, v, SCALE).double() - exact).norm() / exact.norm() < 5e-3
