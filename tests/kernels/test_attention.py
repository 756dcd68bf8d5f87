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


def test_other_dtypes_and_heads_are_left_to_libraries():
    assert is_served(torch.bfloat16, 64) and is_served(torch.float16, 32)
    assert not is_served(torch.float32, 64) and not any(is_served(torch.bfloat16, width) for width in (24, 96, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, (1, 4, 9), 3, 32),
        (2, (1, 4, 9, 16, 25, 36, 64, 100, 169, 256), 16, 64),
        (1, (1, 4, 9, 16, 36, 81, 169, 324, 576, 1024), 4, 64),
        (1, (7, 300, 1), 2, 16),
    ],
)
def test_a_gpu_computes_what_float64_does(shape, dtype, compiled):
    """Law: as near to float64 as an attention a step by torch's own kernels.

    The gradient to log_scale is a number a head, what is left of a sum that cancels: its distance is a draw, of the same size.
    """
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
    factors = (1.2, 1.2, 1.2, 1.2, 3)
    assert all(mine < factor * theirs + 1e-4 for mine, theirs, factor in zip(ours, torchs, factors)), (ours, torchs)


def test_a_step_sees_the_cache_and_itself_and_leaves_its_keys_and_values_there():
    """Law: step by step over a cache, what is seen is what all steps at once see, and the cache ends as they made it."""
    qkv, q_bias, v_bias, log_scale = (tensor.detach() for tensor in inputs())
    wanted = attend(qkv, q_bias, v_bias, log_scale, CAP, LENGTHS, SCALE)
    _, k, v, *_ = torch.ops.varcli.normalize_qkv(qkv, q_bias, v_bias, log_scale, CAP)
    cache, start = torch.zeros(2, *k.transpose(1, 2).shape, dtype=k.dtype), 0
    for length in LENGTHS:
        end = start + length
        seen = attend_step(qkv[:, start:end], q_bias, v_bias, log_scale, CAP, *cache[:, :, :, :end], SCALE)
        torch.testing.assert_close(seen, wanted[:, start:end])
        start = end
    torch.testing.assert_close(cache.transpose(2, 3), torch.stack((k, v)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1, 3, 0, 64), (3, 25, 16, 30, 64), (2, 256, 30, 424, 64), (1, 100, 2, 155, 32)])
def test_a_gpu_takes_a_step_over_a_cache_as_the_formulas_do(shape):
    """And writes nothing but the step's keys and values."""
    torch.manual_seed(0)
    batch, length, heads, before, width = shape
    qkv = torch.randn(batch, length, 3 * heads * width, dtype=torch.bfloat16)
    biases, log_scale = torch.randn(2, heads * width), torch.linspace(4.7, 1, heads).view(1, heads, 1, 1)
    cache = torch.randn(2, batch, heads, before + length + 9, width)
    cache[0] = F.normalize(cache[0], dim=-1)
    cache = cache.bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        room = cache.to(device, copy=True)
        given = (part.to(device) for part in (qkv, *biases, log_scale))
        seen = attend_step(*given, CAP, *room[:, :, :, : before + length], SCALE)
        found.append((seen.cpu().double(), room.cpu().double()))
    (seen_cpu, room_cpu), (seen_cuda, room_cuda) = found
    assert (seen_cuda - seen_cpu).norm() / seen_cpu.norm() < 2e-2  # queries are up to 100 long
    assert (room_cuda - room_cpu).norm() / room_cpu.norm() < 5e-3
    assert torch.equal(room_cuda[:, :, :, :before], cache.double()[:, :, :, :before])
    assert torch.equal(room_cuda[:, :, :, before + length :], cache.double()[:, :, :, before + length :])
